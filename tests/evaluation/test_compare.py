"""``encdec evaluate compare``: which differences are sure, over which examples and seeds."""

from __future__ import annotations

import json

import pytest

from encdec.errors import ConfigError, DataError
from encdec.evaluation.command import main


@pytest.fixture
def evaluation(tmp_path):
    """Writes a finished evaluation of xsum with the answers given."""

    def write(name, answers, references=None):
        folder = tmp_path / name
        (folder / "xsum").mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps({"tasks": {"xsum": {}}}))
        with open(folder / "xsum" / "predictions-00000.jsonl", "w") as file:
            for index, text in enumerate(answers):
                file.write(json.dumps({
                    "index": index, "source": f"s{index}", "prediction": text,
                    "references": [(references or REFERENCES)[index]]}) + "\n")
        return folder

    return write


REFERENCES = [f"the fox number {i} runs" for i in range(30)]


def test_a_better_model_is_seen_and_noise_is_not(evaluation, tmp_path, capsys):
    worse = evaluation("worse", ["the fox"] * 30)
    better = evaluation("better", REFERENCES)
    assert main(["compare", f"--first=A={worse}", f"--second=B={better}",
                 f"--out={tmp_path / 'out'}", "--resamples=100"]) == 0
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    rows = {row["score"]: row for row in content["rows"]}
    row = rows["rougeL"]
    assert row["second"] == 100 and row["difference"] == pytest.approx(100 - row["first"])
    assert row["low"] > 0 and row["p_value"] < 0.001 and row["examples"] == 30
    assert "| xsum | rougeL |" in capsys.readouterr().out
    # One model answers the even examples, the other the odd ones: no difference to speak of.
    halves = [evaluation(f"half{h}", [
        text if i % 2 == h else "" for i, text in enumerate(REFERENCES)]) for h in (0, 1)]
    main(["compare", f"--first=A={halves[0]}", f"--second=B={halves[1]}",
          f"--out={tmp_path / 'same'}", "--resamples=100"])
    [row] = [row for row in json.loads((tmp_path / "same" / "comparison.json").read_text())["rows"]
             if row["score"] == "rougeL"]
    assert row["low"] < 0 < row["high"] and row["p_value"] > 0.5


def test_seeds_are_averaged_example_by_example(evaluation, tmp_path):
    wrong = evaluation("wrong", [""] * 30)
    seeds = [evaluation(f"seed{h}", [
        text if i % 2 == h else "" for i, text in enumerate(REFERENCES)]) for h in (0, 1)]
    main(["compare", f"--first=A={wrong}", f"--second=B={seeds[0]},{seeds[1]}",
          f"--out={tmp_path / 'out'}", "--resamples=100"])
    [row] = [row for row in json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
             if row["score"] == "rougeL"]
    # Every example is right with one of two seeds: 50 each, and nothing to resample.
    assert row["difference"] == row["low"] == row["high"] == 50


def test_other_examples_are_refused(evaluation, tmp_path):
    one = evaluation("one", [""] * 30)
    other = evaluation("other", [""] * 30, ["another text"] * 30)
    with pytest.raises(DataError, match="answered other examples of xsum"):
        main(["compare", f"--first=A={one}", f"--second=B={other}"])
    with pytest.raises(ConfigError, match="--second=B; wanted NAME=DIR,DIR"):
        main(["compare", f"--first=A={one}", "--second=B"])
    with pytest.raises(DataError, match=r"report\.json cannot be read"):
        main(["compare", f"--first=A={one}", f"--second=B={tmp_path / 'nothing'}"])
