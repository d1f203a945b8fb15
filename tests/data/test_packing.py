"""Packing: every example once, nothing too long, seqio's order, less padding than it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encdec.data.packing import METHODS, pack
from encdec.errors import ConfigError

lengths = st.lists(st.tuples(st.integers(0, 24), st.integers(1, 10)), max_size=80)


@given(lengths, st.sampled_from(METHODS))
def test_rows_hold_every_example_once_and_fit(pairs, method):
    sources = np.array([source for source, _ in pairs], int)
    targets = np.array([target for _, target in pairs], int)
    rows = pack(sources, targets, 24, 10, method)
    assert sorted(i for row in rows for i in row) == list(range(len(pairs)))
    for row in rows:
        assert list(row) == sorted(row)
        assert sources[row].sum() <= 24 and targets[row].sum() <= 10
    again = pack(sources, targets, 24, 10, method)
    assert [list(row) for row in rows] == [list(row) for row in again]


def test_greedy_opens_a_row_where_the_next_does_not_fit():
    """By one token: of the source in example 2, of the target in example 4."""
    rows = pack(np.array([3, 3, 1, 1, 0]), np.array([1, 1, 1, 4, 1]), 6, 5, "greedy")
    assert [list(row) for row in rows] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("seed", range(3))
def test_best_fit_pads_less_than_greedy_where_sides_vary_on_their_own(seed):
    rng = np.random.default_rng(seed)
    sources = rng.integers(1, 300, 1500)
    targets = rng.integers(1, 150, 1500)
    greedy, best = (len(pack(sources, targets, 1024, 512, m)) for m in ("greedy", "best_fit"))
    bound = max(sources.sum() / 1024, targets.sum() / 512)
    assert best < 0.95 * greedy
    assert best < 1.05 * bound


def test_complementary_pieces_fill_rows_exactly():
    rng = np.random.default_rng(0)
    cuts = rng.integers(100, 900, 300)
    sources = np.concatenate([cuts, 1024 - cuts])
    targets = np.concatenate([cuts // 4, 256 - cuts // 4])
    assert len(pack(sources, targets, 1024, 256)) <= 1.02 * 300


def test_wrong_use_is_refused():
    with pytest.raises(ConfigError, match=r"'tight'.*best_fit"):
        pack(np.array([1]), np.array([1]), 4, 4, "tight")
    with pytest.raises(ValueError, match=r"truncate"):
        pack(np.array([5]), np.array([1]), 4, 4)
