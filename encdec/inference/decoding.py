"""Cached generation: prefill, one-token steps, and the loop, as pure functions.

Both architectures go through the same three: ``prefill`` reads the inputs (the encoder and
cross-attention's keys and values, or the decoder over start token and inputs), ``decode_step``
feeds one token per row, and ``start`` with ``advance`` make answers of them. Rows have lengths,
positions, settings and random keys of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp

from encdec.inference.decoding_compiler import LazilyCompiled
from encdec.inference.sampling import Choosing, RowSettings, choose, likeliest
from encdec.model import ModelConfig, Params, build_model, init_cache
from encdec.model.cache import CachePlaces


class Memory(flax.struct.PyTreeNode):
    """What the decoder remembers of every row.

    Attributes:
        cache: self-attention's keys and values (``encdec.model.init_cache``).
        source: the encoded source; None in a decoder-only model.
        slots_R: int32, the position and cache slot of each row's next token.
    """

    cache: Any
    source: Any
    slots_R: jax.Array


class Decoding(flax.struct.PyTreeNode):
    """Unfinished answers; N is the capacity for new tokens, K the number of alternatives kept.

    Attributes:
        memory: what the decoder remembers; None where a runtime of another kind keeps it.
        last_R: int32, the token chosen last, not yet fed to the decoder.
        tokens_RxN: int32, the answers, EOS included, then zeros.
        log_probs_RxN: float32, the model's log-probability of each of these tokens, then zeros.
        likeliest_RxNxK: int32, the likeliest tokens of each place, if any row asks for its own.
        likeliest_log_probs_RxNxK: float32, the model's log-probabilities of them.
        counts_R: int32, tokens in each answer.
        finished_R: bool.
        settings: the rows' settings.
    """

    memory: Memory | None
    last_R: jax.Array
    tokens_RxN: jax.Array
    log_probs_RxN: jax.Array
    likeliest_RxNxK: jax.Array
    likeliest_log_probs_RxNxK: jax.Array
    counts_R: jax.Array
    finished_R: jax.Array
    settings: RowSettings


@dataclasses.dataclass(frozen=True)
class DecodingPlan:
    """What is compiled into a decoding program in addition to the model.

    Attributes:
        choosing: how tokens are chosen.
        capacity: new tokens at most; rows may have lower limits.
        start_id: the decoder's first input.
    """

    choosing: Choosing
    capacity: int
    start_id: int


def prefill(
    config: ModelConfig,
    params: Params,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    *,
    start_id: int,
    capacity: int,
) -> tuple[jax.Array, Memory]:
    """Reads the inputs and the start token.

    Args:
        config: the model.
        params: its parameters.
        tokens_BxS: inputs, each in the first ``lengths_B`` places of its row.
        lengths_B: tokens of each input.
        start_id: the decoder's first input: it comes before the inputs in a decoder-only model.
        capacity: how many new tokens the cache must hold.

    Returns:
        Logits [B, V] float32 of each row's first new token, and the memory.
    """
    hidden_BxPxM, memory = read_inputs(
        config, params, tokens_BxS, lengths_B, start_id=start_id, capacity=capacity
    )
    ends_B = memory.slots_R - 1
    hidden_BxM = jnp.take_along_axis(hidden_BxPxM, ends_B[:, None, None], axis=1)[:, 0]
    logits = build_model(config).apply({"params": params}, hidden_BxM, method="logits")
    return cast(jax.Array, logits), memory


def read_inputs(
    config: ModelConfig,
    params: Params,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    *,
    start_id: int,
    capacity: int,
) -> tuple[jax.Array, Memory]:
    """As ``prefill``, with the hidden states [B, P, M] of every place that the decoder read.

    P is 1, the start token, in an encoder-decoder, and 1 + S in a decoder-only model.
    """
    model, (batch, width) = build_model(config), tokens_BxS.shape
    start_Bx1 = jnp.full((batch, 1), start_id, jnp.int32)
    places_BxS = jnp.tile(jnp.arange(width, dtype=jnp.int32), (batch, 1))
    if config.is_encoder_decoder:
        segments_BxS = (places_BxS < lengths_B[:, None]).astype(jnp.int32)
        source = model.apply(
            {"params": params}, tokens_BxS, segments_BxS, places_BxS, method="source"
        )
        prompt_BxP, ends_B = start_Bx1, jnp.zeros(batch, jnp.int32)
    else:
        source, prompt_BxP, ends_B = None, jnp.concatenate([start_Bx1, tokens_BxS], 1), lengths_B
    length = prompt_BxP.shape[1]
    positions_BxP = jnp.tile(jnp.arange(length, dtype=jnp.int32), (batch, 1))
    hidden_BxPxM, cache = model.apply(
        {"params": params},
        prompt_BxP,
        positions_BxP,
        init_cache(config, batch, length + capacity),
        source,
        from_start=True,
        method="decode_cached",
    )
    return hidden_BxPxM, Memory(cache, source, ends_B.astype(jnp.int32) + 1)


def decode_step(
    config: ModelConfig, params: Params, memory: Memory, tokens_R: jax.Array
) -> tuple[jax.Array, Memory]:
    """Feeds one token per row; logits [R, V] float32 of the next, and the memory with it."""
    hidden_Rx1xM, cache = _feed(config, params, memory, tokens_R[:, None])
    logits = build_model(config).apply({"params": params}, hidden_Rx1xM[:, 0], method="logits")
    return cast(jax.Array, logits), memory.replace(cache=cache, slots_R=memory.slots_R + 1)


def verify_step(
    config: ModelConfig, params: Params, memory: Memory, tokens_RxN: jax.Array
) -> tuple[jax.Array, Memory]:
    """Feeds N tokens per row, of which later ones may turn out wrong.

    Returns:
        Logits [R, N, V] float32 of what follows each of them, and the memory with their keys and
        values in the slots from ``slots_R`` on, which itself is as it was. To keep the first n of
        a row's tokens, add n to its slot: nothing reads a slot that comes after its own, and the
        next tokens overwrite the others.
    """
    hidden_RxNxM, cache = _feed(config, params, memory, tokens_RxN)
    logits = build_model(config).apply({"params": params}, hidden_RxNxM, method="logits")
    return cast(jax.Array, logits), memory.replace(cache=cache)


def _feed(
    config: ModelConfig, params: Params, memory: Memory, tokens_RxN: jax.Array
) -> tuple[jax.Array, Any]:
    """Hidden states [R, N, M] of the next N tokens of every row, and the cache with them."""
    return build_model(config).apply(
        {"params": params},
        tokens_RxN,
        memory.slots_R[:, None] + jnp.arange(tokens_RxN.shape[1]),
        memory.cache,
        memory.source,
        method="decode_cached",
    )


def branch_step(
    config: ModelConfig,
    params: Params,
    memory: Memory,
    tokens_BxK: jax.Array,
    positions_B: jax.Array,
    visible_BxKxC: jax.Array,
    positions_BxC: jax.Array,
) -> tuple[jax.Array, Memory]:
    """Feeds the next token of K continuations of every row's text.

    They share its source and its cache.

    Args:
        config: the model.
        params: its parameters.
        memory: of B rows; the tokens go to the slots from ``slots_R`` on, K of them.
        tokens_BxK: one of each continuation.
        positions_B: theirs, the same for all continuations of a row.
        visible_BxKxC: the slots that each reads, its own among them.
        positions_BxC: of what is in each slot, these tokens included.

    Returns:
        Logits [B, K, V] float32 of what follows each, and the memory with them.
    """
    beams = tokens_BxK.shape[1]
    slots_BxK = memory.slots_R[:, None] + jnp.arange(beams)
    model = build_model(config)
    hidden_BxKxM, cache = model.apply(
        {"params": params},
        tokens_BxK,
        jnp.broadcast_to(positions_B[:, None], tokens_BxK.shape),
        memory.cache,
        memory.source,
        places=CachePlaces(slots_BxK, visible_BxKxC, positions_BxC),
        method="decode_cached",
    )
    logits = model.apply({"params": params}, hidden_BxKxM, method="logits")
    return cast(jax.Array, logits), memory.replace(cache=cache, slots_R=memory.slots_R + beams)


def take_rows(config: ModelConfig, memory: Memory, rows_R: jax.Array) -> Memory:
    """The memory of the given rows, in that order; rows may come several times."""
    stacked = functools.partial(
        jnp.take, indices=rows_R, axis=1 if config.execution.scan_layers else 0
    )
    source = memory.source
    if source is not None:
        source = source.replace(
            cross_kv=jax.tree.map(stacked, source.cross_kv), mask_BxS=source.mask_BxS[rows_R]
        )
    return Memory(jax.tree.map(stacked, memory.cache), source, memory.slots_R[rows_R])


def weights_of_a_step(params: Params) -> int:
    """Parameters that a row's step multiplies with, about."""
    read = [part for name, part in params.items() if "encoder" not in name]
    return sum(leaf.size for leaf in jax.tree.leaves(read))


