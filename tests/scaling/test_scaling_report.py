"""From results to laws, figures and the report, on a ladder whose truth is known."""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import pytest
from matplotlib.image import imread

from encdec.cli import main
from encdec.errors import DataError
from encdec.scaling.analysis import analyse
from encdec.scaling.fit import Law
from encdec.scaling.ladder import parse_ladder
from encdec.scaling.planned_runs import plan
from encdec.scaling.plots import flops_groups
from encdec.scaling.results_file import Choices, ResultsFile
from encdec.scaling.scaling_command import load_ladder
from tests.scaling.synthetic import planned_rows

LADDERS = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "scaling.py")
LAWS = {  # truths whose best sizes are inside the micro ladder
    "ed-2of3": Law("total", 2.0, 470.0, 28.0, (0.42,), 0.30),
    "ed-1of2": Law("total", 2.0, 490.0, 29.0, (0.42,), 0.30),
    "ed-1of3": Law("total", 2.0, 510.0, 30.0, (0.42,), 0.30),
    "dec": Law("total", 2.0, 470.0, 32.0, (0.42,), 0.30),
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return planned_rows(plan(parse_ladder(load_ladder(f"{LADDERS}:micro", []))), LAWS)


@pytest.fixture(scope="module")
def ladder(rows, tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("fitted")
    scored = [row | {"scores": {"rougeL": 1 / row["loss"]}} for row in rows if row["final"]]
    ResultsFile(directory / "results.jsonl").append(rows + scored)
    return directory


def test_every_series_is_fitted_and_compared(rows):
    found = analyse(rows, Choices(draws=40))
    assert list(found.series) == ["ed-2of3", "ed-1of2", "ed-1of3", "dec"]
    for name, one in found.series.items():
        assert one.law and one.held_out, name
        assert LAWS[name].beta in one.intervals["beta"], name
        assert one.held_out.mean_absolute_error < 0.05
        assert one.cost.largest_error < 0.02
    assert set(found.comparisons) == {"ed-2of3", "ed-1of2", "ed-1of3"}
    assert found.comparisons["ed-2of3"].share_first_ahead > 0.9
    assert found.comparisons["ed-2of3"].ratio[-1] > 1
    noise, freedom = found.seed_noise
    assert freedom == 16 and noise == pytest.approx(0.004, rel=0.5)


def test_only_ends_of_schedules_are_fitted(rows):
    found = analyse(rows, Choices(draws=0))
    assert sum(len(one.runs) for one in found.series.values()) == len(rows) / 2
    cut = [row for row in rows if row["run"] != "dec_8m_5e12_s0" or not row["final"]]
    found = analyse(cut, Choices(draws=0))
    assert found.unfinished == ("dec_8m_5e12_s0",)


def test_choices_change_what_is_counted(rows):
    target, both = (
        analyse(rows, Choices(tokens=name, draws=0)).series["dec"] for name in ("target", "both")
    )
    assert both.runs.tokens == pytest.approx(5 * target.runs.tokens)  # rows of 128 + 32
    assert both.law.beta == pytest.approx(target.law.beta, rel=1e-2)
    bare = analyse(rows, Choices(parameters="non_embedding", draws=0)).series["dec"]
    assert (bare.runs.parameters < target.runs.parameters).all()
    bits = analyse(rows, Choices(loss="bits_per_byte", draws=0)).series["dec"]
    assert bits.law.E == pytest.approx(target.law.E / 2, rel=0.05)


def test_what_cannot_be_fitted_says_why(rows):
    few = [row for row in rows if row["size"] == "300k"]
    found = analyse(few, Choices(draws=10))
    assert "1 model size;" in found.series["dec"].reason
    assert "has no law" in found.not_compared["ed-2of3"]
    with pytest.raises(DataError, match="no finished run"):
        analyse([row for row in rows if not row["final"]])
    broken = [
        row | {"loss": float("nan")} if row["run"] == "dec_8m_5e12_s0" else row for row in rows
    ]
    with pytest.raises(DataError, match=r"1 runs: dec_8m_5e12_s0; leave them out with --skip"):
        analyse(broken)


def test_fit_prints_and_writes(ladder, tmp_path, capsys):
    out = tmp_path / "fit.json"
    arguments = ["scaling", "fit", f"--results={ladder}", "--resamples=20", f"--out={out}"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for words in ("encoder-decoder 2/3-1/3", "alpha", "held out", "FLOPs ratio", "furthest"):
        assert words in text
    content = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["series"]["dec"]["law"]["beta"] == pytest.approx(0.3, rel=0.3)
    assert content["parts"]["law"]["alpha_encoder"] >= 0
    assert main(["scaling", "fit", f"--results={ladder}", "--skip=nothing"]) == 3
    assert main(["scaling", "fit", "--results=nowhere"]) == 3


def test_runs_of_one_budget_are_one_valley():
    """Also where a twentieth of a decade ends: 3e16 is 10^16.477."""
    runs = np.array([3.01e16, 1e17, 2.98e16, 1.01e17, 2.99e16, 3.3e16])
    assert flops_groups(runs) == [(2.98e16, 3.01e16), (3.3e16, 3.3e16), (1e17, 1.01e17)]


def test_plot_draws_everything(ladder, capsys):
    assert main(["scaling", "plot", f"--results={ladder}", "--resamples=20"]) == 0
    out = ladder / "curves"
    names = {"loss-flops", "isoflop", "contours", "comparison", "score-rougel"}
    assert {path.stem for path in out.glob("*.png")} == names
    assert {path.stem for path in out.glob("*.svg")} == names
    for path in out.glob("*.png"):
        image = imread(path)
        assert min(image.shape[:2]) > 500 and image[..., :3].std() > 0.03, path.name
    page = (out / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == len(names)
    # Self-contained: nothing is fetched from anywhere.
    assert not re.search(r"(src|href)=['\"](?!data:)|<script|@import", page)
    assert "dec_8m_5e12_s0" in page and "Laws" in page
    before = (out / "comparison.svg").read_bytes()
    assert main(["scaling", "plot", f"--results={ladder}", "--resamples=20"]) == 0
    assert (out / "comparison.svg").read_bytes() == before
