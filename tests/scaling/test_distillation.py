"""The law of distilled runs recovers what was planted, and refuses what cannot determine it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from encdec.errors import ConfigError, DataError
from encdec.scaling.analysis import analyse
from encdec.scaling.distillation import DistillationLaw, fit_distillation
from encdec.scaling.fit import Law, Observations
from encdec.scaling.ladder import parse_ladder
from encdec.scaling.planned_runs import plan, run_config
from encdec.scaling.plots import draw_all
from encdec.scaling.results_file import Choices, describe
from encdec.scaling.scaling_report import as_json, sections
from encdec.scaling.series_styles import label_of

SUPERVISED = Law("total", 1.7, 400.0, 410.0, (0.34,), 0.28)
PLANTED = DistillationLaw(
    SUPERVISED,
    {
        "c0": 2.5,
        "c1": 30.0,
        "d1": 1.3,
        "f1": 0.1,
        "A": 2200.0,
        "alpha": 0.32,
        "B": 24000.0,
        "beta": 0.64,
        "gamma": 0.76,
    },
)
TEACHERS = (2.0, 2.2, 2.4, 2.7, 3.0)


def students(noise: float = 0.0, teachers=TEACHERS, sizes: int = 4, budgets: int = 4):
    n, d, teacher = (
        x.ravel()
        for x in np.meshgrid(
            np.geomspace(1e8, 3e9, sizes), np.geomspace(1e9, 1e11, budgets), np.array(teachers)
        )
    )
    loss = PLANTED.loss(n, d, teacher)
    loss = loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(n)))
    return Observations(n, d, loss), teacher


def test_the_form_by_hand():
    """Equation 8 of arXiv 2502.08606, written out once more for one student."""
    c, n, d, teacher = PLANTED.constants, 2e8, 1e10, 2.4
    alone = 1.7 + 400 / n**0.34 + 410 / d**0.28
    middle = (1 + (teacher / (alone * 1.3)) ** 10) ** -3
    own = (2200 / n**0.32 + 24000 / d**0.64) ** 0.76
    assert PLANTED.loss(n, d, teacher) == pytest.approx(teacher + teacher**-2.5 * middle * own)
    assert set(c) == {"c0", "c1", "d1", "f1", "A", "alpha", "B", "beta", "gamma"}


def test_recovers_a_planted_law():
    law = fit_distillation(*students(), SUPERVISED)
    for name, value in PLANTED.constants.items():
        assert law.constants[name] == pytest.approx(value, rel=1e-3), name
    assert law.bounds_hit == ()


def test_predicts_teachers_sizes_and_budgets_that_it_has_not_seen():
    law = fit_distillation(*students(noise=0.002), SUPERVISED)
    runs, teacher = students(teachers=(2.1, 2.55, 2.85), sizes=5, budgets=5)
    predicted = law.loss(runs.parameters, runs.tokens, teacher)
    assert predicted == pytest.approx(runs.loss, rel=0.005)


def test_says_from_when_gold_targets_alone_are_better():
    found = PLANTED.overtaken_at(2e8, 2.4, (1e8, 1e14))
    assert PLANTED.loss(2e8, found, 2.4) == pytest.approx(SUPERVISED.loss(2e8, found), rel=1e-4)
    assert PLANTED.loss(2e8, found / 3, 2.4) < SUPERVISED.loss(2e8, found / 3)
    assert PLANTED.overtaken_at(2e8, 2.4, (1e8, found / 2)) is None
    # A teacher that is no better than the student alone helps nowhere.
    assert PLANTED.overtaken_at(2e8, 3.6, (1e10, 1e12)) == pytest.approx(1e10)


def refused(runs, teacher) -> str:
    with pytest.raises(DataError) as caught:
        fit_distillation(runs, teacher, SUPERVISED)
    return str(caught.value)


def test_refuses_what_cannot_determine_it():
    assert "1 teacher loss;" in refused(*students(teachers=(2.2,)))
    assert "2 teacher losses;" in refused(*students(teachers=(2.2, 2.6)))
    assert "1 student size;" in refused(*students(sizes=1))
    assert "2 token counts;" in refused(*students(budgets=2))
    runs, teacher = students(teachers=(2.0, 2.4, 3.0), sizes=3, budgets=3)
    few = np.array([0, 4, 8, 9, 13, 17, 18, 22, 26])
    assert "9 distilled runs; the 9 constants" in refused(runs.select(few), teacher[few])
    assert "1 of 27 distilled runs is unknown" in refused(
        runs, np.where(np.arange(27) == 3, 0.0, teacher)
    )
    below = runs.loss.copy()
    below[5] = teacher[5] - 0.01
    assert "1 of 27 students have a lower loss than their teacher" in refused(
        dataclasses.replace(runs, loss=below), teacher
    )
    below[5] = np.nan
    assert "loss is not a positive finite number" in refused(
        dataclasses.replace(runs, loss=below), teacher
    )


LADDER = {
    "sizes": {size: {"preset": f"micro-{size}"} for size in ("300k", "1m", "3m")},
    "inputs": 128,
    "targets": 32,
    "splits": ("2/3",),
    "budgets": {"values": (1.6e11, 5e11, 1.6e12), "min_steps": 5},
    "batch": {"rows": 4, "reference_rows": 1000, "smallest": 4, "largest": 64},
    "distilled": {
        "series": ("ed-2of3",),
        "teachers": {
            "kd": {"rows": "scored/a", "loss": 3.0},
            "b": {"rows": "scored/b", "loss": 3.3},
            "c": {"rows": "scored/c", "loss": 3.6},
            "unused": {"rows": "", "loss": 0.0},
        },
    },
}


def test_distilled_runs_repeat_plain_ones_with_a_teacher():
    found = plan(parse_ladder(LADDER))
    by_name = {run.name: run for run in found.runs}
    assert {run.series for run in found.runs} == {
        "ed-2of3",
        "dec",
        "ed-2of3+kd",
        "ed-2of3+b",
        "ed-2of3+c",
    }
    plain, taught = by_name["ed-2of3_1m_1.6e12_s0"], by_name["ed-2of3+b_1m_1.6e12_s0"]
    same = ("model", "batch_size", "steps", "learning_rate", "seed", "flops", "target_tokens")
    assert all(getattr(plain, name) == getattr(taught, name) for name in same)
    assert plain.digest != taught.digest
    assert (plain.teacher, taught.teacher, taught.teacher_loss) == ("", "scored/b", 3.3)
    assert run_config(found.ladder, plain).distill.teacher == ""
    assert run_config(found.ladder, taught).distill.teacher == "scored/b"
    assert describe(taught)["teacher_loss"] == 3.3 and "teacher_loss" not in describe(plain)


@pytest.mark.parametrize(
    ("distilled", "message"),
    [
        ({"series": ("ed-1of2",)}, "expected series of the ladder: ed-2of3, dec"),
        ({"series": ("dec",), "teachers": {"kd": {"rows": ""}}}, "no teacher has rows"),
        ({"series": ("dec",), "teachers": {"a_b": {"rows": "x"}}}, "without '_'"),
        ({"series": ("dec",), "teachers": {"a": {"dir": "x"}}}, "'rows': DIR"),
        (
            {"series": ("dec",), "teachers": {"a": {"rows": "x", "loss": -1.0}}},
            "nats per target token",
        ),
    ],
)
def test_impossible_teachers_are_refused(distilled, message):
    with pytest.raises(ConfigError, match=message):
        parse_ladder({**LADDER, "distilled": distilled})
    with pytest.raises(ConfigError, match="distilled.teachers instead"):
        parse_ladder({**LADDER, "run": {"distill": {"teacher": "x"}}})


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """A ladder's results if distillation were worth a third of the tokens."""
    plain = Law("total", 2.0, 470.0, 28.0, (0.42,), 0.30)
    random, rows = np.random.default_rng(0), []
    for run in plan(parse_ladder(LADDER)).runs:
        worth = {0.0: 1.0, 3.0: 4.0, 3.3: 3.0, 3.6: 2.0}[run.teacher_loss]
        loss = plain.loss(run.parameters.total, worth * run.target_tokens)
        loss *= np.exp(0.003 * random.standard_normal()) * (1.02 if run.series == "dec" else 1)
        rows.append(
            describe(run)
            | {
                "step": run.steps,
                "final": True,
                "flops": run.flops,
                "loss": float(loss),
                "source_tokens": run.source_tokens,
                "target_tokens": run.target_tokens,
            }
        )
    return rows


