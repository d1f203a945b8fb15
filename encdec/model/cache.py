"""The key-value cache of decoding: preallocated, addressed by position, an explicit pytree."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax
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


# As products on a CPU read them without a copy (``cpu_layout``).
HEADS_FIRST = CacheLayout("BKDS", "BKSD")


def cache_layout(config: ModelConfig) -> CacheLayout:
    return HEADS_FIRST if config.execution.for_cpu else CacheLayout()


class CachePlaces(flax.struct.PyTreeNode):
    """Where new tokens are written, and what they read, where slots are not positions: several
    continuations of one text share a row of the cache.

    Attributes:
        slots_BxN: int32, of the new tokens; in order, one after the other.
        visible_BxNxC: bool, the slots that each of them reads, its own among them.
        positions_BxC: int32, the position of what is in each slot.
    """

    slots_BxN: jax.Array
    visible_BxNxC: jax.Array
    positions_BxC: jax.Array


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


def rearranged(config: ModelConfig, cache: Any, rows_R: jax.Array, slots_RxC: jax.Array) -> Any:
    """A cache of the given rows, each with the given slots of its own."""
    first, layout = int(config.execution.scan_layers), cache_layout(config)

    def take(x: jax.Array, axis: int) -> jax.Array:
        shape = [1] * x.ndim
        shape[first], shape[axis] = slots_RxC.shape
        rows = jnp.take(x, rows_R, axis=first, mode="clip")
        return jnp.take_along_axis(rows, slots_RxC.reshape(shape), axis=axis, mode="clip")

    pair = lambda keys_values: tuple(map(take, keys_values, layout.token_axes))
    return pair(cache) if first else tuple(map(pair, cache))


def cached_self_attention(
    config: ModelConfig,
    cache: Any,
    positions_BxN: jax.Array,
    *,
    from_start: bool,
    places: CachePlaces | None,
    offset: jax.Array | int = 0,
) -> tuple[AttentionInputs, AttentionInputs | None]:
    """The inputs of self-attention for new tokens, in layers that read all and in local ones.

    Args:
        config: the model.
        cache: of all layers.
        positions_BxN: positions of the tokens, which are their slots too without ``places``.
        from_start: the tokens are the first of their rows, in order.
        places: slots that are not positions.
        offset: the tokens are rotated as if this many were before them.

    Returns:
        The second is None in a model without an attention window.
    """
    rope = rope_table(config, positions_BxN + offset)
    if places is None:
        slots_BxN = positions_BxN
        capacity = jax.tree.leaves(cache)[0].shape[cache_layout(config).token_axes[0]]
        mask_BxNxC = jnp.arange(capacity) <= positions_BxN[..., None]
        kv_positions = jnp.arange(capacity)
    else:
        slots_BxN, mask_BxNxC = places.slots_BxN, places.visible_BxNxC
        kv_positions = places.positions_BxC
    attention = AttentionInputs(mask_BxNxC, rope, rope, slots_BxN, causal=from_start)
    if not config.attention_window:
        return attention, None
    near_BxNxC = window_mask(positions_BxN, kv_positions, config.attention_window)
    rope = rope_table(config, positions_BxN + offset, local=True)
    mask_BxNxC = mask_BxNxC & near_BxNxC
    return attention, attention.replace(mask_BxTxS=mask_BxNxC, q_rope=rope, kv_rope=rope)
