"""``encdec evaluate compare``: which differences are sure, over which examples and seeds."""

from __future__ import annotations

import json
import math

import pytest

from encdec.errors import ConfigError, DataError
from encdec.evaluation.compare import compare_markdown, compare_scores
from encdec.evaluation.evaluate_command import main
from encdec.evaluation.judge import CACHE, Judge
from encdec.evaluation.likelihood import CALIBRATION_BINS, Likelihood, LikelihoodFiles
from encdec.evaluation.predictions import Example, Prediction, PredictionFiles
from encdec.metrics.score import mean_score


@pytest.fixture
def evaluation(tmp_path):
    """Writes a finished evaluation of xsum with the answers given."""

    def write(name, answers, references=None, task="xsum", judge=None):
        folder = tmp_path / name
        references = [[text] for text in references or REFERENCES]
        examples = [Example(f"s{index}", tuple(texts)) for index, texts in enumerate(references)]
        PredictionFiles(folder / task, {}, examples).append(
            0, {index: Prediction(text, 1, "eos", False) for index, text in enumerate(answers)}
        )
        (folder / "report.json").write_text(
            json.dumps(
                {
                    "tasks": {task: {"examples": len(answers)}},
                    "judge": judge,
                    "model": {"run": name, "checkpoint": f"runs/{name}"},
                }
            )
        )
        return folder

    return write


REFERENCES = [f"the fox number {i} runs" for i in range(30)]


def test_a_better_model_is_seen_and_noise_is_not(evaluation, tmp_path, capsys):
    worse = evaluation("worse", ["the fox"] * 30)
    better = evaluation("better", REFERENCES)
    assert (
        main(
            [
                "compare",
                f"--first=A={worse}",
                f"--second=B={better}",
                f"--out={tmp_path / 'out'}",
                "--resamples=100",
            ]
        )
        == 0
    )
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    rows = {row["score"]: row for row in content["rows"]}
    row = rows["rougeL"]
    assert row["second"] == 100 and row["difference"] == pytest.approx(100 - row["first"])
    assert row["low"] > 0 and row["p_value"] < 0.001 and row["examples"] == 30
    assert "| xsum | rougeL |" in capsys.readouterr().out
    # One model answers the even examples, the other the odd ones: no difference to speak of.
    halves = [
        evaluation(f"half{h}", [text if i % 2 == h else "" for i, text in enumerate(REFERENCES)])
        for h in (0, 1)
    ]
    main(
        [
            "compare",
            f"--first=A={halves[0]}",
            f"--second=B={halves[1]}",
            f"--out={tmp_path / 'same'}",
            "--resamples=100",
        ]
    )
    [row] = [
        row
        for row in json.loads((tmp_path / "same" / "comparison.json").read_text())["rows"]
        if row["score"] == "rougeL"
    ]
    assert row["low"] < 0 < row["high"] and row["p_value"] > 0.5


def test_seeds_are_averaged_example_by_example(evaluation, tmp_path):
    wrong = evaluation("wrong", [""] * 30)
    seeds = [
        evaluation(f"seed{h}", [text if i % 2 == h else "" for i, text in enumerate(REFERENCES)])
        for h in (0, 1)
    ]
    main(
        [
            "compare",
            f"--first=A={wrong}",
            f"--second=B={seeds[0]},{seeds[1]}",
            f"--out={tmp_path / 'out'}",
            "--resamples=100",
        ]
    )
    [row] = [
        row
        for row in json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
        if row["score"] == "rougeL"
    ]
    # Every example is right with one of two seeds: 50 each, and nothing to resample.
    assert row["difference"] == row["low"] == row["high"] == 50


def test_other_examples_are_refused(evaluation, tmp_path):
    one = evaluation("one", [""] * 30)
    other = evaluation("other", [""] * 30, ["another text"] * 30)
    with pytest.raises(DataError, match="answered other examples of xsum"):
        main(["compare", f"--first=A={one}", f"--second=B={other}"])
    with pytest.raises(ConfigError, match="--second=B; expected NAME=DIR,DIR"):
        main(["compare", f"--first=A={one}", "--second=B"])
    with pytest.raises(DataError, match=r"report\.json cannot be read"):
        main(["compare", f"--first=A={one}", f"--second=B={tmp_path / 'nothing'}"])


def rows_of(first, second, out):
    main(
        ["compare", f"--first=A={first}", f"--second=B={second}", f"--out={out}", "--resamples=100"]
    )
    return {row["score"]: row for row in json.loads((out / "comparison.json").read_text())["rows"]}


