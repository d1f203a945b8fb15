"""Trackers: what they are given, offline; failures do not end a run. Hooks by command line."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from encdec import cli
from encdec.errors import ConfigError
from encdec.train import trackers
from encdec.train.trackers import make_trackers, tracker_names
from encdec.train.train_command import _hook

SETTINGS = {"run": {"steps": 5, "data": {"records": "a"}}, "model": {"d_model": 16}}
installed = lambda name: pytest.mark.skipif(
    importlib.util.find_spec(name) is None, reason=f"{name} is not installed (extra trackers)"
)


class Listed:
    """A tracker that keeps what it is given."""

    runs: list[Listed] = []  # noqa: RUF012

    def __init__(self, workdir, known, settings):
        self.id = known or f"id{len(self.runs)}"
        self.settings, self.lines, self.closed = settings, [], False
        self.runs.append(self)

    def log(self, step, numbers):
        if step == 13:
            raise ConnectionError("no server\nmore")
        self.lines.append((step, numbers))

    def close(self):
        self.closed = True


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.setattr(Listed, "runs", [])
    monkeypatch.setitem(trackers.TRACKERS, "json", Listed)  # a name that is always importable
    return Listed.runs


def test_a_tracker_gets_settings_and_metrics_and_is_continued(listed, tmp_path):
    said = []
    for steps in ((1, 2), (3,)):
        [writer] = make_trackers(tracker_names("json"), tmp_path, SETTINGS, said.append)
        for step in steps:
            writer.write_scalars(step, {"train/loss": step})
        writer.close()
    assert [run.id for run in listed] == ["id0", "id0"] and not said
    assert listed[0].settings == {"run.steps": 5, "run.data.records": "a", "model.d_model": 16}
    assert listed[0].lines == [(1, {"train/loss": 1.0}), (2, {"train/loss": 2.0})]
    assert all(run.closed for run in listed)


def test_a_tracker_that_fails_is_left_out(listed, tmp_path, monkeypatch):
    said = []
    [writer] = make_trackers(["json"], tmp_path, SETTINGS, said.append)
    for step in (12, 13, 14):
        writer.write_scalars(step, {"a": 1})
    writer.close()
    assert [step for step, _ in listed[0].lines] == [12] and not listed[0].closed
    assert said == [
        "warning: json failed (ConnectionError: no server); the run continues without it, and "
        "metrics.jsonl has everything"
    ]

    def broken(*_):
        raise OSError("refused")

    monkeypatch.setitem(trackers.TRACKERS, "json", broken)
    assert make_trackers(["json"], tmp_path, SETTINGS, said.append) == []
    assert "json did not start (OSError: refused)" in said[1]


def test_names_are_checked_first(listed, monkeypatch):
    assert tracker_names("") == [] and tracker_names(" json ") == ["json"]
    for wrong in ("wandbb", "json,json"):
        with pytest.raises(ConfigError, match="expected wandb or mlflow"):
            tracker_names(wrong)
    monkeypatch.setitem(trackers.TRACKERS, "no_such_package", Listed)
    with pytest.raises(ConfigError, match="needs no_such_package, which is not installed"):
        tracker_names("no_such_package")


@installed("wandb")
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    said = []
    for step in (1, 2):
        [writer] = make_trackers(["wandb"], tmp_path / "run", SETTINGS, said.append)
        writer.write_scalars(step, {"train/loss": 0.5})
        writer.close()
    assert not said
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2 and len({run.stem for run in runs}) == 1  # one id, joined when synced
    assert all(b"train/loss" in run.read_bytes() for run in runs)


@installed("mlflow")
def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    said = []
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        [writer] = make_trackers(["mlflow"], tmp_path / "run", SETTINGS, said.append)
        writer.write_scalars(step, {"train/loss": 0.5 / step})
        writer.close()
    assert not said
    import mlflow

    client = mlflow.MlflowClient()
    [experiment] = [e for e in client.search_experiments() if e.name == "encdec"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params["run.steps"] == "5" and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.25)]


def test_hooks_are_named_by_module_and_function(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_hooks_of_a_test.py").write_text("def look(session):\n    return session\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    call, every = _hook("my_hooks_of_a_test:look:100")
    assert call(3) == 3 and every == 100 and _hook("my_hooks_of_a_test:look")[1] == 0
    for wrong, message in (
        ("my_hooks_of_a_test:lok:1", "no function 'lok'; did you mean 'look'"),
        ("my_hooks_of_a_test:look:x", "EVERY in steps"),
        ("absent_module:look", "--hook=absent_module cannot be imported"),
        ("look", "expected MODULE:FUNCTION"),
    ):
        with pytest.raises(ConfigError, match=message):
            _hook(wrong)
    config = cli.__file__.replace("encdec/cli.py", "configs/pretrain.py:test")
    command = ["train", f"--config={config}", "--workdir=w", "--on_report=absent_module:f"]
    assert cli.main(command) == 2 and "absent_module" in capsys.readouterr().err
