"""The key-value cache of decoding: preallocated, addressed by position, an explicit pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from encdec.model.attention import AttentionInputs, window_mask
from encdec.model.config import ModelConfig
from encdec.model.positions import rope_table


def init_cache(config: ModelConfig, batch_size: int, capacity: int) -> Any:
    """An empty cache of the decoder's self-attention for ``capacity`` tokens a row.

    Returns:
        (keys, values), each [L, B, capacity, K, D] in the compute dtype when layers are scanned;
        a tuple of one such pair per layer, without the L, when they are unrolled (so that a
        decoding loop can update each in place).
    """
    shape = (batch_size, capacity, config.num_kv_heads, config.head_dim)
    dtype = jnp.dtype(config.dtype)
    if config.scan_layers:
        shape = (config.decoder_layers, *shape)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    return tuple(
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.decoder_layers))


def cached_self_attention(
    config: ModelConfig, cache: Any, positions_BxN: jax.Array, local: bool = False
) -> AttentionInputs:
    """Self-attention's inputs for new tokens at ``positions_BxN``, which are their slots too.

    ``local`` gives those of layers that read the attention window alone.
    """
    capacity = jax.tree.leaves(cache)[0].shape[-3]
    mask_BxNxC = jnp.arange(capacity) <= positions_BxN[..., None]
    if local:
        mask_BxNxC &= window_mask(positions_BxN, jnp.arange(capacity), config.attention_window)
    rope = rope_table(config, positions_BxN, local)
    return AttentionInputs(mask_BxNxC, rope, rope, positions_BxN)
