"""What a vocabulary loses from the prepared text, counted over all of it.

Three measures, the first two over all of it: unknown ids among the tokens; characters that do not
come back from between two letters (case folding, normalization, alphabets without byte fallback);
and whole texts encoded and decoded, which finds what no character shows alone (white space that is
joined or stripped). Decoding costs as much as encoding, so of large blocks an even sample of
pieces is decoded.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from encdec.data.vocabulary import ByteVocabulary, Vocabulary

# Of each block (some 4 MB of text) so many characters are decoded again, in pieces of this length.
DECODED_CHARACTERS = 1 << 16
PIECE_CHARACTERS = 1 << 12
# Characters or ids that are looked at together.
PART = 1 << 16
EXAMPLES = 3
SHOWN_BEFORE, SHOWN_AFTER = 24, 48
SHOWN_CHARACTERS = 20
CARD_CHARACTERS = 1000
OTHERS = "others"
ASCII = bytes(range(128))


@dataclasses.dataclass(frozen=True)
class Losses:
    """Sums over texts; ``+`` adds those of different texts.

    Attributes:
        unknown_ids: tokens that stand for text the vocabulary cannot write.
        characters: occurrences of every character that does not come back.
        texts, decoded, changed: texts (or pieces of long ones), those that were encoded and
            decoded again, and those of them that came back as something else.
        examples: (before, after) from the first texts that were changed.
    """

    unknown_ids: int = 0
    characters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    texts: int = 0
    decoded: int = 0
    changed: int = 0
    examples: Sequence[Sequence[str]] = ()

    def __add__(self, other: Losses) -> Losses:
        return Losses(
            self.unknown_ids + other.unknown_ids,
            dict(collections.Counter(self.characters) + collections.Counter(other.characters)),
            self.texts + other.texts,
            self.decoded + other.decoded,
            self.changed + other.changed,
            [*self.examples, *other.examples][:EXAMPLES],
        )

    def __bool__(self) -> bool:
        """Whether anything is lost."""
        return bool(self.unknown_ids or self.characters or self.changed)

    def to_card(self) -> dict[str, Any]:
        """As the card states it: the commonest characters first, rare ones summed as "others"."""
        characters = dict(self._ordered()[:CARD_CHARACTERS])
        if rest := sum(count for _, count in self._ordered()[CARD_CHARACTERS:]):
            characters[OTHERS] = rest
        return dataclasses.asdict(self) | {"characters": characters}

    def _ordered(self) -> list[tuple[str, int]]:
        return sorted(self.characters.items(), key=lambda item: (-item[1], item[0]))

    def describe(self) -> str:
        """One line for people: how much, which characters, one example."""
        if not self:
            if not self.texts:
                return "not counted"
            return f"nothing ({self.decoded:,} of {self.texts:,} texts decoded and compared)"
        parts = []
        if self.unknown_ids:
            parts.append(f"{self.unknown_ids:,} unknown ids")
        if self.characters:
            common = [c for c, _ in self._ordered() if c != OTHERS][:SHOWN_CHARACTERS]
            shown = " ".join(repr(character)[1:-1] for character in common)
            more = " ..." if len(self.characters) > SHOWN_CHARACTERS else ""
            total = sum(self.characters.values())
            parts.append(f"{total:,} characters are not restored ({shown}{more})")
        if self.changed:
            parts.append(f"{self.changed:,} of {self.decoded:,} decoded texts are changed")
        line = ", ".join(parts)
        if self.examples:
            before, after = self.examples[0]
            line += f"; {before!r} becomes {after!r}"
        return line


def count_losses(
    vocabulary: Vocabulary, texts: Sequence[str], tokens: Sequence[np.ndarray]
) -> Losses:
    """The losses of ``texts``, whose examples have the ids ``tokens``."""
    if isinstance(vocabulary, ByteVocabulary):
        # UTF-8 and back, by construction.
        return Losses(texts=len(texts), decoded=len(texts))
    unknown = count_unknown(vocabulary, tokens)
    lost = _lost_characters(vocabulary, texts)
    pieces = list(_pieces(texts))
    stride = sum(map(len, pieces)) // DECODED_CHARACTERS + 1
    sample = pieces[::stride]
    changed = [(text, back) for text, back in _there_and_back(vocabulary, sample) if text != back]
    shown = changed
    if not changed and (unknown or lost):
        # All pieces are looked through for the one that shows it: rare, and of lossy ones only.
        found = (pair for pair in _there_and_back(vocabulary, pieces) if pair[0] != pair[1])
        shown = list(itertools.islice(found, EXAMPLES))
    examples = [_around_difference(*pair) for pair in shown[:EXAMPLES]]
    return Losses(unknown, lost, len(pieces), len(sample), len(changed), examples)


def count_unknown(vocabulary: Vocabulary, tokens: Sequence[np.ndarray]) -> int:
    """Unknown ids among arrays of ids."""
    if vocabulary.unk_id is None:
        return 0
    return sum(
        int(np.count_nonzero(np.concatenate(part) == vocabulary.unk_id)) for part in _parts(tokens)
    )


def _parts(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Runs of texts or arrays, short enough that what is computed of them stays in the cache."""
    start = size = 0
    for end, value in enumerate(values, 1):
        size += len(value)
        if size >= PART:
            yield values[start:end]
            start, size = end, 0
    if start < len(values):
        yield values[start:]


