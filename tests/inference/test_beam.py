"""Beam search against all answers there are, and against a search by full forward passes."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from encdec.inference import beam, beam_steps, shapes
from encdec.inference.beam import beam_search
from encdec.inference.beam_steps import BeamPlan
from encdec.inference.decoding import Memory
from encdec.inference.ready import ready_for_decoding
from encdec.model import for_decoding
from tests.inference.examples import CONFIGS, START, greedy, laid_out, model, next_log_probs, padded

V, EOS = 4, 1
INPUTS = ([3, 2, 2, 0, 2], [2, 3])


def every_answer(config, params, source, length, alpha):
    """All complete answers with their totals, best first, by full forward passes."""
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


def search(config, params, alpha, limit, beams, capacity, **changes):
    settings = {"start_id": START, "eos_id": EOS, "vocabulary_size": V} | changes
    plan = BeamPlan(beams, capacity, **settings)
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
            found.totals_BxK[row], [total for _, total in wanted[:beams]], rtol=1e-4, atol=1e-5
        )
        assert set(got) == {answer for answer, _ in wanted[:beams]}
        assert got[0] == wanted[0][0]
        # Token log-probabilities add up to the total.
        totals = np.array(found.log_probs_BxKxN[row]).sum(-1)
        penalty = ((5 + np.array(found.counts_BxK[row])) / 6) ** alpha
        np.testing.assert_allclose(totals / penalty, found.totals_BxK[row], rtol=1e-4)


def test_alpha_favours_longer_answers_and_the_limit_may_be_lower_than_the_room():
    config, params = model("encoder_decoder", vocab_size=V, scan_layers=False)
    short, long = (search(config, params, alpha, 4, 40, 4) for alpha in (0.0, 3.0))
    assert np.array(long.counts_BxK[:, :3]).sum() > np.array(short.counts_BxK[:, :3]).sum()
    low = search(config, params, 0.6, 2, 40, 4)
    for row, source in enumerate(INPUTS):
        wanted = every_answer(config, params, source, 2, 0.6)
        kept = np.isfinite(low.totals_BxK[row])
        assert kept.sum() == len(wanted) == 1 + 3 * V
        assert answers_of(low, row)[0] == wanted[0][0]
        np.testing.assert_allclose(
            np.array(low.totals_BxK[row])[kept], [total for _, total in wanted], rtol=1e-4
        )


def test_narrow_beams_keep_what_they_promise():
    config, params = model("decoder_only", scan_layers=False)
    inputs = ([5, 9, 30, 4, 77], [8, 3])
    plan = BeamPlan(beams=4, capacity=7, start_id=START, eos_id=-1, vocabulary_size=264)
    found = beam_search(config, plan, params, *padded(inputs), 0.0, 7)
    for row, source in enumerate(inputs):
        best = answers_of(found, row)[0]
        assert len(best) == 7 and len(set(answers_of(found, row))) == 4
        # Its total is the answer's own, by a full pass over it.
        full = next_log_probs(config, params, source, [best])[0]
        np.testing.assert_allclose(
            found.log_probs_BxKxN[row, 0], full[np.arange(7), best], rtol=1e-4, atol=1e-5
        )
        # No promise in general, but so it is here: better than the greedy answer.
        assert found.totals_BxK[row, 0] > sum(greedy(config, params, source, 7)[1]) - 1e-4


def search_by_full_passes(config, params, source, beams, limit, alpha, eos):
    """One input's hypotheses with their totals, best first, as the definition has it."""
    penalty = lambda count: ((5 + count) / 6) ** alpha
    alive, complete = [(0.0, ())], []
    for count in range(1, limit + 1):
        rows = next_log_probs(config, params, source, [answer for _, answer in alive])[:, -1]
        grown = [
            (total + float(row[token]), (*answer, token))
            for (total, answer), row in zip(alive, rows)
            for token in range(len(row))
        ]
        grown = sorted(grown, reverse=True)[: 2 * beams]
        complete += [(total / penalty(count), one) for total, one in grown if one[-1] == eos]
        complete = sorted(complete, reverse=True)[:beams]
        alive = [one for one in grown if one[1][-1] != eos][:beams]
        if len(complete) == beams and alive[0][0] / penalty(limit) <= complete[-1][0]:
            return complete
    complete += [(total / penalty(limit), answer) for total, answer in alive]
    return sorted(complete, reverse=True)[:beams]


WINDOWED = {"decoder_layers": 2, "attention_window": 4, "decoder_global_layers": (1,)}
SEVERAL = ([5, 9, 3, 4, 7, 8, 2], [8, 3], [3, 4, 3], [9], [6, 6, 2, 9, 4], [10, 2, 3, 7])


