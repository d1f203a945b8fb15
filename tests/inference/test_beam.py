"""Beam search against all answers there are."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.inference import beam
from encdec.inference.beam import BeamPlan, beam_search
from encdec.inference.decoding import Memory
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
    plan = BeamPlan(beams, room, **settings)
    return beam_search(config, plan, params, *padded(INPUTS), alpha, limit)


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
    plan = BeamPlan(beams=4, room=7, start_id=START, eos_id=-1, vocabulary_size=264)
    found = beam_search(config, plan, params, *padded(inputs), 0.0, 7)
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


@pytest.fixture
def chain(monkeypatch):
    """A model whose next token depends on the last alone: its parameters are log-probabilities."""
    memory = Memory(jnp.zeros(()), None, jnp.zeros((), jnp.int32))
    first = lambda config, params, *source, **more: (params[START][None], memory)
    after = lambda config, params, memory, last_R: (params[last_R], memory)
    monkeypatch.setattr(beam, "prefill", first)
    monkeypatch.setattr(beam, "decode_step", after)
    monkeypatch.setattr(beam, "take_rows", lambda config, memory, rows: memory)


def test_narrow_beams_stop_early_only_where_nothing_better_can_come(chain, monkeypatch):
    """With a length penalty, longer answers may still overtake: the search ends with what the
    same search finds that goes on to the limit."""
    limit, random = 12, np.random.default_rng(0)
    tables = random.dirichlet([0.4] * V, (60, V)).astype(np.float32)
    # Two poor short answers, and a long one that gains on them by its length alone.
    tables[0] = [
        [0.97, 0.01, 0.01, 0.01],
        [0.25] * 4,
        [0.25, 0.45, 0, 0.3],
        [0.02, 0.95, 0.01, 0.02],
    ]
    plan = BeamPlan(beams=2, room=limit, start_id=START, eos_id=EOS, vocabulary_size=V)
    run = functools.partial(
        beam_search.__wrapped__,
        None,
        plan,
        tokens_BxS=np.zeros((1, 1), np.int32),
        lengths_B=None,
        alpha=0.6,
        limit=limit,
    )
    early = jax.jit(lambda params: run(params))
    found = [early(np.log(table + 1e-9)) for table in tables]

    ends, loop = [], jax.lax.while_loop

    def to_the_limit(undecided, step, search):
        jax.debug.callback(lambda n: ends.append(int(n)), loop(undecided, step, search).count)
        return loop(lambda search: search.count < limit, step, search)

    monkeypatch.setattr(jax.lax, "while_loop", to_the_limit)
    whole = jax.jit(lambda params: run(params))
    for table, first in zip(tables, found):
        full = whole(np.log(table + 1e-9))
        np.testing.assert_array_equal(first.tokens_BxKxN, full.tokens_BxKxN)
        np.testing.assert_allclose(first.scores_BxK, full.scores_BxK, rtol=1e-5)
    jax.effects_barrier()
    assert len(ends) == len(tables) and 0.2 < np.mean(np.array(ends) < limit) < 1, ends
