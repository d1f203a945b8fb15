"""What every vocabulary is: text to ids and back, extra ids at its end, a spec that names it."""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

from encdec.errors import ConfigError, DataError
from encdec.files import write_bytes, write_json
from encdec.storage import as_path, make_directory

SPEC_FILE = "vocabulary.json"
# One for each span: enough for a text of 1.3 million tokens with 15 % in spans of three. At width
# 1,024, in float32 with Adam's moments, a table of so many rows takes 0.8 GB.
MOST_EXTRA_IDS = 1 << 16
EOS_NAME = "</s>"  # where a vocabulary has no name of its own for it


@dataclasses.dataclass(frozen=True)
class VocabularySpec:
    """What a card or work directory says of its vocabulary; ``file`` is relative to it."""

    kind: str
    size: int
    eos_id: int
    pad_id: int
    extra_ids: int
    fingerprint: str
    file: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Vocabulary(abc.ABC):
    """Text to ids and back. ``size`` counts the extra ids; ``pad_id`` is 0 as in seqio."""

    kind: str
    # Under which name a copy of the model is stored with records and checkpoints.
    file: str | None = None
    pad_id = 0

    def __init__(self, extra_ids: int = 0):
        if not isinstance(extra_ids, int) or not 0 <= extra_ids <= MOST_EXTRA_IDS:
            raise ConfigError(
                f"extra_ids is {extra_ids!r}; expected 0 to {MOST_EXTRA_IDS:,}: each is a row of "
                "the model's table, and objectives use one for each span of a text"
            )
        self.extra_ids = extra_ids

    @classmethod
    @abc.abstractmethod
    def restore(cls, model: bytes, spec: VocabularySpec, name: str) -> Self:
        """The vocabulary that a spec describes; ``model`` is its file, ``name`` its place."""

    @property
    @abc.abstractmethod
    def base_size(self) -> int:
        """Ids without the extra ids."""

    @property
    @abc.abstractmethod
    def eos_id(self) -> int:
        """Id that ends a text."""

    @property
    def unk_id(self) -> int | None:
        """Id of text that the vocabulary cannot write; None where it writes every text."""
        return None

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], add_eos: bool = False) -> list[np.ndarray]:
        """One int32 array of ids a text; on the calling thread only, read-only arrays."""

    def encode_by_library(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same by the library's own batch call alone, which benchmarks compare with."""
        return self.encode_batch(texts)

    @abc.abstractmethod
    def _decode_plain(self, ids: list[int]) -> str:
        """Text of ids below ``base_size``."""

    @abc.abstractmethod
    def _model_bytes(self) -> bytes:
        """What, in addition to the kind and the extra ids, makes two vocabularies the same."""

    @functools.cached_property
    @abc.abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of text each id stands for, int32 [size]; 0 for control and extra ids."""

    @property
    def size(self) -> int:
        return self.base_size + self.extra_ids

    @property
    def fingerprint(self) -> str:
        """sha256 over the kind, the model's bytes and the number of extra ids."""
        digest = hashlib.sha256()
        digest.update(f"{self.kind}\n{self.extra_ids}\n".encode())
        digest.update(self._model_bytes())
        return digest.hexdigest()

    def with_extra_ids(self, extra_ids: int) -> Vocabulary:
        """The same vocabulary with another number of extra ids."""
        other = copy.copy(self)
        Vocabulary.__init__(other, extra_ids)
        other.__dict__.pop("byte_lengths", None)  # cached, one number an id
        return other

    def extra_id(self, number: int) -> int:
        """Id of extra id ``number``; number 0 is the vocabulary's last id, as in T5."""
        if not 0 <= number < self.extra_ids:
            raise DataError(
                f"extra id {number} is needed, but the vocabulary has {self.extra_ids} extra ids; "
                f"load it with --extra_ids={number + 1} or more"
            )
        return self.size - 1 - number

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids up to the first EOS; extra ids show as ``<extra_id_0>``, ..."""
        parts: list[str] = []
        plain: list[int] = []
        for token in map(int, ids):
            if token == self.eos_id:
                break
            if not 0 <= token < self.size:
                raise DataError(f"id {token} is outside the vocabulary of {self.size} ids")
            if token < self.base_size:
                plain.append(token)
                continue
            if plain:
                parts.append(self._decode_plain(plain))
                plain = []
            parts.append(f"<extra_id_{self.size - 1 - token}>")
        if plain:
            parts.append(self._decode_plain(plain))
        return "".join(parts)

    def decode_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
        """Texts of ids as ``encode_batch`` gives them: no EOS, no extra ids."""
        return [self._decode_plain(ids.tolist()) for ids in batch]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Names of control tokens that text never encodes to, EOS first, and their ids."""
        return {EOS_NAME: self.eos_id}

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens stand for these tokens."""
        names = self.special_tokens
        pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        parts = re.split(f"({pattern})", text)
        ids: list[int] = []
        for place, part in enumerate(parts):
            if place % 2:
                ids.append(names[part])
            elif part:
                ids += self.encode(part)
        return ids

    def decode_marked(self, ids: Iterable[int]) -> str:
        """Text of all ids, with EOS by its name; ``encode_marked`` reads it."""
        name = next(iter(self.special_tokens))
        parts: list[list[int]] = [[]]
        for token in ids:
            if token == self.eos_id:
                parts.append([])
            else:
                parts[-1].append(token)
        return name.join(map(self.decode, parts))

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that an id stands for where it may be a part of a character; None elsewhere."""
        return None

    def piece(self, token: int) -> str:
        """How one id is shown to people."""
        return repr(self.decode([token]))[1:-1] if token != self.eos_id else EOS_NAME

    def spec(self) -> VocabularySpec:
        return VocabularySpec(
            kind=self.kind,
            size=self.size,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            extra_ids=self.extra_ids,
            fingerprint=self.fingerprint,
            file=self.file,
        )

    def save(self, directory: str | pathlib.Path) -> VocabularySpec:
        """Write the model's copy and ``vocabulary.json`` into ``directory``; return the spec."""
        directory = as_path(directory)
        make_directory(directory)
        spec = self.spec()
        if spec.file:
            write_bytes(directory / spec.file, self._model_bytes())
        write_json(directory / SPEC_FILE, spec.to_dict())
        return spec
