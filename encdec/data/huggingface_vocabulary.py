"""Vocabularies from Hugging Face's ``tokenizer.json``, with the optional ``tokenizers`` package."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from encdec.data.vocabulary_base import Vocabulary, VocabularySpec
from encdec.errors import ConfigError, DataError

# How published tokenizers name the token that ends a text, where nothing says it.
EOS_TOKENS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>")
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_of_letter() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for (GPT-2's table): printable
    characters of Latin-1 for themselves, the other bytes in order from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


BYTE_OF_LETTER = _byte_of_letter()


def _each_replaced(letter: str) -> str:
    """U+FFFD for a byte that is not part of a character (an escaped surrogate)."""
    return "\ufffd" if "\udc80" <= letter <= "\udcff" else letter


class HuggingFaceVocabulary(Vocabulary):
    """A ``tokenizer.json`` (Llama, Phi-3, Mistral, GPT-2, ...), without its template of BOS.

    Text never encodes to special tokens, whatever it spells. ``size`` counts every id up to the
    last one in use, then the extra ids; ``pad_id`` is 0 as everywhere here.
    """

    kind = "huggingface"
    file = "tokenizer.json"

    def __init__(
        self,
        model: bytes,
        extra_ids: int = 0,
        *,
        eos_id: int | None = None,
        eos_token: str | None = None,
        name: str = "the tokenizer.json",
    ):
        super().__init__(extra_ids)
        # Batches are encoded by several processes already.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            import tokenizers
        except ImportError as error:
            raise ConfigError(
                f"{name} needs the tokenizers package: pip install 'tokenizers>=0.21,<1'; or give "
                "a SentencePiece .model"
            ) from error
        self._model = model
        try:
            self._content = json.loads(model)
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        except Exception as error:
            raise DataError(f"{name} is not a valid tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if not self._ids:
            raise DataError(f"{name} has no tokens")
        self._eos_id = self._find_eos(name, eos_token) if eos_id is None else eos_id

    @classmethod
    def restore(cls, model: bytes, spec: VocabularySpec, name: str) -> Self:
        return cls(model, spec.extra_ids, eos_id=spec.eos_id, name=name)

    def _find_eos(self, name: str, eos_token: str | None) -> int:
        tokens = (eos_token,) if eos_token else EOS_TOKENS
        for token in tokens:
            if token in self._ids:
                return self._ids[token]
        raise DataError(
            f"{name} has none of the EOS tokens {', '.join(tokens)}; put the tokenizer_config.json "
            "with its eos_token next to it"
        )

    @property
    def base_size(self) -> int:
        return max(self._ids.values()) + 1

    @property
    def eos_id(self) -> int:
        return self._eos_id

    @property
    def unk_id(self) -> int | None:
        model = self._content.get("model", {})
        # Unigram models name it by its number, all others by its text.
        return model.get("unk_id", self._ids.get(model.get("unk_token")))

    @property
    def fingerprint(self) -> str:
        """sha256 over the kind, extra ids, EOS and the file's bytes."""
        digest = hashlib.sha256(f"{self.kind}\n{self.extra_ids}\n{self.eos_id}\n".encode())
        digest.update(self._model)
        return digest.hexdigest()

    def encode_batch(self, texts: Sequence[str], add_eos: bool = False) -> list[np.ndarray]:
        batch = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        end = [self.eos_id] * add_eos
        return [np.array(encoded.ids + end, np.int32) for encoded in batch]

    def piece(self, token: int) -> str:
        shown = self._tokenizer.id_to_token(token) if token < self.base_size else None
        return super().piece(token) if shown is None else shown

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        names = {token: name for name, token in self._ids.items()}
        added = self._content.get("added_tokens", ())
        special = {token["content"]: token["id"] for token in added if token.get("special")}
        return {names[self.eos_id]: self.eos_id} | special

    def token_bytes(self, token: int) -> bytes | None:
        piece = self._tokenizer.id_to_token(token) if token < self.base_size else None
        if piece is None or piece in self.special_tokens:
            return None
        if BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        if self._byte_level and all(letter in BYTE_OF_LETTER for letter in piece):
            return bytes(BYTE_OF_LETTER[letter] for letter in piece)
        return None

    def _decode_plain(self, ids: list[int]) -> str:
        """The library's text, except that bytes which are not a character do not take with them the
        characters before them, as in SentencePiece: what a text begins with stays as it grows."""
        if not self._has_byte_pieces or self._tokenizer.decoder is None:
            return self._tokenizer.decode(ids, skip_special_tokens=False)
        pieces: list[str] = []
        for is_bytes, run in itertools.groupby(
            filter(None, map(self._tokenizer.id_to_token, ids)),
            lambda piece: BYTE_PIECE.fullmatch(piece) is not None,
        ):
            if is_bytes:
                data = bytes(int(piece[3:5], 16) for piece in run)
                pieces.append("".join(map(_each_replaced, data.decode("utf-8", "surrogateescape"))))
            else:
                pieces += run
        return self._tokenizer.decoder.decode(pieces)

    @functools.cached_property
    def _has_byte_pieces(self) -> bool:
        return any(map(BYTE_PIECE.fullmatch, self._ids))

    @functools.cached_property
    def _byte_level(self) -> bool:
        """Whether it is byte-level BPE, which writes every byte as one character."""
        parts = [self._content.get("decoder"), self._content.get("pre_tokenizer")]
        return '"ByteLevel"' in json.dumps(parts)

    def decode_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
        ids = [part.tolist() for part in batch]
        return self._tokenizer.decode_batch(ids, skip_special_tokens=False)

    def _model_bytes(self) -> bytes:
        return self._model

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        added = {token["content"]: token for token in self._content.get("added_tokens", ())}
        lengths = np.zeros(self.size, np.int32)
        for piece, token in self._ids.items():
            if piece in added:
                special = added[piece].get("special", False)
                lengths[token] = 0 if special else len(piece.encode("utf-8"))
            elif BYTE_PIECE.fullmatch(piece):
                lengths[token] = 1
            elif self._byte_level:
                lengths[token] = len(piece)
            else:
                lengths[token] = len(piece.replace("\u2581", " ").encode("utf-8"))
        return lengths


def configured_eos(path: pathlib.Path) -> str | None:
    """The eos_token of the tokenizer_config.json next to a ``tokenizer.json``, if any."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    try:
        token: Any = json.loads(config.read_text(encoding="utf-8-sig")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{config} is not readable JSON: {error}") from error
    return token.get("content") if isinstance(token, dict) else token
