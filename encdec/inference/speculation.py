"""Speculative decoding: a step verifies a draft of several tokens, and keeps those that are right.

A drafted token is right where it is the token that the model chooses there, greedy or drawn, with
all of the row's settings: every place is decided by ``decoding.append``, as in plain decoding, from
logits that differ from a one-token step's by rounding alone. A token is drawn with the key of its
place in the answer, so that also a drawn answer is the one of plain decoding: to draw x from p and
keep a drafted token if it equals x is the acceptance rule of speculative sampling
(arXiv 2211.17192) for a draft of one token without a distribution, p(draft) to accept and p without
the draft, normalized, otherwise.

The memory needs no rollback: a slot is a position, and nothing reads beyond its own.
"""

from __future__ import annotations

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp

from encdec.inference.decoding import (
    Decoding,
    DecodingPlan,
    Memory,
    append,
    decode_step,
    prefill,
    take_rows,
    verify_step,
)
from encdec.inference.decoding_compiler import LazilyCompiled
from encdec.inference.drafts import NOTHING, LookupTexts, look_up
from encdec.model import ModelConfig, Params

FED_AT_ONCE = 10  # tokens that a draft model is fed after plain steps


class Drafting(flax.struct.PyTreeNode):
    """What drafts are made of, of every row.

    Attributes:
        sources: the texts that drafts are copied from; None with a draft model.
        memory: the draft model's; None without one.
        fed_R: int32, the answer's tokens that are in it.
    """

    sources: LookupTexts | None = None
    memory: Memory | None = None
    fed_R: jax.Array | None = None


class VerifiedCounts(flax.struct.PyTreeNode):
    """What verifying steps gave.

    Attributes:
        steps: int32, how many there were.
        made_K: int32; element j counts the rows and steps of which more than j tokens came.
    """

    steps: jax.Array
    made_K: jax.Array


def begin_drafting(
    config: ModelConfig,
    params: Params,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    *,
    start_id: int,
    capacity: int,
    times: int = 1,
) -> Drafting:
    """A draft model that has read the inputs, each for ``times`` rows."""
    _, memory = prefill(config, params, tokens_BxS, lengths_B, start_id=start_id, capacity=capacity)
    if times > 1:
        memory = take_rows(config, memory, jnp.repeat(jnp.arange(len(tokens_BxS)), times))
    return Drafting(memory=memory, fed_R=jnp.zeros(len(tokens_BxS) * times, jnp.int32))


def catch_up(
    config: ModelConfig, params: Params, drafting: Drafting, decoding: Decoding
) -> Drafting:
    """Feeds a draft model what plain steps have made, but for the token chosen last.

    Finished rows are left as they are: nothing is drafted for them.
    """
    assert drafting.memory is not None and drafting.fed_R is not None  # of a draft model
    wanted_R = jnp.where(decoding.finished_R, drafting.fed_R, jnp.maximum(decoding.counts_R - 1, 0))
    width = decoding.tokens_RxN.shape[1]

    def behind(carry: tuple[Memory, jax.Array]) -> jax.Array:
        return jnp.any(carry[1] < wanted_R)

    def feed(carry: tuple[Memory, jax.Array]) -> tuple[Memory, jax.Array]:
        memory, fed_R = carry
        places_RxN = jnp.minimum(fed_R[:, None] + jnp.arange(FED_AT_ONCE), width - 1)
        tokens_RxN = jnp.take_along_axis(decoding.tokens_RxN, places_RxN, axis=1)
        _, memory = verify_step(config, params, memory, tokens_RxN)
        new_R = jnp.minimum(wanted_R - fed_R, FED_AT_ONCE)
        return memory.replace(slots_R=memory.slots_R + new_R), fed_R + new_R

    memory, fed_R = jax.lax.while_loop(behind, feed, (drafting.memory, drafting.fed_R))
    return drafting.replace(memory=memory, fed_R=fed_R)


