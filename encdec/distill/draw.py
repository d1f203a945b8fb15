"""Reduces a teacher's logits, on the device, to what is stored: draws, top-k, or everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from encdec.data.sparse_logits import SparseFormat, SparseLogits, count_draws

Kept = Mapping[str, jax.Array | np.ndarray]


def keep(logits_NxV: jax.Array, keys_N: jax.Array, fmt: SparseFormat) -> Kept:
    """Reduces logits to what ``fmt`` stores.

    Args:
        logits_NxV: float32, over the model's table; ids beyond ``fmt.vocab_size`` (rows
            that only round the table up) take no part.
        keys_N: one random key a token; used by "sampled" alone.
        fmt: what to keep.

    Returns:
        log_normaliser [N] and entropy [N] of the distribution at ``fmt.temperature``, and
        "sampled": draws [N, draws] int32, with a proposal also log_ratios [N, draws];
        "top_k": ids [N, k], log_probs [N, k], tail [N]; "full": log_probs [N, V].
    """
    logits_NxV = logits_NxV[:, : fmt.vocab_size].astype(jnp.float32) / fmt.temperature
    log_normaliser = jax.nn.logsumexp(logits_NxV, axis=-1)
    log_probs_NxV = logits_NxV - log_normaliser[:, None]
    probs_NxV = jnp.exp(log_probs_NxV)
    # An impossible id (logit -inf) adds nothing to the entropy.
    surprise = jnp.where(probs_NxV > 0, log_probs_NxV, 0.0)
    kept = {"log_normaliser": log_normaliser, "entropy": -jnp.sum(probs_NxV * surprise, axis=-1)}
    if fmt.method == "full":
        return kept | {"log_probs": log_probs_NxV}
    if fmt.method == "top_k":
        top, ids = jax.lax.top_k(log_probs_NxV, fmt.k)
        # Summed over what is left out rather than 1 minus what is kept, which would cancel.
        rest = jnp.put_along_axis(probs_NxV, ids, 0.0, axis=-1, inplace=False)
        return kept | {"ids": ids.astype(jnp.int32), "log_probs": top, "tail": jnp.sum(rest, -1)}
    if not fmt.weighted:
        return kept | {"draws": draw_ids(probs_NxV, keys_N, fmt.draws)}
    scaled = fmt.proposal * log_probs_NxV
    log_mass = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    draws = draw_ids(jnp.exp(scaled - log_mass), keys_N, fmt.draws)
    log_ratios_NxV = log_probs_NxV - (scaled - log_mass)
    return kept | {"draws": draws, "log_ratios": jnp.take_along_axis(log_ratios_NxV, draws, -1)}


def draw_ids(probs_NxV: jax.Array, keys_N: jax.Array, draws: int) -> jax.Array:
    """Independent draws with replacement from each row, [N, draws] int32.

    The cumulative distribution is inverted in two steps, first among blocks of about sqrt(V) ids,
    then within the block drawn: one pass over the vocabulary however many draws, and float32
    keeps its relative precision for unlikely ids, which a single cumulative sum would lose.
    """
    rows, vocab = probs_NxV.shape
    width = max(1, int(np.ceil(np.sqrt(vocab))))
    blocks = -(-vocab // width)
    padded = jnp.pad(probs_NxV, ((0, 0), (0, blocks * width - vocab)))
    probs_NxGxW = padded.reshape(rows, blocks, width)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2, draws)))(keys_N)
    block = _invert(jnp.sum(probs_NxGxW, axis=-1)[:, None], uniform[:, 0])
    within = jnp.take_along_axis(probs_NxGxW, block[..., None], axis=1)
    place = _invert(within, uniform[:, 1])
    return (block * width + place).astype(jnp.int32)


def _invert(mass_NxDxK: jax.Array, uniform_NxD: jax.Array) -> jax.Array:
    """Which of K masses a uniform number in [0, 1) falls on; never one without mass."""
    cumulative = jnp.cumsum(mass_NxDxK, axis=-1)
    total = cumulative[..., -1:]
    # Rounding may carry u * total up to the total itself, beyond the last id that has mass.
    below = jnp.nextafter(total, jnp.zeros_like(total))
    target = jnp.minimum(uniform_NxD[..., None] * total, below)
    return jnp.sum(cumulative <= target, axis=-1, dtype=jnp.int32)


def to_sparse(kept: dict[str, np.ndarray], fmt: SparseFormat) -> SparseLogits:
    """What ``keep`` returned for n tokens, brought to the host, in the form that is stored."""
    scalars: dict[str, Any] = {name: kept[name] for name in ("log_normaliser", "entropy")}
    n = len(kept["entropy"])
    if fmt.method == "full":
        none = np.zeros(0, np.int32)
        return SparseLogits(np.zeros(n, np.int32), none, log_probs=kept["log_probs"], **scalars)
    if fmt.method == "top_k":
        order = np.argsort(kept["ids"], axis=1)
        ids, log_probs = (
            np.take_along_axis(kept[x], order, axis=1).reshape(-1) for x in ("ids", "log_probs")
        )
        return SparseLogits(
            np.full(n, fmt.k, np.int32), ids, log_probs=log_probs, tail=kept["tail"], **scalars
        )
    sizes, ids, counts, first = count_draws(kept["draws"])
    ratios = kept["log_ratios"].reshape(-1)[first] if fmt.weighted else None
    return SparseLogits(sizes, ids, counts=counts, log_ratios=ratios, **scalars)
