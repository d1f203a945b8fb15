"""Writes vocabularies as files that transformers' AutoTokenizer reads, with the framing of prompts.

``tokenizer(text)`` gives the ids that ``encdec generate`` feeds: with the start token of a
decoder-only model, the prefix, and the EOS that ends inputs where the model was trained so.
``tokenizer(source, target)`` of a decoder-only model is a whole training text. What differs
between inputs and labels (``text_target``) needs the tokenizer class that is shipped along, which
transformers takes with ``trust_remote_code=True`` alone.
"""

from __future__ import annotations

import base64
import json
import pathlib
import shutil
from typing import Any

from encdec.data.huggingface_vocabulary import BYTE_OF_LETTER
from encdec.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from encdec.errors import ConfigError
from encdec.export.special_ids import PADDING_TOKEN
from encdec.files import write_json
from encdec.inference.text_io import INCOMPLETE, PromptFormat
from encdec.model.model_config import Architecture

SHIPPED = pathlib.Path(__file__).parent / "shipped"
SPACE = "\u2581"
LABELS_CLASS = "tokenization_encdec.EncdecTokenizer"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType


def write(
    out: pathlib.Path,
    prompts: PromptFormat,
    architecture: Architecture,
    pad_id: int,
    *,
    chat: bool = False,
) -> None:
    """Writes tokenizer files that give the ids of our prompts and labels, padded with ``pad_id``,
    which may be the id that comes after the vocabulary's last. ``chat``: whether the model has a
    chat template.

    Raises:
        ConfigError: a SentencePiece model that is neither a unigram nor a BPE model.
    """
    vocabulary, start_id = prompts.vocabulary, prompts.decoder_start_id
    content = tokenizer_content(vocabulary)
    if pad_id == vocabulary.size:
        content.setdefault("added_tokens", []).append(_added(pad_id, PADDING_TOKEN))
    names = {
        "eos_token": _piece(content, vocabulary.eos_id),
        "pad_token": _piece(content, pad_id),
        "bos_token": _piece(content, start_id),
    }
    if vocabulary.unk_id is not None:
        names["unk_token"] = _piece(content, vocabulary.unk_id)
    decoder_only = architecture == "decoder_only"
    before = [start_id] * decoder_only + list(prompts.inputs_prefix)
    after = [vocabulary.eos_id] * prompts.inputs_eos
    # A pair is what a decoder-only model is trained on: source, then target, then EOS.
    pair_end = [vocabulary.eos_id] if decoder_only else after
    pieces = {token: _piece(content, token) for token in {*before, *after, *pair_end}}
    content["post_processor"] = _template(
        [pieces[i] for i in before],
        [pieces[i] for i in after],
        [pieces[i] for i in pair_end],
        {piece: token for token, piece in pieces.items()},
        middle=decoder_only,
    )
    write_json(out / "tokenizer.json", content)
    settings: dict[str, Any] = names | {
        # The start token comes in front of what max_input_tokens counts.
        "model_max_length": prompts.max_input_tokens + decoder_only,
        "clean_up_tokenization_spaces": False,
        # No token types: transformers 4 hands them to models that take none.
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left" if decoder_only else "right",
        # Text never becomes a special token, whatever it spells; but transformers reads what a
        # chat template gives as text, too.
        "split_special_tokens": not chat,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if before or not after:  # labels are ids and EOS
        shutil.copyfile(SHIPPED / "tokenization_encdec.py", out / "tokenization_encdec.py")
        settings["auto_map"] = {"AutoTokenizer": [None, LABELS_CLASS]}
    write_json(out / "tokenizer_config.json", settings)


def tokenizer_content(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of a tokenizer.json, without a template of special tokens.

    Raises:
        ConfigError: a SentencePiece model that is neither a unigram nor a BPE model.
    """
    if isinstance(vocabulary, ByteVocabulary):
        return _bytes_content(vocabulary)
    if isinstance(vocabulary, SentencePieceVocabulary):
        return sentencepiece_content(vocabulary)
    content = json.loads(vocabulary._model_bytes())
    for token in range(vocabulary.base_size, vocabulary.size):
        content.setdefault("added_tokens", []).append(_added(token, _extra(vocabulary, token)))
    return content | {"truncation": None, "padding": None}


def _piece(content: dict[str, Any], token: int) -> str:
    for added in content.get("added_tokens", ()):
        if added["id"] == token:
            return added["content"]
    pieces = content["model"]["vocab"]
    if isinstance(pieces, dict):
        return next(piece for piece, number in pieces.items() if number == token)
    return pieces[token][0]


def _template(
    before: list[str], after: list[str], pair_end: list[str], ids: dict[str, int], *, middle: bool
) -> dict[str, Any]:
    """A text between special tokens, and two texts: with ``after`` between them too."""
    special = lambda names: [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    text = lambda name: [{"Sequence": {"id": name, "type_id": 0}}]
    between = special(after) if middle else []
    return {
        "type": "TemplateProcessing",
        "single": special(before) + text("A") + special(after),
        "pair": special(before) + text("A") + between + text("B") + special(pair_end),
        "special_tokens": {
            name: {"id": name, "ids": [token], "tokens": [name]} for name, token in ids.items()
        },
    }


def _extra(vocabulary: Vocabulary, token: int) -> str:
    return f"<extra_id_{vocabulary.size - 1 - token}>"


def _added(token: int, name: str, special: bool = True) -> dict[str, Any]:
    return {
        "id": token,
        "content": name,
        "special": special,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }


def _bytes_content(vocabulary: ByteVocabulary) -> dict[str, Any]:
    """Plain bytes as byte-level BPE without merges; incomplete characters decode to nothing."""
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    letters = sorted(BYTE_OF_LETTER, key=BYTE_OF_LETTER.__getitem__)
    vocab |= {letter: vocabulary.offset + byte for byte, letter in enumerate(letters)}
    added = [_added(token, name) for name, token in list(vocab.items())[: vocabulary.offset]]
    for token in range(vocabulary.base_size, vocabulary.size):
        vocab[_extra(vocabulary, token)] = token
        added.append(_added(token, _extra(vocabulary, token)))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    nothing = {"type": "Replace", "pattern": {"String": INCOMPLETE}, "content": ""}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level | {"trim_offsets": False},
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [byte_level | {"trim_offsets": False}, nothing],
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def sentencepiece_content(vocabulary: SentencePieceVocabulary) -> dict[str, Any]:
    """A SentencePiece model, with our extra ids, as the content of a tokenizer.json."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # made at import, so that no type says its content
    model = messages.ModelProto.FromString(vocabulary._model_bytes())
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
        name = _extra(vocabulary, token)
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
    # Not Metaspace: it omits the leading space if the text already starts with one.
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
        "added_tokens": [_added(*one) for one in added],
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
        # Text that spells a control or byte piece is encoded as plain characters.
        text = {
            piece.piece
            for piece in model.pieces
            if piece.type in (kinds.NORMAL, kinds.USER_DEFINED)
        }
        least = min(score for _, score in vocab) - 1.0
        never = least * (1 + max(len(piece) for piece, _ in vocab if piece not in text))
        return {
            "type": "Unigram",
            "unk_id": model.trainer_spec.unk_id,
            "vocab": [[piece, score if piece in text else never] for piece, score in vocab],
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
