"""Beam search against all answers there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from encdec.inference.beam import beam_search
from tests.inference.examples import START, greedy, model, next_log_probs, padded

V, EOS = 4, 1
INPUTS = ([3, 2, 2, 0, 2], [2, 3])


def every_answer(config, params, source, length, alpha):
    """All complete answers with their scores, best first, by full forward passes."""
    table = {}
    inner = [t for t in range(V) if t != EOS]
    for count in range(length):
        starts = list(itertools.product(inner, repeat=count))
        rows = next_log_probs(config, params, source, starts)
        for begin, row in zip(starts, rows):
            spent = sum(row[i, token] for i, token in enumerate(begin))
            for last in range(V):
                if last == EOS or count == length - 1:
                    answer = (*begin, last)
                    table[answer] = (spent + row[-1, last]) / ((5 + len(answer)) / 6) ** alpha
    return sorted(table.items(), key=lambda item: -item[1])


def search(config, params, alpha, limit, beams, room, **changes):
    settings = {"start_id": START, "eos_id": EOS, "vocabulary_size": V} | changes
    return beam_search(
        config, params, *padded(INPUTS), alpha, limit, beams=beams, room=room, **settings
    )


def answers_of(found, row):
    return [
        tuple(np.array(tokens)[:count].tolist())
        for tokens, count in zip(found.tokens_BxKxN[row], found.counts_BxK[row])
    ]


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_wide_beams_find_the_best_of_all_answers(name, alpha):
    config, params = model(name, vocab_size=V, scan_layers=False)
    beams, length = 40, 4  # 3 ** 3 answers may be alive
    found = search(config, params, alpha, length, beams, length)
    for row, source in enumerate(INPUTS):
        wanted = every_answer(config, params, source, length, alpha)
        got = answers_of(found, row)
        np.testing.assert_allclose(
            found.scores_BxK[row], [score for _, score in wanted[:beams]], rtol=1e-4, atol=1e-5
        )
        assert set(got) == {answer for answer, _ in wanted[:beams]}
        assert got[0] == wanted[0][0]
        # Token log-probabilities add up to the score.
        totals = np.array(found.log_probs_BxKxN[row]).sum(-1)
        penalty = ((5 + np.array(found.counts_BxK[row])) / 6) ** alpha
        np.testing.assert_allclose(totals / penalty, found.scores_BxK[row], rtol=1e-4)


def test_alpha_favours_longer_answers_and_the_limit_may_be_lower_than_the_room():
    config, params = model("encoder_decoder", vocab_size=V, scan_layers=False)
    short, long = (search(config, params, alpha, 4, 40, 4) for alpha in (0.0, 3.0))
    assert np.array(long.counts_BxK[:, :3]).sum() > np.array(short.counts_BxK[:, :3]).sum()
    low = search(config, params, 0.6, 2, 40, 4)
    for row, source in enumerate(INPUTS):
        wanted = every_answer(config, params, source, 2, 0.6)
        kept = np.isfinite(low.scores_BxK[row])
        assert kept.sum() == len(wanted) == 1 + 3 * V
        assert answers_of(low, row)[0] == wanted[0][0]
        np.testing.assert_allclose(
            np.array(low.scores_BxK[row])[kept], [score for _, score in wanted], rtol=1e-4
        )


def test_narrow_beams_keep_what_they_promise():
    config, params = model("decoder_only", scan_layers=False)
    inputs = ([5, 9, 30, 4, 77], [8, 3])
    found = beam_search(
        config,
        params,
        *padded(inputs),
        0.0,
        7,
        beams=4,
        room=7,
        start_id=START,
        eos_id=-1,
        vocabulary_size=264,
    )
    for row, source in enumerate(inputs):
        best = answers_of(found, row)[0]
        assert len(best) == 7 and len(set(answers_of(found, row))) == 4
        # Its score is the answer's own, by a full pass over it.
        full = next_log_probs(config, params, source, [best])[0]
        np.testing.assert_allclose(
            found.log_probs_BxKxN[row, 0], full[np.arange(7), best], rtol=1e-4, atol=1e-5
        )
        # No promise in general, but so it is here: better than the greedy answer.
        assert found.scores_BxK[row, 0] > sum(greedy(config, params, source, 7)[1]) - 1e-4
