"""Beam search over cached steps, with the length penalty of GNMT.

The hypotheses of an input share one row of the cache (``encdec.inference.beam_steps``). The search
runs in segments of a few steps. Between two segments the host removes decided inputs from the
batch when that halves it. When the slots are full, those that no hypothesis needs are freed:
hypotheses of one input mostly differ in their last tokens.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import NamedSharding

from encdec.inference.beam_steps import (
    BeamPlan,
    BeamState,
    advance,
    begin,
    length_penalty,
    prompt_slots,
    rearrange,
)
from encdec.inference.decoding import weights_of_a_step
from encdec.inference.leaving import rows_leave
from encdec.inference.shapes import coarse_bucket, shrunk
from encdec.model import ModelConfig, Params

LEAST_STEPS = 32  # that new slots are made for
SEGMENT = 16  # steps at most between two looks at which inputs are decided


@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """K hypotheses per input, NumPy arrays.

    Attributes:
        tokens_BxKxN: int32, EOS included, then zeros.
        log_probs_BxKxN: float32, of each token, then zeros.
        counts_BxK: int32, tokens in each.
        totals_BxK: float32, best first; sums of log-probabilities, divided by the length penalty;
            -inf where there is no hypothesis.
    """

    tokens_BxKxN: np.ndarray
    log_probs_BxKxN: np.ndarray
    counts_BxK: np.ndarray
    totals_BxK: np.ndarray


def beam_search(
    config: ModelConfig,
    plan: BeamPlan,
    params: Params,
    tokens_BxS: jax.Array | np.ndarray,
    lengths_B: jax.Array | np.ndarray,
    alpha: float,
    limit: int,
    *,
    inputs: int | None = None,
    sharding: NamedSharding | None = None,
) -> Hypotheses:
    """The best complete hypotheses found for each input, best first.

    A hypothesis is complete with EOS or at ``limit`` tokens. An input is decided when no hypothesis
    of it that is alive can still enter the complete ones.

    Args:
        config: the model.
        plan: beams and capacity.
        params: the model's parameters.
        tokens_BxS: inputs, each in the first ``lengths_B`` places of its row.
        lengths_B: tokens of each input.
        alpha: of ``length_penalty``, 0 or more.
        limit: new tokens at most, from 1 to ``plan.capacity``.
        inputs: how many of the rows are inputs, the first; by default all. The others are there
            for the batch's size, and get no hypotheses.
        sharding: of the rows over copies of the model; None on one device.
    """
    batch, width = tokens_BxS.shape
    real_B = np.arange(batch) < (batch if inputs is None else inputs)
    new_slots = min(LEAST_STEPS, limit) * plan.beams
    slots = coarse_bucket(prompt_slots(config, width) + new_slots)
    search, look = begin(config, plan, slots, params, tokens_BxS, lengths_B, real_B, alpha, limit)
    found = _nothing_found(batch, plan)
    rows_B = np.where(real_B, np.arange(batch), -1)  # the inputs that are still in the search
    multiplications = plan.beams * weights_of_a_step(params)
    copies = sharding.mesh.shape[sharding.spec[0]] if sharding else 1  # that hold some of the rows
    while True:
        look = jax.device_get(look)
        undecided, rows = int(look.open_B.sum()), len(look.open_B)
        if not undecided or look.count >= limit:
            break
        steps = min((slots - int(look.used)) // plan.beams, SEGMENT, limit - int(look.count))
        size = rows
        if rows_leave():
            size = shrunk(rows, undecided, multiplications, copies)
        if size < rows:
            _write_down(found, plan, search, rows_B, alpha)
            chosen_R = np.resize(np.flatnonzero(look.open_B), size)
            rows_B = np.where(np.arange(size) < undecided, rows_B[chosen_R], -1)
        elif steps < 1:
            chosen_R = np.arange(rows)
        else:
            search, look = advance(config, plan, params, search, alpha, limit, steps)
            continue
        slots = coarse_bucket(int(look.kept_B[chosen_R].max()) + new_slots)
        before = jax.tree.map(lambda x: x.sharding, search) if sharding else None
        search, look = rearrange(config, slots, search, chosen_R, rows_B >= 0)
        if before is not None:
            search = jax.device_put(search, before)
    _write_down(found, plan, search, rows_B, alpha)
    return found


def _nothing_found(batch: int, plan: BeamPlan) -> Hypotheses:
    shape = (batch, plan.beams)
    return Hypotheses(
        np.zeros((*shape, plan.capacity), np.int32),
        np.zeros((*shape, plan.capacity), np.float32),
        np.zeros(shape, np.int32),
        np.full(shape, -np.inf, np.float32),
    )


def _write_down(
    found: Hypotheses, plan: BeamPlan, search: BeamState, rows_B: np.ndarray, alpha: float
) -> None:
    """Puts the best hypotheses so far of the search's inputs into their rows (-1: no input)."""
    alive, complete, history, count = jax.device_get(
        (search.alive, search.complete, search.history, search.count)
    )
    totals_BxK = (alive.totals_BxK / length_penalty(count, alpha)).astype(np.float32)
    cut_off = alive.replace(totals_BxK=totals_BxK)
    ends = jax.tree.map(lambda *both: np.concatenate(both, axis=1), complete, cut_off)
    best_BxK = np.argsort(-ends.totals_BxK, axis=1, kind="stable")[:, : plan.beams]
    ends = jax.tree.map(lambda x: np.take_along_axis(x, best_BxK, axis=1), ends)
    there_BxK = np.isfinite(ends.totals_BxK)
    counts_BxK = np.where(there_BxK, ends.counts_BxK, 0)
    tokens_BxKxN = np.zeros((*counts_BxK.shape, plan.capacity), np.int32)
    log_probs_BxKxN = np.zeros(tokens_BxKxN.shape, np.float32)
    beams_BxK = np.zeros_like(counts_BxK)  # where each one's token is in the history
    for place in reversed(range(int(counts_BxK.max()))):
        of = functools.partial(_at, place, beams_BxK)
        last_BxK, before_BxK = counts_BxK == place + 1, counts_BxK > place + 1
        for past, end, out in (
            (history.tokens_BxNxK, ends.tokens_BxK, tokens_BxKxN),
            (history.log_probs_BxNxK, ends.log_probs_BxK, log_probs_BxKxN),
        ):
            out[:, :, place] = np.where(last_BxK, end, np.where(before_BxK, of(past), 0))
        parents_BxK = np.where(before_BxK, of(history.parents_BxNxK), 0)
        beams_BxK = np.where(last_BxK, ends.parents_BxK, parents_BxK)
    for into, made in (
        (found.tokens_BxKxN, tokens_BxKxN),
        (found.log_probs_BxKxN, log_probs_BxKxN),
        (found.counts_BxK, counts_BxK),
        (found.totals_BxK, ends.totals_BxK),
    ):
        into[rows_B[rows_B >= 0]] = made[rows_B >= 0]


def _at(place: int, beams_BxK: np.ndarray, past_BxNxK: np.ndarray) -> np.ndarray:
    return np.take_along_axis(past_BxNxK[:, place], beams_BxK, axis=1)
