"""Texts as a model's inputs, and its tokens as text: prompts, stop strings, streams."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

from encdec.data.vocabulary import Vocabulary
from encdec.errors import ConfigError, DataError

SOURCE = "{source}"  # where a template has the text itself

# What SentencePiece shows for the bytes of a character that is not complete yet.
INCOMPLETE = "\ufffd"


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How inputs reach the model: as in the records that it was trained on.

    Attributes:
        vocabulary: of the model.
        decoder_start_id: the decoder's first input.
        inputs_eos: whether inputs end with EOS.
        inputs_prefix: ids in front of every input's tokens, as imported models may want them.
        template: text around every input's own, which ``{source}`` marks; a text that has this
            form already stays as it is, so that a task's examples are not framed twice.
        max_input_tokens: longest input allowed, prefix and EOS included.
        keep_unknown: read what the vocabulary cannot write as its unknown token, instead of
            refusing the text.
    """

    vocabulary: Vocabulary
    decoder_start_id: int = 0
    inputs_eos: bool = True
    max_input_tokens: int = 512
    keep_unknown: bool = True
    inputs_prefix: tuple[int, ...] = ()
    template: str = SOURCE

    @property
    def added(self) -> int:
        """How many tokens an input has in addition to its text."""
        return len(self.inputs_prefix) + self.inputs_eos

    @property
    def capacity(self) -> int:
        """How many tokens of text an input has at most."""
        return max(self.max_input_tokens - self.added, 0)

    def framed(self, text: str) -> str:
        """The text in the template."""
        before, _, after = self.template.partition(SOURCE)
        has_form = text.startswith(before) and text.endswith(after)
        if has_form and len(text) >= len(before) + len(after):
            return text
        return before + text + after

    def encode(
        self, text: str, *, truncate: bool = False, name: str = "the input"
    ) -> tuple[list[int], bool]:
        """The input's tokens, and whether it was cut: its end, never its EOS or the template's.

        Raises:
            DataError: the text is empty, no valid text, too long, or the vocabulary cannot write
                it all and ``keep_unknown`` is off.
        """
        check_text(text, name)
        text = self.framed(text)
        ids = self.vocabulary.encode(text)
        self.check_known(ids, text, name)
        if truncate and len(ids) > self.capacity and (cut := self._cut(text)):
            return self.fit(cut, name=name)[0], True
        return self.fit(ids, truncate=truncate, name=name)

    def _cut(self, framed: str) -> list[int]:
        """The tokens of the longest beginning of a text that fits together with what the template
        has around it; none where that leaves nothing, or there is nothing behind the text."""
        before, _, after = self.template.partition(SOURCE)
        tokens = lambda end: self.vocabulary.encode(framed[:end] + after)
        ends = range(len(before) + 1, (len(framed) - len(after)) * bool(after) + 1)
        place = bisect.bisect_left(ends, True, key=lambda end: len(tokens(end)) > self.capacity)
        return tokens(ends[place - 1]) if place else []

    def fit(
        self, ids: Sequence[int], *, truncate: bool = False, name: str = "the input"
    ) -> tuple[list[int], bool]:
        """The input of a text whose tokens are ``ids``, and whether it was cut.

        Raises:
            DataError: no tokens, one outside the vocabulary, or too many.
        """
        self.check_tokens(ids, name)
        cut = len(ids) > self.capacity
        if cut and not truncate:
            raise DataError(
                f"{name} has {len(ids) + self.added:,} tokens, but the model accepts "
                f"{self.max_input_tokens:,}; shorten it, cut its end with --too_long=cut, or allow "
                "more than in training with --max_input_tokens"
            )
        end = [self.vocabulary.eos_id] * self.inputs_eos
        return [*self.inputs_prefix, *ids[: self.capacity], *end], cut

    def check_known(
        self, ids: list[int], text: str, name: str = "the input", *, marked: bool = False
    ) -> None:
        """Raises DataError for a text whose tokens are ``ids``, some of them unknown, unless
        ``keep_unknown``. ``marked``: names of special tokens in it stand for these, of which the
        unknown one may be one."""
        unknown, special = self.vocabulary.unk_id, self.vocabulary.special_tokens if marked else {}
        named = [one for one, token in special.items() if token == unknown]
        if self.keep_unknown or unknown is None:
            return
        if ids.count(unknown) > sum(map(text.count, named)):
            raise DataError(
                f"{name} has {self._unknown_part(text)}, which the vocabulary cannot represent; "
                "leave it out, or use --keep_unknown to read it as the unknown token"
            )

    def check_tokens(self, ids: Sequence[int], name: str = "the input") -> None:
        """Raises DataError for no tokens, or one outside the vocabulary."""
        if not ids:
            raise DataError(f"{name} has no tokens; give at least one")
        size = self.vocabulary.size
        wrong = next((i for i in ids if not 0 <= i < size), None)
        if wrong is not None:
            raise DataError(
                f"{name} has the token {wrong}, but the vocabulary has ids from 0 to {size - 1}"
            )

    def _unknown_part(self, text: str) -> str:
        """The first character that the vocabulary cannot write, and its place."""
        unknown = self.vocabulary.unk_id
        for place, character in enumerate(text):
            if unknown in self.vocabulary.encode(character):
                return f"{character!r} at place {place}"
        return "something"


