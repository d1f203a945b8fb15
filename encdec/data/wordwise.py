"""BPE one word at a time: SentencePiece's own ids, several times faster, by remembering words.

SentencePiece merges pieces over a whole text. Where no piece of the vocabulary reaches over a
boundary, though, no merge does, and what stands on either side is encoded as if alone. Such
boundaries are in front of every run of spaces, unless a piece holds a space after another
character; around every character that is in no longer piece: line ends, tabs and, in Llama's and
Mistral's vocabularies, digits; and between punctuation and letters, unless pieces join the two.
Words repeat, so most are looked up.

Only models for which this is exact are taken (``word_encoder``): BPE with byte fallback and without
normalization or user-defined pieces. Unigram models add up scores over the text, and unknown
characters without byte fallback join over boundaries.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

SPACES = " \u2581"
# Longer stretches without a boundary (other scripts, encoded data) seldom come again.
KEPT_CHARACTERS = 64
# Of each of two generations, together about 100 MB a process; words in use pass into the younger.
KEPT_WORDS = 250_000


class WordEncoder(dict):
    """Words to the bytes of their int32 ids, filled as they come; ``encode`` puts texts together.

    ``encode_word`` gives a word's int32 ids, ``words`` finds them, ``prefix`` begins every text.
    """

    def __init__(
        self, encode_word: Callable[[str], np.ndarray], words: re.Pattern[str], prefix: str
    ):
        super().__init__()
        self._encode_word = encode_word
        self._words = words.findall
        self._prefix = prefix
        self._older: dict[str, bytes] = {}

    def __missing__(self, word: str) -> bytes:
        ids = self._older.get(word)
        if ids is None:
            ids = self._encode_word(word).tobytes()
        if len(word) <= KEPT_CHARACTERS:
            if len(self) >= KEPT_WORDS:
                self._older = dict(self)
                self.clear()
            self[word] = ids
        return ids

    def encode(self, text: str, end: bytes = b"") -> np.ndarray:
        """The text's ids, int32 and read-only; ``end`` are bytes of ids to follow them."""
        words = self._words(self._prefix + text) if text else ()
        return np.frombuffer(b"".join((*map(self.__getitem__, words), end)), np.int32)


def word_encoder(model: bytes) -> WordEncoder | None:
    """An encoder for a serialized SentencePiece model, None where word by word is not exact."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except (ImportError, TypeError):
        # No protobuf, or another package has registered its own copy of the model's format.
        return None
    import sentencepiece

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    if not _is_exact(proto):
        return None
    prefix = " " if proto.normalizer_spec.add_dummy_prefix else ""
    proto.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return WordEncoder(
        lambda word: processor.encode(word, return_type="numpy"),
        _words_of(piece.piece for piece in proto.pieces if piece.type == _NORMAL),
        prefix,
    )


# Of SentencePiece's ModelProto: the type of ordinary pieces, and those that stand for no text.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_BPE = 2


def _is_exact(proto: Any) -> bool:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return (
        trainer.model_type == _BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
        and all(piece.type in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE) for piece in proto.pieces)
        and not any("\u2581" in piece.piece.lstrip("\u2581") for piece in proto.pieces)
    )


def _words_of(pieces: Iterable[str]) -> re.Pattern[str]:
    """A pattern whose matches, one after another, are the words of a text.

    A word is a run of spaces and then either punctuation or anything else, as far as no piece
    joins the two; or a single character that is in no longer piece.
    """
    longer = [piece for piece in pieces if len(piece) > 1]
    joined = set().union(*longer)
    alone = {c for c in map(chr, range(128)) if c not in joined and c not in SPACES}
    # All that pieces join to punctuation, directly or by others; letters end that.
    marks = set(string.punctuation) & joined
    while marks:
        touching = filter(re.compile(f"[{re.escape(''.join(marks))}]").search, longer)
        more = set().union(*touching) - set(SPACES) - marks
        if not more:
            break
        marks |= more
    if any(character.isalpha() for character in marks):
        marks = set()
    spaces, alone_, marks_ = (
        re.escape("".join(sorted(characters))) for characters in (SPACES, alone, marks)
    )
    kinds = [f"[{spaces}]*[^{spaces}{alone_}{marks_}]+"]
    kinds += [f"[{spaces}]*[{marks_}]+"] if marks else []
    kinds += [f"[{alone_}]"] if alone else []
    return re.compile("|".join([*kinds, f"[{spaces}]+"]))
