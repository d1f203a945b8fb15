"""Continuous batching as pure functions: rows of one running batch taken and given back.

The batch is a ``Decoding`` of a fixed number of rows, the slots, each with room for the longest
input and the longest answer. A request is read by itself at the width of its bucket, in a program
of one row, and its memory is copied into a free slot while the others go on where they were. So
what a request is answered depends neither on its neighbours nor on when it came.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from encdec.inference.decoding import Decoding, DecodingPlan, Memory, append, prefill
from encdec.inference.sampling import RowSettings, greedy_rows
from encdec.model import ModelConfig, init_cache
from encdec.model.cache import widen

Params = Any


@dataclasses.dataclass(frozen=True)
class SlotPlan:
    """What is compiled into the server's programs beside the model.

    Attributes:
        decoding: how tokens are chosen, and the room for new ones in each slot.
        slots: R, rows of the batch.
        longest_input: tokens, EOS included.
    """

    decoding: DecodingPlan
    slots: int
    longest_input: int


@flax.struct.dataclass
class Prefilled:
    """An input that was read: logits [1, V] of its first new token, and the memory of it."""

    logits_1xV: jax.Array
    memory: Memory


def read(
    config: ModelConfig, plan: SlotPlan, params: Params, tokens_1xS: jax.Array, length: jax.Array
) -> Prefilled:
    """Reads one input, in the first ``length`` of its S places; S is at most the longest input.

    Its memory comes at the width of a slot, so that there is one program to insert it.
    """
    logits_1xV, memory = prefill(
        config, params, tokens_1xS, length[None], start_id=plan.decoding.start_id, room=0
    )

    source, cache = memory.source, memory.cache
    if source is not None:
        missing = plan.longest_input - source.mask_BxS.shape[1]
        source = source.replace(
            cross_kv=widen(config, source.cross_kv, plan.longest_input),
            mask_BxS=jnp.pad(source.mask_BxS, ((0, 0), (0, missing))),
        )
    else:
        cache = widen(config, cache, 1 + plan.longest_input)
    return Prefilled(logits_1xV, memory.replace(source=source, cache=cache))


def empty(config: ModelConfig, plan: SlotPlan, params: Params) -> Decoding:
    """A batch whose slots are all free."""
    tokens = jax.ShapeDtypeStruct((plan.slots, plan.longest_input), jnp.int32)
    lengths = jax.ShapeDtypeStruct((plan.slots,), jnp.int32)
    _, memory = jax.eval_shape(
        lambda params, tokens, lengths: prefill(
            config,
            params,
            tokens,
            lengths,
            start_id=plan.decoding.start_id,
            room=plan.decoding.room,
        ),
        params,
        tokens,
        lengths,
    )
    memory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)
    return _blank(plan, memory, greedy_rows(plan.slots, 0))


def _blank(plan: SlotPlan, memory: Memory, settings: RowSettings) -> Decoding:
    rows, room = settings.limit_R.shape[0], plan.decoding.room
    return Decoding(
        memory=memory,
        last_R=jnp.zeros(rows, jnp.int32),
        tokens_RxN=jnp.zeros((rows, room), jnp.int32),
        log_probs_RxN=jnp.zeros((rows, room), jnp.float32),
        counts_R=jnp.zeros(rows, jnp.int32),
        finished_R=settings.limit_R <= 0,
        settings=settings,
    )


def insert(
    config: ModelConfig,
    plan: SlotPlan,
    decoding: Decoding,
    slot: jax.Array,
    prefilled: Prefilled,
    settings: RowSettings,
) -> Decoding:
    """Puts what was read into a slot and chooses its first token; the others are not touched.

    Args:
        config: the model, layers unrolled.
        plan: the batch's.
        decoding: the batch.
        slot: which row.
        prefilled: what ``read`` gave; may be inserted several times.
        settings: of one row.
    """
    row = _blank(plan, prefilled.memory, settings)
    row = append(plan.decoding, row, prefilled.logits_1xV)

    def write(whole: jax.Array, part: jax.Array) -> jax.Array:
        if jax.dtypes.issubdtype(whole.dtype, jax.dtypes.prng_key):
            return whole.at[slot].set(part[0])
        # The part may be shorter: what the slot held there before is never read, because a
        # position is read only after it was written.
        return jax.lax.dynamic_update_slice(
            whole, part.astype(whole.dtype), (slot,) + (0,) * (whole.ndim - 1)
        )

    return jax.tree.map(write, decoding, row)


def release(decoding: Decoding, free_R: jax.Array) -> Decoding:
    """Ends these rows, and has them ask for nothing that costs time."""
    settings, rows = decoding.settings, decoding.counts_R.shape[0]
    idle = greedy_rows(rows, 0)
    quiet = lambda field: jnp.where(free_R, getattr(idle, field), getattr(settings, field))
    names = ("temperature_R", "top_k_R", "top_p_R", "repetition_penalty_R", "no_repeat_ngram_R")
    settings = settings.replace(**{name: quiet(name) for name in names})
    return decoding.replace(finished_R=decoding.finished_R | free_R, settings=settings)


def slot_bytes(config: ModelConfig, plan: SlotPlan) -> int:
    """Memory of one slot's keys and values, in bytes."""
    room, longest = plan.decoding.room, plan.longest_input
    kept = (1 + room) + longest  # of cross-attention, or of the prompt: alike in size
    cache = jax.eval_shape(lambda: init_cache(config, 1, kept))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


# The compiled forms; the batch is given over to the result.
read_compiled = jax.jit(read, static_argnames=("config", "plan"))
insert_compiled = jax.jit(insert, static_argnames=("config", "plan"), donate_argnames=("decoding",))
release_compiled = jax.jit(release, donate_argnames=("decoding",))
