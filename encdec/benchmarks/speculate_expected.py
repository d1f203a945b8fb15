"""What drafts of each length would give: tokens per step of given answers, applied to measured
costs of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from encdec.inference.drafts import LookupTexts, look_up


def tokens_per_step(
    sources: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    eos_id: int,
    sizes: Sequence[int],
) -> dict[int, float]:
    """Tokens per step of so many tokens, by which each of the answers would have been made.

    Drafts change no answer, so that this follows from the answers alone. An answer's first token
    comes from reading its source and is in no step; answers of one token make none, and none at
    all give 1.

    Args:
        sources: token ids of each text.
        answers: those of the answers, EOS included where there is one.
        eos_id: the token that ends an answer.
        sizes: tokens that a step feeds: the last one and ``size - 1`` drafted ones.
    """
    rows, lengths_R = len(answers), np.array([len(answer) for answer in answers])
    answers_RxN, sources_RxS = _padded(answers), _padded(sources)
    texts = LookupTexts(sources_RxS, np.array([len(source) for source in sources], np.int32))
    eos_R, places_N = np.full(rows, eos_id, np.int32), np.arange(answers_RxN.shape[1])
    found = {}
    for size in sizes:
        counts_R, steps = np.ones(rows, np.int32), 0
        while (running_R := counts_R < lengths_R).any():
            made_RxN = np.where(places_N < counts_R[:, None], answers_RxN, 0)
            drafts_RxD = look_up(texts, made_RxN, counts_R, eos_R, size - 1, np)
            next_RxD = counts_R[:, None] + np.arange(size - 1)
            inside_RxD = np.minimum(next_RxD, len(places_N) - 1)
            right_RxD = (np.take_along_axis(answers_RxN, inside_RxD, 1) == drafts_RxD) & (
                next_RxD < lengths_R[:, None]
            )
            right_R = np.logical_and.accumulate(right_RxD, axis=1).sum(axis=1)
            counts_R = np.where(running_R, np.minimum(counts_R + right_R + 1, lengths_R), counts_R)
            counts_R = counts_R.astype(np.int32)
            steps += int(running_R.sum())
        made = int(np.maximum(lengths_R - 1, 0).sum())
        found[size] = made / steps if steps else 1.0
    return found


def expected_table(
    ratios: Mapping[str, Mapping[int, float]], allowed: Mapping[str, Mapping[int, float]]
) -> Table:
    """Tokens per second of drafting steps in those of plain ones, one row at a time.

    Args:
        ratios: by runtime, the cost of a step of each size in steps of one token.
        allowed: by task, tokens per step of each size.
    """
    sizes = list(next(iter(allowed.values())))
    title = "expected: tokens per step of a file's answers, over the cost of the step"
    table = Table(title=title)
    for column in ("task", "runtime", *(f"k = {size}" for size in sizes)):
        left = column in ("task", "runtime")
        table.add_column(column, justify="left" if left else "right")
    for task, tokens in allowed.items():
        table.add_row(task, "tokens per step", *(f"{tokens[size]:.2f}" for size in sizes))
        for runtime, costs in ratios.items():
            cells = [f"{tokens[k] / costs[k]:.2f}" if k in costs else "–" for k in sizes]
            table.add_row("", f"{runtime}, times plain", *cells)
    return table


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [R, N], zeros behind each."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = ids
    return padded
