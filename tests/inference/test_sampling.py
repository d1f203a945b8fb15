"""Choosing tokens from given logits: distributions, supports, penalties."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from encdec.inference.sampling import (
    Choosing,
    choose,
    first_highest,
    likeliest,
    log_probs_of,
    repeating_tokens,
    truncate,
)
from tests.inference.examples import rows

LOGITS = np.log(np.array([0.30, 0.25, 0.18, 0.12, 0.08, 0.04, 0.02, 0.01], np.float32)) + 3.0
DRAWS = 20_000
choose_compiled = jax.jit(choose, static_argnames="choosing")


def draw(logits=LOGITS, count=DRAWS, vocabulary_size=8, answers=None, **settings):
    """``count`` independent draws from the same logits, and their log-probabilities."""
    choosing = Choosing(
        vocabulary_size, sampled=True, truncated=True, penalised="repetition_penalty" in settings
    )
    answers = np.zeros((count, 1), np.int32) if answers is None else answers
    lengths = np.full(count, answers.shape[1] if "repetition_penalty" in settings else 0)
    return map(
        np.array,
        choose_compiled(
            np.tile(logits, (count, 1)), choosing, rows(count, 9, **settings), answers, lengths
        ),
    )


def expected(temperature=1.0, top_k=0, top_p=1.0):
    """The distribution by its definition, with a sort."""
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    keep = order[: top_k or len(p)]
    mass = p[keep] / p[keep].sum()
    keep = keep[: np.searchsorted(np.cumsum(mass), top_p - 1e-9) + 1]
    result = np.zeros_like(p)
    result[keep] = p[keep] / p[keep].sum()
    return result


@pytest.mark.parametrize(
    "settings, support",
    [
        ({}, 8),
        ({"temperature": 0.5}, 8),
        ({"temperature": 3.0, "top_k": 5}, 5),
        ({"top_k": 3}, 3),
        ({"top_k": 1}, 1),
        ({"top_p": 0.5}, 2),  # 0.30 + 0.25
        ({"top_p": 0.56}, 3),
        ({"top_p": 0.01}, 1),
        ({"top_k": 3, "top_p": 0.75}, 2),  # of 0.73: (0.30 + 0.25) / 0.73 = 0.753
        ({"temperature": 2.0, "top_p": 0.9}, 6),
    ],
)
def test_draws_follow_the_distribution(settings, support):
    wanted = expected(**settings)
    assert (wanted > 0).sum() == support
    tokens, log_probs = draw(**{"temperature": 1.0} | settings)
    counts = np.bincount(tokens, minlength=8)
    assert (counts[wanted == 0] == 0).all()  # the support is exact
    kept = wanted > 0
    if support > 1:
        # Each test fails one right sampler in a million.
        assert stats.chisquare(counts[kept], wanted[kept] * DRAWS).pvalue > 1e-6
    # The model's own log-probability, whatever was done to draw.
    np.testing.assert_allclose(log_probs, np.log(expected())[tokens], rtol=1e-4)


def test_the_statistical_test_can_fail():
    tokens, _ = draw(temperature=1.1)
    counts = np.bincount(tokens, minlength=8)
    assert stats.chisquare(counts, expected() * DRAWS).pvalue < 1e-6


def test_rows_differ_in_their_settings():
    count = 4
    tokens, _ = draw(
        count=count,
        temperature=[0.0, 1.0, 0.0, 1.0],
        top_k=[0, 1, 5, 0],
        top_p=[1.0, 1.0, 0.1, 1e-6],
    )
    np.testing.assert_array_equal(tokens, 0)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (40, 1.0), (0, 0.8), (40, 0.8), (10_000, 1.0)])
def test_truncation_equals_sorting(top_k, top_p):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (5, 1000)).astype(np.float32)
    logits[:, 7] = -np.inf
    got = np.array(jax.jit(truncate)(logits, jnp.full(5, top_k), jnp.full(5, top_p, jnp.float32)))
    for row, result in zip(logits, got):
        order = np.argsort(-row)[: top_k or None]
        p = np.exp(row[order].astype(np.float64))
        p /= p.sum()
        keep = order[np.cumsum(p) - p < top_p]
        np.testing.assert_array_equal(
            np.flatnonzero(result > -np.inf), np.sort(keep[row[keep] > -np.inf])
        )
        np.testing.assert_array_equal(result[keep], row[keep])


def test_the_first_highest_is_argmax():
    """Of equal numbers, infinite ones, and a place of the row where nothing is a number."""
    x = np.random.default_rng(0).integers(0, 9, (40, 37)).astype(np.float32)
    x[3], x[4, 5:], x[5, 7] = -np.inf, -np.inf, np.inf
    for made in (first_highest(x, np), jax.jit(first_highest)(x)):
        np.testing.assert_array_equal(made, x.argmax(-1))
        assert made.dtype == np.int32
    assert first_highest(np.full((1, 4), np.nan), np)[0] in range(4)


def test_ids_beyond_the_vocabulary_are_never_chosen():
    logits = LOGITS.copy()
    logits[6:] = 50.0
    tokens, _ = draw(logits, vocabulary_size=6, temperature=1.0)
    assert tokens.max() == 5
    greedy, _ = choose_compiled(
        logits[None], Choosing(6), rows(1, 9), np.zeros((1, 4), np.int32), np.zeros(1, int)
    )
    assert int(greedy[0]) == 0


def test_repetition_penalty_lowers_what_was_said():
    logits = np.array([2.0, 1.5, -1.0, -1.1], np.float32)
    answers = np.array([[0, 2, 2, 1]], np.int32)

    def chosen(penalty, count, logits=logits):
        return int(
            choose_compiled(
                logits[None],
                Choosing(4, penalised=True),
                rows(1, 9, repetition_penalty=penalty),
                answers,
                np.array([count]),
            )[0][0]
        )

    assert chosen(1.0, 3) == 0
    assert chosen(2.0, 3) == 1  # 2.0 / 2 < 1.5; place 3 of the answers is not written yet
    assert chosen(2.0, 4) == 0  # now 1 is lowered too: 1.0 against 0.75
    assert chosen(2.0, 4, logits - 8.0) == 3  # negative logits are multiplied
    assert chosen(2.0, 0) == 0
    tokens, _ = draw(
        count=DRAWS,
        temperature=1.0,
        repetition_penalty=1.5,
        answers=np.tile(np.array([[0, 3]], np.int32), (DRAWS, 1)),
    )
    p = LOGITS.astype(np.float64)
    p[[0, 3]] = np.where(p[[0, 3]] > 0, p[[0, 3]] / 1.5, p[[0, 3]] * 1.5)
    p = np.exp(p) / np.exp(p).sum()
    assert stats.chisquare(np.bincount(tokens, minlength=8), p * DRAWS).pvalue > 1e-6


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tokens_that_repeat_an_ngram_against_a_search(n):
    rng = np.random.default_rng(n)
    answers, counts = rng.integers(0, 3, (40, 12)), rng.integers(0, 13, 40)
    n_R = np.where(np.arange(40) % 5 == 4, 0, n)  # some rows do not ask for it
    banned = np.array(jax.jit(repeating_tokens, static_argnums=3)(answers, counts, n_R, 4))
    for answer, count, row, asked in zip(answers, counts, banned, n_R):
        said = answer[:count].tolist()
        grams = [said[i : i + n] for i in range(count - n + 1)] if asked else []
        for token in range(4):
            assert row[token] == ([*said[count - n + 1 :], token] in grams if count >= n else False)
    assert banned.any() and not banned.all()
    short = jnp.zeros((1, 2), int)
    assert not np.array(repeating_tokens(short, jnp.array([2]), jnp.array([3]), 4)).any()


def test_rows_get_what_they_ask_for_whatever_else_is_compiled_in_or_asked_for():
    """Bit for bit: a row's choice under everything, next to other rows, is its choice alone."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (6, 50)).astype(np.float32)
    answers, counts = rng.integers(0, 50, (6, 9)), np.array([9, 8, 9, 4, 9, 9])
    answers[:, 5:] = answers[:, :4]
    each = {
        "temperature": [0.0, 0.0, 1.0, 1.0, 1.0, 0.0],
        "top_k": [0, 0, 0, 5, 0, 0],
        "top_p": [1.0, 1.0, 1.0, 1.0, 0.5, 1.0],
        "no_repeat_ngram": [0, 3, 0, 0, 2, 0],
        "repetition_penalty": [1.0, 1.0, 1.0, 1.7, 1.0, 3.0],
    }
    everything = Choosing(50, sampled=True, truncated=True, penalised=True, ngrams=True)
    settings = rows(6, 9, **each)
    together = choose_compiled(logits, everything, settings, answers, counts)
    for row in range(6):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], settings)
        get = lambda name, row=row: each[name][row]
        least = Choosing(
            50,
            get("temperature") > 0,
            get("top_k") > 0 or get("top_p") < 1,
            get("repetition_penalty") != 1,
            get("no_repeat_ngram") > 0,
        )
        for choosing in (least, everything):
            alone = choose_compiled(
                logits[row : row + 1], choosing, one, answers[row : row + 1], counts[row : row + 1]
            )
            np.testing.assert_array_equal(alone[0][0], together[0][row])
            np.testing.assert_array_equal(alone[1][0], together[1][row])


