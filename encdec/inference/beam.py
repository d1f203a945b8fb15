"""Beam search over the cached one-token step, with the length penalty of GNMT."""

from __future__ import annotations

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp

from encdec.inference.decoding import Memory, decode_step, prefill, take_rows
from encdec.model import ModelConfig, Params


class Hypotheses(flax.struct.PyTreeNode):
    """K hypotheses an input.

    Attributes:
        tokens_BxKxN: int32, EOS included, then zeros.
        log_probs_BxKxN: float32, of each token, then zeros.
        counts_BxK: int32, tokens in each.
        scores_BxK: float32, best first; sums of log-probabilities while alive, divided by the
            length penalty when complete; -inf where there is no hypothesis.
    """

    tokens_BxKxN: jax.Array
    log_probs_BxKxN: jax.Array
    counts_BxK: jax.Array
    scores_BxK: jax.Array


class _Search(flax.struct.PyTreeNode):
    memory: Memory  # of B * K rows
    logits_RxV: jax.Array
    alive: Hypotheses
    complete: Hypotheses
    count: jax.Array


def length_penalty(length: jax.Array, alpha: jax.Array) -> jax.Array:
    """``((5 + length) / 6) ** alpha`` (GNMT, arXiv 1609.08144, eq. 14); 1 for alpha = 0."""
    return ((5.0 + length) / 6.0) ** alpha


@dataclasses.dataclass(frozen=True)
class BeamPlan:
    """What a compiled beam search depends on, besides the model.

    Attributes:
        beams: K, hypotheses kept alive for each input, and returned.
        room: N, the cache's capacity for new tokens.
        start_id: the decoder's first input.
        eos_id: completes a hypothesis.
        vocabulary_size: ids from here on are never chosen.
    """

    beams: int
    room: int
    start_id: int
    eos_id: int
    vocabulary_size: int


@functools.partial(jax.jit, static_argnames=("config", "plan"))
def beam_search(
    config: ModelConfig,
    plan: BeamPlan,
    params: Params,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    alpha: jax.Array,
    limit: jax.Array,
) -> Hypotheses:
    """The best complete hypotheses found for each input, best first.

    A hypothesis is complete with EOS or at ``limit`` tokens. The search ends when no hypothesis
    that is alive can still enter the complete ones.

    Args:
        config: the model.
        plan: beams and capacity.
        params: the model's parameters.
        tokens_BxS: inputs, each in the first ``lengths_B`` places of its row.
        lengths_B: tokens of each input.
        alpha: of ``length_penalty``, 0 or more.
        limit: new tokens at most, from 1 to ``plan.room``.
    """
    batch, beams, room = tokens_BxS.shape[0], plan.beams, plan.room
    logits_BxV, memory = prefill(
        config, params, tokens_BxS, lengths_B, start_id=plan.start_id, room=room
    )
    rows_R = jnp.repeat(jnp.arange(batch), beams)
    nothing = Hypotheses(
        jnp.zeros((batch, beams, room), jnp.int32),
        jnp.zeros((batch, beams, room), jnp.float32),
        jnp.zeros((batch, beams), jnp.int32),
        jnp.full((batch, beams), -jnp.inf),
    )
    # One empty hypothesis an input; with K, all would grow identically.
    alive = nothing.replace(scores_BxK=nothing.scores_BxK.at[:, 0].set(0.0))
    search = _Search(
        take_rows(config, memory, rows_R), logits_BxV[rows_R], alive, nothing, jnp.int32(0)
    )
    search = _grow(config, plan, search, alpha)

    def undecided(search: _Search) -> jax.Array:
        # Log-probabilities only fall, and the longest answer is divided by the most.
        hope_B = search.alive.scores_BxK[:, 0] / length_penalty(limit, alpha)
        return (search.count < limit) & jnp.any(hope_B > search.complete.scores_BxK[:, -1])

    def step(search: _Search) -> _Search:
        last_R = jnp.take(search.alive.tokens_BxKxN, search.count - 1, axis=2).reshape(-1)
        logits_RxV, memory = decode_step(config, params, search.memory, last_R)
        search = search.replace(memory=memory, logits_RxV=logits_RxV)
        return _grow(config, plan, search, alpha)

    search = jax.lax.while_loop(undecided, step, search)
    cut_off = search.alive.replace(
        scores_BxK=search.alive.scores_BxK / length_penalty(search.count, alpha)
    )
    return _best(search.complete, cut_off)


def _grow(config: ModelConfig, plan: BeamPlan, search: _Search, alpha: jax.Array) -> _Search:
    """Every hypothesis by one token: the best K continue, those with EOS become complete."""
    alive, (batch, beams) = search.alive, search.alive.scores_BxK.shape
    size = search.logits_RxV.shape[-1]
    log_probs = jax.nn.log_softmax(search.logits_RxV).reshape(batch, beams, size)
    allowed = jnp.arange(size) < plan.vocabulary_size
    scores = alive.scores_BxK[:, :, None] + jnp.where(allowed, log_probs, -jnp.inf)
    # At most K of the best 2K have EOS, so that K remain to continue.
    scores_BxC, places_BxC = jax.lax.top_k(scores.reshape(batch, -1), 2 * beams)
    parents_BxC, tokens_BxC = places_BxC // size, (places_BxC % size).astype(jnp.int32)
    steps_BxC = jnp.take_along_axis(log_probs.reshape(batch, -1), places_BxC, axis=1)
    candidates = _pick(alive, parents_BxC)
    count = search.count + 1
    candidates = Hypotheses(
        candidates.tokens_BxKxN.at[:, :, search.count].set(tokens_BxC),
        candidates.log_probs_BxKxN.at[:, :, search.count].set(steps_BxC),
        jnp.full_like(tokens_BxC, count),
        scores_BxC,
    )
    ended_BxC = tokens_BxC == plan.eos_id
    final_BxC = jnp.where(ended_BxC, scores_BxC / length_penalty(count, alpha), -jnp.inf)
    complete = _best(search.complete, candidates.replace(scores_BxK=final_BxC))
    # Stable: candidates come best first.
    going_on_BxK = jnp.argsort(ended_BxC, axis=1, stable=True)[:, :beams]
    alive = _pick(candidates, going_on_BxK)
    still = ~jnp.take_along_axis(ended_BxC, going_on_BxK, axis=1)
    alive = alive.replace(scores_BxK=jnp.where(still, alive.scores_BxK, -jnp.inf))
    parents_BxK = jnp.take_along_axis(parents_BxC, going_on_BxK, axis=1)
    rows_R = (parents_BxK + beams * jnp.arange(batch)[:, None]).reshape(-1)
    # The source is the same for all hypotheses of an input, so it stays where it is.
    memory = take_rows(config, search.memory.replace(source=None), rows_R)
    memory = memory.replace(source=search.memory.source)
    return _Search(memory, search.logits_RxV, alive, complete, count)


def _pick(hypotheses: Hypotheses, places_BxK: jax.Array) -> Hypotheses:
    def take(x: jax.Array) -> jax.Array:
        places = places_BxK.reshape(places_BxK.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, places, axis=1)

    return jax.tree.map(take, hypotheses)


def _best(first: Hypotheses, second: Hypotheses) -> Hypotheses:
    """The best of two sets, as many as the first holds; the first set's come first in a tie."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)
    _, places = jax.lax.top_k(both.scores_BxK, first.scores_BxK.shape[1])
    return _pick(both, places)
