"""A small ladder is really run: killed, resumed, collected, split over processes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
import random
import shutil
import sys
import time

import pytest

from encdec import cli
from encdec.data.task_registry import TEXT_TASKS
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from encdec.evaluation.examples import Example, Examples
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.load_generator import load
from encdec.metrics.metric_registry import metric_named
from encdec.scaling import evaluate_plan
from encdec.scaling.ladder import parse_ladder
from encdec.scaling.planned_runs import Plan, plan
from encdec.scaling.results_file import ResultsFile, collect
from encdec.scaling.run import Workdir, run_plan
from tests.devices import one_device
from tests.forks import Fork, finish

LADDER = {
    "name": "tiny",
    "sizes": {"tiny": {"preset": "test", "vocab_size": 264}},
    "inputs": 24,
    "targets": 12,
    "splits": ("2/3",),
    "match": "parameters+data",
    "evaluations": 2,
    "budgets": {"kind": "rows", "values": (64.0, 128.0), "min_steps": 4},
    "batch": {"rows": 8, "reference_rows": 64, "largest": 8},
    "run": {"log_every": 4, "checkpoint": {"every": 4}, "mesh": {"data": 1}},
    "distilled": {"teachers": {"kd": {"rows": "", "loss": 0.0}}},
}
STEPS = {"64": 8, "128": 16}


def tiny(records: pathlib.Path, eval_records: pathlib.Path, **changes) -> Plan:
    return plan(
        parse_ladder(
            {**LADDER, "records": str(records), "eval_records": str(eval_records), **changes}
        )
    )


class FakeTraining:
    """Writes what training would have written, and fails where told to."""

    def __init__(self, fail: str = "", stop_short: str = ""):
        self.fail, self.stop_short, self.trained = fail, stop_short, []

    def __call__(self, config, workdir: str) -> None:
        path = pathlib.Path(workdir)
        path.mkdir(parents=True, exist_ok=True)
        self.trained.append(path.name)
        if path.name == self.fail:
            raise NonFiniteError("step 3: loss is nan")
        last = config.steps // 2 if path.name == self.stop_short else config.steps
        with open(path / "metrics.jsonl", "a") as file:
            for step in (config.steps // 2, config.steps):
                if step <= last:
                    file.write(
                        json.dumps(
                            {
                                "step": step,
                                "time": 0.0,
                                "eval/loss": 2.0 - step / 99,
                                "eval/bits_per_byte": 1.5,
                                "eval/accuracy": 0.1,
                            }
                        )
                        + "\n"
                    )


def rows_of(directory: pathlib.Path) -> list[dict]:
    return ResultsFile(directory / "results.jsonl").read()


def test_only_what_is_not_done_is_run(tmp_path, records, eval_records):
    found, train = tiny(records, eval_records), FakeTraining()
    first = run_plan(found, tmp_path, only=["dec_tiny_64_s0"], train=train)
    assert first.done == ("dec_tiny_64_s0",) and len(rows_of(tmp_path)) == 2
    second = run_plan(found, tmp_path, train=train)
    assert second.done_before == ("dec_tiny_64_s0",) and len(second.done) == 3
    third = run_plan(found, tmp_path, train=train)
    assert third.done == () and len(third.done_before) == 4
    assert len(train.trained) == len(set(train.trained)) == 4
    rows = rows_of(tmp_path)
    assert len(rows) == 8 == len({(row["run"], row["step"]) for row in rows})
    assert sum(row["final"] for row in rows) == 4
    last = next(row for row in rows if row["run"] == "dec_tiny_128_s0" and row["final"])
    run = found.named("dec_tiny_128_s0")
    assert (last["flops"], last["step"]) == (pytest.approx(run.flops), 16)
    half = next(row for row in rows if row["run"] == "dec_tiny_128_s0" and not row["final"])
    assert half["flops"] == pytest.approx(run.flops / 2)


def test_a_failed_run_stops_no_other(tmp_path, records, eval_records):
    found = tiny(records, eval_records)
    outcome = run_plan(found, tmp_path, train=FakeTraining(fail="dec_tiny_64_s0"))
    assert outcome.failed == {"dec_tiny_64_s0": "step 3: loss is nan"}
    assert len(outcome.done) == 3
    again = run_plan(found, tmp_path, train=FakeTraining())
    assert again.done == ("dec_tiny_64_s0",)


def test_killed_between_training_and_recording(tmp_path, records, eval_records):
    """The last evaluation stands in the run's directory, and nothing in the results."""
    found, train = tiny(records, eval_records), FakeTraining()
    run = found.runs[0]
    from encdec.scaling.planned_runs import run_config

    train(run_config(found.ladder, run), str(Workdir(tmp_path).run_directory(run.name)))
    outcome = run_plan(found, tmp_path, train=train)
    assert run.name in outcome.done_before and train.trained.count(run.name) == 1