def test_presence_and_frequency_penalties_and_biases_move_logits():
    """By their definitions, one row each, next to a row that asks for nothing."""
    answers = np.array([[0, 0, 1, 7], [0, 0, 1, 7], [0, 0, 1, 7], [0, 0, 1, 7]], np.int32)
    presence, frequency = np.array([0.0, 0.6, 0.0, 0.0]), np.array([0.0, 0.0, 0.2, 0.0])
    settings = rows(4, 9, presence_penalty=presence, frequency_penalty=frequency)
    bias_ids = np.full((4, 3), -1, np.int32)
    biases = np.zeros((4, 3), np.float32)
    bias_ids[3, :2], biases[3, :2] = [5, 0], [2.5, -100]
    settings = settings.replace(bias_ids_RxB=bias_ids, biases_RxB=biases)
    chosen, log_probs = choose_compiled(
        np.tile(LOGITS, (4, 1)),
        Choosing(8, penalised=True, biases=3),
        settings,
        answers,
        np.full(4, 3),  # the token in the last place is not there yet
    )
    counts = np.bincount([0, 0, 1], minlength=8)
    wanted = [
        np.argmax(LOGITS - p * (counts > 0) - f * counts) for p, f in zip(presence, frequency)
    ]
    wanted[3] = 5
    assert chosen.tolist() == wanted == [0, 2, 1, 5]
    # The model's own, whatever moved the choice.
    np.testing.assert_allclose(log_probs, (LOGITS - np.log(np.exp(LOGITS).sum()))[wanted], 1e-5)


def test_tokens_that_are_given_are_not_chosen():
    answers = np.array([[6, 3, 0], [6, 3, 0]], np.int32)
    chosen, log_probs = choose_compiled(
        np.tile(LOGITS, (2, 1)), Choosing(8), rows(2, 9, given=2), answers, np.array([1, 2])
    )
    assert chosen.tolist() == [3, 0]
    np.testing.assert_allclose(
        log_probs, (LOGITS - np.log(np.exp(LOGITS).sum()))[[3, 0]], rtol=1e-5
    )


def test_the_likeliest_tokens_are_the_vocabularys():
    logits = np.concatenate([LOGITS, [99.0]])[None]  # a row of the table that is not a token
    ids, log_probs = likeliest(logits, Choosing(8, alternatives=3))
    assert ids.tolist() == [[0, 1, 2]]
    assert log_probs[0, 0] == log_probs_of(logits, jnp.array([0]))[0]
    np.testing.assert_allclose(log_probs[0], LOGITS[:3] - 99, atol=1e-4)