def speculate(
    config: ModelConfig,
    plan: DecodingPlan,
    size: int,
    draft_config: ModelConfig | None,
    params: Params,
    draft_params: Params | None,
    decoding: Decoding,
    drafting: Drafting,
    steps: jax.Array,
) -> tuple[Decoding, Drafting, VerifiedCounts]:
    """Up to ``steps`` steps, each of which feeds ``size`` tokens per row; stops when all rows are
    finished.

    Args:
        config: the model.
        plan: as for ``decoding.advance``.
        size: 2 or more: the token chosen last and ``size - 1`` drafted ones.
        draft_config: the draft model, of the same vocabulary; None where drafts are looked up.
        params: the model's parameters.
        draft_params: the draft model's.
        decoding: the answers so far.
        drafting: what drafts are made of.
        steps: how many.
    """
    Carry = tuple[Decoding, Drafting, VerifiedCounts]

    def unfinished(carry: Carry) -> jax.Array:
        decoding, _, tally = carry
        return (tally.steps < steps) & ~jnp.all(decoding.finished_R)

    def step(carry: Carry) -> Carry:
        decoding, drafting, tally = carry
        before = decoding.memory
        assert before is not None  # it is what this runs the model with
        decoding = decoding.replace(memory=None)
        if draft_config is None:
            drafts_RxD = copied(drafting.sources, decoding, size - 1)
        else:
            assert draft_params is not None and drafting.memory is not None
            drafts_RxD, cache = drafted(
                draft_config, plan, draft_params, drafting.memory, decoding, size
            )
        fed_RxK = jnp.concatenate([decoding.last_R[:, None], jnp.maximum(drafts_RxD, 0)], axis=1)
        logits_RxKxV, memory = verify_step(config, params, before, fed_RxK)
        counts_R = decoding.counts_R
        decoding = accept(plan, decoding, drafts_RxD, logits_RxKxV)
        made_R = decoding.counts_R - counts_R  # of what was fed, the tokens that stay
        if drafting.memory is not None and drafting.fed_R is not None:
            slots_R = drafting.memory.slots_R + made_R
            drafting = drafting.replace(
                memory=drafting.memory.replace(cache=cache, slots_R=slots_R),
                fed_R=drafting.fed_R + made_R,
            )
        made_K = jnp.sum(made_R[:, None] > jnp.arange(size), axis=0, dtype=jnp.int32)
        return (
            decoding.replace(memory=memory.replace(slots_R=before.slots_R + made_R)),
            drafting,
            VerifiedCounts(tally.steps + 1, tally.made_K + made_K),
        )

    if draft_config is not None:
        assert draft_params is not None
        drafting = catch_up(draft_config, draft_params, drafting, decoding)
    nothing = VerifiedCounts(jnp.int32(0), jnp.zeros(size, jnp.int32))
    return jax.lax.while_loop(unfinished, step, (decoding, drafting, nothing))


def copied(sources: LookupTexts | None, decoding: Decoding, length: int) -> jax.Array:
    """A draft [R, length] from the source, the answer, and what is given of it."""
    assert sources is not None  # without a draft model
    settings, counts = decoding.settings, decoding.counts_R[:, None]
    drafts_RxD = look_up(sources, decoding.tokens_RxN, decoding.counts_R, settings.eos_R, length)
    places_RxD = counts + jnp.arange(length)
    inside_RxD = jnp.minimum(places_RxD, decoding.tokens_RxN.shape[1] - 1)
    given_RxD = jnp.take_along_axis(decoding.tokens_RxN, inside_RxD, axis=1)
    return jnp.where(places_RxD < settings.given_R[:, None], given_RxD, drafts_RxD)


def drafted(
    config: ModelConfig,
    plan: DecodingPlan,
    params: Params,
    memory: Memory,
    decoding: Decoding,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """A draft [R, size - 1] by a draft model, and its cache with the tokens fed so far.

    It chooses as the model does, with the same settings and the same noise, so that drawn tokens
    agree as often as greedy ones. The last drafted token is fed too: it may be kept.
    """
    choosing = dataclasses.replace(plan.choosing, alternatives=0)
    plan = dataclasses.replace(plan, choosing=choosing)

    def step(carry: tuple[Memory, Decoding], _: None) -> tuple[tuple[Memory, Decoding], jax.Array]:
        memory, decoding = carry
        logits_RxV, memory = decode_step(config, params, memory, decoding.last_R)
        decoding = append(plan, decoding, logits_RxV)
        return (memory, decoding), decoding.last_R

    (memory, _), drafts_KxR = jax.lax.scan(step, (memory, decoding), None, length=size)
    return drafts_KxR[:-1].T, memory.cache


def accept(
    plan: DecodingPlan, decoding: Decoding, drafts_RxD: jax.Array, logits_RxKxV: jax.Array
) -> Decoding:
    """Chooses every row's tokens, one after the other, up to the first that was not drafted.

    Logits [R, K, V] are those after the token chosen last and after each of the K - 1 drafted.
    """
    rows, size = logits_RxKxV.shape[:2]
    nothing_Rx1 = jnp.full((rows, 1), NOTHING, jnp.int32)
    drafts_RxK = jnp.concatenate([drafts_RxD, nothing_Rx1], axis=1)
    Carry = tuple[jax.Array, jax.Array, Decoding]

    def agreed(carry: Carry) -> jax.Array:
        place, going_R, _ = carry
        return (place < size) & jnp.any(going_R)

    def choose_next(carry: Carry) -> Carry:
        place, going_R, decoding = carry
        at = functools.partial(jax.lax.dynamic_index_in_dim, index=place, axis=1, keepdims=False)
        # For ``append``, a row whose draft went wrong is one that is finished.
        chosen = append(plan, decoding.replace(finished_R=~going_R), at(logits_RxKxV))
        finished_R = jnp.where(going_R, chosen.finished_R, decoding.finished_R)
        going_R = going_R & ~finished_R & (chosen.last_R == at(drafts_RxK))
        return place + 1, going_R, chosen.replace(finished_R=finished_R)

    return jax.lax.while_loop(agreed, choose_next, (jnp.int32(0), ~decoding.finished_R, decoding))[
        2
    ]


# The compiled forms; the memories are donated to the results.
begin_drafting_compiled = jax.jit(
    begin_drafting, static_argnames=("config", "start_id", "capacity", "times")
)
speculate_compiled = LazilyCompiled(
    speculate,
    static_argnames=("config", "plan", "size", "draft_config"),
    donate_argnames=("decoding", "drafting"),
)
