"""Finished rows leave a batch: steps are made with those that are still being answered."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from encdec.inference.decoding import Decoding, take_rows, weights_of_a_step
from encdec.inference.shapes import shrunk
from encdec.model import ModelConfig, Params

# What is written down of every row.
ANSWERS = (
    *("tokens_RxN", "log_probs_RxN", "likeliest_RxNxK", "likeliest_log_probs_RxNxK"),
    *("counts_R", "finished_R"),
)


def rows_leave() -> bool:
    """Whether a smaller batch may be worth its compilation: on CPUs, where that was measured.

    Elsewhere a step of few rows is bound by reading the weights, and gains little.
    """
    return jax.default_backend() == "cpu"


class LeavingRows:
    """Advances a batch on one device, from which finished rows leave when that halves it.

    Callers see all rows all the time: the answers of those that left are kept on the host.

    Args:
        config: the model.
        params: its parameters.
        plain: makes so many more tokens of a batch of any size.
        rows: of the batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        plain: Callable[[Decoding, int], Decoding],
        rows: int,
    ):
        self._config, self._plain, self._weights = config, plain, weights_of_a_step(params)
        self._rows_R = np.arange(rows)  # what the rows of the part are; -1: none
        self._part: Decoding | None = None  # None while no row has left

    def advance(self, decoding: Decoding, steps: int) -> Decoding:
        """So many more tokens of the rows that are not finished."""
        finished_R = np.array(decoding.finished_R)
        part = decoding if self._part is None else self._part
        running_R = (self._rows_R >= 0) & ~finished_R[self._rows_R]
        size = shrunk(len(running_R), int(running_R.sum()), self._weights)
        if size < len(running_R):
            decoding = self._on_host(decoding)
            chosen_R = np.resize(np.flatnonzero(running_R), size)
            self._rows_R = np.where(
                np.arange(size) < running_R.sum(), self._rows_R[chosen_R], -1
            ).astype(np.int32)
            whole, part = part, _taken(self._config, part, chosen_R)
            for leaf in jax.tree.leaves(whole.memory):
                leaf.delete()  # callers keep the old state, and would keep its cache alive
        elif self._part is None:
            return self._plain(decoding, steps)
        there_R = self._rows_R >= 0
        stopped_R = ~there_R | finished_R[self._rows_R]
        part = self._plain(part.replace(finished_R=stopped_R), steps)
        self._part = part
        for name in ANSWERS:
            getattr(decoding, name)[self._rows_R[there_R]] = np.asarray(getattr(part, name))[
                there_R
            ]
        return decoding

    def _on_host(self, decoding: Decoding) -> Decoding:
        """All rows' answers, as NumPy arrays that are written to."""
        if self._part is not None:
            return decoding
        return decoding.replace(
            memory=None, **{name: np.array(getattr(decoding, name)) for name in ANSWERS}
        )


@functools.partial(jax.jit, static_argnames=("config",))
def _taken(config: ModelConfig, decoding: Decoding, rows_R: jax.Array) -> Decoding:
    assert decoding.memory is not None  # it is what this runs the model with
    rest = jax.tree.map(lambda x: x[rows_R], decoding.replace(memory=None))
    return rest.replace(memory=take_rows(config, decoding.memory, rows_R))
