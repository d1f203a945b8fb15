"""Vocabularies: SentencePiece models and plain bytes, without TensorFlow.

Ids agree with seqio's ``SentencePieceVocabulary`` and ``ByteVocabulary``; extra ids (sentinels,
modes) are at the vocabulary's end, counted from the last id down as in T5, so that a model sized
for the vocabulary needs no remapping when an objective asks for them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from encdec.data.huggingface_vocabulary import HuggingFaceVocabulary, configured_eos
from encdec.data.vocabulary_base import SPEC_FILE, Vocabulary, VocabularySpec
from encdec.data.wordwise import WordEncoder, word_encoder
from encdec.errors import DataError
from encdec.files import write_bytes, write_json
from encdec.storage import as_path, make_directory, user_place

MODEL_FILE = "vocabulary.model"
CARD_FILE = "dataset.json"
# Where our exports for Hugging Face keep the vocabulary as it was, extra ids included.
VOCABULARY_FOLDER = "vocabulary"
# A word encoder takes a tenth of a second to make; prompts do without.
WORDWISE_CHARACTERS = 1 << 16


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes offset by 3: pad 0, EOS 1, unk 2, as ``seqio.ByteVocabulary``."""

    kind = "bytes"
    offset = 3
    eos_id = 1
    base_size = offset + 256

    @classmethod
    def restore(cls, model: bytes, spec: VocabularySpec, name: str) -> Self:
        return cls(spec.extra_ids)

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
            raise DataError(f"{name} is not a SentencePiece model: {error}") from error
        if not model or pieces == 0:
            raise DataError(f"{name} is empty; give a trained .model file (encdec vocab makes one)")
        if self._processor.eos_id() < 0:
            raise DataError(f"{name} defines no EOS piece; train it with an eos_id >= 0")

    @classmethod
    def restore(cls, model: bytes, spec: VocabularySpec, name: str) -> Self:
        return cls(model, spec.extra_ids, name=name)

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


KINDS: dict[str, type[Vocabulary]] = {
    kind.kind: kind for kind in (ByteVocabulary, SentencePieceVocabulary, HuggingFaceVocabulary)
}