def check_text(text: str, name: str) -> None:
    """Raises DataError for a text that is empty, or no valid text."""
    if not text.strip():
        raise DataError(f"{name} is empty; give a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} has half a character (a lone surrogate) at position {error.start}; save "
            "it as UTF-8"
        ) from None


def check_template(template: str) -> None:
    """ConfigError unless it marks the place of the text once."""
    if template.count(SOURCE) != 1:
        raise ConfigError(
            f"the template {template!r} has {SOURCE} {template.count(SOURCE)} times; expected it "
            "once, in place of an input's text"
        )


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string in ``text`` begins; None where there is none."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return min(places) if places else None


def after_eos(ids: list[int], eos_id: int) -> list[int]:
    """The tokens behind the last EOS, with which another text begins; all where there is none."""
    return ids[len(ids) - ids[::-1].index(eos_id) :] if eos_id in ids else ids


def text_after(vocabulary: Vocabulary, context: Sequence[int], ids: Sequence[int]) -> str:
    """What ``ids`` add to the text of the tokens before them."""
    if not len(context):
        return vocabulary.decode(ids)
    before = vocabulary.decode(context).rstrip(INCOMPLETE)
    return vocabulary.decode([*context, *ids])[len(before) :]


def tokens_to_stop(
    vocabulary: Vocabulary, ids: Sequence[int], stop: Sequence[str], context: Sequence[int] = ()
) -> int | None:
    """How many tokens it takes until the text holds a stop string; None where it never does."""
    holds = lambda n: find_stop(text_after(vocabulary, context, ids[:n]), stop) is not None
    if not stop or not holds(len(ids)):
        return None
    return next(n for n in range(1, len(ids) + 1) if holds(n))


# Tokens before a token on which the text that it adds may depend: a character has 4 bytes at
# most, and decoders treat the beginning of a text alone differently.
WINDOW = 16


class PieceTexts:
    """The text that each token adds behind those before it.

    A token that completes a character adds all of it, and those that began it add nothing.
    Text that another token may still change (bytes of an incomplete character) is not counted.

    Args:
        vocabulary: of the tokens.
        before: tokens of the same text before the first.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] = ()):
        self._vocabulary, self._tokens = vocabulary, list(before)
        self._settled = ""  # text of the window
        self._move()

    def of(self, token: int) -> str:
        """What ``token`` would add here."""
        return self._text([*self._window, token])[len(self._settled) :]

    def add(self, token: int) -> str:
        """What ``token`` adds; it is before the next ones."""
        text = self._text([*self._window, token])
        piece, self._settled = text[len(self._settled) :], text
        self._tokens.append(token)
        self._window.append(token)
        if len(self._window) > self._longest:
            self._move()
        return piece

    def _move(self) -> None:
        """Lets go of tokens that no longer matter, so that each one costs the same."""
        before, begin = self._tokens, max(0, len(self._tokens) - WINDOW)
        while begin and not self._vocabulary.decode(before[begin:]).strip():
            begin = max(0, begin - WINDOW)
        self._window = before[begin:]
        self._longest = len(self._window) + 2 * WINDOW
        self._settled = self._text(self._window)

    def _text(self, tokens: Sequence[int]) -> str:
        return self._vocabulary.decode(tokens).rstrip(INCOMPLETE)


class TextStream:
    """Tokens to text piece by piece: what it gave out is never taken back.

    Text that may still change (the bytes of an incomplete character) or turn out to be a stop
    string is held back until it is settled. ``context`` are tokens of the same text before them.
    """

    def __init__(
        self, vocabulary: Vocabulary, stop: Sequence[str] = (), context: Sequence[int] = ()
    ):
        self._vocabulary, self._context = vocabulary, list(context)
        self._stop = tuple(stop)
        self._given = 0
        self.stopped = False

    def push(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The new settled text, given all tokens so far; with ``last``, all that is left."""
        if self.stopped:
            return ""
        text = text_after(self._vocabulary, self._context, ids)
        count = tokens_to_stop(self._vocabulary, ids, self._stop, self._context)
        if count is not None:
            # Of several, the one that is complete first, however the tokens come.
            text = text_after(self._vocabulary, self._context, ids[:count])
            text, self.stopped = text[: find_stop(text, self._stop)], True
        elif not last:
            text = text.rstrip(INCOMPLETE)
            text = text[: len(text) - self._possible_stop(text)]
        new, self._given = text[self._given :], max(self._given, len(text))
        return new

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