def start(
    config: ModelConfig,
    plan: DecodingPlan,
    params: Params,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    settings: RowSettings,
) -> Decoding:
    """Reads the inputs, once each, and chooses every row's first token.

    ``settings`` may hold a multiple of the inputs' rows: each input is then answered so many
    times, the answers to one input in neighbouring rows.
    """
    logits_RxV, memory = prefill(
        config, params, tokens_BxS, lengths_B, start_id=plan.start_id, capacity=plan.capacity
    )
    batch, rows = tokens_BxS.shape[0], settings.limit_R.shape[0]
    if rows != batch:
        rows_R = jnp.repeat(jnp.arange(batch), rows // batch)
        logits_RxV, memory = logits_RxV[rows_R], take_rows(config, memory, rows_R)
    return append(plan, blank(plan, memory, settings), logits_RxV)


def blank(plan: DecodingPlan, memory: Memory | None, settings: RowSettings) -> Decoding:
    """Answers without tokens to inputs that were read."""
    rows, capacity, kept = (settings.limit_R.shape[0], plan.capacity, plan.choosing.alternatives)
    return Decoding(
        memory=memory,
        last_R=jnp.zeros(rows, jnp.int32),
        tokens_RxN=jnp.zeros((rows, capacity), jnp.int32),
        log_probs_RxN=jnp.zeros((rows, capacity), jnp.float32),
        likeliest_RxNxK=jnp.zeros((rows, capacity, kept), jnp.int32),
        likeliest_log_probs_RxNxK=jnp.zeros((rows, capacity, kept), jnp.float32),
        counts_R=jnp.zeros(rows, jnp.int32),
        finished_R=settings.limit_R <= 0,
        settings=settings,
    )


def advance(
    config: ModelConfig, plan: DecodingPlan, params: Params, decoding: Decoding, steps: jax.Array
) -> Decoding:
    """Up to ``steps`` more tokens per row; stops when all rows are finished.

    A finished row runs along without writing anything, at the slot where it stopped.
    """

    def unfinished(carry: tuple[jax.Array, Decoding]) -> jax.Array:
        return (carry[0] < steps) & ~jnp.all(carry[1].finished_R)

    def step(carry: tuple[jax.Array, Decoding]) -> tuple[jax.Array, Decoding]:
        done, decoding = carry
        before = decoding.memory
        assert before is not None  # it is what this runs the model with
        logits_RxV, memory = decode_step(config, params, before, decoding.last_R)
        slots_R = jnp.where(decoding.finished_R, before.slots_R, memory.slots_R)
        decoding = decoding.replace(memory=memory.replace(slots_R=slots_R))
        return done + 1, append(plan, decoding, logits_RxV)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), decoding))[1]


