"""The paper's table: means and intervals over seeds, what was not measured, the paper apart."""

from __future__ import annotations

import json

import pytest

from encdec.errors import ConfigError, DataError
from encdec.evaluation.evaluate_command import main
from encdec.evaluation.results_table import (
    COLUMNS,
    PAPER,
    PAPER_MEANS,
    cell,
    has_papers_tasks,
    table,
    table_markdown,
)


def report(seed, value, task="squad_v2", low=None):
    return {
        "model": {"seed": seed, "parameters": 1000, "training_flops": 2e12},
        "tasks": {task: {"scores": {"rougeL": {"value": value, "low": low, "high": 90.0}}}},
    }


def test_one_seed_has_the_interval_over_examples_and_several_students():
    one = cell([report(0, 50.0, low=40.0)], "squad_v2", "rougeL")
    assert (one.interval.low, one.interval.high, one.seeds) == (40.0, 90.0, (0,))
    three = cell([report(s, v) for s, v in ((2, 40.0), (0, 50.0), (1, 60.0))], "squad_v2", "rougeL")
    # Mean 50, standard error 10 / sqrt(3), and 4.303 is t's 97.5 % point at two degrees.
    assert three.interval.value == 50 and three.seeds == (0, 1, 2)
    assert three.interval.high - 50 == pytest.approx(4.3027 * 10 / 3**0.5, rel=1e-4)
    assert cell([report(0, 50.0)], "xsum", "rougeL") is None


def test_the_papers_means_are_those_of_its_cells():
    assert PAPER_MEANS.keys() == PAPER.keys()
    for name, (mean, _) in PAPER_MEANS.items():
        assert sum(rouge for rouge, _ in PAPER[name]) / 4 == pytest.approx(mean, abs=0.0251)
    assert all(len(row) == len(COLUMNS) for row in PAPER.values())


def test_the_command_lays_ours_beside_the_papers(tmp_path, capsys):
    for name, seed, value in (("a", 0, 50.0), ("b", 1, 60.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report(seed, value)))
    arguments = [f"--model=ED 2/3-1/3={tmp_path / 'a'},{tmp_path / 'b'}", f"--out={tmp_path}"]
    assert main(["table", *arguments]) == 0
    ours, paper = capsys.readouterr().out.split("## The paper's figures")
    [row] = [line for line in ours.splitlines() if line.startswith("| ED 2/3-1/3 |")]
    assert "55.0 [-8.5, 118.5] (n=2)" in row and row.count("–") == 4 and "2.00e+12" in row
    assert "| DEC | – | – | – | – | – | – | – |" in ours
    assert "| ED 2/3-1/3 | 67 / 93 | 31 / 26 | 93 / 66 | 25 / 19 | 54 / 51 |" in paper
    assert "55.0" not in paper and "67" not in row
    with pytest.raises(ConfigError, match="expected NAME=DIR"):
        main(["table", "--model=x", f"--out={tmp_path}"])
    with pytest.raises(DataError, match=r"report\.json cannot be read"):
        main(["table", f"--model=x={tmp_path / 'c'}", f"--out={tmp_path}"])


def test_a_mean_wants_every_column_and_other_scores_have_their_own_table():
    full = [report(0, value, task) for value, (task, _, _) in zip((10, 20, 30, 60), COLUMNS)]
    full[0]["tasks"]["squad_v2"]["scores"]["has_answer_f1"] = {
        "value": 12.345,
        "low": 1.0,
        "high": None,
    }
    content = table({"DEC": full, "ED 2/3-1/3": full[:3]})
    means = {row["model"]: row["mean"] for row in content["rows"]}
    assert means["DEC"] == 30 and means["ED 2/3-1/3"] is None and means["teacher"] is None
    assert has_papers_tasks(content) and not has_papers_tasks(table({"DEC": full[:3]}))
    text = table_markdown(content)
    assert "| model | SQuAD F1, answerable |" in text
    assert "| DEC | 12.35 [1.00, nan] |" in text or "| DEC | 12.35 [1.00, –] |" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"run": "x"}, "evaluate the same run, runs/a"),
        ({"seeds": [1, 0]}, r"evaluate runs/a and runs/b, trained from the same seeds \(1, 0\)"),
    ],
)
def test_one_training_is_not_counted_as_two_seeds(change, message, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        content = report(0, 50.0)
        content["model"] |= {"checkpoint": f"runs/{name}", "run": name} | change
        (tmp_path / name / "report.json").write_text(json.dumps(content))
    a, b, out = (str(tmp_path / name) for name in "ab" + "o")
    with pytest.raises(DataError, match=f"{a} and {b} both have squad_v2 and {message}"):
        main(["table", f"--model=x={a},{b}", f"--out={out}"])
    with pytest.raises(DataError, match=f"{a} and {a}/../a both have squad_v2 and are the same"):
        main(["table", f"--model=x={a}", f"--model=x={a}/../a", f"--out={out}"])
    assert main(["table", f"--model=x={a}", f"--model=y={b}", f"--out={out}"]) == 0


def test_every_judge_has_a_table_of_its_own():
    def judged(seed, value, judge, missing=0, task="squad_v2"):
        one = report(seed, 50.0, task)
        one["tasks"][task]["scores"]["judge"] = {"value": value, "low": value - 1, "high": 99.0}
        one["tasks"][task]["judge_missing"] = missing
        return one | {"judge": {"model": judge, "endpoint": "http://x/v1", "prompt": "Judge it."}}

    assert "No judge was asked" in table_markdown(table({"DEC": [report(0, 50.0)]}))
    text = table_markdown(
        table(
            {
                "DEC": [judged(0, 41.0, "wise", 3), judged(0, 12.0, "wise", task="xsum")],
                "mine": [judged(0, 77.0, "unwise")],
                "ED 2/3-1/3": [report(0, 50.0)],
            }
        )
    )
    measured, *judges, paper = text.split("\n## ")
    assert "No judge was asked" not in text and "41.0" not in measured and "41.0" not in paper
    wise, unwise = judges[-2:]
    assert wise.startswith("Opinion of wise (http://x/v1)") and "not Ragas scores" in wise
    assert "| model | squad_v2 | xsum |" in wise
    assert "| DEC | 41.0 [40.0, 99.0], 3 missing | 12.0 [11.0, 99.0] |" in wise
    assert "mine" not in wise and "| mine | 77.0 [76.0, 99.0] |" in unwise
