"""Intervals that cover what they should, and tests that do not see differences in noise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import sacrebleu

from encdec.metrics import intervals
from encdec.metrics import text_metrics as scores


def mean_of(values):
    return lambda indices: values[indices].mean(axis=1)


def ratio(sums):
    return sums[:, 0] / sums[:, 1]


def test_a_mean_has_the_interval_of_the_normal_law():
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = intervals.bootstrap(mean_of(values), 400)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=half / 5)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 5)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(200):
        found = intervals.bootstrap(mean_of(rng.binomial(1, 0.3, 100)), 100, resamples=200)
        hits += found.low <= 0.3 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_pairing_finds_what_single_intervals_hide():
    rng = np.random.default_rng(3)
    first = rng.normal(0, 10, 200)
    second = first + rng.normal(0.5, 1, 200)
    assert intervals.compare(mean_of(first), mean_of(second), 200).low > 0
    assert (
        intervals.randomisation_test(first[:, None], second[:, None], lambda sums: sums[:, 0])
        < 0.01
    )
    alone = intervals.bootstrap(mean_of(first), 200)
    assert alone.high - alone.low > 2


def test_randomisation_equals_the_exact_test_and_is_level_in_noise():
    total = lambda sums: sums[:, 0]
    # All 2^5 sign flips of (1, 2, 3, 4, 5): two reach |sum| = 15.
    exact = intervals.randomisation_test(
        np.zeros((5, 1)), np.array([[1], [2], [3], [4], [5]]), total, trials=20_000
    )
    assert exact == pytest.approx(2 / 32, abs=0.01)
    rng = np.random.default_rng(4)
    small = [
        intervals.randomisation_test(*rng.normal(size=(2, 50, 1)), total, trials=500) < 0.05
        for _ in range(200)
    ]
    assert np.mean(small) < 0.1
    with pytest.raises(ValueError, match="same examples"):
        intervals.randomisation_test(np.ones((1, 1)), np.ones((2, 1)), total)


REFERENCES = [
    "the cat sat on the mat today",
    "a dog ran in the park all day",
    "we go home now then",
    "one two three four five six",
    "red and blue make violet paint",
    "so it goes on for us",
    "no more words are left here",
]
FIRST = [
    "the cat sat on a mat today",
    "a dog ran in a park day",
    "we go home",
    "one two six",
    "red and blue",
    "so it goes on for us",
    "words are here",
]
SECOND = [
    "the cat on the mat",
    "a dog ran in the park all day",
    "we go home now then",
    "one two three four five six",
    "red and green make violet paint",
    "so it went on",
    "no more words are left here",
]


@pytest.mark.parametrize("seeds", [[FIRST], [FIRST, FIRST[:3] + SECOND[3:5] + ["so", "no"]]])
def test_swaps_within_a_corpus_score_equal_all_of_them_counted_by_the_library(seeds):
    """p of BLEU against every one of the 2^7 swaps, each scored by sacrebleu from the texts; of
    several seeds, with the mean of their BLEU, which is not that of their mean counts."""

    def corpus_bleu(texts):
        return sacrebleu.corpus_bleu(texts, [REFERENCES], tokenize="none", force=True).score

    def mean_bleu(swaps, side):
        pairs = [zip(zip(one, SECOND), swaps) for one in seeds]
        return np.mean([corpus_bleu([pair[swap ^ side] for pair, swap in one]) for one in pairs])

    differences = np.array(
        [
            abs(mean_bleu(swaps, True) - mean_bleu(swaps, False))
            for swaps in itertools.product((False, True), repeat=len(FIRST))
        ]
    )
    exact = np.mean(differences >= differences[0] - 1e-9)
    wanted = [[text] for text in REFERENCES]
    [second], *first = [scores.bleu(wanted, texts) for texts in (SECOND, *seeds)]
    found = intervals.randomisation_test(
        np.stack([one.parts_ExK for [one] in first]),
        second.parts_ExK,
        second.of_sums,
        trials=50_000,
    )
    assert 0.03 < exact < 0.9
    # Five standard errors of 50,000 trials.
    assert found == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / 50_000))


def test_a_score_that_is_not_defined_has_no_p_value_and_its_trials_count_as_large():
    nothing = np.zeros((3, 2))
    with np.errstate(invalid="ignore"):
        assert np.isnan(intervals.randomisation_test(nothing, nothing + 1, ratio))
        # Only without a swap, or with both, have both sides something below the line.
        mixed = [np.array([[1.0, 1], [0, 0]]), np.array([[0.0, 0], [2, 1]])]
        assert intervals.randomisation_test(*mixed, ratio, trials=400) == 1