def append(plan: DecodingPlan, decoding: Decoding, logits_RxV: jax.Array) -> Decoding:
    """Chooses a token for every unfinished row, or takes the one given, and writes it down."""
    counts_R, settings = decoding.counts_R, decoding.settings
    chosen_R, log_probs_R = choose(
        logits_RxV, plan.choosing, settings, decoding.tokens_RxN, counts_R
    )
    running_R = ~decoding.finished_R
    rows_R = jnp.arange(counts_R.shape[0])
    places_R = jnp.where(running_R, counts_R, plan.capacity)  # out of range, so dropped
    if plan.choosing.alternatives:
        decoding = _keep_likeliest(plan.choosing, decoding, logits_RxV, places_R)
    ended_R = (chosen_R == settings.eos_R) & (counts_R >= settings.given_R)
    counts_R = counts_R + running_R
    ended_R |= counts_R >= jnp.minimum(settings.limit_R, plan.capacity)
    return decoding.replace(
        last_R=jnp.where(running_R, chosen_R, decoding.last_R),
        tokens_RxN=decoding.tokens_RxN.at[rows_R, places_R].set(chosen_R, mode="drop"),
        log_probs_RxN=decoding.log_probs_RxN.at[rows_R, places_R].set(log_probs_R, mode="drop"),
        counts_R=counts_R,
        finished_R=decoding.finished_R | ended_R,
    )


def _keep_likeliest(
    choosing: Choosing, decoding: Decoding, logits_RxV: jax.Array, places_R: jax.Array
) -> Decoding:
    """Writes down the likeliest tokens of the places; zeros while no row asks for them."""
    rows_R, shape = jnp.arange(places_R.shape[0]), (places_R.shape[0], choosing.alternatives)
    # What the condition gives is small; the whole arrays would be copied at every step.
    ids_RxK, log_probs_RxK = jax.lax.cond(
        jnp.any(decoding.settings.alternatives_R > 0),
        lambda logits_RxV: likeliest(logits_RxV, choosing),
        lambda _: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)),
        logits_RxV,
    )
    write = lambda whole, part: whole.at[rows_R, places_R].set(part, mode="drop")
    return decoding.replace(
        likeliest_RxNxK=write(decoding.likeliest_RxNxK, ids_RxK),
        likeliest_log_probs_RxNxK=write(decoding.likeliest_log_probs_RxNxK, log_probs_RxK),
    )


# The compiled forms; the memory of ``advance`` is donated to the result.
start_compiled = jax.jit(start, static_argnames=("config", "plan"))
advance_compiled = LazilyCompiled(
    advance, static_argnames=("config", "plan"), donate_argnames=("decoding",)
)
