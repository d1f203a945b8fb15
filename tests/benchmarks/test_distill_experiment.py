"""The experiment's pieces against plain counts; the gradients' figure on a tiny pair of models."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from encdec.benchmarks.distill_experiment import (
    BINS,
    DistillExperiment,
    calibration_error,
    check_setting,
    expected_calibration_error,
    student_config,
    variants,
)
from encdec.benchmarks.distill_gradients import angle_degrees, gradient_errors
from encdec.benchmarks.distill_report import draw_gradients, draw_students, table
from encdec.cli import main
from encdec.data.batches import Batches
from encdec.data.records import open_records
from encdec.errors import ConfigError
from encdec.model import build_model
from encdec.saved.saved_params import load_params_for_inference
from encdec.train.loop import train
from tests.devices import one_device
from tests.distill.conftest import records, teacher  # noqa: F401
from tests.train.conftest import small_run


@pytest.fixture(scope="module")
@one_device()
def student(records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("student") / "work"
    train(
        small_run(
            records, model="test", steps=1, model_overrides={"scan_layers": False, "init_std": 0.1}
        ),
        workdir,
    )
    return workdir


def test_calibration_error_counts_every_target_token_once(records, student):
    config, params, _ = load_params_for_inference(student)
    model, opened = build_model(config), open_records(records)
    batch = Batches(opened, global_batch=42, shuffle=False)[0]
    probs = np.asarray(jax.nn.softmax(model.apply({"params": params}, batch)))
    real = batch["decoder_loss_weights"] > 0
    confidence, right = (
        probs.max(-1)[real],
        (probs.argmax(-1) == batch["decoder_target_tokens"])[real],
    )
    error = 0.0
    for low in range(BINS):
        inside = (confidence >= low / BINS) & (confidence < (low + 1) / BINS)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            error += inside.mean() * gap
    np.testing.assert_allclose(calibration_error(student, str(records), rows=16), error, rtol=1e-4)


def test_calibrated_guesses_have_no_error():
    count = np.array([10.0, 0.0, 20.0])
    assert expected_calibration_error(count, count / 2, count / 2) == 0
    assert expected_calibration_error(count, np.array([9.0, 0, 20]), count / 2) == 14 / 30


def test_top_k_gets_the_bytes_of_the_draws():
    kinds = variants(pairs_per_token=14.0)
    assert [kind.method for kind in kinds] == ["", "full", "sampled"] + ["top_k"] * 4
    equal = kinds[3]
    assert abs(4 * equal.k + 7 - (3 * 14 + 5)) <= 2 and equal.tail == "dropped"
    assert kinds[-1].tail == "merged" and kinds[-1].store == equal.store
    assert len({kind.name for kind in kinds}) == len(kinds)


def test_settings_that_compare_nothing_are_refused(records):
    make = lambda **changes: DistillExperiment(
        pathlib.Path("/nowhere"),
        str(records),
        str(records),
        str(records),
        student="test",
        **changes,
    )
    with pytest.raises(ConfigError, match="at least 4 times.* a larger --teacher"):
        check_setting(make(teacher="test-dec", teacher_layers=0))
    with pytest.raises(ConfigError, match=r"encoder-decoder; expected a decoder-only"):
        check_setting(make(teacher="micro-1m", teacher_layers=0))
    check_setting(make(teacher="micro-1m-dec", teacher_layers=2))
    run = student_config(make(), variants(14.0)[3], 1)
    assert run.distill.tail == "dropped" and run.seed == 1
    assert run.distill.teacher.endswith("top_k10")


def test_angles_of_known_vectors():
    assert angle_degrees(np.array([1.0, 0]), np.array([1.0, 1])) == pytest.approx(45)
    assert angle_degrees(np.array([2.0, 0]), np.array([4.0, 0])) == 0
    assert angle_degrees(np.array([2.0, 0]), np.array([-4.0, 0])) == pytest.approx(180)


@pytest.mark.slow
def test_more_draws_point_nearer_to_every_logit(records, teacher, student, tmp_path):
    errors = gradient_errors(student, teacher, str(records), rows=32, batch_rows=16, draws=(3, 100))
    of = {(error.kind, index): error for index, error in enumerate(errors)}
    few, many = of["draws", 0], of["draws", 3]
    assert few.angle > 2 * many.angle > 0 and abs(many.norm_ratio - 1) < 0.05
    assert few.bytes_per_token < many.bytes_per_token
    assert of["top-k", 4].angle > many.angle
    assert of["top-k", 4].bytes_per_token == pytest.approx(many.bytes_per_token, rel=0.05)
    draw_gradients(errors, tmp_path / "gradients.png")
    assert (tmp_path / "gradients.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_has_a_line_for_each_student(tmp_path):
    row = lambda name, losses, **more: {
        "name": name,
        "seeds": len(losses),
        "loss": float(np.mean(losses)),
        "ece": 0.02,
        "loss_std": float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
        "ece_std": None,
        "runs": [{"loss": loss, "ece": 0.02} for loss in losses],
        **more,
    }
    results = {
        "students": [row("CE", [4.0, 4.2]), row("50 draws", [4.0], bytes_per_token=36.04)],
        "teacher": {"parameters": 1234, "loss": 3.69, "ece": 0.01},
    }
    text = table(results)
    assert "| CE | 2 | 4.1000 ± 0.1414 | +0.00% | 0.0200 | 0 |" in text
    assert "| 50 draws | 1 | 4.0000 | -2.44% | 0.0200 | 36.0 |" in text
    assert "| the teacher, 1,234 parameters | 1 | 3.6900 | -10.00% |" in text
    draw_students(results, tmp_path / "students.png")
    assert (tmp_path / "students.png").stat().st_size > 5000


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "distill", "--help"])
    assert stopped.value.code == 0 and "--teacher_records" in capsys.readouterr().out
