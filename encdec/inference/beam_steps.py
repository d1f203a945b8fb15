"""The compiled parts of beam search, as pure functions of its state.

The hypotheses of an input share one row of the cache. A step writes the keys and values of each
hypothesis's last token into a slot of its own, and a mask says which slots a hypothesis consists
of: the prompt, read by all, and its own ancestors. So nothing is moved when hypotheses change
places, the prompt and the source are kept and read once per input, and the queries of all
hypotheses are one product. ``rearrange`` moves the slots that are still needed to the front, once
in a while.

Tokens are kept as they were chosen, with the places of their parents; nothing is rewritten when
hypotheses change places there either.
"""

from __future__ import annotations

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp

from encdec.inference.decoding import Memory, branch_step, prefill, take_rows
from encdec.inference.decoding_compiler import LazilyCompiled
from encdec.inference.shapes import coarse_bucket
from encdec.model import ModelConfig, Params
from encdec.model.cache import rearranged, widen
from encdec.model.encoder_decoder import Source


@dataclasses.dataclass(frozen=True)
class BeamPlan:
    """What a compiled beam search depends on, in addition to the model.

    Attributes:
        beams: K, hypotheses kept alive for each input, and returned.
        capacity: N, new tokens at most.
        start_id: the decoder's first input.
        eos_id: completes a hypothesis.
        vocabulary_size: ids from here on are never chosen.
    """

    beams: int
    capacity: int
    start_id: int
    eos_id: int
    vocabulary_size: int


class Ends(flax.struct.PyTreeNode):
    """The last tokens of K hypotheses per input; the others are found in the history.

    Attributes:
        totals_BxK: float32, of log-probabilities, those of complete ones divided by the length
            penalty; -inf where there is none.
        counts_BxK: int32, tokens in each hypothesis.
        tokens_BxK: int32.
        log_probs_BxK: float32.
        parents_BxK: int32, the hypotheses that were alive before, from which these came.
    """

    totals_BxK: jax.Array
    counts_BxK: jax.Array
    tokens_BxK: jax.Array
    log_probs_BxK: jax.Array
    parents_BxK: jax.Array


class History(flax.struct.PyTreeNode):
    """What was alive after each of N tokens: fields of ``Ends``."""

    tokens_BxNxK: jax.Array
    log_probs_BxNxK: jax.Array
    parents_BxNxK: jax.Array


class BeamState(flax.struct.PyTreeNode):
    """The state of B inputs; C is the number of cache slots.

    Attributes:
        memory: B rows; ``slots_R`` are the first free slots.
        positions_B: of the next token.
        visible_BxKxC: the slots that each hypothesis alive consists of.
        positions_BxC: of what is in the slots.
        alive: totals are of log-probabilities; all -inf once an input is decided.
        complete: best first.
        history: up to the hypotheses alive.
        count: tokens so far.
    """

    memory: Memory
    positions_B: jax.Array
    visible_BxKxC: jax.Array
    positions_BxC: jax.Array
    alive: Ends
    complete: Ends
    history: History
    count: jax.Array


class BeamProgress(flax.struct.PyTreeNode):
    """What the host needs to know of a search.

    Attributes:
        open_B: bool, the inputs that are not decided.
        kept_B: slots that the hypotheses alive of each consist of.
        used: slots in use, of the row that uses most.
        count: tokens so far.
    """

    open_B: jax.Array
    kept_B: jax.Array
    used: jax.Array
    count: jax.Array