def test_a_run_without_its_last_evaluation_is_not_done(tmp_path, records, eval_records):
    found = tiny(records, eval_records)
    name = "ed-2of3_tiny_128_s0"
    outcome = run_plan(found, tmp_path, train=FakeTraining(stop_short=name))
    assert "without an evaluation" in outcome.failed[name]
    assert not any(row["final"] for row in rows_of(tmp_path) if row["run"] == name)


def test_a_torn_line_is_cut_off_and_written_again(tmp_path, records, eval_records):
    found = tiny(records, eval_records)
    run_plan(found, tmp_path, train=FakeTraining())
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole) - whole[:-1].rfind(b"\n") - 1, 37):
        path.write_bytes(whole[:-cut])
        assert len(rows_of(tmp_path)) == 7
        train = FakeTraining()
        run_plan(found, tmp_path, train=train)
        assert train.trained == [] and path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path, records, eval_records):
    found = tiny(records, eval_records)
    run_plan(found, tmp_path, train=FakeTraining())
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:40] + "\n" + "".join(lines[2:]))
    with pytest.raises(DataError, match="line 2 is damaged"):
        run_plan(found, tmp_path, train=FakeTraining())


def test_a_torn_metrics_line_is_passed_over(tmp_path, records, eval_records):
    found = tiny(records, eval_records)
    run = found.runs[0]
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "eval/loss": 2.0}\n{"step": 8, "eva')
    assert [row["step"] for row in collect(run, tmp_path)] == [4]


def test_scores_are_collected(tmp_path, records, eval_records):
    found = tiny(records, eval_records)
    run_plan(found, tmp_path, train=FakeTraining())
    run = found.runs[0]
    folder = Workdir(tmp_path).run_directory(run.name)
    (folder / "scores.json").write_text('{"rougeL": 0.25}')
    other = Workdir(tmp_path).run_directory(found.runs[1].name)
    (other / "scores.json").write_text('{"f1": {"value": 0.5, "low": 0.4, "high": 0.7}}')
    run_plan(found, tmp_path, train=FakeTraining())
    scored = {row["run"]: row for row in rows_of(tmp_path) if "scores" in row}
    assert scored[run.name]["scores"] == {"rougeL": 0.25}
    assert "score_intervals" not in scored[run.name]
    assert scored[found.runs[1].name]["scores"] == {"f1": 0.5}
    assert scored[found.runs[1].name]["score_intervals"] == {"f1": [0.4, 0.7]}
    # What is scored again counts, and is not written once more.
    (folder / "scores.json").write_text('{"rougeL": 0.5}')
    for _ in range(2):
        run_plan(found, tmp_path, train=FakeTraining())
    scored = {row["run"]: row for row in rows_of(tmp_path) if "scores" in row}
    assert scored[run.name]["scores"] == {"rougeL": 0.5}
    assert (tmp_path / "results.jsonl").read_text().count('"scores"') == 3
    (Workdir(tmp_path).run_directory(found.runs[2].name) / "scores.json").write_text('["f1"]')
    with pytest.raises(DataError, match=r"expected \{metric: value\}"):
        run_plan(found, tmp_path, train=FakeTraining())


def test_a_teacher_s_loss_may_be_told_later(tmp_path, records, eval_records):
    """As the report asks for where the loss of a finished run's teacher is unknown."""
    for loss in (0.0, 3.5):
        distilled = {"series": ("ed-2of3",), "teachers": {"kd": {"rows": "kd", "loss": loss}}}
        found = tiny(records, eval_records, distilled=distilled)
        run_plan(found, tmp_path, train=FakeTraining())
        taught = [row for row in rows_of(tmp_path) if "+kd" in row["run"] and row["final"]]
        assert [row["teacher_loss"] for row in taught] == [loss] * 2


def test_one_task_scores_all_runs_of_a_ladder(tmp_path, records, eval_records, monkeypatch):
    found = tiny(records, eval_records)
    run_plan(found, tmp_path, only=["dec_tiny_64_s0"], train=FakeTraining())
    monkeypatch.setattr(evaluate_plan, "_scores", lambda *given: {"rougeL": {"value": 1.0}})
    one = Examples("one", (Example("a", ("b",)),), ("rougeL",))
    others = [
        dataclasses.replace(one, name="other"),
        dataclasses.replace(one, metrics=("exact_match",)),
        dataclasses.replace(one, examples=(Example("a", ("c",)),)),
    ]
    assert evaluate_plan.evaluate_plan(found, tmp_path, one) == ["dec_tiny_64_s0"]
    assert evaluate_plan.evaluate_plan(found, tmp_path, one) == []
    for other, what in zip(others, ("task", "metrics", "fingerprint")):
        with pytest.raises(
            ConfigError, match=f"{what}.* is .* there and .* here.*to score all again"
        ):
            evaluate_plan.evaluate_plan(found, tmp_path, other)


def test_another_ladder_or_plan_is_refused(tmp_path, records, eval_records):
    run_plan(tiny(records, eval_records), tmp_path, train=FakeTraining())
    with pytest.raises(CheckpointError, match=r"match is 'parameters\+data' there"):
        run_plan(tiny(records, eval_records, match="flops+data"), tmp_path)
    # Where and how runs are done may change ...
    elsewhere = {**LADDER["run"], "mesh": {"data": -1}, "log_every": 8}
    outcome = run_plan(tiny(records, eval_records, run=elsewhere), tmp_path, train=FakeTraining())
    assert len(outcome.done_before) == 4
    with pytest.raises(CheckpointError, match="run is"):
        run_plan(
            tiny(records, eval_records, run={**LADDER["run"], "loss": {"z_loss": 0.1}}), tmp_path
        )
    # ... but not the rows whose losses are compared ...
    sampled = {**LADDER["run"], "eval": {"batches": 1}}
    with pytest.raises(CheckpointError, match="run is"):
        run_plan(tiny(records, eval_records, run=sampled), tmp_path)
    with pytest.raises(CheckpointError, match="fingerprints of records and eval_records is"):
        run_plan(tiny(records, records), tmp_path)
    shutil.copytree(eval_records, tmp_path / "moved")
    run_plan(tiny(records, tmp_path / "moved"), tmp_path, train=FakeTraining())
    # ... more budgets only add runs ...
    more = {**LADDER["budgets"], "values": (64.0, 128.0, 192.0)}
    train = FakeTraining()
    run_plan(tiny(records, eval_records, budgets=more), tmp_path, train=train)
    assert sorted(train.trained) == ["dec_tiny_192_s0", "ed-2of3_tiny_192_s0"]
    # ... but a size of the same name with another model is another run.
    other = {"tiny": {"preset": "test", "vocab_size": 264, "mlp_dim": 96}}
    with pytest.raises(DataError, match="of another plan"):
        run_plan(tiny(records, eval_records, sizes=other), tmp_path)
    with pytest.raises(DataError, match=r"ladder.eval_records is empty"):
        run_plan(tiny(records, ""), tmp_path)


def test_a_run_in_other_hands_is_left_alone(tmp_path, records, eval_records):
    found, train = tiny(records, eval_records), FakeTraining()
    name = found.runs[0].name
    with Workdir(tmp_path).lock(name) as mine:
        assert mine
        outcome = run_plan(found, tmp_path, train=train)
    assert outcome.busy == (name,) and name not in train.trained


def arguments(
    directory: pathlib.Path, records: pathlib.Path, eval_records: pathlib.Path, *more: str
) -> list[str]:
    config = directory.parent / "tiny.py"
    config.write_text(
        f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({LADDER!r})\n"
    )
    return [
        "scaling",
        "run",
        f"--ladder={config}",
        f"--ladder.records={records}",
        f"--ladder.eval_records={eval_records}",
        f"--workdir={directory}",
        *more,
    ]


def losses(directory: pathlib.Path) -> dict[tuple[str, int], float]:
    rows = [row for row in rows_of(directory) if "scores" not in row]
    found = {(row["run"], row["step"]): row["loss"] for row in rows}
    assert len(found) == len(rows), "a run was recorded twice"
    return found


@pytest.fixture(scope="module")
@one_device()
def undisturbed(tmp_path_factory, records, eval_records) -> pathlib.Path:
    """The tiny ladder, really trained, as tasks of an array job and then collected."""
    directory = tmp_path_factory.mktemp("undisturbed") / "ladder"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(arguments(directory, records, eval_records, "--dry_run")) == 0
    assert not directory.exists()
    listing = said.getvalue().splitlines()
    assert len(listing) == 4 and all("--only=" in line for line in listing)
    assert cli.main(arguments(directory, records, eval_records, "--index=0")) == 0
    assert len({row["run"] for row in rows_of(directory)}) == 1
    assert cli.main(arguments(directory, records, eval_records)) == 0
    return directory


@pytest.mark.slow
def test_the_ladder_is_trained_and_recorded(undisturbed):
    found = losses(undisturbed)
    assert len(found) == 8
    assert {step for _, step in found} == {4, 8, 16}
    assert all(2 < loss < 6 for loss in found.values())
    # More data, lower loss: these are real runs.
    assert found["dec_tiny_128_s0", 16] < found["dec_tiny_64_s0", 8]


MODULE = """
from encdec.tasks import TextTask, register_task

def pairs(split, bad_rows):
    yield from {"train": [], "test": [("ab", "ba"), ("hello", "x")]}[split]

register_task(TextTask("my_pairs", pairs, splits=("train", "test"), metrics=("exact_match",)))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_every_finished_run_is_scored_once(
    undisturbed, records, eval_records, tmp_path, monkeypatch, capsys
):
    """On a task of a module of the user's own, by the command."""
    (tmp_path / "my_ladder_tasks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    words = arguments(undisturbed, records, eval_records, "--task=my_pairs", "--split=test")
    words = ["scaling", "evaluate", *words[2:], "--metrics=rougeL"]
    assert cli.main(words) == DataError.exit_code and "--module" in capsys.readouterr().err
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        assert cli.main([*words, "--module=my_ladder_tasks"]) == 0
        assert "4 to evaluate on 2 examples of my_pairs" in capsys.readouterr().err
        assert cli.main([*words, "--module=my_ladder_tasks"]) == 0
        assert "0 to evaluate on" in capsys.readouterr().err
    finally:
        TEXT_TASKS.pop("my_pairs")
        sys.modules.pop("my_ladder_tasks")
    # The score is that of the answers which each model gives to one input at a time.
    rows = {row["run"]: row for row in rows_of(undisturbed) if "scores" in row}
    assert len(rows) == 4
    generator = load(Workdir(undisturbed).run_directory("dec_tiny_128_s0"))
    answers = [
        generator.generate([source], GenerationSettings(max_tokens=12))[0][0].text
        for source in ("ab", "hello")
    ]
    row = rows["dec_tiny_128_s0"]
    assert row["scores"] == metric_named("rougeL")(["ba", "x"], answers)
    low, high = row["score_intervals"]["rougeL"]
    assert low <= row["scores"]["rougeL"] <= high


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_distilled_runs_of_a_ladder(undisturbed, records, eval_records, tmp_path):
    """A run of the ladder teaches: stored rows, the series once more, rows of both in one file."""
    teacher = Workdir(undisturbed).run_directory("dec_tiny_128_s0")
    store_teacher_logits(teacher=teacher, records=records, out=tmp_path / "stored")
    directory = tmp_path / "ladder"
    loss = losses(undisturbed)["dec_tiny_128_s0", 16]
    done = cli.main(
        arguments(
            directory,
            records,
            eval_records,
            "--ladder.distilled.series=('ed-2of3',)",
            f"--ladder.distilled.teachers.kd.rows={tmp_path / 'stored'}",
            f"--ladder.distilled.teachers.kd.loss={loss}",
            "--only=ed-2of3_tiny_128_s0",
            "--only=ed-2of3+kd_tiny_128_s0",
        )
    )
    assert done == 0
    final = {row["run"]: row for row in rows_of(directory) if row["final"]}
    plain, taught = final["ed-2of3_tiny_128_s0"], final["ed-2of3+kd_tiny_128_s0"]
    assert plain["loss"] == pytest.approx(losses(undisturbed)["ed-2of3_tiny_128_s0", 16], rel=1e-6)
    assert taught["loss"] != plain["loss"] and taught["teacher_loss"] == loss
    assert taught["flops"] == plain["flops"]
    with open(Workdir(directory).run_directory("ed-2of3+kd_tiny_128_s0") / "metrics.jsonl") as file:
        assert any("train/distill_loss" in line for line in file)


@pytest.mark.slow
def test_killed_at_any_moment_and_restarted(tmp_path, records, eval_records, undisturbed):
    """Kill -9 at a moment of its first runs, and then left to finish."""
    directory = tmp_path / "ladder"
    command, log = [arguments(directory, records, eval_records)], tmp_path / "log"
    process = Fork(cli.main, command, log)
    # From the first sign of progress on, so that a slow machine, too, has begun.
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if rows_of(directory) or list(directory.glob("runs/*/checkpoints/*")):
            break
        time.sleep(0.02)
    time.sleep(random.Random(0).uniform(0, 2))
    process.kill()
    finish([Fork(cli.main, command, log)])
    assert losses(directory) == pytest.approx(losses(undisturbed), rel=1e-6)
