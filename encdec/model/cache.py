"""The key-value cache of decoding: preallocated, addressed by position, an explicit pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from encdec.model.attention import AttentionInputs, heads_first, window_mask
from encdec.model.config import ModelConfig
from encdec.model.positions import rope_table


def init_cache(config: ModelConfig, batch_size: int, capacity: int) -> Any:
    """An empty cache of the decoder's self-attention for ``capacity`` tokens a row.

    Returns:
        (keys, values), each [L, B, capacity, K, D] in the compute dtype when layers are scanned;
        a tuple of one such pair per layer, without the L, when they are unrolled (so that a
        decoding loop can update each in place). See ``KeyValues`` for their other layout.
    """
    shape = (batch_size, capacity, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros(shape, jnp.dtype(config.dtype))
    if config.scan_layers:
        stacked = jnp.zeros((config.decoder_layers, *shape), empty.dtype)
        return stacked, jnp.zeros_like(stacked)
    pair = heads_first((empty, empty)) if config.kernel_parts else (empty, empty)
    return tuple(tuple(jnp.zeros_like(x) for x in pair) for _ in range(config.decoder_layers))


def token_axes(config: ModelConfig) -> tuple[int, int]:
    """The axis of tokens in keys and in values, from the end."""
    return (-1, -2) if config.kernel_parts else (-3, -3)


def widen(config: ModelConfig, key_values: Any, width: int) -> Any:
    """A cache, or the keys and values of a source, filled up with zeros to ``width`` tokens."""

    def wider(x: jax.Array, axis: int) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, width - x.shape[axis])
        return jnp.pad(x, padding)

    if config.scan_layers:
        return tuple(map(wider, key_values, token_axes(config)))
    return tuple(tuple(map(wider, pair, token_axes(config))) for pair in key_values)


def cached_self_attention(
    config: ModelConfig,
    cache: Any,
    positions_BxN: jax.Array,
    local: bool = False,
    from_start: bool = False,
) -> AttentionInputs:
    """Self-attention's inputs for new tokens at ``positions_BxN``, which are their slots too.

    ``local`` gives those of layers that read the attention window alone; ``from_start`` says that
    the tokens are the first of their rows, in order.
    """
    capacity = jax.tree.leaves(cache)[0].shape[token_axes(config)[0]]
    mask_BxNxC = jnp.arange(capacity) <= positions_BxN[..., None]
    if local:
        mask_BxNxC &= window_mask(positions_BxN, jnp.arange(capacity), config.attention_window)
    rope = rope_table(config, positions_BxN, local)
    return AttentionInputs(mask_BxNxC, rope, rope, positions_BxN, causal=from_start)