def test_line_separators_and_an_unfinished_line_do_no_harm(evaluation, tmp_path):
    answers = ["one\u2028two\x85three\u2029", *REFERENCES[1:]]
    one, other = evaluation("one", answers), evaluation("other", [""] * 30)
    # Of a process that was killed, whose window another shard answered.
    (one / "xsum" / "predictions-00001.jsonl").write_bytes(b'{"index": 3, "sour')
    assert rows_of(one, other, tmp_path / "out")["rougeL"]["examples"] == 30
    path = one / "xsum" / "predictions-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"holds the answers to 29 examples but .* reports 30"):
        rows_of(one, other, tmp_path / "out")


def test_a_score_of_other_examples_on_each_side_has_no_difference():
    sides = [mean_score("s", [1.0, 3.0]), mean_score("s", [4.0])]
    row = compare_scores(sides, 10)
    assert row["first"] == 2 and row["second"] == 4 and row["examples"] == 1
    assert row["difference"] is row["p_value"] is None
    text = compare_markdown({"trials": 1, "rows": [{"task": "t", "score": "s"} | row]}, ("a", "b"))
    assert "| t | s | 2.00 | 4.00 | – | – to – | – | 1 |" in text


def test_scores_of_the_whole_set_have_p_values_too(evaluation, tmp_path):
    answers = [f"the fox {i} runs over" for i in range(30)]
    better = evaluation("better", REFERENCES, task="code_java2cs")
    worse = evaluation("worse", answers, task="code_java2cs")
    again = evaluation("again", answers, task="code_java2cs")
    # The better model is surer of every reference but the last, which it has not.
    bins = ((30.0, 20.0, 25.0), *[(0.0, 0.0, 0.0)] * (CALIBRATION_BINS - 1))
    for folder, nats, count in ((better, 1.0, 29), (worse, 2.0, 30), (again, 2.0, 30)):
        LikelihoodFiles(folder / "code_java2cs").append(
            0, {index: Likelihood(nats + index / 100, 3, 12, bins) for index in range(count)}
        )
    rows = rows_of(worse, better, tmp_path / "out")
    assert rows["bleu"]["p_value"] < 0.001 and rows["bleu"]["difference"] > 50
    assert rows["perplexity"]["examples"] == rows["bits_per_byte"]["examples"] == 29
    assert rows["perplexity"]["p_value"] < 0.001 and rows["perplexity"]["difference"] < 0
    assert rows["bits_per_byte"]["difference"] == pytest.approx(-1 / 12 / math.log(2))
    assert rows["calibration_error"]["p_value"] == 1  # equal on both sides
    assert all(row["p_value"] is not None for row in rows.values())
    assert {row["p_value"] for row in rows_of(worse, again, tmp_path / "out").values()} == {1}


def test_bands_have_a_p_value_of_kappa(evaluation, tmp_path):
    gold = [str(4 + i % 5) for i in range(30)]
    near = evaluation("near", gold[:20] + ["6"] * 10, gold, task="ielts_band")
    far = evaluation("far", ["5", "7", "6"] * 10, gold, task="ielts_band")
    row = rows_of(far, near, tmp_path / "out")["kappa"]
    assert row["low"] > 0 and row["p_value"] < 0.01


def test_one_judges_opinions_are_compared(evaluation, tmp_path):
    folders = []
    for name, numbers in (("bad", "3x"), ("good", "78")):
        judge = Judge(
            "local",
            "wise",
            tmp_path / name / CACHE,
            lambda prompt, numbers=numbers: numbers[
                int(prompt.split("###Input\ns")[1].split("\n")[0]) % 2
            ],
        )
        folders.append(evaluation(name, [name] * 30, judge=judge.describe()))
        judge.opinions(
            [Example(f"s{i}", (text,)) for i, text in enumerate(REFERENCES)], [name] * 30
        )
    row = rows_of(*folders, tmp_path / "out")["judge"]
    # The first model has an opinion of every other example only.
    assert (row["examples"], row["first"], row["second"]) == (15, 30, 70)
    assert row["p_value"] < 0.001
    report = json.loads((folders[0] / "report.json").read_text())
    report["judge"] |= {"model": "unwise"}
    (folders[0] / "report.json").write_text(json.dumps(report))
    assert "judge" not in rows_of(*folders, tmp_path / "out")


def test_one_run_is_not_two_seeds(evaluation):
    one, other = evaluation("one", [""] * 30), evaluation("other", [""] * 30)
    with pytest.raises(DataError, match="one and .*one both have xsum and are the same directory"):
        main(["compare", f"--first=A={one},{one}", f"--second=B={other}"])
