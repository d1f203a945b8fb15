"""Positions and rotary position embedding (RoPE, arXiv 2104.09864), rotate-half pairing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from encdec.model.model_config import ModelConfig

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, each [B, T, 1, D] float32


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
    return config.rope_theta * (factor * longest / config.rope_max_length - (factor - 1)) ** (
        dim / (dim - 2)
    )


def rope_frequencies(config: ModelConfig, local: bool = False) -> jax.Array:
    """Angular frequency of each rotated pair, [D/2] float32, radians per position.

    Local layers have a base of their own and no scaling; see ``ModelConfig.local_rope_theta``.

    ``linear`` divides positions by the factor (arXiv 2306.15595); ``ntk`` has another base
    (``rope_base``); ``per_pair`` divides each frequency by a number of its own, which covers
    Llama 3's rule and LongRoPE (arXiv 2402.13753). None depends on the sequence: packing,
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


def rope_table(config: ModelConfig, positions_BxT: jax.Array, local: bool = False) -> Rotation:
    """Cosines and sines for ``apply_rope``, made once for all layers.

    Both halves of a head turn by the same angles; they are written out, and the two tables kept
    apart, so that no layer has to cut and join arrays narrower than a vector register.
    """
    angles = positions_BxT.astype(jnp.float32)[..., None] * rope_frequencies(config, local)
    angles = jnp.concatenate([angles, angles], axis=-1)[..., None, :]
    magnitude = 1.0 if local and config.local_rope_theta else config.rope_magnitude
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def apply_rope(
    x_BxTxHxD: jax.Array, rotation: Rotation | None, scale: float = 1.0, by_product: bool = False
) -> jax.Array:
    """Rotates the halves of each head by its position's angles, in float32, and multiplies them.

    Without a rotation, x as it is.

    Args:
        x_BxTxHxD: queries or keys.
        rotation: from ``rope_table``.
        scale: multiplies what was rotated.
        by_product: swap the halves by a product with a matrix of 0, 1 and -1 rather than by
            cutting and joining: the same numbers, and on a TPU, where half a head is half a
            vector register, much less work.
    """
    if rotation is None:
        return x_BxTxHxD
    if by_product:
        return _rotated_by_product(x_BxTxHxD, *rotation, scale)
    x, (cos, sin) = x_BxTxHxD.astype(jnp.float32), rotation
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return ((x * cos + turned * sin) * scale).astype(x_BxTxHxD.dtype)


def _turned(x: jax.Array) -> jax.Array:
    """Halves (first, second) of the last axis as (-second, first), float32, by a product."""
    half = x.shape[-1] // 2
    quarter_turn = np.zeros((2 * half, 2 * half), np.float32)
    quarter_turn[half:, :half], quarter_turn[:half, half:] = -np.eye(half), np.eye(half)
    # Exact, as each output is one input: in bfloat16 as it is, in float32 at full precision.
    precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(
        "...d,de->...e",
        x,
        quarter_turn.astype(x.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotated_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array, scale: float) -> jax.Array:
    return ((x.astype(jnp.float32) * cos + _turned(x) * sin) * scale).astype(x.dtype)


def _rotate_forward(
    x: jax.Array, cos: jax.Array, sin: jax.Array, scale: float
) -> tuple[jax.Array, Rotation]:
    return _rotated_by_product(x, cos, sin, scale), (cos, sin)


def _rotate_backward(
    scale: float, rotation: Rotation, gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    # The transpose of a rotation is the one back: no product of rounded sines is transposed.
    cos, sin = rotation
    back = (gradient.astype(jnp.float32) * cos - _turned(gradient) * sin) * scale
    return back.astype(gradient.dtype), None, None


_rotated_by_product.defvjp(_rotate_forward, _rotate_backward)