def load_vocabulary(
    source: VocabularySpec | dict[str, Any] | str | os.PathLike[str] | Vocabulary,
    *,
    extra_ids: int | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Vocabulary:
    """Load a vocabulary from "bytes", a ``.model`` or ``tokenizer.json`` file, a directory
    holding one, or a spec.

    ``directory`` is where a spec's file is. ``extra_ids`` is for "bytes", files (default 0, or
    'PATH+100' in the string) and directories, to whose own it may add; specs carry their own.

    Raises DataError where the file is missing or is not what the spec's fingerprint says.
    """
    if isinstance(source, dict):
        source = _spec_from_dict(source, "the vocabulary's spec")
    if isinstance(source, Vocabulary | VocabularySpec):
        if extra_ids not in (None, source.extra_ids):
            raise DataError(
                f"extra_ids is {extra_ids}, but the given vocabulary has {source.extra_ids}; load "
                "it with the same number"
            )
        if isinstance(source, Vocabulary):
            return source
        return _from_spec(source, as_path(directory or "."))
    text, stated = _place_and_extra_ids(source)
    path = as_path(text)
    if stated is not None:
        if extra_ids not in (None, stated):
            raise DataError(
                f"{source} states {stated} extra ids and --extra_ids is {extra_ids}; give only one "
                "of them"
            )
        extra_ids = stated
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
        return HuggingFaceVocabulary(
            path.read_bytes(), extra_ids or 0, eos_token=configured_eos(path), name=str(path)
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


def _place_and_extra_ids(source: str | os.PathLike[str]) -> tuple[str, int | None]:
    """A path, or "bytes", without the number of 'PATH+100'; the number, None without."""
    text = user_place("the vocabulary", str(source))
    match = re.fullmatch(r"(.+)\+(\d{1,18})", text)
    if match is None or as_path(text).exists():
        return text, None
    return match[1], int(match[2])


def recorded_framing(
    source: Any, extra_ids: int | None = None
) -> tuple[int | None, tuple[int, ...]]:
    """What frames texts in the work or records directory that ``load_vocabulary`` reads.

    Where more extra ids are asked for than it has, those that it has come after the new ones:
    sentinels among the tokens returned have their new ids.

    Returns:
        The decoder's first input, and the ids in front of every source; None and nothing for all
        else that it takes: "bytes", files, specs and vocabularies.
    """
    nothing: tuple[None, tuple[int, ...]] = (None, ())
    if not isinstance(source, str | os.PathLike):
        return nothing
    text, stated = _place_and_extra_ids(source)
    if text == "bytes":
        return nothing
    path = as_path(text)
    wanted = extra_ids if stated is None else stated
    for name, group in (("config.json", "data"), (CARD_FILE, None)):
        if not (path / name).is_file():
            continue
        try:
            content = json.loads((path / name).read_text())
            framing = content[group] if group else content
            start_id, prefix = framing["decoder_start_id"], framing.get("inputs_prefix", ())
            if isinstance(start_id, int):
                start_id, *prefix = _moved((start_id, *map(int, prefix)), path, wanted)
                return start_id, tuple(prefix)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return nothing


def _moved(tokens: Sequence[int], directory: pathlib.Path, extra_ids: int | None) -> list[int]:
    """Tokens of a directory's vocabulary as they are with so many extra ids; None: with its own."""
    if extra_ids is None:
        return list(tokens)
    spec = _spec_in_directory(directory)
    first, added = spec.size - spec.extra_ids, max(extra_ids - spec.extra_ids, 0)
    return [token + added * (token >= first) for token in tokens]


def vocabulary_file(directory: pathlib.Path) -> pathlib.Path | None:
    """What ``load_vocabulary`` reads of a Hugging Face model's directory, if there is anything.

    The tokenizer.json of our exports is the same vocabulary under another fingerprint.
    """
    if (directory / VOCABULARY_FOLDER / SPEC_FILE).is_file():
        return directory / VOCABULARY_FOLDER
    for name in ("tokenizer.model", "tokenizer.json"):
        if (directory / name).is_file():
            return directory / name
    return None


def copy_vocabulary(
    source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> VocabularySpec:
    """Copy the vocabulary of one records or work directory into another."""
    source, target = as_path(source), as_path(target)
    spec = _spec_in_directory(source)
    make_directory(target)
    if spec.file:
        write_bytes(target / spec.file, (source / spec.file).read_bytes())
    write_json(target / SPEC_FILE, spec.to_dict())
    return spec


def _from_spec(spec: VocabularySpec, directory: pathlib.Path) -> Vocabulary:
    kind = KINDS.get(spec.kind)
    if kind is None:
        *others, last = map(repr, KINDS)
        raise DataError(
            f"vocabulary kind {spec.kind!r} is not known; expected {', '.join(others)} or {last}"
        )
    file = spec.file or kind.file
    if file is None:
        vocabulary = kind.restore(b"", spec, spec.kind)
    else:
        path = directory / file
        if not path.is_file():
            raise DataError(
                f"vocabulary file {path} is missing; copy it back from where {directory} came from"
            )
        vocabulary = kind.restore(path.read_bytes(), spec, str(path))
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
        f"no vocabulary in {directory}: neither {SPEC_FILE} nor {CARD_FILE} is there; give a "
        "records directory, a work directory or a .model file"
    )


def _spec_from_dict(content: Any, where: str) -> VocabularySpec:
    fields = {field.name for field in dataclasses.fields(VocabularySpec)}
    wanted = fields - {"file"}
    if not isinstance(content, dict) or not wanted <= set(content):
        seen = sorted(content) if isinstance(content, dict) else content
        raise DataError(
            f"{where} does not describe a vocabulary: expected {sorted(wanted)}, got {seen}"
        )
    return VocabularySpec(**{name: content[name] for name in fields if name in content})