def _lost_characters(vocabulary: Vocabulary, texts: Sequence[str]) -> dict[str, int]:
    kept = _kept_characters(vocabulary)
    lost_ascii = [c for c in map(chr, ASCII) if not kept[c]]
    found: collections.Counter[str] = collections.Counter()
    for part in _parts(texts):
        data = "".join(part).encode("utf-8")
        # What remains without ASCII is UTF-8 still, and mostly short.
        others = data.translate(None, ASCII).decode("utf-8")
        seen = set(others)
        new = [character for character in seen if character not in kept]
        kept.update(zip(new, comes_back(vocabulary, new)))
        if lost := {c for c in seen if not kept[c]}:
            found.update(c for c in others if c in lost)
        if lost_ascii:
            counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
            found.update({c: int(counts[ord(c)]) for c in lost_ascii})
    return dict(+found)


# Weakly held: a vocabulary remembers words, some 100 MB of them.
_KEPT: weakref.WeakKeyDictionary[Vocabulary, dict[str, bool]] = weakref.WeakKeyDictionary()


def _kept_characters(vocabulary: Vocabulary) -> dict[str, bool]:
    """Whether each character seen so far comes back; of ASCII all."""
    if vocabulary not in _KEPT:
        characters = list(map(chr, ASCII))
        _KEPT[vocabulary] = dict(zip(characters, comes_back(vocabulary, characters)))
    return _KEPT[vocabulary]


def comes_back(vocabulary: Vocabulary, characters: Sequence[str]) -> list[bool]:
    """Whether each character is in the text that comes back for it between two letters."""
    pairs = _there_and_back(vocabulary, [f"a{character}b" for character in characters])
    return [character in back for character, (_, back) in zip(characters, pairs)]


def _there_and_back(vocabulary: Vocabulary, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    # Few at a time, so that a search may stop early.
    for start in range(0, len(texts), 256):
        part = texts[start : start + 256]
        yield from zip(part, vocabulary.decode_batch(vocabulary.encode_batch(part)))


def _pieces(texts: Sequence[str]) -> Iterator[str]:
    """Texts, long ones in pieces; cut between letters or digits: no new white space at an edge."""
    for text in texts:
        start = 0
        while len(text) - start > PIECE_CHARACTERS:
            end = start + PIECE_CHARACTERS
            while end > start + 1 and not (text[end - 1].isalnum() and text[end].isalnum()):
                end -= 1
            yield text[start:end]
            start = end
        if text:
            yield text[start:] if start else text


def _around_difference(before: str, after: str) -> tuple[str, str]:
    """Where two texts begin to differ, with some text around it."""
    place = next((i for i, (x, y) in enumerate(zip(before, after)) if x != y), len(after))
    cut = slice(max(0, place - SHOWN_BEFORE), place + SHOWN_AFTER)
    return before[cut], after[cut]
