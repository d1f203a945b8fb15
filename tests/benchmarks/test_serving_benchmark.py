"""``encdec benchmark serving``, small."""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax
import numpy as np
import pytest

from encdec import cli
from encdec.benchmarks import serving_drafts
from encdec.benchmarks.serving_client import Pass, TimedAnswer, served_model
from encdec.benchmarks.serving_drafts import DraftedPass
from encdec.errors import ConfigError
from encdec.inference.generation_settings import OFF
from encdec.inference.pace import SIZES, Pace
from encdec.interop.framing import Framing
from encdec.interop.importing import write_model
from encdec.model import unroll_params
from tests.inference.test_generator import PROMPTS, printing_model


@pytest.mark.slow
def test_both_ways_make_the_same_tokens(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert (
        cli.main(
            [
                "benchmark",
                "serving",
                "--model=micro-300k",
                "--requests=6",
                "--slots=2",
                "--repeats=1",
                "--inputs_from=4",
                "--inputs_to=15",
                "--tokens_from=2",
                "--tokens_to=8",
                f"--out={out}",
            ]
        )
        == 0
    )
    report = json.loads(out.read_text())
    first, second = report["arms"].values()
    assert first["tokens"] == second["tokens"] > 6
    assert report["throughput_ratio"] == pytest.approx(
        second["tokens_per_second"] / first["tokens_per_second"]
    )
    assert "throughput at once" in capsys.readouterr().out


def written(out, params, config):
    """A random model as `encdec import` would leave it, for texts of up to 16 tokens."""
    write_model(
        out,
        config.replace(scan_layers=False),
        jax.tree.map(np.asarray, unroll_params(params, config)),
        source={"family": "test", "name": "random"},
        vocabulary=PROMPTS.vocabulary,
        framing=Framing(PROMPTS.decoder_start_id, inputs_eos=True),
        max_length=32,
    )
    return out


@pytest.mark.slow
def test_drafts_change_no_answer_of_a_server(tmp_path, capsys, monkeypatch):
    """Sixty requests of all kinds at once, of a model whose draft model is often right."""
    config, params = printing_model("encoder_decoder")
    rng = np.random.default_rng(0)
    near = jax.tree.map(lambda x: x + rng.normal(0, 0.03, x.shape).astype(x.dtype), params)
    model, draft = written(tmp_path / "model", params, config), tmp_path / "draft"
    written(draft, near, config)
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out.json"
    texts.write_text(
        "".join(json.dumps({"source": f"text {i} " * (i % 4 + 1)}) + "\n" for i in range(20))
    )
    monkeypatch.setattr(Pace, "size", lambda self, sizes: SIZES[0])  # whatever it costs here
    argv = [f"--checkpoint={model}", f"--jsonl={texts}", f"--draft={draft}", "--mixed"]
    argv += ["--requests=60", "--slots=4", "--repeats=1", f"--out={out}"]
    other = argparse.Namespace(checkpoint=model, draft=[OFF], slots=4, requests=60)
    with serving_drafts.servers(other) as running:  # the same model, so that answers are equal
        argv += [f"--against={running[OFF][0]}/v1/"]
        assert cli.main(["benchmark", "serving", *argv]) == 0
    plain, drafted, against = json.loads(out.read_text())["arms"].values()
    assert against["equal_answers"] == 60 and against["times_against"] == 1.0
    assert drafted["times_against"] == pytest.approx(drafted["times_off"] / against["times_off"])
    assert drafted["equal_answers"] == drafted["answers"] == 60
    assert plain["drafted_tokens"] == 0 and 0.2 < drafted["accepted"] < 0.95
    assert drafted["steps"] < 0.8 * plain["steps"]
    assert "equal to off: 60 of 60 answers" in capsys.readouterr().out


def test_an_answer_that_differs_is_counted():
    one = TimedAnswer("ab", ["a", "b"], [-1.0, -2.0], "stop", 0.1, 0.2)
    others = [
        dataclasses.replace(one, log_probs=[-1.0, -2.5]),
        dataclasses.replace(one, tokens=["a", "c"]),
    ]
    options = argparse.Namespace(requests=2)
    # Another server's text counts, not the pieces in which it comes.
    pieces = [dataclasses.replace(one, tokens=["ab"]), dataclasses.replace(one, text="ac")]
    rounds = [
        {
            serving_drafts.AGAINST: DraftedPass(Pass(3.0, 6.0, pieces), 0, 0, 0),
            OFF: DraftedPass(Pass(4.0, 6.0, [one, one]), 9, 0, 0),
            "lookup": DraftedPass(Pass(2.0, 4.0, others), 5, 8, 4),
        }
    ]
    arms = serving_drafts.summary(options, rounds)["arms"]
    assert arms[serving_drafts.AGAINST]["unequal"] == [1]
    arm = arms["lookup"]
    assert arm["times_against"] == 1.5
    assert (arm["equal_answers"], arm["answers"], arm["unequal"]) == (1, 2, [1])
    assert arm["largest_log_prob_difference"] == 0.5
    assert arm["times_off_in_processor_time"] == 1.5
    assert (arm["times_off"], arm["requests_per_second"], arm["accepted"]) == (2.0, 1.0, 0.5)


def test_an_address_without_a_server():
    with pytest.raises(ConfigError, match="no server of OpenAI's protocol tells its models there"):
        served_model("http://127.0.0.1:9")


def test_settings_that_cannot_be(capsys):
    for argv, message in (
        (["--slots=0"], "slots is 0; expected 1 or more"),
        (["--tokens_from=9", "--tokens_to=8"], "expected tokens_from = 9 or more"),
        (["--model=nonsense"], "unknown preset"),
        (["--checkpoint=java2cs"], "--checkpoint=DIR and --jsonl=FILE go together"),
        (["--against=http://x"], "against is http://x, which has no effect without --checkpoint"),
        (["--checkpoint=java2cs", "--jsonl=x", "--against=x:8"], "--against=x:8 is not an address"),
        (["--draft=lookup"], "which has no effect without --checkpoint"),
        (
            ["--checkpoint=java2cs", "--jsonl=x", "--tokens_to=70"],
            "tokens_to is 70, which has no effect with --checkpoint",
        ),
    ):
        assert cli.main(["benchmark", "serving", *argv]) == 2
        assert message in capsys.readouterr().err
