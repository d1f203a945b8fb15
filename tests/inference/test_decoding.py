"""Cached decoding against full forward passes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.inference.decoding import Memory, advance_compiled, start_compiled, take_rows
from encdec.inference.ready import ready_for_decoding
from encdec.model import init_cache
from encdec.model.encoder_decoder import Source
from tests.inference.examples import CONFIGS, greedy, model, padded, plan, rows

INPUTS = ([5, 9, 30, 4, 77], [8, 3], [100, 101, 102, 103, 104])
NEW = 7


def run(config, params, inputs, settings, plan, steps=None):
    """The answers as lists of (tokens, log-probabilities), and the state they come from."""
    decoding = start_compiled(config, plan, params, *padded(inputs), settings)
    for count in steps or [plan.capacity]:
        decoding = advance_compiled(config, plan, params, decoding, count)
    tokens, log_probs, counts = map(
        np.array, (decoding.tokens_RxN, decoding.log_probs_RxN, decoding.counts_R)
    )
    for row, count in enumerate(counts):
        assert not tokens[row, count:].any() and not log_probs[row, count:].any()
    return [(t[:n].tolist(), p[:n]) for t, p, n in zip(tokens, log_probs, counts)], decoding


@functools.cache
def wanted(name, source):
    return greedy(*model(name), source, NEW)


@pytest.mark.parametrize("layout", ["scanned", "unrolled"])
@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_greedy_equals_full_passes_in_a_batch_of_mixed_lengths(name, layout):
    config, params = model(name)
    if layout == "unrolled":
        config, params = ready_for_decoding(config, params)
        assert not config.execution.scan_layers
    answers, decoding = run(config, params, INPUTS, rows(3, NEW), plan(config, NEW))
    assert bool(decoding.finished_R.all())
    for source, (tokens, log_probs) in zip(INPUTS, answers):
        full_tokens, full_log_probs = wanted(name, tuple(source))
        assert tokens == full_tokens
        np.testing.assert_allclose(log_probs, full_log_probs, atol=1e-5, rtol=1e-5)
    assert len({tuple(tokens) for tokens, _ in answers}) == 3  # the inputs do matter


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_eos_and_limits_end_rows_while_others_go_on(name):
    config, params = ready_for_decoding(*model(name))
    full = [wanted(name, tuple(source))[0] for source in INPUTS]
    # EOS is a token that the first row comes to in the middle of its answer.
    eos = next(t for t in full[0][1:] if t not in full[1][:3] and t != full[0][0])
    limits = [NEW, 3, 0]
    answers, decoding = run(
        config, params, INPUTS, rows(3, limits, eos=eos), plan(config, NEW), steps=[1, 1, 3, 20]
    )
    assert [tokens for tokens, _ in answers] == [full[0][: full[0].index(eos) + 1], full[1][:3], []]
    assert bool(decoding.finished_R.all())
    # The capacity bounds rows whose limit is larger, and nothing happens after the end.
    answers, _ = run(config, params, INPUTS, rows(3, 100), plan(config, NEW), steps=[50])
    assert [tokens for tokens, _ in answers] == full


def test_an_answer_depends_on_its_key_alone():
    """Not on the other rows, the padding, the number of samples or how the loop is cut."""
    config, params = ready_for_decoding(*model("decoder_only"))
    settings = rows(6, NEW, temperature=1.0)
    made = plan(config, NEW, sampled=True)
    together, _ = run(config, params, INPUTS, settings, made)  # two answers an input
    for number in (2, 5):
        alone = jax.tree.map(lambda x, number=number: x[number : number + 1], settings)
        answer, _ = run(config, params, [INPUTS[number // 2]], alone, made, steps=[2, 1, 30])
        assert answer[0][0] == together[number][0]
        np.testing.assert_allclose(answer[0][1], together[number][1], atol=1e-5, rtol=1e-5)
    assert together[0][0] != together[1][0]


@pytest.mark.parametrize("scanned", [True, False])
def test_rows_are_taken_from_every_part_of_the_memory(scanned):
    config = CONFIGS["encoder_decoder"].replace(scan_layers=scanned)
    fill = lambda tree: jax.tree.map(
        lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape), tree
    )
    source = Source(fill(init_cache(config, 3, 4)), np.eye(3, 4) > 0)
    memory = Memory(fill(init_cache(config, 3, 5)), source, jnp.array([4, 5, 6]))
    taken = take_rows(config, memory, jnp.array([2, 0, 2, 1]))
    parts = lambda memory: jax.tree.leaves((memory.cache, memory.source.cross_kv))
    for before, after in zip(parts(memory), parts(taken)):
        np.testing.assert_array_equal(after, np.take(before, [2, 0, 2, 1], int(scanned)))
    np.testing.assert_array_equal(taken.slots_R, [6, 4, 6, 5])
    np.testing.assert_array_equal(taken.source.mask_BxS, source.mask_BxS[[2, 0, 2, 1]])


def test_parameters_cast_beforehand_change_nothing():
    config, params = model("decoder_only", std=0.1, dtype="bfloat16", scan_layers=False)
    kept, same = ready_for_decoding(config, params, "bfloat16")
    assert same["embedder"]["embedding"].dtype == jnp.bfloat16
    assert same["decoder"]["final_norm"]["scale"].dtype == jnp.float32
    first, wanted = (
        start_compiled(kept, plan(kept, 1), weights, *padded(INPUTS), rows(3, 1))
        for weights in (same, params)
    )
    np.testing.assert_array_equal(first.tokens_RxN, wanted.tokens_RxN)
    np.testing.assert_array_equal(first.log_probs_RxN, wanted.log_probs_RxN)
    config, params = ready_for_decoding(config, params)
    assert config.dtype == "float32"  # the tests run on CPUs
