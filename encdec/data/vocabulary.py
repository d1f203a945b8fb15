"""Vocabularies: SentencePiece models and plain bytes, without TensorFlow.

Ids agree with seqio's ``SentencePieceVocabulary`` and ``ByteVocabulary``; extra ids (sentinels,
modes) lie at the vocabulary's end, counted from the last id down as in T5, so that a model sized
for the vocabulary needs no remapping when an objective asks for them.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from encdec.data.wordwise import WordEncoder, word_encoder
from encdec.errors import DataError
from encdec.storage import user_path

SPEC_FILE = "vocabulary.json"
MODEL_FILE = "vocabulary.model"
CARD_FILE = "dataset.json"
EOS_NAME = "</s>"  # where a vocabulary has no name of its own for it
# A word encoder takes a tenth of a second to make; prompts do without.
WORDWISE_CHARACTERS = 1 << 16


@dataclasses.dataclass(frozen=True)
class VocabularySpec:
    """What a card or work directory says of its vocabulary; `file` is relative to it."""

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
    """Text to ids and back. `size` counts the extra ids; `pad_id` is 0 as in seqio."""

    kind: str
    # Under which name a copy of the model lies beside records and checkpoints.
    file: str | None = None
    pad_id = 0

    def __init__(self, extra_ids: int = 0):
        if not isinstance(extra_ids, int) or extra_ids < 0:
            raise DataError(f"extra_ids must be an integer >= 0, got {extra_ids!r}")
        self.extra_ids = extra_ids

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
        """Text of ids below `base_size`."""

    @abc.abstractmethod
    def _model_bytes(self) -> bytes:
        """What, beside the kind and the extra ids, makes two vocabularies the same."""

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
        for name in ("byte_lengths",):  # cached, one number an id
            other.__dict__.pop(name, None)
        return other

    def extra_id(self, number: int) -> int:
        """Id of extra id `number`; number 0 is the vocabulary's last id, as in T5."""
        if not 0 <= number < self.extra_ids:
            raise DataError(
                f"extra id {number} asked for, but the vocabulary has {self.extra_ids} extra ids; "
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
                raise DataError(f"id {token} lies outside the vocabulary of {self.size} ids")
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
        """Texts of ids as `encode_batch` gives them: no EOS, no extra ids."""
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
        return repr(self.decode([token]))[1:-1] if token != self.eos_id else "</s>"

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
        """Write the model's copy and ``vocabulary.json`` into `directory`; return the spec."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        spec = self.spec()
        if spec.file:
            (directory / spec.file).write_bytes(self._model_bytes())
        (directory / SPEC_FILE).write_text(json.dumps(spec.to_dict(), indent=2) + "\n")
        return spec


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes offset by 3: pad 0, EOS 1, unk 2, as ``seqio.ByteVocabulary``."""

    kind = "bytes"
    offset = 3
    eos_id = 1
    base_size = offset + 256

    def encode_batch(self, texts: Sequence[str], add_eos: bool = False) -> list[np.ndarray]:
        batch = []
        for text in texts:
            data = np.frombuffer(text.encode("utf-8"), np.uint8)
            ids = np.empty(len(data) + add_eos, np.int32)
            np.add(data, self.offset, out=ids[: len(data)], dtype=np.int32)
            ids[len(data) :] = self.eos_id
            batch.append(ids)
        return batch

    def _decode_plain(self, ids: list[int]) -> str:
        data = bytes(token - self.offset for token in ids if token >= self.offset)
        return data.decode("utf-8", errors="ignore")

    def token_bytes(self, token: int) -> bytes | None:
        known = self.offset <= token < self.base_size
        return bytes([token - self.offset]) if known else None

    def _model_bytes(self) -> bytes:
        return b""

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.size, np.int32)
        lengths[self.offset : self.base_size] = 1
        return lengths


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece ``.model``; text never encodes to extra ids, whatever it spells."""

    kind = "sentencepiece"
    file = MODEL_FILE

    def __init__(self, model: bytes, extra_ids: int = 0, name: str = "the SentencePiece model"):
        super().__init__(extra_ids)
        import sentencepiece

        self._model = model
        self._wordwise = False
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            pieces = self._processor.GetPieceSize()
        except Exception as error:
            raise DataError(f"{name} is no SentencePiece model: {error}") from error
        if not model or pieces == 0:
            raise DataError(f"{name} is empty; give a trained .model file (encdec vocab makes one)")
        if self._processor.eos_id() < 0:
            raise DataError(f"{name} defines no EOS piece; train it with an eos_id >= 0")

    @property
    def base_size(self) -> int:
        return self._processor.GetPieceSize()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def unk_id(self) -> int | None:
        token = self._processor.unk_id()
        return None if token < 0 else token

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        ids = [self.eos_id, *filter(self._processor.is_control, range(self.base_size))]
        return {self._processor.id_to_piece(token): token for token in ids}

    def token_bytes(self, token: int) -> bytes | None:
        if token >= self.base_size or not self._processor.is_byte(token):
            return None
        return bytes([int(self._processor.id_to_piece(token)[3:5], 16)])

    @property
    def bos_id(self) -> int | None:
        """The model's BOS id, or None where it has none."""
        token = self._processor.bos_id()
        return None if token < 0 else token

    @property
    def adds_dummy_prefix(self) -> bool:
        """Whether encoding puts a space in front of every text (Llama's and T5's models do)."""
        first = self._processor.encode("a")[0]
        return self._processor.id_to_piece(first).startswith("\u2581")

    def encode_batch(self, texts: Sequence[str], add_eos: bool = False) -> list[np.ndarray]:
        self._wordwise = self._wordwise or sum(map(len, texts)) >= WORDWISE_CHARACTERS
        if self._wordwise and self._words is not None:
            encode, end = self._words.encode, np.int32(self.eos_id).tobytes() * add_eos
            return [encode(text, end) for text in texts]
        return self._encode_plainly(texts, add_eos)

    def encode_by_library(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._encode_plainly(texts, add_eos=False)

    def _encode_plainly(self, texts: Sequence[str], add_eos: bool) -> list[np.ndarray]:
        return self._processor.encode(
            list(texts), num_threads=1, add_eos=add_eos, return_type="numpy"
        )

    @functools.cached_property
    def _words(self) -> WordEncoder | None:
        return word_encoder(self._model)

    def piece(self, token: int) -> str:
        if token >= self.base_size:
            return super().piece(token)
        return self._processor.id_to_piece(token)

    def _decode_plain(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def decode_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
        return self._processor.decode([ids.tolist() for ids in batch], num_threads=1)

    def _model_bytes(self) -> bytes:
        return self._model

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        processor = self._processor
        lengths = np.zeros(self.size, np.int32)
        for token in range(self.base_size):
            if processor.is_byte(token) or processor.is_unknown(token):
                lengths[token] = 1
            elif not (processor.is_control(token) or processor.is_unused(token)):
                piece = processor.id_to_piece(token).replace("\u2581", " ")
                lengths[token] = len(piece.encode("utf-8"))
        return lengths


def load_vocabulary(
    source: VocabularySpec | dict[str, Any] | str | pathlib.Path | Vocabulary,
    *,
    extra_ids: int | None = None,
    directory: str | pathlib.Path | None = None,
) -> Vocabulary:
    """Load a vocabulary from "bytes", a ``.model`` or ``tokenizer.json`` file, a directory
    holding one, or a spec.

    `directory` is where a spec's file lies. `extra_ids` is for "bytes", files (default 0, or
    'PATH+100' in the string) and directories, to whose own it may add; specs carry their own.

    Raises DataError where the file is missing or is not what the spec's fingerprint says.
    """
    if isinstance(source, dict):
        source = _spec_from_dict(source, "the vocabulary's spec")
    if isinstance(source, Vocabulary | VocabularySpec):
        if extra_ids not in (None, source.extra_ids):
            raise DataError(
                f"extra_ids is {extra_ids}, but the vocabulary at hand has {source.extra_ids}; "
                "load it with as many as are wanted"
            )
        if isinstance(source, Vocabulary):
            return source
        return _from_spec(source, pathlib.Path(directory or "."))
    text = user_path("the vocabulary", str(source))
    path = pathlib.Path(text)
    if not path.exists() and (match := re.fullmatch(r"(.+)\+(\d+)", text)):
        if extra_ids not in (None, int(match[2])):
            raise DataError(
                f"{text} has {match[2]} extra ids and --extra_ids={extra_ids}; give one"
            )
        text, path, extra_ids = match[1], pathlib.Path(match[1]), int(match[2])
    if text == "bytes":
        return ByteVocabulary(extra_ids or 0)
    if path.is_dir():
        vocabulary = _from_spec(_spec_in_directory(path), path)
        if extra_ids is None or extra_ids == vocabulary.extra_ids:
            return vocabulary
        if extra_ids < vocabulary.extra_ids:
            raise DataError(
                f"--extra_ids={extra_ids}, but {path} has {vocabulary.extra_ids} already; give "
                "that number or more, or leave it out"
            )
        return vocabulary.with_extra_ids(extra_ids)
    if not path.is_file():
        raise DataError(
            f"vocabulary {text} not found; give the path of a .model or tokenizer.json, 'bytes', "
            f"or train one: encdec vocab --task=stdlib_text --size=8192 --out={text}"
        )
    if path.suffix == ".json":
        # Only where asked for: it needs a package that nothing else here does.
        from encdec.data import huggingface_vocabulary as huggingface

        return huggingface.HuggingFaceVocabulary(
            path.read_bytes(),
            extra_ids or 0,
            eos_token=huggingface.configured_eos(path),
            name=str(path),
        )
    return SentencePieceVocabulary(path.read_bytes(), extra_ids or 0, name=str(path))


def recorded_vocabulary(content: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, Any]:
    """The vocabulary's spec in a work directory's ``config.json``, where a text is needed.

    Raises:
        DataError: the model was imported without one.
    """
    spec = content["data"]["vocabulary"]
    if spec is None:
        raise DataError(
            f"the model in {workdir} was imported without its vocabulary, so it reads and writes "
            f"no text; import it again with --vocabulary=FILE --overwrite --out={workdir}"
        )
    return spec


def vocabulary_file(directory: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer.model or tokenizer.json of a Hugging Face model's directory, if any."""
    for name in ("tokenizer.model", "tokenizer.json"):
        if (directory / name).is_file():
            return directory / name
    return None


def copy_vocabulary(source: str | pathlib.Path, target: str | pathlib.Path) -> VocabularySpec:
    """Copy the vocabulary of one records or work directory into another."""
    source, target = pathlib.Path(source), pathlib.Path(target)
    spec = _spec_in_directory(source)
    target.mkdir(parents=True, exist_ok=True)
    if spec.file:
        shutil.copyfile(source / spec.file, target / spec.file)
    (target / SPEC_FILE).write_text(json.dumps(spec.to_dict(), indent=2) + "\n")
    return spec


def _from_spec(spec: VocabularySpec, directory: pathlib.Path) -> Vocabulary:
    if spec.kind == ByteVocabulary.kind:
        vocabulary: Vocabulary = ByteVocabulary(spec.extra_ids)
    elif spec.kind in ("sentencepiece", "huggingface"):
        path = directory / (spec.file or MODEL_FILE)
        if not path.is_file():
            raise DataError(
                f"vocabulary file {path} is missing; copy it back from where {directory} came from"
            )
        content, name = path.read_bytes(), str(path)
        if spec.kind == "sentencepiece":
            vocabulary = SentencePieceVocabulary(content, spec.extra_ids, name=name)
        else:
            from encdec.data.huggingface_vocabulary import HuggingFaceVocabulary

            vocabulary = HuggingFaceVocabulary(
                content, spec.extra_ids, eos_id=spec.eos_id, name=name
            )
    else:
        raise DataError(
            f"vocabulary kind {spec.kind!r} is not known; wanted 'sentencepiece', 'huggingface' "
            "or 'bytes'"
        )
    if vocabulary.fingerprint != spec.fingerprint:
        raise DataError(
            f"the vocabulary in {directory} has fingerprint {vocabulary.fingerprint[:16]}, but "
            f"{spec.fingerprint[:16]} was recorded with the data; put the original file back"
        )
    return vocabulary


def _spec_in_directory(directory: pathlib.Path) -> VocabularySpec:
    for name in (SPEC_FILE, CARD_FILE):
        path = directory / name
        if path.is_file():
            try:
                content = json.loads(path.read_text())
            except ValueError as error:
                raise DataError(f"{path} is not readable JSON: {error}") from error
            if name == CARD_FILE:
                content = content.get("vocabulary") if isinstance(content, dict) else None
            return _spec_from_dict(content, str(path))
    raise DataError(
        f"no vocabulary in {directory}: neither {SPEC_FILE} nor {CARD_FILE} lies there; give a "
        "records directory, a work directory or a .model file"
    )


def _spec_from_dict(content: Any, where: str) -> VocabularySpec:
    fields = {field.name for field in dataclasses.fields(VocabularySpec)}
    wanted = fields - {"file"}
    if not isinstance(content, dict) or not wanted <= set(content):
        seen = sorted(content) if isinstance(content, dict) else content
        raise DataError(f"{where} describes no vocabulary: wanted {sorted(wanted)}, got {seen}")
    return VocabularySpec(**{name: content[name] for name in fields if name in content})
