"""A plan's memory and chip-hours through the compiled step."""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib

import pytest

from encdec.cli import main
from encdec.errors import DataError
from encdec.scaling import compiled
from encdec.scaling.compiled import StepFigures, read_kept, step_figures
from encdec.scaling.ladder import parse_ladder
from encdec.scaling.planned_runs import plan
from encdec.scaling.scaling_command import load_ladder

LADDERS = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "scaling.py")
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)


class FakeCompiler:
    """Figures that follow from the step, and none for wide models."""

    def __init__(self, too_wide: int = 10**9):
        self.compiled, self.too_wide = [], too_wide

    def __call__(self, run, topology, inputs, targets) -> StepFigures:
        self.compiled.append((run.model, run.batch_size))
        if run.model_config().d_model >= self.too_wide:
            return StepFigures(topology, 256, reason="Used 20G of 16G hbm.")
        return StepFigures(topology, 256, 2.0**30, 2.0**34, 1e-3 * run.batch_size, 0.5)


@pytest.fixture(scope="module")
def paper():
    return plan(parse_ladder(load_ladder(f"{LADDERS}:paper", [])))


def silent(text: str) -> None:
    pass


def test_each_distinct_step_is_compiled_once(paper, tmp_path):
    first, kept = FakeCompiler(), tmp_path / "kept.jsonl"
    found = step_figures(paper.ladder, paper.runs, "v5e:16x16", kept, silent, first)
    assert set(found) == {run.name for run in paper.runs}
    steps = {(run.series, run.size, run.batch_size) for run in paper.runs}
    assert len(first.compiled) == len(steps) < len(paper.runs)
    again = FakeCompiler()
    assert step_figures(paper.ladder, paper.runs, "v5e:16x16", kept, silent, again) == found
    assert again.compiled == []
    step_figures(paper.ladder, paper.runs, "v5e:8x8", kept, silent, again)
    assert len(again.compiled) == len(steps)


def test_what_a_step_depends_on(paper):
    def keys(*overrides: str, **distill: str) -> set[str]:
        ladder = load_ladder(f"{LADDERS}:paper", list(overrides)).to_dict()
        ladder["run"]["distill"] |= distill
        found = plan(parse_ladder(ladder))
        return {compiled.step_key(found.ladder, run, "v5e:16x16") for run in found.runs}

    base = keys()
    assert keys("--ladder.learning_rate.peak=3e-4", "--ladder.run.log_every=7") == base
    assert not keys("--ladder.run.mesh.fsdp=4") & base
    assert not keys("--ladder.run.optimizer.name=muon") & base
    taught = "--ladder.distilled.series=('dec',)", "--ladder.distilled.teachers.kd.rows=kd"
    forward, backward = keys(*taught), keys(*taught, loss="reverse_kl")
    assert forward & backward == base < forward and forward != backward


def test_a_torn_line_is_compiled_again_and_a_damaged_one_named(paper, tmp_path):
    kept = tmp_path / "kept.jsonl"
    step_figures(paper.ladder, paper.runs[:3], "v5e:16x16", kept, silent, FakeCompiler())
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-20])
    again = FakeCompiler()
    step_figures(paper.ladder, paper.runs[:3], "v5e:16x16", kept, silent, again)
    assert len(again.compiled) == 1 and kept.read_bytes() == whole
    assert len(read_kept(kept)) == 3
    kept.write_text("{}\n" + whole.decode())
    with pytest.raises(DataError, match="line 1 does not hold a step's figures"):
        read_kept(kept)


def test_the_bill_is_steps_times_seconds_times_chips(paper, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "compile_figures", FakeCompiler(too_wide=1600))
    arguments = ["scaling", "plan", f"--ladder={LADDERS}:paper", "--topology=v5e:16x16"]
    assert main([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    fit = [run for run in paper.runs if run.size != "1b"]
    hours = sum(run.steps * 1e-3 * run.batch_size * 256 / 3600 for run in fit)
    assert content["chip_hours"] == pytest.approx(hours)
    assert len(content["do_not_fit"]) == len(paper.runs) - len(fit) > 0
    by_name = {run["name"]: run["compiled"] for run in content["runs"]}
    assert by_name["dec_1b_5_s0"]["peak_bytes"] is None
    assert by_name["dec_330m_5_s0"]["mfu"] == 0.5
    assert main([*arguments, "--only=dec_330m_5_s0", "--only=dec_1b_5_s0"]) == 0
    text = capsys.readouterr().out
    assert "1.00 of 16.00" in text and "50.0%" in text and "too large" in text
    assert "dec_1b_5_s0: Used 20G" in text and "chip-hours on v5e:16x16 (256 chips)" in text
    assert "ed-2of3_330m_5_s0" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compiled=x"], "--compiled=x has no effect without --topology"),
        (["--topology=v5e:4x4", "--chip=v5e"], "give one"),
        (["--topology=v9:4x4"], "v5e:4x4"),
        (["--only=dec_330m_6_s0"], "did you mean"),
    ],
)
def test_contradictions_are_refused(options, message, capsys):
    assert main(["scaling", "plan", f"--ladder={LADDERS}:paper", *options]) == 2
    assert message in capsys.readouterr().err


def test_not_a_number_is_not_kept_as_one(tmp_path, paper):
    kept = tmp_path / "kept.jsonl"
    step_figures(paper.ladder, paper.runs[:1], "v5e:16x16", kept, silent, FakeCompiler(too_wide=1))
    json.loads(kept.read_text(), parse_constant=lambda name: pytest.fail(name))
    (figures,) = read_kept(kept).values()
    assert math.isnan(figures.peak_bytes) and figures.reason == "Used 20G of 16G hbm."


@pytest.mark.slow
@needs_compiler
def test_agrees_with_encdec_compile(tmp_path, capsys):
    """The same step through the plan and through the command that explains it."""
    config = tmp_path / "ladder.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict(dict(sizes=dict(tiny=dict(preset='test')), inputs=128,\n"
        "        targets=128, splits=('2/3',), decoder_only=False,\n"
        "        budgets=dict(kind='rows', values=(400.0,), min_steps=5),\n"
        "        batch=dict(rows=8, reference_rows=400, smallest=8, largest=8)))\n"
    )
    assert main(["scaling", "plan", f"--ladder={config}", "--topology=v5e:2x2", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    report = tmp_path / "report.json"
    pretrain = pathlib.Path(LADDERS).with_name("pretrain.py")
    overrides = [
        f"--config.model_overrides.{k}={v}"
        for k, v in {
            name: run["model"][name] for name in ("encoder_layers", "decoder_layers")
        }.items()
    ]
    assert (
        main(
            [
                "compile",
                f"--config={pretrain}:test",
                "--topology=v5e:2x2",
                "--inputs_length=128",
                "--targets_length=128",
                "--config.batch_size=8",
                *overrides,
                "--config.optimizer.weight_decay=0.1",
                "--config.schedule.warmup_steps=1",
                f"--config.steps={run['steps']}",
                f"--out={report}",
            ]
        )
        == 0
    )
    (wanted,) = json.loads(report.read_text())
    found = run["compiled"]
    assert found["limit_bytes"] == wanted["memory_bytes"]["limit"]
    assert found["peak_bytes"] == pytest.approx(wanted["memory_bytes"]["peak"], rel=0.02)
    assert found["step_seconds"] == pytest.approx(wanted["step_seconds"], rel=0.05)
    assert found["chip_hours"] == pytest.approx(run["steps"] * found["step_seconds"] * 4 / 3600)
