"""``encdec benchmark speculate``: what is measured, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from encdec.benchmarks.speculate_benchmark import StepCost, main, measure_steps
from encdec.benchmarks.speculate_expected import tokens_per_step
from encdec.benchmarks.speculate_tasks import STEP_SIZES, log_prob_difference, near_tie
from encdec.errors import ConfigError
from encdec.inference.load_generator import load
from tests.inference.conftest import LEARNED, encoder_decoder_run  # noqa: F401


def test_ratios_are_against_a_step_of_one_token():
    cost = StepCost("jax", 1, {1: 0.5, 4: 0.75})
    assert cost.ratio(1) == 1 and cost.ratio(4) == 1.5


def test_tokens_per_step_follow_from_the_answers():
    eos, source = 1, list(range(10, 30))
    copied, strange = [*source, eos], list(range(40, 61))
    # The first token comes without a step; twenty are left, of a copy as many per step as it feeds.
    found = tokens_per_step([source] * 2, [copied, [10]], eos, (1, 2, 5, 10, 16))
    assert found == {1: 1, 2: 2, 5: 5, 10: 10, 16: 10}
    # A token that was never there has to be made by itself, and makes the other's mean smaller.
    assert tokens_per_step([source], [strange], eos, (5,)) == {5: 1}
    both = tokens_per_step([source, source], [copied, strange], eos, (5,))
    assert both == {5: 40 / (4 + 20)}
    assert tokens_per_step([source], [[10]], eos, (2,)) == {2: 1}


def test_a_runtime_is_given_no_more_tokens_than_it_takes():
    asked = {"jax": [], "litert": []}
    steps = {name: asked[name].append for name in asked}
    jax, litert = measure_steps(steps, 1, 1, {"litert": 8})
    assert set(jax.seconds) == set(asked["jax"]) == set(STEP_SIZES)
    assert set(litert.seconds) == set(asked["litert"]) == {1, 2, 4, 5, 8}


@pytest.mark.slow
def test_steps_and_tasks_are_measured(encoder_decoder_run, tmp_path, capsys):
    texts = tmp_path / "dev.jsonl"
    texts.write_text("".join(json.dumps({"source": source}) + "\n" for source, _ in LEARNED))
    arguments = [
        "--model=test",
        "--inputs_length=4",
        "--repeats=1",
        "--as_trained",
        f"--checkpoint={encoder_decoder_run}",
    ]
    assert main([*arguments, f"--jsonl={texts}", f"--out={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "k = 16" in shown and "always wrong" in shown
    report = json.loads((tmp_path / "speculate.json").read_text())
    (cost, as_trained), (rate,) = report["costs"], report["tasks"]
    assert [cost["runtime"], as_trained["runtime"]] == ["jax", "jax, as trained"]
    assert list(map(int, cost["seconds"])) == list(STEP_SIZES) and min(cost["seconds"].values()) > 0
    assert report["always_wrong"] > 0
    assert rate["task"] == "dev" and rate["same_answers"] == 1 and rate["tokens"] > 0
    # How often drafts are verified follows from times; where none was, there is no rate.
    assert rate["tokens_a_step"] == 0 or 1 <= rate["tokens_a_step"] <= 8
    assert 0 <= rate["acceptance"] <= 1
    assert "expected" in shown and min(rate["allowed"].values()) >= 1
    # Where every step verifies, there are such steps, and the answers are still the same.
    always = ["--always", f"--checkpoint={encoder_decoder_run}", f"--jsonl={texts}"]
    assert main([*always, f"--out={tmp_path}"]) == 0
    (rate,) = json.loads((tmp_path / "speculate.json").read_text())["tasks"]
    assert rate["same_answers"] == 1 and not rate["different"] and 1 <= rate["tokens_a_step"] <= 8


@pytest.mark.slow
def test_steps_of_exports_are_measured(tmp_path):
    exports = "--runtimes=onnx-float32,litert-float32"
    arguments = ["--model=test", exports, "--inputs_length=4", "--repeats=1", f"--out={tmp_path}"]
    assert main(arguments) == 0
    costs = json.loads((tmp_path / "speculate.json").read_text())["costs"]
    sizes = {cost["runtime"]: list(map(int, cost["seconds"])) for cost in costs}
    assert sizes == {"onnx-float32": list(STEP_SIZES), "litert-float32": [1, 2, 4, 5, 8, 10]}


def test_what_cannot_be_measured_is_refused():
    for arguments, message in (
        ([], "nothing to measure"),
        (["--checkpoint=x"], "go together"),
        (["--model=test", "--runtimes=jax,tf"], "--runtimes has 'tf'"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(arguments)


@pytest.mark.slow
def test_a_near_tie_is_told_from_a_fault(encoder_decoder_run):
    """Another answer is a near-tie only where plain decoding itself is that close to it."""
    plain, text = load(encoder_decoder_run, draft="off"), LEARNED[0][0]
    ((wanted,),) = plain.generate([text])
    wrong = next(token for token in range(5, 20) if token not in wanted.tokens)
    fault = dataclasses.replace(wanted, tokens=[wrong, *wanted.tokens[1:]])
    assert not near_tie(plain, text, wanted, fault)
    assert not near_tie(plain, text, wanted, dataclasses.replace(wanted, tokens=wanted.tokens[:-1]))
    heavy = SimpleNamespace(  # plain decoding in which the other token is as likely
        generate=lambda texts, settings, **more: [[fault if settings.logit_bias else wanted]]
    )
    assert near_tie(heavy, text, wanted, fault)
    assert log_prob_difference(wanted, fault) == 0 == log_prob_difference(wanted, wanted)
