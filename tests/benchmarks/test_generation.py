"""Timing of generation: what is timed is the right work, and the numbers add up."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from encdec.benchmarks import generation as benchmark
from encdec.benchmarks.generation import GenerationTiming, Spread, time_generation
from encdec.errors import ConfigError
from encdec.inference.ready import ready_for_decoding
from tests.inference.examples import model


@pytest.fixture(scope="module")
def models():
    return {name: model(name) for name in ("encoder_decoder", "decoder_only")}


def test_cached_and_uncached_runs_make_the_same_tokens(models):
    config, params = ready_for_decoding(*models["decoder_only"])
    tokens = jax.numpy.asarray(np.random.default_rng(0).integers(2, 264, (2, 6)), "int32")
    answers = []
    for make in (benchmark.cached_run, benchmark._uncached_run):
        first, rest = make(config, params, tokens, 5)
        answers.append(rest(first()))
    cached, uncached = answers
    np.testing.assert_array_equal(cached.tokens_RxN, uncached[:, 7:])
    np.testing.assert_array_equal(uncached[:, 1:7], tokens)
    np.testing.assert_array_equal(cached.counts_R, 5)  # no EOS ends a timed run


def test_timings_are_of_every_model_at_every_length(models):
    said = []
    timings = time_generation(models, [4, 6], 5, batch=2, repeats=3, on_progress=said.append)
    assert [(t.model, t.cached, t.input_length) for t in timings] == [
        (name, cached, length)
        for length in (4, 6)
        for name, cached in (
            ("encoder_decoder", True),
            ("decoder_only", True),
            ("decoder_only", False),
        )
    ]
    assert len(said) == 6 and said[2] == "decoder_only, 4 tokens in, uncached"
    for timing in timings:
        assert len(timing.first_token_seconds) == len(timing.total_seconds) == 3
        assert all(
            0 < first < total
            for first, total in zip(timing.first_token_seconds, timing.total_seconds)
        )
        spread = timing.tokens_per_second
        assert 0 < spread.low <= spread.median <= spread.high


def test_rates_and_spreads_by_hand():
    timing = GenerationTiming("m", True, 8, 11, 2, (1.0, 1.0, 2.0), (3.0, 2.0, 6.0))
    assert timing.first_token == Spread(1.0, 1.0, 1.5)
    assert timing.total == Spread(3.0, 2.5, 4.5)
    assert timing.tokens_per_second == Spread(10.0, 7.5, 15.0)  # 20 tokens in 2, 1 and 4 s


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"output_length": 1}, "output_length is 1; expected 2 or more"),
        ({"input_lengths": [8, 0]}, "input_lengths is 0; expected 1 or more"),
        ({"repeats": 0}, "repeats is 0"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_lengths_that_cannot_be_are_refused(models, changes, message):
    arguments = {"input_lengths": [8], "output_length": 4, "repeats": 1, "batch": 1} | changes
    with pytest.raises(ConfigError, match=message):
        time_generation(models, **arguments)