def length_penalty(length: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """``((5 + length) / 6) ** alpha`` (GNMT, arXiv 1609.08144, eq. 14); 1 for alpha = 0."""
    return ((5.0 + length) / 6.0) ** alpha


def prompt_slots(config: ModelConfig, width: int) -> int:
    """Slots of what is read before the first new token."""
    return 1 if config.is_encoder_decoder else 1 + width


@functools.partial(jax.jit, static_argnames=("config", "plan", "slots"))
def begin(
    config: ModelConfig,
    plan: BeamPlan,
    slots: int,
    params: Params,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    real_B: jax.Array,
    alpha: jax.Array,
    limit: jax.Array,
) -> tuple[BeamState, BeamProgress]:
    """Reads the inputs and chooses the first tokens."""
    (batch, width), beams = tokens_BxS.shape, plan.beams
    capacity = slots - prompt_slots(config, width)
    logits_BxV, memory = prefill(
        config, params, tokens_BxS, lengths_B, start_id=plan.start_id, capacity=capacity
    )
    whole = lambda value, dtype: jnp.full((batch, beams), value, dtype)
    nothing = Ends(
        whole(-jnp.inf, jnp.float32),
        *(whole(0, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.int32)),
    )
    # One empty hypothesis per input; with K, all would grow identically.
    first_B = jnp.where(real_B, 0.0, -jnp.inf)
    alive = nothing.replace(totals_BxK=nothing.totals_BxK.at[:, 0].set(first_B))
    past = jnp.zeros((batch, plan.capacity, beams), jnp.int32)
    if memory.source is not None:
        memory = memory.replace(source=_widened(config, memory.source))
    places_BxC = jnp.tile(jnp.arange(slots), (batch, 1))
    visible_BxC = places_BxC < memory.slots_R[:, None]
    search = BeamState(
        memory,
        memory.slots_R,
        jnp.tile(visible_BxC[:, None], (1, beams, 1)),
        places_BxC,
        alive,
        nothing,
        History(past, past.astype(jnp.float32), past),
        jnp.int32(0),
    )
    logits_BxKxV = jnp.broadcast_to(logits_BxV[:, None], (batch, beams, logits_BxV.shape[1]))
    search = _grow(plan, search, logits_BxKxV, alpha, limit)
    return search, _look(search)


def _widened(config: ModelConfig, source: Source) -> Source:
    """For fewer programs of steps, whose time hardly depends on it."""
    before = source.mask_BxS.shape[1]
    width = coarse_bucket(before)
    mask_BxS = jnp.pad(source.mask_BxS, ((0, 0), (0, width - before)))
    return Source(widen(config, source.cross_kv, width), mask_BxS)


@functools.partial(LazilyCompiled, static_argnames=("config", "plan"), donate_argnames=("search",))
def advance(
    config: ModelConfig,
    plan: BeamPlan,
    params: Params,
    search: BeamState,
    alpha: jax.Array,
    limit: jax.Array,
    steps: jax.Array,
) -> tuple[BeamState, BeamProgress]:
    """Up to ``steps`` more tokens, for which there are slots; ends when all inputs are decided."""
    last = search.count + steps

    def undecided(search: BeamState) -> jax.Array:
        return (search.count < last) & jnp.any(_open(search))

    def step(search: BeamState) -> BeamState:
        memory = search.memory
        slots = search.positions_BxC.shape[1]
        own_BxKxC = jnp.arange(slots) == (
            memory.slots_R[:, None, None] + jnp.arange(plan.beams)[:, None]
        )
        visible_BxKxC = search.visible_BxKxC | own_BxKxC
        positions_BxC = jnp.where(
            jnp.any(own_BxKxC, axis=1), search.positions_B[:, None], search.positions_BxC
        )
        logits_BxKxV, memory = branch_step(
            config,
            params,
            memory,
            search.alive.tokens_BxK,
            search.positions_B,
            visible_BxKxC,
            positions_BxC,
        )
        search = search.replace(
            memory=memory,
            positions_B=search.positions_B + 1,
            visible_BxKxC=visible_BxKxC,
            positions_BxC=positions_BxC,
        )
        return _grow(plan, search, logits_BxKxV, alpha, limit)

    search = jax.lax.while_loop(undecided, step, search)
    return search, _look(search)


def _grow(
    plan: BeamPlan, search: BeamState, logits_BxKxV: jax.Array, alpha: jax.Array, limit: jax.Array
) -> BeamState:
    """Every hypothesis by one token: the best K continue, those with EOS become complete."""
    alive, (batch, beams, size) = search.alive, logits_BxKxV.shape
    log_probs = jax.nn.log_softmax(logits_BxKxV)
    allowed = jnp.arange(size) < plan.vocabulary_size
    totals = alive.totals_BxK[:, :, None] + jnp.where(allowed, log_probs, -jnp.inf)
    # At most K of the best 2K have EOS, so that K remain to continue.
    totals_BxC, places_BxC = jax.lax.top_k(totals.reshape(batch, -1), 2 * beams)
    count = search.count + 1
    candidates = Ends(
        totals_BxC,
        jnp.full_like(places_BxC, count),
        places_BxC % size,
        jnp.take_along_axis(log_probs.reshape(batch, -1), places_BxC, axis=1),
        places_BxC // size,
    )
    ended_BxC = candidates.tokens_BxK == plan.eos_id
    final_BxC = jnp.where(ended_BxC, totals_BxC / length_penalty(count, alpha), -jnp.inf)
    complete = _best(search.complete, candidates.replace(totals_BxK=final_BxC))
    # Stable: candidates come best first.
    continuing_BxK = jnp.argsort(ended_BxC, axis=1, stable=True)[:, :beams]
    alive = _pick(candidates, continuing_BxK)
    still_BxK = ~jnp.take_along_axis(ended_BxC, continuing_BxK, axis=1)
    alive = alive.replace(totals_BxK=jnp.where(still_BxK, alive.totals_BxK, -jnp.inf))
    hopeful_B = _hopeful(alive, complete, alpha, limit)
    alive = alive.replace(totals_BxK=jnp.where(hopeful_B[:, None], alive.totals_BxK, -jnp.inf))
    write = lambda past, new: jax.lax.dynamic_update_index_in_dim(past, new, search.count, 1)
    history = History(
        write(search.history.tokens_BxNxK, alive.tokens_BxK),
        write(search.history.log_probs_BxNxK, alive.log_probs_BxK),
        write(search.history.parents_BxNxK, alive.parents_BxK),
    )
    visible_BxKxC = jnp.take_along_axis(
        search.visible_BxKxC, alive.parents_BxK[:, :, None], axis=1, mode="clip"
    )
    return search.replace(
        visible_BxKxC=visible_BxKxC, alive=alive, complete=complete, history=history, count=count
    )


def _hopeful(alive: Ends, complete: Ends, alpha: jax.Array, limit: jax.Array) -> jax.Array:
    """Whether a hypothesis that is alive may still enter the complete ones, bool [B].

    Log-probabilities only fall, and the longest answer is divided by the most.
    """
    hope_B = alive.totals_BxK[:, 0] / length_penalty(limit, alpha)
    return hope_B > complete.totals_BxK[:, -1]


def _open(search: BeamState) -> jax.Array:
    """The inputs that are not decided, bool [B]."""
    return jnp.any(search.alive.totals_BxK > -jnp.inf, axis=1)


def _needed(search: BeamState) -> jax.Array:
    """The slots that any hypothesis alive consists of, bool [B, C]."""
    alive_BxKx1 = search.alive.totals_BxK[:, :, None] > -jnp.inf
    return jnp.any(search.visible_BxKxC & alive_BxKx1, axis=1)


def _look(search: BeamState) -> BeamProgress:
    kept_B = jnp.sum(_needed(search), axis=1)
    return BeamProgress(_open(search), kept_B, jnp.max(search.memory.slots_R), search.count)


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def rearrange(
    config: ModelConfig, slots: int, search: BeamState, rows_R: jax.Array, real_R: jax.Array
) -> tuple[BeamState, BeamProgress]:
    """The search of the given rows with ``slots`` slots, of which the needed ones come first.

    Rows that are not ``real_R`` have no hypotheses from now on.
    """
    take = functools.partial(jnp.take, indices=rows_R, axis=0, mode="clip")
    memory = search.memory
    source = take_rows(config, memory.replace(cache=()), rows_R).source
    rest = jax.tree.map(take, search.replace(memory=None, count=None))
    totals_RxK = jnp.where(real_R[:, None], rest.alive.totals_BxK, -jnp.inf)
    rest = rest.replace(alive=rest.alive.replace(totals_BxK=totals_RxK))
    needed_RxC = _needed(rest)
    order_RxC = jnp.argsort(~needed_RxC, axis=1, stable=True)
    held = order_RxC.shape[1]
    order_RxC = jnp.pad(order_RxC, ((0, 0), (0, max(0, slots - held))))[:, :slots]
    kept_R = jnp.sum(needed_RxC, axis=1, dtype=jnp.int32)
    visible_RxKxC = jnp.take_along_axis(rest.visible_BxKxC, order_RxC[:, None], axis=2)
    search = rest.replace(
        memory=Memory(rearranged(config, memory.cache, rows_R, order_RxC), source, kept_R),
        visible_BxKxC=visible_RxKxC & (jnp.arange(slots) < kept_R[:, None, None]),
        positions_BxC=jnp.take_along_axis(rest.positions_BxC, order_RxC, axis=1),
        count=search.count,
    )
    return search, _look(search)


def _pick(ends: Ends, places_BxK: jax.Array) -> Ends:
    return jax.tree.map(lambda x: jnp.take_along_axis(x, places_BxK, axis=1, mode="clip"), ends)


def _best(first: Ends, second: Ends) -> Ends:
    """The best of two sets, as many as the first holds; the first set's come first in a tie."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)
    _, places_BxK = jax.lax.top_k(both.totals_BxK, first.totals_BxK.shape[1])
    return _pick(both, places_BxK)
