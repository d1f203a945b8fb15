"""The quickstart's report, from figures made up; the runs that it compares; its scores."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest

from encdec.cost.flops import training_flops
from encdec.data.records import read_card
from encdec.errors import ConfigError
from encdec.evaluation.examples import Example, Examples
from encdec.quickstart import quickstart_command as command
from encdec.quickstart import quickstart_report as report
from encdec.quickstart.quickstart_plan import REFERENCE_RATE, REFERENCE_SECONDS, TASKS, plan_text
from encdec.quickstart.quickstart_report import ModelReport, QuickstartReport, Timing
from tests.inference.conftest import LEARNED, encoder_decoder_run  # noqa: F401
from tests.train.conftest import random_pairs, write_records

TIMES = [Timing(512, 0.02, 0.05, 1000.0), Timing(1024, 0.03, 0.06, 900.0)]


def model(title, loss, timings=(), uncached=()):
    return ModelReport(
        title=title,
        layers="4 + 2",
        parameters=1_000_000,
        training_flops=1e13,
        training_seconds=100.0,
        curve=[(1e12, loss + 1), (1e13, loss)],
        loss=loss,
        bits_per_byte=loss / 2,
        scores={"exact_match": 4 * loss, "rougeL": 10 * loss},
        shuffled={"exact_match": 0.0, "rougeL": loss},
        timings=list(timings),
        uncached=list(uncached),
        memory_bytes=2**23,
        samples=[f"{title} says"],
    )


@pytest.fixture(scope="module")
def found():
    models = [
        model("encoder-decoder", 4.0, TIMES),
        model("decoder-only", 5.0, TIMES, TIMES),
        model("distilled encoder-decoder", 3.9),
    ]
    data = {
        "task": "t",
        "train_examples": 10,
        "held_out_examples": 3,
        "target_tokens_seen": 5000,
        "timed_new_tokens": 32,
    }
    teacher = {
        "name": "decoder-only",
        "draws": 50,
        "alpha": 0.5,
        "tokens": 1000,
        "bytes_per_token": 30.25,
        "ids_per_token": 15.0,
        "entropy": 3.0,
        "scoring_seconds": 7.0,
    }
    return QuickstartReport(
        models,
        data,
        teacher,
        [("def f(): pass", "Do nothing.")],
        "machine",
        "2026-01-01",
        "encdec quickstart",
    )


def test_every_model_has_its_column_and_the_twin_is_timed_once(found):
    rows = {row[0]: row[1:] for row in report.table(found, 512)}
    assert rows[""] == ("encoder-decoder", "decoder-only", "distilled encoder-decoder")
    assert rows["held-out loss, nats per target token"] == ("4.0000", "5.0000", "3.9000")
    assert rows["first token, 512 input tokens"] == ("20.0 ms", "20.0 ms", "same architecture")
    assert rows["tokens per second, cached"][2] == "same architecture"
    assert rows["exact match, held-out functions"] == ("16.0", "20.0", "15.6")
    assert rows["Rouge-L, shuffled sources"] == ("4.0", "5.0", "3.9")
    said = report.ratios(found, 512)
    assert said[0].startswith("held-out loss: 0.800 of the decoder-only figure (encoder-decoder")
    assert "0.975 of its held-out loss" in said[-1] and "1.000 of its training time" in said[-1]
    # After few steps nothing is right: nobody is ahead, and no share is taken of 0.
    scores = [{"exact_match": value} for value in (0.0, 0.0, 2.0)]
    models = [dataclasses.replace(m, scores=s) for m, s in zip(found.models, scores)]
    said = report.ratios(dataclasses.replace(found, models=models), 512)
    assert said[1] == "exact match: 0.0 against the 0.0 of the decoder-only figure (neither ahead)"
    assert "2.0 against the 0.0 of its exact match" in said[-1]


def test_the_page_and_its_pictures_are_written(found, tmp_path):
    paths = report.write(found, tmp_path, 512)
    assert {path.name for path in paths} == {
        "report.md",
        "report.json",
        "samples.txt",
        "loss.png",
        "inference.png",
    }
    page = (tmp_path / "report.md").read_text()
    assert "30.2 bytes per token" in page and "0.5 x the divergence from the decoder-only" in page
    assert "distilled encoder-decoder: distilled encoder-decoder says" in page
    assert json.loads((tmp_path / "report.json").read_text())["teacher"]["alpha"] == 0.5
    for name in report.PICTURES:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_data_of_another_call_is_not_taken_for_this_one_s(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(command, "train_vocabulary", lambda texts, path, size: path.touch())
    monkeypatch.setattr(
        command,
        "prepare",
        lambda out, **how: (
            made.append(how["max_examples"]) or write_records(out, random_pairs(3, 0))
        ),
    )
    assert command.prepare_data(tmp_path, TASKS["repair"], 9).keys() == {"train", "test"}
    assert command.prepare_data(tmp_path, TASKS["repair"], 9)["train"].rows and made == [9, 9]
    with pytest.raises(ConfigError, match="max_examples is 9 there and None here.*--workdir"):
        command.prepare_data(tmp_path, TASKS["repair"], None)
    with pytest.raises(ConfigError, match="task is 'stdlib_repair' there"):
        command.prepare_data(tmp_path, TASKS["summaries"], 9)


def test_the_three_runs_differ_in_what_they_should_alone(tmp_path):
    for split in ("train", "test"):
        write_records(tmp_path / "data" / split, random_pairs(3, 0))
    cards = {split: read_card(tmp_path / "data" / split) for split in ("train", "test")}
    task = dataclasses.replace(TASKS["repair"], steps=40)
    runs = command.make_runs(tmp_path, cards, task, seed=3)
    ours, peer = runs["encoder_decoder"], runs["decoder_only"]
    flops = [training_flops(run.model_config(), task.inputs, task.targets) for run in runs.values()]
    assert flops[1] / flops[0] == pytest.approx(1, abs=0.03)
    assert ours.data == peer.data and ours.optimizer == peer.optimizer and ours.steps == peer.steps
    student = command.distilled_run(ours, tmp_path)
    assert student.distill.teacher == str(tmp_path / "teacher")
    assert student.distill.alpha == command.ALPHA and student.distill.loss == "forward_kl"
    assert dataclasses.replace(student, distill=ours.distill) == ours


def test_held_out_functions_are_answered_and_scored(encoder_decoder_run, tmp_path):
    shutil.copytree(encoder_decoder_run, tmp_path / "run")
    examples = [Example(source, (target,)) for source, target in [*LEARNED[:3], ("a hare", "y")]]
    held_out = Examples("learned", tuple(examples), ("exact_match",))
    found = command.answer(tmp_path / "run", held_out, 8)
    assert found.scores == {"exact_match": 75}
    assert found.texts == [*(target for _, target in LEARNED[:3]), "x"]
    assert found.shuffled == {"exact_match": 0}
    assert command.answer(tmp_path / "run", held_out, 8) == found


def test_a_slower_machine_and_more_steps_are_told_to_take_longer():
    seconds = lambda text: [float(n) for n in re.findall(r"(\d+) s[,;]", text)]
    task = TASKS["repair"]
    told = seconds(plan_text(task, REFERENCE_RATE))
    assert told == list(REFERENCE_SECONDS.values()) and sum(told) < 420
    assert seconds(plan_text(task, REFERENCE_RATE / 2)) == [2 * value for value in told]
    longer = seconds(plan_text(dataclasses.replace(task, steps=2 * task.steps), REFERENCE_RATE))
    assert longer[1] == 2 * told[1] and longer[0] == told[0]


def test_of_a_long_answer_the_lines_that_differ_are_shown(found):
    source = "def f(a)\n    return a\n"
    wanted = "def f(a):\n    return a\n"
    models = [
        dataclasses.replace(model, samples=[text])
        for model, text in zip(found.models, (wanted, source, "x"))
    ]
    page = report.samples_text(
        dataclasses.replace(found, models=models, samples=[(source, wanted)])
    )
    lines = [line.strip() for line in page.splitlines()]
    assert lines[2:] == [
        "written by its author: def f(a):",
        "encoder-decoder (right): def f(a):",
        "decoder-only: (nothing changed)",
        "distilled encoder-decoder: x",
        "",
    ]


def test_samples_are_short_where_there_are_short_functions():
    lines = lambda *counts: [Example("x\n" * count, ("y",)) for count in counts]
    assert command.pick_samples(lines(40, 3, 40, 5, 7, 40)) == [1, 3, 4]
    assert command.pick_samples(lines(*[40] * 8)) == [1, 4, 6]
