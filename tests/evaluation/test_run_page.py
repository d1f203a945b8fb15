"""``encdec report``: one file, whole by itself, with the curves and differences of its runs."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from encdec import cli
from encdec.evaluation.run_page import MOST_POINTS, chart
from encdec.model import preset


def write_run(folder, seed, losses, evaluated=False):
    folder.mkdir(parents=True)
    run = {"steps": 2 * len(losses), "seed": seed, "init_from": f"runs/before-{seed}" * (seed > 0)}
    config = {"run": run, "model": preset("micro-1m").to_dict(), "data": {}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        json.dumps({"step": step, "train/loss": loss, "eval/loss": loss + 0.5})
        for step, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9')
    if not evaluated:
        return
    score = {"value": 0.25, "low": 0.1, "high": 0.4}
    report = {"tasks": {"faq": {"scores": {"exact_match": score, "odd": {"value": None}}}}}
    (folder / "dev" / "faq").mkdir(parents=True)
    (folder / "dev" / "report.json").write_text(json.dumps(report))
    row = {"index": 0, "source": "<b>a & b", "references": ["r"], "prediction": "p" * 999}
    row |= {"tokens": 1, "finish": "stop", "source_cut": False}
    (folder / "dev" / "faq" / "predictions-0.jsonl").write_text(json.dumps(row) + "\n")


class Checked(html.parser.HTMLParser):
    """Every tag is closed, and nothing is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        assert not {"src", "href"} & dict(attributes).keys()
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "x" / "run", 0, [3.0, 2.0, 1.0], evaluated=True)
    write_run(tmp_path / "y" / "run", 7, [3.0, 2.5, float("nan"), 2.25])
    return [str(tmp_path / name / "run") for name in "xy"]


def test_a_page_has_curves_totals_differences_and_answers(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["report", *runs, f"--out={out}"]) == 0
    text = out.read_text()
    checked = Checked()
    checked.feed(text)
    assert checked.open == [] and checked.seen.count("figure") == 2
    assert checked.seen.count("polyline") == 4  # two runs in each of the two charts with numbers
    assert "http" not in text
    for wanted in (
        "<td>x/run</td><td>842,048</td><td>–</td><td>3 of 6</td>"
        "<td>1.0000</td><td>1.5000</td><td>1.5000 (step 3)</td>",
        "<td>trained from before-7</td><td>4 of 8</td><td>2.2500</td>",
        "<td>run.seed</td><td>0</td><td>7</td>",
        "<td>exact_match</td><td>0.25 (0.1 to 0.4)</td>",
        "&lt;b&gt;a &amp; b",
    ):
        assert wanted in text, wanted
    assert "d_model" not in text and "p" * 601 not in text and "<b>" not in text
    assert cli.main(["report", *runs, f"--out={out}"]) == 2  # it exists
    assert cli.main(["report", runs[0], runs[0], f"--out={out}", "--overwrite"]) == 2
    assert cli.main(["report", str(tmp_path), f"--out={out}", "--overwrite"]) == 3
    assert cli.main(["report", runs[0], f"--out={out}", "--overwrite"]) == 0
    assert "<td>model.d_model</td><td>96</td>" in out.read_text()


def test_runs_are_next_to_each_other_in_each_score_and_answer(tmp_path):
    for name in "xy":
        write_run(tmp_path / name, 0, [3.0, 2.0], evaluated=True)
    runs = [str(tmp_path / name) for name in "xy"]
    assert cli.main(["report", *runs, f"--out={tmp_path / 'page.html'}"]) == 0
    found = re.findall(
        r"<tr><td>(.), dev</td><td>faq</td><td>(\w+|.*?b)</td>",
        tmp_path.joinpath("page.html").read_text(),
    )
    assert [name for name, _ in found] == list("xyxyxy")
    assert [about for _, about in found[::2]] == ["exact_match", "odd", "&lt;b&gt;a &amp; b"]


def test_long_curves_are_thinned_and_keep_their_end():
    drawn = chart("t", "", [[(x, x**0.5) for x in range(10 * MOST_POINTS)], [(3, 1.0)]])
    [points] = re.findall(r'<polyline points="([^"]*)"', drawn)
    assert len(points.split()) == MOST_POINTS + 1 and drawn.count("<circle") == 1
    assert points.split()[-1].startswith("448.0,")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_draws_it(runs, tmp_path):
    assert cli.main(["report", *runs, f"--out={tmp_path / 'page.html'}"]) == 0
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu"),
            f"--user-data-dir={tmp_path / 'profile'}",
            *("--window-size=1100,900", f"--screenshot={picture}", f"file://{tmp_path}/page.html"),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    # The colours of both runs are on it: a PNG of an empty page is far smaller.
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 15_000