def test_distilled_series_are_compared_with_their_plain_one(rows, tmp_path):
    found = analyse(rows, Choices(draws=10))
    assert list(found.series) == ["ed-2of3", "ed-2of3+b", "ed-2of3+c", "ed-2of3+kd", "dec"]
    assert found.parts is None  # one split: distilled runs are no split of their own
    assert set(found.comparisons) == {"ed-2of3"}  # no decoder-only series has these teachers
    assert set(found.against_plain) == {"ed-2of3+b", "ed-2of3+c", "ed-2of3+kd"}
    assert found.against_plain["ed-2of3+kd"].ratio[-1] > 1.5
    one = found.distillation["ed-2of3"]
    assert len(one.runs) == 27 and set(one.teacher_loss) == {3.0, 3.3, 3.6}
    assert one.law is not None and np.abs(one.residuals).max() < 0.05
    titles = [section.title for section in sections(found)]
    assert any("over all teachers" in title for title in titles)
    assert any("against gold targets alone" in title for title in titles)
    assert as_json(found)["distillation"]["ed-2of3"]["runs"] == 27
    assert "distilled" in {figure.name for figure in draw_all(found, tmp_path)}
    assert label_of("ed-2of3+kd") == "encoder-decoder 2/3-1/3 + KD"
    assert label_of("dec+b") == "decoder-only + KD (b)"


def test_one_teacher_has_no_law_and_says_so(rows):
    single = [row for row in rows if row["series"] in ("ed-2of3", "dec", "ed-2of3+kd")]
    found = analyse(single, Choices(draws=0))
    assert found.series["ed-2of3+kd"].law and "ed-2of3+kd" in found.against_plain
    one = found.distillation["ed-2of3"]
    assert one.law is None and "1 teacher loss;" in one.reason
    assert any("Not fitted: 1 teacher loss" in section.remark for section in sections(found))
