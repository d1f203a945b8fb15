"""The likelihood of references: against cached decoding, alone and in a batch, and by hand."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from encdec.evaluation import likelihood
from encdec.evaluation.evaluate import _Pass, _report
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.evaluation.examples import Examples
from encdec.evaluation.likelihood import (
    CALIBRATION_BINS,
    SKIPPED,
    Likelihood,
    LikelihoodFiles,
    LikelihoodModel,
    likelihood_scores,
)
from encdec.evaluation.predictions import Example, Prediction, UnreadableSources
from encdec.inference.generator import Generator, read_prompt_format
from encdec.saved.saved_params import load_params_for_inference
from tests.inference.conftest import LEARNED, decoder_only_run, encoder_decoder_run  # noqa: F401

OTHERS = ["a fish unknown", "b"]


def likelihood_model(run, **more):
    prompts, _ = read_prompt_format(run)
    config, params, _ = load_params_for_inference(run)
    return LikelihoodModel(config, params, prompts, **more), Generator(config, params, prompts)


@pytest.mark.parametrize("run", ["encoder_decoder_run", "decoder_only_run"])
def test_it_is_what_cached_decoding_says_of_its_own_answers(run, request):
    model, generator = likelihood_model(request.getfixturevalue(run), devices=jax.devices()[:2])
    sources = [source for source, _ in LEARNED] + OTHERS
    answers = [answer[0] for answer in generator.generate(sources)]
    ended = [
        (source, answer)
        for source, answer in zip(sources, answers)
        if answer.finish == "eos" and answer.text
    ]
    assert len(ended) >= 4
    examples = [Example(source, (answer.text,)) for source, answer in ended]
    found = model.of(examples)
    for one, (_, answer) in zip(found, ended):
        assert one.tokens == len(answer.tokens)
        assert one.nats == pytest.approx(-sum(answer.log_probs), rel=1e-3, abs=1e-4)
        assert one.text_bytes == len(answer.text.encode())
        # Greedy answers are the likeliest tokens, so that all are right.
        count, confidence, right = np.sum(one.bins, axis=0)
        assert (count, right) == (one.tokens, one.tokens)
        assert confidence == pytest.approx(np.exp(answer.log_probs).sum(), rel=1e-3)


def test_mixed_lengths_in_a_batch_equal_one_at_a_time(encoder_decoder_run):
    model, _ = likelihood_model(encoder_decoder_run, batch_rows=8)
    examples = [
        Example("one fish", ("not at all",)),
        Example("a", ("b" * 20,)),
        Example("and a tortoise", ("slow",)),
    ]
    together = model.of(examples)
    for example, one in zip(examples, together):
        assert one.nats == pytest.approx(model.of([example])[0].nats, rel=1e-4)


def test_long_texts_are_read_a_few_at_a_time(encoder_decoder_run, monkeypatch):
    model, _ = likelihood_model(encoder_decoder_run, batch_rows=8, devices=jax.devices()[:2])
    examples = [Example("one fish", (answer,)) for answer in ("b" * 30, "slow", "not", "at all")]
    together, sizes = model.of(examples), []
    batch = model._batch
    monkeypatch.setattr(
        model, "_batch", lambda pairs, size: sizes.append(size) or batch(pairs, size)
    )
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 100)
    assert [one.tokens for one in model.of(examples)] == [one.tokens for one in together]
    assert sizes[0] == 2 and sum(sizes) == 2 + 4  # a row for each device at least
    for few, one in zip(model.of(examples), together):
        assert few.nats == pytest.approx(one.nats, rel=1e-4)


def bins(*entries):
    found = [(0.0, 0.0, 0.0)] * CALIBRATION_BINS
    for place, entry in entries:
        found[place] = entry
    return tuple(found)


def test_scores_by_hand():
    found = [
        # Two tokens at confidence 0.5, one right; one token at 0.9, wrong.
        Likelihood(2 * math.log(2), 2, 4, bins((7, (2, 1.0, 1)))),
        Likelihood(4 * math.log(2), 1, 2, bins((13, (1, 0.9, 0)))),
        SKIPPED,
    ]
    scores = {one.name: one for one in likelihood_scores(found)}
    value = {name: one.value for name, one in scores.items()}
    assert scores["perplexity"].count == 2
    assert value["perplexity"] == pytest.approx(2 ** (6 / 3))
    assert value["bits_per_byte"] == pytest.approx(1.0)
    assert value["calibration_error"] == pytest.approx(100 * 0.9 / 3)
    assert scores["bits_per_byte"].statistic(np.array([[1]])) == pytest.approx(2.0)
    interval = scores["perplexity"].interval(200)
    assert interval.low < interval.value < interval.high
    assert likelihood_scores([SKIPPED]) == []


def test_shuffled_sources_are_compared_on_the_examples_that_both_passes_read():
    """Each pass skips another example; where the source does not matter there is no difference."""
    passes = []
    for skipped in (0, 3):
        one = object.__new__(_Pass)
        one.examples = [Example(str(i), ("a",)) for i in range(4)]
        one.sources, one.not_writable = UnreadableSources((skipped,), ()), 0
        one.found = {index: Prediction("a", 1, "eos", False) for index in range(4)}
        one._given = {
            index: Likelihood(2.0**index, 1, 1, bins((7, (1, 1, 1)))) for index in range(4)
        }
        one._given[skipped] = SKIPPED
        passes.append(one)
    task = Examples("t", tuple(passes[0].examples), ("exact_match",))
    settings = EvaluationSettings("c", "o", tasks=("t",), shuffle_sources=0, resamples=50)
    found = _report(task, passes, None, settings)
    other = found["shuffled_sources"]["scores"]["bits_per_byte"]
    assert found["scores"]["bits_per_byte"]["value"] == pytest.approx(14 / 3 / math.log(2), 1e-5)
    assert other["value"] == pytest.approx(7 / 3 / math.log(2), 1e-5)
    assert other["difference"] == {"value": 0, "low": 0, "high": 0} and other["examples"] == 3


def test_files_keep_what_is_whole(tmp_path):
    files = LikelihoodFiles(tmp_path)
    made = {0: Likelihood(1.5, 3, 9, bins((1, (3, 0.3, 2)))), 2: SKIPPED}
    files.append(0, made)
    assert files.read() == made
    path = tmp_path / "likelihood-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert list(files.read()) == [0]
    files.append(0, {2: SKIPPED})
    assert files.read() == made
