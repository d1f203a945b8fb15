"""Models of llama2.c (its legacy float32 export) as our decoder-only model, and its tokenizers.

Seven int32 (dim, hidden, layers, heads, kv heads, vocabulary, longest sequence; a negative
vocabulary stands for an untied head), then float32 tensors kind by kind, all layers of a kind
together. Rotation pairs neighbours there and halves of a head here.
"""

from __future__ import annotations

import pathlib
import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from encdec.data.vocabulary import SentencePieceVocabulary
from encdec.errors import ConfigError, DataError
from encdec.model import ExecutionConfig, ModelConfig
from encdec.storage import on_this_machine

if TYPE_CHECKING:
    from etils import epath

# BOS of its tokenizers. It comes between texts, and run.c stops there: it is EOS, too.
START_ID = 1
_BYTE = re.compile(rb"<0x[0-9A-F]{2}>")


def read_model(path: pathlib.Path) -> tuple[ModelConfig, dict[str, Any], int]:
    """Configuration, unrolled parameters, and the longest sequence.

    Raises:
        DataError: no file there, or its size does not fit its header.
    """
    if not path.is_file() or not path.stat().st_size:
        raise DataError(f"{path} is empty, or not a file; give a model's .bin file")
    data = np.memmap(path, np.uint8, mode="r")
    header = data[:28].view("<i4").tolist() if len(data) >= 28 else [0] * 7
    M, F, layers, H, K, V, longest = header
    tied, V = V > 0, abs(V)
    if min(M, F, layers, H, K, V, longest) < 1 or M % H or H % K:
        raise DataError(
            f"{path} does not start with a llama2.c header (it starts with {header}); expected a "
            "legacy (version 0) float32 export"
        )
    D = M // H
    shapes = [
        ("embedding", (V, M)),
        ("attention_norm", (layers, M)),
        ("q", (layers, H * D, M)),
        ("k", (layers, K * D, M)),
        ("v", (layers, K * D, M)),
        ("o", (layers, M, H * D)),
        ("mlp_norm", (layers, M)),
        ("gate", (layers, F, M)),
        ("down", (layers, M, F)),
        ("up", (layers, F, M)),
        ("final_norm", (M,)),
        ("cosines", (longest, D // 2)),
        ("sines", (longest, D // 2)),
    ] + ([] if tied else [("head", (V, M))])
    wanted = 28 + 4 * sum(int(np.prod(shape)) for _, shape in shapes)
    if len(data) != wanted:
        raise DataError(
            f"{path} has {len(data):,} bytes, but its header {header} implies {wanted:,}"
        )
    tensors, start = {}, 28
    for name, shape in shapes:
        stop = start + 4 * int(np.prod(shape))
        tensors[name] = data[start:stop].view("<f4").reshape(shape)
        start = stop
    config = ModelConfig(
        architecture="decoder_only",
        vocab_size=V,
        encoder_layers=0,
        decoder_layers=layers,
        d_model=M,
        num_heads=H,
        num_kv_heads=K,
        head_dim=D,
        mlp_dim=F,
        mlp_gated=True,
        mlp_activation="silu",
        norm_eps=1e-5,
        norm_cast="before_scale",
        tie_embeddings=tied,
        execution=ExecutionConfig(scan_layers=False),
        dtype="float32",
    )
    return config, _params(config, tensors), longest


def _params(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our unrolled parameters."""
    M, D, H, K = config.d_model, config.head_dim, config.num_heads, config.num_kv_heads
    embedder = {"embedding": tensors["embedding"]}
    if not config.tie_embeddings:
        embedder["head"] = tensors["head"].T
    decoder: dict[str, Any] = {"final_norm": {"scale": tensors["final_norm"]}}
    for layer in range(config.decoder_layers):
        kernel = lambda name, layer=layer: tensors[name][layer]
        halves = lambda name, heads, kernel=kernel: (
            kernel(name)
            .reshape(heads, D // 2, 2, M)
            .swapaxes(1, 2)
            .reshape(heads, D, M)
            .transpose(2, 0, 1)
        )
        decoder[f"layers_{layer}"] = {
            "self_attention_norm": {"scale": kernel("attention_norm")},
            "self_attention": {
                "q": {"kernel": halves("q", H)},
                "k": {"kernel": halves("k", K)},
                "v": {"kernel": kernel("v").reshape(K, D, M).transpose(2, 0, 1)},
                "o": {"kernel": kernel("o").reshape(M, H, D).transpose(1, 2, 0)},
            },
            "mlp_norm": {"scale": kernel("mlp_norm")},
            "mlp": {name: {"kernel": kernel(name).T} for name in ("gate", "up", "down")},
        }
    return {"embedder": embedder, "decoder": decoder}


def find_tokenizers(model: pathlib.Path | epath.Path, vocab_size: int) -> list[pathlib.Path]:
    """The tokenizers next to a model: files ``tok*.bin`` with as many pieces, of each content one.

    Those next to an address in a bucket are copied to this machine.
    """
    fitting: dict[bytes, pathlib.Path] = {}
    for found in sorted(model.parent.glob("tok*.bin")):
        if found == model:
            continue
        path = on_this_machine(found)
        try:
            pieces = _pieces(path)
        except DataError:
            continue
        if len(pieces) == vocab_size:
            fitting.setdefault(path.read_bytes(), path)
    return list(fitting.values())


def read_tokenizer(path: pathlib.Path) -> SentencePieceVocabulary:
    """A tokenizer (``tokenizer.bin``) as the SentencePiece model from which it was exported.

    BPE by the pieces' scores, with bytes for what no piece writes. Text is not normalized, as in
    run.c.

    Raises:
        ConfigError: the package protobuf is missing.
        DataError: the file is not such a tokenizer.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:
        raise ConfigError(
            f"{path} needs protobuf to be read ({error}); install it with: pip install protobuf"
        ) from None
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    kinds = model.SentencePiece
    pieces = _pieces(path)
    for token, (score, text) in enumerate(pieces):
        kind = kinds.NORMAL
        if token < 3:
            kind = kinds.CONTROL if token else kinds.UNKNOWN
        elif _BYTE.fullmatch(text):
            kind = kinds.BYTE
        name = ("<unk>", "<s>", "</s>")[token] if token < 3 else text.decode().replace(" ", "▁")
        model.pieces.add(piece=name, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size = spec.BPE, len(pieces)
    spec.byte_fallback = sum(piece.type == kinds.BYTE for piece in model.pieces) == 256
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, START_ID, START_ID, -1
    spec.eos_piece = "<s>"
    normal = model.normalizer_spec
    normal.name, normal.add_dummy_prefix = "identity", True
    normal.remove_extra_whitespaces, normal.escape_whitespaces = False, True
    return SentencePieceVocabulary(model.SerializeToString(deterministic=True), name=str(path))


def _pieces(path: pathlib.Path) -> list[tuple[float, bytes]]:
    """Score and text of every piece: int32 (longest piece), then float32, int32 (bytes), bytes."""
    data = path.read_bytes()
    refusal = DataError(f"{path} is not a tokenizer of llama2.c (tokenizer.bin)")
    pieces, at = [], 4
    while at < len(data):
        if at + 8 > len(data):
            raise refusal
        score, length = struct.unpack_from("<fi", data, at)
        at += 8 + length
        if not 0 < length <= 4_096 or at > len(data):
            raise refusal
        pieces.append((score, data[at - length : at]))
    # SentencePiece's own names are written with newlines around them.
    names = [text.strip() for _, text in pieces[:3]]
    try:
        "".join(text.decode() for _, text in pieces)
    except UnicodeDecodeError:
        raise refusal from None
    if names != [b"<unk>", b"<s>", b"</s>"]:
        raise refusal
    return pieces
