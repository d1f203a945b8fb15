"""The key-value cache of decoding: preallocated, addressed by position, an explicit pytree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from encdec.model.attention import AttentionInputs, window_mask
from encdec.model.model_config import ModelConfig
from encdec.model.positions import rope_table


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """The order of axes in cached keys and in cached values: batch, slots, kv heads, head width."""

    keys: str = "BSKD"
    values: str = "BSKD"

    @property
    def token_axes(self) -> tuple[int, int]:
        """The axis of tokens in keys and in values, from the end."""
        return self.keys.index("S") - 4, self.values.index("S") - 4


# As the products of a decoder in shards read them without a copy (``cpu_layout``).
HEADS_FIRST = CacheLayout("BKDS", "BKSD")


def cache_layout(config: ModelConfig) -> CacheLayout:
    return HEADS_FIRST if config.execution.cpu_shards else CacheLayout()


def init_cache(config: ModelConfig, batch_size: int, capacity: int) -> Any:
    """An empty cache of the decoder's self-attention for ``capacity`` tokens per row.

    Returns:
        (keys, values), each [L, B, capacity, K, D] in the compute dtype when layers are scanned;
        a tuple of one such pair per layer, without the L, when they are unrolled (so that a
        decoding loop can update each in place). ``cache_layout`` has the order of the axes.
    """
    sizes = {"B": batch_size, "S": capacity, "K": config.num_kv_heads, "D": config.head_dim}
    layout, layers = cache_layout(config), config.decoder_layers
    shapes = [tuple(sizes[axis] for axis in axes) for axes in (layout.keys, layout.values)]
    empty = lambda *stacked: tuple(
        jnp.zeros((*stacked, *shape), jnp.dtype(config.dtype)) for shape in shapes
    )
    return empty(layers) if config.execution.scan_layers else tuple(empty() for _ in range(layers))


def widen(config: ModelConfig, key_values: Any, width: int) -> Any:
    """A cache, or the keys and values of a source, padded with zeros to ``width`` tokens."""

    def wider(x: jax.Array, axis: int) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, width - x.shape[axis])
        return jnp.pad(x, padding)

    axes = cache_layout(config).token_axes
    if config.execution.scan_layers:
        return tuple(map(wider, key_values, axes))
    return tuple(tuple(map(wider, pair, axes)) for pair in key_values)


def cached_self_attention(
    config: ModelConfig,
    cache: Any,
    positions_BxN: jax.Array,
    local: bool = False,
    from_start: bool = False,
    offset: jax.Array | int = 0,
) -> AttentionInputs:
    """Self-attention's inputs for new tokens at ``positions_BxN``, which are their slots too.

    ``local`` gives those of layers that read the attention window alone; ``from_start`` says that
    the tokens are the first of their rows, in order. They are rotated as if ``offset`` tokens were
    before them.
    """
    capacity = jax.tree.leaves(cache)[0].shape[cache_layout(config).token_axes[0]]
    mask_BxNxC = jnp.arange(capacity) <= positions_BxN[..., None]
    if local:
        mask_BxNxC &= window_mask(positions_BxN, jnp.arange(capacity), config.attention_window)
    rope = rope_table(config, positions_BxN + offset, local)
    return AttentionInputs(mask_BxNxC, rope, rope, positions_BxN, causal=from_start)
