"""Positions and rotary position embedding (RoPE, arXiv 2104.09864), rotate-half pairing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from encdec.model.config import ModelConfig


def segment_lengths(positions_BxS: jax.Array, segments_BxS: jax.Array) -> jax.Array:
    """Length of the packed segment that each token belongs to, [B, S] int32 (linear time).

    A segment ends where the next token has another segment id; within a segment positions count
    from 0, so its length is the last token's position plus one.
    """
    index_S = jnp.arange(positions_BxS.shape[-1], dtype=jnp.int32)
    following = jnp.pad(segments_BxS[..., 1:], ((0, 0), (0, 1)), constant_values=-1)
    ends = jnp.where(segments_BxS != following, index_S, positions_BxS.shape[-1])
    nearest_end = jax.lax.cummin(ends, axis=positions_BxS.ndim - 1, reverse=True)
    return positions_BxS + (nearest_end - index_S) + 1


def encoder_rope_positions(
    config: ModelConfig, positions_BxS: jax.Array, segments_BxS: jax.Array
) -> jax.Array:
    """Positions that rotate the encoder's queries and keys: as given, or centred per segment.

    Centred means ``arange(length) - (length - 1) // 2``, as in the paper's release.
    """
    if config.encoder_positions == "from_zero":
        return positions_BxS
    return positions_BxS - (segment_lengths(positions_BxS, segments_BxS) - 1) // 2


def rope_base(config: ModelConfig) -> float:
    """The base of RoPE's frequencies in layers that read all, stretched where the rule is "ntk".

    That rule multiplies it by ``((f * L / L_max) - (f - 1)) ** (D / (D - 2))`` with factor f and
    ``L = max(rope_length, L_max)``.
    """
    if config.rope_scaling != "ntk" or config.rope_factor == 1:
        return config.rope_theta
    factor, dim = config.rope_factor, config.head_dim
    longest = max(config.rope_length, config.rope_max_length)
    return config.rope_theta * (
        factor * longest / config.rope_max_length - (factor - 1)) ** (dim / (dim - 2))


def rope_frequencies(config: ModelConfig, local: bool = False) -> jax.Array:
    """Angular frequency of each rotated pair, [D/2] float32, radians per position.

    Local layers have a base of their own and no scaling; see ``ModelConfig.local_rope_theta``.

    ``linear`` divides positions by the factor (arXiv 2306.15595); ``ntk`` has another base
    (``rope_base``); ``per_pair`` divides each frequency by a number of its own, which covers
    Llama 3's rule and LongRoPE (arXiv 2402.13753). None depends on the sequence at hand: packing,
    padding and keys cached earlier change nothing.
    """
    dim = config.head_dim
    if local and config.local_rope_theta:
        return config.local_rope_theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    frequencies = rope_base(config) ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if config.rope_scaling == "linear":
        frequencies = frequencies / config.rope_factor
    if config.rope_scaling == "per_pair":
        frequencies = frequencies / jnp.array(config.rope_divisors, jnp.float32)
    return frequencies


def rope_table(
    config: ModelConfig, positions_BxT: jax.Array, local: bool = False
) -> jax.Array:
    """Cosines and sines for ``apply_rope``, [2, B, T, 1, D/2] float32; made once for all layers."""
    angles = positions_BxT.astype(jnp.float32)[..., None] * rope_frequencies(config, local)
    table = jnp.stack([jnp.cos(angles), jnp.sin(angles)])[..., None, :]
    own_base = local and config.local_rope_theta
    return table if own_base else table * config.rope_magnitude


def apply_rope(x_BxTxHxD: jax.Array, table: jax.Array | None) -> jax.Array:
    """Rotates the halves of each head by its position's angles, in float32; identity for None."""
    if table is None:
        return x_BxTxHxD
    first, second = jnp.split(x_BxTxHxD.astype(jnp.float32), 2, axis=-1)
    cos, sin = table[0], table[1]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxHxD.dtype)
