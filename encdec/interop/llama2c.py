"""Models of llama2.c (its legacy float32 export) as our decoder-only model.

Seven int32 (dim, hidden, layers, heads, kv heads, vocabulary, longest sequence; a negative
vocabulary stands for an untied head), then float32 tensors kind by kind, all layers of a kind
together. Rotation pairs neighbours there and halves of a head here.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from encdec.errors import DataError
from encdec.model import ExecutionConfig, ModelConfig

START_ID = 1  # BOS of its tokenizers


def read_model(path: pathlib.Path) -> tuple[ModelConfig, dict[str, Any], int]:
    """Configuration, unrolled parameters, and the longest sequence.

    Raises:
        DataError: the file's size does not fit its header.
    """
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
