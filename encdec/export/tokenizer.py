"""Vocabularies as the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import base64
import json
import pathlib
from typing import Any

from encdec.data.records import write_json
from encdec.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from encdec.errors import ConfigError

SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType


def write(
    out: pathlib.Path,
    vocabulary: Vocabulary,
    *,
    inputs_eos: bool,
    start_id: int,
    architecture: str,
    max_length: int,
) -> None:
    """Writes tokenizer files that give the ids of our prompts.

    Raises:
        ConfigError: a SentencePiece model that is neither a unigram nor a BPE model.
    """
    common: dict[str, Any] = {
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right" if architecture == "encoder_decoder" else "left",
    }
    if isinstance(vocabulary, ByteVocabulary):
        write_json(
            out / "tokenizer_config.json",
            common | {"tokenizer_class": "ByT5Tokenizer", "extra_ids": vocabulary.extra_ids},
        )
        return
    if isinstance(vocabulary, SentencePieceVocabulary):
        content = sentencepiece_content(vocabulary)
    else:
        content = json.loads(vocabulary._model_bytes())
    pieces = {
        name: ids
        for name, ids in (
            ("eos_token", vocabulary.eos_id),
            ("pad_token", vocabulary.pad_id),
            ("bos_token", start_id),
        )
    }
    names = {name: _piece(content, token) for name, token in pieces.items()}
    around = (
        ("", names["eos_token"] if inputs_eos else "")
        if architecture == "encoder_decoder"
        else (names["bos_token"], "")
    )
    ids = {names["eos_token"]: vocabulary.eos_id, names["bos_token"]: start_id}
    content["post_processor"] = _template(*around, ids)
    write_json(out / "tokenizer.json", content)
    write_json(
        out / "tokenizer_config.json",
        common | names | {"tokenizer_class": "PreTrainedTokenizerFast"},
    )


def _piece(content: dict[str, Any], token: int) -> str:
    for added in content.get("added_tokens", ()):
        if added["id"] == token:
            return added["content"]
    pieces = content["model"]["vocab"]
    if isinstance(pieces, dict):
        return next(piece for piece, number in pieces.items() if number == token)
    return pieces[token][0]


def _template(before: str, after: str, ids: dict[str, int]) -> dict[str, Any]:
    special = lambda name: [{"SpecialToken": {"id": name, "type_id": 0}}] if name else []
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": special(before) + text + special(after),
        "pair": special(before) + text + [{"Sequence": {"id": "B", "type_id": 0}}] + special(after),
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]}
            for name in {before, after} - {""}
        },
    }


def sentencepiece_content(vocabulary: SentencePieceVocabulary) -> dict[str, Any]:
    """A SentencePiece model, with our extra ids, as the content of a tokenizer.json."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(vocabulary._model_bytes())
    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise ConfigError(
            "the vocabulary is a SentencePiece model of words or characters, and "
            "only unigram and BPE models can be written as tokenizer.json"
        )
    kinds = type(model.pieces[0])
    special = (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
    added = [
        (i, piece.piece, piece.type != kinds.USER_DEFINED)
        for i, piece in enumerate(model.pieces)
        if piece.type in special
    ]
    vocab = [[piece.piece, piece.score] for piece in model.pieces]
    for token in range(vocabulary.base_size, vocabulary.size):
        name = f"<extra_id_{vocabulary.size - 1 - token}>"
        vocab.append([name, 0.0])
        added.append((token, name, True))
    spec = model.normalizer_spec
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    # No Metaspace: it leaves out the space in front where the text has one already.
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spec.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": name,
                "special": is_special,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, name, is_special in added
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(model, vocab),
    }


def _model(model: Any, vocab: list[list[Any]]) -> dict[str, Any]:
    """The tokenizer.json's model. BPE's merges are all pairs that make a piece, best pieces first:
    SentencePiece merges whatever neighbours make the piece of the highest score."""
    kinds = type(model.pieces[0])
    fallback = any(piece.type == kinds.BYTE for piece in model.pieces)
    if model.trainer_spec.model_type == _UNIGRAM:
        return {
            "type": "Unigram",
            "unk_id": model.trainer_spec.unk_id,
            "vocab": vocab,
            "byte_fallback": fallback,
        }
    ids = {piece: number for number, (piece, _) in enumerate(vocab)}
    normal = [piece for piece in model.pieces if piece.type == kinds.NORMAL]
    mergeable = {piece.piece for piece in normal}
    merges = []
    for piece in sorted(normal, key=lambda piece: -piece.score):
        text = piece.piece
        pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
        pairs = [pair for pair in pairs if mergeable.issuperset(pair)]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    return {
        "type": "BPE",
        "vocab": ids,
        "merges": merges,
        "unk_token": unknown,
        "byte_fallback": fallback,
        "fuse_unk": True,
    }
