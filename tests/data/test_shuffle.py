"""The order of rows: grain's own where it is sound, always a permutation, the same on all hosts."""

from __future__ import annotations

import numpy as np
import pytest
from grain.experimental import index_shuffle
from hypothesis import example, given, settings
from hypothesis import strategies as st

from encdec.data.shuffle import KEPT_ROWS, _whole_order, epoch_order_seed, permuted, shuffled_rows


@settings(max_examples=60, deadline=None)
@given(st.integers(2_000, 2**40), st.integers(0, 2**32 - 1), st.data())
@example(65_536, 52, None)
@example(65_538, 0, None)
@example(2**32, 2**32 - 1, None)
def test_numbers_are_those_of_grains_index_shuffle(count, seed, data):
    if (count - 1).bit_length() % 2 and (count - 1).bit_count() == 1:
        count += 1  # grain's own mistake, below
    places = [0, 1, count - 1]
    if data:
        places += data.draw(st.lists(st.integers(0, count - 1), max_size=20))
    expected = [index_shuffle(p, max_index=count - 1, seed=seed, rounds=4) for p in places]
    assert permuted(np.array(places), count, seed).tolist() == expected
    if count <= KEPT_ROWS:
        assert _whole_order(count, seed)[places].tolist() == expected


def test_four_to_the_k_plus_one_rows_are_all_visited_though_grain_repeats_one():
    rows = 65_537
    first, last = (index_shuffle(p, max_index=rows - 1, seed=5, rounds=4) for p in (0, rows - 1))
    assert first == last
    assert np.bincount(shuffled_rows(np.arange(rows), rows, 3), minlength=rows).tolist() == (
        [1] * rows
    )
    above = KEPT_ROWS + 1
    assert len(np.unique(permuted(np.arange(above), above, 5))) == above


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 10**12), st.integers(0, 2**40))
def test_any_stretch_of_the_stream_is_the_epochs_one_after_another(rows, start, seed):
    positions = np.arange(start, start + 50)
    found = shuffled_rows(positions, rows, seed)
    for position, row in zip(positions.tolist(), found.tolist()):
        epoch, place = divmod(position, rows)
        order = _whole_order(rows, epoch_order_seed(seed, epoch))
        assert row == order[place]
        assert sorted(order) == list(range(rows))


@pytest.mark.parametrize("rows", [KEPT_ROWS - 1, KEPT_ROWS, KEPT_ROWS + 1, 1_000_003])
def test_kept_and_computed_orders_meet_without_a_seam(rows):
    positions = np.arange(3 * rows - 40, 3 * rows + 40)
    found = shuffled_rows(positions, rows, "a seed")
    for epoch, part in ((2, found[:40]), (3, found[40:])):
        places = positions[(positions // rows) == epoch] % rows
        expected = permuted(places, rows, epoch_order_seed("a seed", epoch))
        np.testing.assert_array_equal(part, expected)
    assert len(np.unique(found[:40])) == len(np.unique(found[40:])) == 40
