"""Packing examples into rows of two lengths at once: encoder and decoder side together.

"best_fit" is bin-centric greedy vector packing (Panigrahy et al. 2011, "Heuristics for Vector Bin
Packing"): one row is open at a time and takes, from a pool of waiting examples, the one that
scores best against the room left on both sides. Best-fit decreasing, its one-dimensional
relative, left up to 10 % more padding on real pairs, since it places the hard ones too early.
Rows are shuffled when read, so their order is free.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from encdec.errors import ConfigError

METHODS = ("best_fit", "greedy", "none")
POOL = 2048
TRIAL = 1024


def pack(
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    inputs_length: int,
    targets_length: int,
    method: str = "best_fit",
) -> list[np.ndarray]:
    """Example numbers of each row, ascending within it; every example lies in exactly one row.

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
    raise ConfigError(f"packing is {method!r}; wanted one of {', '.join(METHODS)}")


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


class _Pool:
    """Candidates for the open row, refilled in order as examples are placed."""

    def __init__(self, sources: np.ndarray, targets: np.ndarray, S: int, T: int):
        shares = np.stack([sources / S, targets / T]).astype(np.float32)
        self.waiting = (sources, targets, shares[0], shares[1], np.arange(len(sources)))
        self.next = 0
        self.columns = tuple(
            np.empty(min(POOL, len(sources)), column.dtype) for column in self.waiting
        )
        self.count = 0
        self.refill()

    def refill(self) -> None:
        more = min(len(self.columns[0]) - self.count, len(self.waiting[0]) - self.next)
        for column, waiting in zip(self.columns, self.waiting):
            column[self.count : self.count + more] = waiting[self.next : self.next + more]
        self.count += more
        self.next += more

    def take(self, place: int) -> tuple[int, int, int]:
        """Remove a candidate: (source length, target length, example)."""
        source, target, _, _, example = (column[place] for column in self.columns)
        self.count -= 1
        for column in self.columns:
            column[place] = column[self.count]
        return int(source), int(target), int(example)


Score = Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]


def _alignment(source: np.ndarray, target: np.ndarray, free_s: float, free_t: float) -> np.ndarray:
    return source * free_s + target * free_t


def _fullness(source: np.ndarray, target: np.ndarray, free_s: float, free_t: float) -> np.ndarray:
    return -np.maximum(free_s - source, free_t - target)


def _balance(source: np.ndarray, target: np.ndarray, free_s: float, free_t: float) -> np.ndarray:
    return source + target - 2 * np.abs((free_s - source) - (free_t - target))


# Which fits best depends on how sources and targets are distributed: by alignment where one side
# is coarse, by balance where the two sides vary on their own.
SCORES: tuple[Score, ...] = (_alignment, _fullness, _balance)


def _best_fit(sources: np.ndarray, targets: np.ndarray, S: int, T: int) -> list[np.ndarray]:
    trial = slice(0, TRIAL)
    score = min(SCORES, key=lambda score: len(_fill(sources[trial], targets[trial], S, T, score)))
    return _fill(sources, targets, S, T, score)


def _fill(
    sources: np.ndarray, targets: np.ndarray, S: int, T: int, score: Score
) -> list[np.ndarray]:
    pool = _Pool(sources, targets, S, T)
    rows: list[np.ndarray] = []
    while pool.count:
        free_source, free_target = S, T
        row: list[int] = []
        while pool.count:
            source, target, source_share, target_share, _ = (
                column[: pool.count] for column in pool.columns
            )
            scores = score(source_share, target_share, free_source / S, free_target / T)
            scores[(source > free_source) | (target > free_target)] = -np.inf
            place = int(scores.argmax())
            if scores[place] == -np.inf:
                break
            used_source, used_target, example = pool.take(place)
            free_source -= used_source
            free_target -= used_target
            row.append(example)
        rows.append(np.sort(row))
        pool.refill()
    return rows