@pytest.mark.parametrize(
    "name, changes, layout",
    [
        ("encoder_decoder", {}, ready_for_decoding),
        ("encoder_decoder", WINDOWED | {"merged_attention": True}, "shards"),
        ("decoder_only", {}, lambda config, params: (config, params)),  # scanned
        ("decoder_only", WINDOWED, ready_for_decoding),
    ],
)
def test_a_search_in_segments_is_the_one_by_full_passes(name, changes, layout, monkeypatch):
    """While slots run out every few steps, and decided inputs leave the batch."""
    if changes:
        changes = changes | {"scan_layers": False}
    config, params = model(name, std=0.2, vocab_size=12, **changes)
    if layout == "shards":
        made, weights = laid_out(*for_decoding(config, params), 2)
    else:
        made, weights = layout(config, params)
    beams, limit, alpha = 3, 14, 0.6
    plan = BeamPlan(beams, limit, START, EOS, 12)
    sizes = []

    def noted(config, slots, search, rows_R, real_R):
        sizes.append((len(search.positions_B), len(rows_R)))
        return beam_steps.rearrange(config, slots, search, rows_R, real_R)

    for constant, value in (("LEAST_STEPS", 2), ("SEGMENT", 3)):
        monkeypatch.setattr(beam, constant, value)
    monkeypatch.setattr(shapes, "WORTH", 0)
    monkeypatch.setattr(beam, "rearrange", noted)
    monkeypatch.setattr(beam, "coarse_bucket", lambda length: -(-length // 12) * 12)
    found = beam_search(made, plan, weights, *padded(SEVERAL), alpha, limit)
    assert any(before == after for before, after in sizes), sizes
    assert any(before > after for before, after in sizes), sizes
    for row, source in enumerate(SEVERAL):
        wanted = search_by_full_passes(config, params, source, beams, limit, alpha, EOS)
        assert answers_of(found, row) == [one for _, one in wanted]
        np.testing.assert_allclose(found.totals_BxK[row], [total for total, _ in wanted], rtol=1e-4)
    assert len(set(found.counts_BxK[:, 0].tolist())) > 2


@pytest.fixture
def chain(monkeypatch):
    """A model whose next token depends on the last alone: its parameters are log-probabilities."""

    def first(config, params, tokens_BxS, lengths_B, **more):
        logits_BxV = jnp.tile(params["table"][START], (len(tokens_BxS), 1))
        return logits_BxV, Memory((), None, jnp.ones(len(tokens_BxS), jnp.int32))

    def after(config, params, memory, tokens_BxK, *more):
        slots_B = memory.slots_R + tokens_BxK.shape[1]
        return params["table"][tokens_BxK], memory.replace(slots_R=slots_B)

    monkeypatch.setattr(beam_steps, "prefill", first)
    monkeypatch.setattr(beam_steps, "branch_step", after)
    programs = beam_steps.begin, beam_steps.advance
    forget = lambda: [program.clear_cache() for program in programs]
    forget()
    yield forget
    forget()


def test_narrow_beams_stop_early_only_where_nothing_better_can_come(chain, monkeypatch):
    """With a length penalty, longer answers may still overtake: the search ends with what the
    same search finds that continues to the limit."""
    limit, random = 12, np.random.default_rng(0)
    tables = random.dirichlet([0.4] * V, (60, V)).astype(np.float32)
    # Two poor short answers, and a long one that gains on them by its length alone.
    tables[0] = [
        [0.97, 0.01, 0.01, 0.01],
        [0.25] * 4,
        [0.25, 0.45, 0, 0.3],
        [0.02, 0.95, 0.01, 0.02],
    ]
    plan = BeamPlan(beams=2, capacity=limit, start_id=START, eos_id=EOS, vocabulary_size=V)
    config, source = CONFIGS["encoder_decoder"], (np.zeros((1, 1), np.int32), np.ones(1, np.int32))
    run = lambda table: beam_search(
        config, plan, {"table": np.log(table + 1e-9)}, *source, 0.6, limit
    )
    ends = []

    def advance(config, plan, params, search, alpha, limit, steps):
        ends[-1] += 1
        return beam_steps.advance(config, plan, params, search, alpha, limit, steps)

    monkeypatch.setattr(beam, "advance", advance)
    monkeypatch.setattr(beam, "SEGMENT", 1)
    found = []
    for table in tables:
        ends.append(1)
        found.append(run(table))
    never_decided = lambda alive, complete, alpha, limit: alive.totals_BxK[:, 0] > -jnp.inf
    monkeypatch.setattr(beam_steps, "_hopeful", never_decided)
    chain()
    monkeypatch.setattr(beam, "advance", beam_steps.advance)
    monkeypatch.setattr(beam, "SEGMENT", limit)
    for table, first in zip(tables, found):
        full = run(table)
        np.testing.assert_array_equal(first.tokens_BxKxN, full.tokens_BxKxN)
        np.testing.assert_allclose(first.totals_BxK, full.totals_BxK, rtol=1e-5)
    assert len(ends) == len(tables) and 0.2 < np.mean(np.array(ends) < limit) < 1, ends
