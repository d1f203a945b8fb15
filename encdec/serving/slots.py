"""Continuous batching as pure functions: rows of one running batch are occupied and released.

The batch is a ``Decoding`` of a fixed number of rows, the slots, each with capacity for the longest
input and the longest answer. A request is prefilled alone at the width of its bucket, in a program
of one row, and its keys and values are copied into a free slot while the others continue. So
an answer depends neither on its neighbours nor on the time of arrival.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar, cast

import flax
import jax
import jax.numpy as jnp

from encdec.cost.flops import cache_bytes
from encdec.inference.decoding import (
    Decoding,
    DecodingPlan,
    Memory,
    append,
    blank,
    prefill,
    read_inputs,
)
from encdec.inference.sampling import RowSettings, greedy_rows, likeliest, log_probs_of
from encdec.inference.speculation import Drafting
from encdec.model import ModelConfig, Params, build_model
from encdec.model.cache import widen

_Rows = TypeVar("_Rows", Decoding, Memory)


@dataclasses.dataclass(frozen=True)
class SlotPlan:
    """Constants compiled into the server's programs, in addition to the model.

    Attributes:
        decoding: how tokens are chosen, and how many new ones fit each slot.
        slots: R, rows of the batch.
        longest_input: tokens, EOS included.
    """

    decoding: DecodingPlan
    slots: int
    longest_input: int


class Prefilled(flax.struct.PyTreeNode):
    """A prefilled input: logits [1, V] of its first new token, and its ``Memory``."""

    logits_1xV: jax.Array
    memory: Memory


class InputLogProbs(flax.struct.PyTreeNode):
    """A decoder-only model's log-probabilities of an input's tokens, given those before each.

    Attributes:
        log_probs_S: float32, of the tokens.
        likeliest_SxK: int32, the most likely tokens at each position.
        likeliest_log_probs_SxK: float32, of these.
    """

    log_probs_S: jax.Array
    likeliest_SxK: jax.Array
    likeliest_log_probs_SxK: jax.Array


# Positions whose logits are in memory at once: all of a long input's would take gigabytes.
LOG_PROBS_AT_ONCE = 64


def read(
    config: ModelConfig, plan: SlotPlan, params: Params, tokens_1xS: jax.Array, length: jax.Array
) -> Prefilled:
    """Prefills one input, the first ``length`` of S tokens; S is at most the longest input.

    Its ``Memory`` has the width of a slot, so that one program inserts all inputs.
    """
    logits_1xV, memory = prefill(
        config, params, tokens_1xS, length[None], start_id=plan.decoding.start_id, capacity=0
    )

    return Prefilled(logits_1xV, _as_wide_as_a_slot(config, plan, memory))


def read_with_log_probs(
    config: ModelConfig, plan: SlotPlan, params: Params, tokens_1xS: jax.Array, length: jax.Array
) -> tuple[Prefilled, InputLogProbs]:
    """As ``read``, with log-probabilities of the input's own tokens; for decoder-only models."""
    hidden_1xPxM, memory = read_inputs(
        config, params, tokens_1xS, length[None], start_id=plan.decoding.start_id, capacity=0
    )
    model = build_model(config)

    def logits_of(hidden_M: jax.Array) -> jax.Array:
        logits_1xV = model.apply({"params": params}, hidden_M[None], method="logits")
        return cast(jax.Array, logits_1xV)

    def log_probs_at(place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden_M, token = place
        logits_1xV = logits_of(hidden_M)
        ids_1xK, log_probs_1xK = likeliest(logits_1xV, plan.decoding.choosing)
        return log_probs_of(logits_1xV, token[None])[0], ids_1xK[0], log_probs_1xK[0]

    # The state after a place is what foretells the next token; the start token is place 0.
    found = jax.lax.map(
        log_probs_at, (hidden_1xPxM[0, :-1], tokens_1xS[0]), batch_size=LOG_PROBS_AT_ONCE
    )
    logits_1xV = logits_of(hidden_1xPxM[0, length])
    return Prefilled(logits_1xV, _as_wide_as_a_slot(config, plan, memory)), InputLogProbs(*found)


def _as_wide_as_a_slot(config: ModelConfig, plan: SlotPlan, memory: Memory) -> Memory:
    source, cache = memory.source, memory.cache
    if source is not None:
        missing = plan.longest_input - source.mask_BxS.shape[1]
        source = source.replace(
            cross_kv=widen(config, source.cross_kv, plan.longest_input),
            mask_BxS=jnp.pad(source.mask_BxS, ((0, 0), (0, missing))),
        )
    else:
        cache = widen(config, cache, 1 + plan.longest_input)
    return memory.replace(source=source, cache=cache)


def empty(config: ModelConfig, plan: SlotPlan, params: Params) -> Decoding:
    """A batch with all slots free."""
    memory = empty_memory(config, plan, params)
    return blank(plan.decoding, memory, greedy_rows(plan.slots, 0, plan.decoding.choosing.biases))


def empty_memory(config: ModelConfig, plan: SlotPlan, params: Params) -> Memory:
    """What a model remembers of every slot before it has read anything."""
    tokens = jax.ShapeDtypeStruct((plan.slots, plan.longest_input), jnp.int32)
    lengths = jax.ShapeDtypeStruct((plan.slots,), jnp.int32)
    _, memory = jax.eval_shape(
        lambda params, tokens, lengths: prefill(
            config,
            params,
            tokens,
            lengths,
            start_id=plan.decoding.start_id,
            capacity=plan.decoding.capacity,
        ),
        params,
        tokens,
        lengths,
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)


def insert(
    config: ModelConfig,
    plan: SlotPlan,
    decoding: Decoding,
    slot: jax.Array,
    prefilled: Prefilled,
    begun_N: jax.Array,
    settings: RowSettings,
) -> Decoding:
    """Puts a prefilled input into a slot and chooses its first token; other slots do not change.

    Args:
        config: the model, layers unrolled.
        plan: the batch's.
        decoding: the batch.
        slot: which row.
        prefilled: the result of ``read``; may be inserted several times.
        begun_N: int32, tokens with which the answer begins, in its first ``given_R`` positions.
        settings: of one row.
    """
    row = blank(plan.decoding, prefilled.memory, settings).replace(tokens_RxN=begun_N[None])
    row = append(plan.decoding, row, prefilled.logits_1xV)

    return _with_row(decoding, row, slot)


def insert_for_drafts(drafting: Drafting, slot: jax.Array, memory: Memory) -> Drafting:
    """Puts what a draft model remembers of an input, the result of ``read``, into a slot."""
    assert drafting.memory is not None and drafting.fed_R is not None  # of a draft model
    return drafting.replace(
        memory=_with_row(drafting.memory, memory, slot), fed_R=drafting.fed_R.at[slot].set(0)
    )


def _with_row(whole: _Rows, row: _Rows, slot: jax.Array) -> _Rows:
    """Arrays of rows with one of them replaced by the only row of other arrays."""

    def write(whole: jax.Array, part: jax.Array) -> jax.Array:
        if jax.dtypes.issubdtype(whole.dtype, jax.dtypes.prng_key):
            return whole.at[slot].set(part[0])
        # The new part may be shorter: old values behind it are never read, because a position is
        # read only after it was written.
        return jax.lax.dynamic_update_slice(
            whole, part.astype(whole.dtype), (slot,) + (0,) * (whole.ndim - 1)
        )

    return jax.tree.map(write, whole, row)


def release(decoding: Decoding, free_R: jax.Array) -> Decoding:
    """Ends these rows, and clears settings that would cost time in later steps."""
    settings, rows = decoding.settings, decoding.counts_R.shape[0]
    keys_R = settings.keys_R
    idle = greedy_rows(rows, 0, settings.bias_ids_RxB.shape[1]).replace(keys_R=None)
    settings = jax.tree.map(
        lambda quiet, now: jnp.where(free_R[(...,) + (None,) * (now.ndim - 1)], quiet, now),
        idle,
        settings.replace(keys_R=None),
    )
    return decoding.replace(
        finished_R=decoding.finished_R | free_R, settings=settings.replace(keys_R=keys_R)
    )


def slot_bytes(config: ModelConfig, plan: SlotPlan) -> int:
    """Bytes of one slot's keys and values."""
    return cache_bytes(config, plan.longest_input, 1 + plan.decoding.capacity)


# The compiled forms; the batch's buffers are donated to the result.
read_compiled = jax.jit(read, static_argnames=("config", "plan"))
read_with_log_probs_compiled = jax.jit(read_with_log_probs, static_argnames=("config", "plan"))
insert_compiled = jax.jit(insert, static_argnames=("config", "plan"), donate_argnames=("decoding",))
insert_for_drafts_compiled = jax.jit(insert_for_drafts, donate_argnames=("drafting",))
release_compiled = jax.jit(release, donate_argnames=("decoding",))
