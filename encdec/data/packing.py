"""Packing examples into rows of two lengths at once: encoder and decoder side together.

"best_fit" is bin-centric greedy vector packing (Panigrahy et al. 2011, "Heuristics for Vector Bin
Packing"): one row is open at a time and takes, from a pool of waiting examples, the one that
fits best into the space left on both sides. Best-fit decreasing, its one-dimensional
relative, left up to 10 % more padding on real pairs, since it places the hard ones too early.
Rows are shuffled when read, so their order is free.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from encdec.errors import ConfigError

METHODS = ("best_fit", "greedy", "none")
POOL = 1024
TRIAL = 512
UNSEARCHED = 0.6
AHEAD = 64


def pack(
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    inputs_length: int,
    targets_length: int,
    method: str = "best_fit",
) -> list[np.ndarray]:
    """Example numbers of each row, ascending within it; every example is in exactly one row.

    "best_fit": little padding. "greedy": seqio's order, a new row where the next example does
    not fit. "none": one example a row. Deterministic. Lengths must fit a row.
    """
    sources = np.asarray(source_lengths, np.int64)
    targets = np.asarray(target_lengths, np.int64)
    if sources.size and (sources.max() > inputs_length or targets.max() > targets_length):
        raise ValueError("an example is longer than its row; truncate before packing")
    if method == "none":
        return list(np.arange(len(sources))[:, None])
    if method == "greedy":
        return _greedy(sources, targets, inputs_length, targets_length)
    if method == "best_fit":
        return _best_fit(sources, targets, inputs_length, targets_length)
    raise ConfigError(f"packing is {method!r}; expected one of {', '.join(METHODS)}")


def _greedy(sources: np.ndarray, targets: np.ndarray, S: int, T: int) -> list[np.ndarray]:
    rows: list[list[int]] = []
    # seqio packs batches of this many examples on their own.
    window = max(S, T)
    used_source = used_target = 0
    for example, (source, target) in enumerate(zip(sources.tolist(), targets.tolist())):
        used_source += source
        used_target += target
        if example % window == 0 or used_source > S or used_target > T:
            rows.append([])
            used_source, used_target = source, target
        rows[-1].append(example)
    return [np.asarray(row) for row in rows]


# Columns of a candidate: lengths, shares of a row, their sum and difference, example number.
SOURCE, TARGET, SOURCE_SHARE, TARGET_SHARE, SUM, DIFFERENCE, EXAMPLE = range(7)

Priority = Callable[[np.ndarray, float, float], np.ndarray]


def _alignment(candidates: np.ndarray, free_source: float, free_target: float) -> np.ndarray:
    return candidates[SOURCE_SHARE] * free_source + candidates[TARGET_SHARE] * free_target


def _fullness(candidates: np.ndarray, free_source: float, free_target: float) -> np.ndarray:
    return np.minimum(
        candidates[SOURCE_SHARE] - free_source, candidates[TARGET_SHARE] - free_target
    )


def _balance(candidates: np.ndarray, free_source: float, free_target: float) -> np.ndarray:
    imbalance = np.abs(candidates[DIFFERENCE] - (free_source - free_target))
    return candidates[SUM] - 2 * imbalance


# Which fits best depends on how sources and targets are distributed: by alignment where one side
# is coarse, by balance where the two sides vary on their own.
PRIORITIES: tuple[Priority, ...] = (_alignment, _fullness, _balance)


def _best_fit(sources: np.ndarray, targets: np.ndarray, S: int, T: int) -> list[np.ndarray]:
    source_shares, target_shares = sources / max(S, 1), targets / T
    examples = np.stack(
        [
            sources,
            targets,
            source_shares,
            target_shares,
            source_shares + target_shares,
            source_shares - target_shares,
            np.arange(len(sources)),
        ]
    )
    trial = examples[:, :TRIAL]
    priority = min(PRIORITIES, key=lambda one: len(_fill(trial, S, T, one)))
    return _fill(examples, S, T, priority)


def _fill(examples: np.ndarray, S: int, T: int, priority: Priority) -> list[np.ndarray]:
    total = examples.shape[1]
    pool = examples[:, :POOL].copy()
    count = taken = pool.shape[1]
    longest_source, longest_target = examples[[SOURCE, TARGET]].max(1, initial=0)
    rows: list[np.ndarray] = []
    while count:
        # The first part of a row costs no search: whatever comes next is as good as any.
        unsearched = _that_fit(examples[:2, taken : taken + AHEAD], S * UNSEARCHED, T * UNSEARCHED)
        row = list(range(taken, taken + unsearched))
        used = examples[[SOURCE, TARGET], taken : taken + unsearched].sum(1)
        free_source, free_target = S - int(used[0]), T - int(used[1])
        taken += unsearched
        while count:
            candidates = pool[:, :count]
            priorities = priority(candidates, free_source / max(S, 1), free_target / T)
            if free_source < longest_source or free_target < longest_target:
                too_long = candidates[SOURCE] > free_source
                too_long |= candidates[TARGET] > free_target
                priorities[too_long] = -np.inf
            place = int(priorities.argmax())
            if priorities[place] == -np.inf:
                break
            free_source -= int(pool[SOURCE, place])
            free_target -= int(pool[TARGET, place])
            row.append(int(pool[EXAMPLE, place]))
            count -= 1
            pool[:, place] = pool[:, count]
        rows.append(np.sort(row))
        more = min(pool.shape[1] - count, total - taken)
        pool[:, count : count + more] = examples[:, taken : taken + more]
        count += more
        taken += more
    return rows


def _that_fit(lengths: np.ndarray, free_source: float, free_target: float) -> int:
    """How many of the examples, in order, fit both remaining capacities."""
    used = np.cumsum(lengths, axis=1)
    fits = (used[SOURCE] <= free_source) & (used[TARGET] <= free_target)
    return int(fits.argmin()) if not fits.all() else len(fits)
