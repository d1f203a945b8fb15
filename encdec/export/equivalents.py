"""The same function in other parameters: what a format cannot express is folded into weights.

Each rewriting takes a configuration with its unrolled float32 parameters and returns another pair
that computes the same, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from encdec.fields import flattened
from encdec.interop.layout import unflatten
from encdec.model import ModelConfig, Params, for_decoding

Equivalent = tuple[ModelConfig, Params]


def on_host(config: ModelConfig, params: Any) -> Equivalent:
    """Unrolled float32 NumPy parameters, query heads next to the kv head that they read."""
    config, params = for_decoding(config.replace(dtype="float32", param_dtype="float32"), params)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    return group_heads(config, params)


def _rewrite(params: Params, change: Callable[[str, np.ndarray], np.ndarray]) -> Params:
    return unflatten({path: change(path, x) for path, x in flattened(params, "/").items()})


def group_heads(config: ModelConfig, params: Params) -> Equivalent:
    """Grouped pairing (query head h reads kv head h // group) from tiled (h % kv heads)."""
    if config.kv_pairing == "grouped":
        return config, params
    kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    order = np.arange(config.num_heads).reshape(group, kv_heads).T.reshape(-1)

    def change(path: str, x: np.ndarray) -> np.ndarray:
        if path.endswith("attention/q/kernel"):
            return x[:, order]
        if path.endswith(("attention/q/bias", "attention/o/kernel")):
            return x[order]
        if path.endswith("attention/q_norm/scale") and config.qk_norm_over_heads:
            return x.reshape(config.num_heads, -1)[order].reshape(-1)
        return x

    return config.replace(kv_pairing="grouped"), _rewrite(params, change)


def equal_biases(config: ModelConfig, params: Params) -> Equivalent:
    """Biases on all four attention projections, zero where there were none, if on any."""
    if config.qkv_bias == config.attention_out_bias:
        return config, params
    flat = flattened(params, "/")
    for path, kernel in list(flat.items()):
        if path.endswith("_attention/o/kernel"):
            flat.setdefault(path.replace("kernel", "bias"), np.zeros(kernel.shape[2:], np.float32))
    return query_biases(config.replace(attention_out_bias=True), unflatten(flat))


def query_biases(config: ModelConfig, params: Params) -> Equivalent:
    """Biases on queries, keys and values, zero where there were none."""
    if config.qkv_bias:
        return config, params
    flat = flattened(params, "/")
    for path, kernel in list(flat.items()):
        if path.endswith(("_attention/q/kernel", "_attention/k/kernel", "_attention/v/kernel")):
            flat[path.replace("kernel", "bias")] = np.zeros(kernel.shape[1:], np.float32)
    return config.replace(qkv_bias=True), unflatten(flat)


def norms_around(config: ModelConfig, params: Params, *, plus_one: bool) -> Equivalent:
    """Norms that scale by w, or by 1 + w."""
    shift = np.float32(int(config.norm_plus_one) - int(plus_one))
    changed = _rewrite(params, lambda path, x: x + shift if path.endswith("/scale") else x)
    return config.replace(norm_plus_one=plus_one), changed


def scaled_embedding(config: ModelConfig, params: Params, *, scaled: bool) -> Equivalent:
    """Token embeddings multiplied by sqrt(width), or not; the head becomes a tensor of its own."""
    if config.embedding_scale == scaled:
        return config, params
    factor = np.float32(config.d_model ** (-0.5 if scaled else 0.5))
    flat = flattened(params, "/")
    if config.tie_embeddings:
        flat["embedder/head"] = flat["embedder/embedding"].T
    for path in ("embedder/embedding", "encoder_embedder/embedding"):
        if path in flat:
            flat[path] = flat[path] * factor
    return config.replace(embedding_scale=scaled, tie_embeddings=False), unflatten(flat)


def plain_attention_scale(config: ModelConfig, params: Params) -> Equivalent:
    """Logits in attention scaled by 1/sqrt(head_dim), the rest multiplied into the queries'
    weights, or into their norm where they have one."""
    factor = np.float32(config.attention_logit_scale * config.head_dim**0.5)
    config = config.replace(attention_scale=0.0)
    if abs(factor - 1) < 1e-7:
        return config, params
    queries = ("attention/q/kernel", "attention/q/bias")

    def change(path: str, x: np.ndarray) -> np.ndarray:
        if config.qk_norm and path.endswith("attention/q_norm/scale"):
            return (x + 1) * factor - 1 if config.norm_plus_one else x * factor
        return x * factor if not config.qk_norm and path.endswith(queries) else x

    return config, _rewrite(params, change)


def whole_query_scalar(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params, int]:
    """A model whose logits in attention have the scale of one over the root of a whole number, and
    the number."""
    scalar = config.attention_logit_scale**-2
    if scalar < 0.5 or abs(scalar - round(scalar)) > 1e-4:
        config, params = plain_attention_scale(config, params)
        scalar = config.head_dim
    return config, params, round(scalar)
