"""``encdec paper search``: trials in order, resumed, counted, and what would be chosen."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from fractions import Fraction

import pytest

from encdec.cost.flops import training_flops
from encdec.errors import ConfigError, NonFiniteError
from encdec.paper import rate_search
from encdec.paper.paper_command import load_config, main
from encdec.paper.rate_search import Grid, planned_trials, setting_of
from encdec.paper.result_rows import append_results, read_results
from encdec.paper.search_tables import search_markdown, verdicts
from encdec.paper.setting import TEACHER, model_of, parse_setting
from tests.paper.test_paper_command import CONFIG, TINY

ED = "ED 2/3-1/3"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    config = TINY.format(path=str(CONFIG)).replace(
        "return config", "config.pretrain.steps = 0\n    return config"
    )
    (folder / "config.py").write_text(config)
    for split, count in (("train", 40), ("validation", 8)):
        path = folder / "data" / split / "code_java2cs.jsonl"
        path.parent.mkdir(parents=True)
        texts = [f"int quick{i % 9}() {{return {i};}}" for i in range(count)]
        path.write_text(
            "".join(json.dumps({"source": t, "target": t.upper()}) + "\n" for t in texts)
        )
    return folder


def arguments(inputs, work, *more):
    places = [f"--config={inputs / 'config.py'}", f"--data_dir={inputs / 'data'}"]
    return ["search", *places, f"--workdir={work}", f"--rows={ED}", "--fraction=2/3", *more]


@pytest.mark.usefixtures("one_device")
def test_trials_are_short_runs_done_once(inputs, tmp_path, capsys, monkeypatch):
    rates = "--learning_rates=0.02,0.01"
    taught, real = [], rate_search.train

    def interrupted(run, folder):
        if len(taught) == 1:
            raise KeyboardInterrupt
        taught.append(run)
        return real(run, folder)

    monkeypatch.setattr(rate_search, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(inputs, tmp_path, rates))
    [line] = read_results(tmp_path / "results.jsonl")
    assert (line["kind"], line["row"], line["steps"], line["of_steps"]) == ("search", ED, 2, 3)
    # The learning rate in use is tried first.
    assert line["in_use"] and (line["learning_rate"], line["dropout"]) == (0.01, 0.1)
    [run] = taught
    assert run.steps == 2 and run.optimizer.learning_rate == 0.01
    assert run.model_overrides["mlp_dropout"] == 0.1
    assert line["bits_per_byte"] == min(bits for _, bits in line["curve"]) > 0
    assert line["cpu_seconds"] > 0 and line["seconds"] > 0
    setting = parse_setting(load_config(f"{inputs / 'config.py'}").to_dict())
    cost = training_flops(model_of(setting, ED), 64, 32, batch_size=8)
    assert line["training_flops"] == 2 * cost

    seen = []

    def imitated(run, folder):
        """A run that ends at its step 2 with a loss that depends on its learning rate."""
        seen.append(run.optimizer.learning_rate)
        row = {"step": 2, "eval/bits_per_byte": 9 - 100 * run.optimizer.learning_rate}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    folder = tmp_path / "search" / "ed-2of3-code-0.02-0.1-2-0"
    before = json.loads((folder / "spent.json").read_text())  # of the interrupted trial
    monkeypatch.setattr(rate_search, "train", imitated)
    assert main(arguments(inputs, tmp_path, rates)) == 0
    assert seen == [0.02]
    lines = read_results(tmp_path / "results.jsonl")
    assert lines[1]["bits_per_byte"] == 7 and not lines[1]["in_use"]
    assert lines[1]["seconds"] > before["seconds"] > 0
    printed = capsys.readouterr().out
    assert "2 of 3 steps" in printed and "| 0.01 (in use) | 0.1 | 1 |" in printed
    assert main(arguments(inputs, tmp_path, rates)) == 0 and len(seen) == 1
    assert main(["table", str(tmp_path / "results.jsonl")]) == 0
    assert capsys.readouterr().out.count("## Search on code: 2 of 3 steps") == 2


def test_models_take_turns_and_only_what_is_tried_differs():
    setting = parse_setting(load_config(f"{CONFIG}:codexglue").to_dict())
    grid = Grid((ED, "DEC"), (5e-3, 1e-2), (0.0, 0.1), Fraction(1, 6))
    [column] = setting.columns
    trials = planned_trials(setting, grid, [column])
    assert [(trial.row, trial.learning_rate, trial.dropout) for trial in trials[:4]] == [
        (ED, 1e-2, 0.1),
        ("DEC", 1e-2, 0.1),
        (ED, 5e-3, 0.1),
        ("DEC", 5e-3, 0.1),
    ]
    assert len(set(trials)) == 8 and {trial.steps for trial in trials} == {500}
    assert setting_of(setting, trials[0]) == setting
    changed = setting_of(setting, trials[-1])
    assert (changed.dropout, changed.optimizer.learning_rate) == (0.0, 5e-3)
    with_own = dataclasses.replace(setting, teacher_dropout=0.2, teacher_steps=900)
    [own] = planned_trials(with_own, Grid((TEACHER,), (1e-2,), (0.3,), Fraction(1, 9)), [column])
    assert own.steps == 100
    assert setting_of(with_own, own).teacher_dropout == 0.3
    assert setting_of(with_own, own).dropout == setting.dropout
    assert model_of(changed, "DEC") == model_of(setting, "DEC").replace(
        mlp_dropout=0.0, residual_dropout=0.0
    )


def line(row, rate, bits, in_use=False, dropout=0.1, seed=0):
    return {
        **{"kind": "search", "setting": "s", "column": "c", "steps": 500, "of_steps": 3000},
        **{"row": row, "learning_rate": rate, "dropout": dropout, "seed": seed},
        **{"bits_per_byte": bits, "in_use": in_use, "training_flops": 1e12},
        **{"cpu_seconds": 90.0, "seconds": 180.0, "device": "1 x cpu", "date": "2026-11-29"},
    }


def test_the_verdict_says_what_would_be_chosen_and_whether_the_order_changes():
    rows = [line("DEC", 1e-2, 0.8, True), line("DEC", 2e-2, 0.6), line("DEC", 5e-3, 0.9)]
    rows += [line(ED, 1e-2, 0.7, True), line(ED, 2e-2, 0.75), line(ED, 5e-3, 0.8)]
    dec, ed, order = verdicts(rows)
    assert "2e" not in ed and "is in use and the best tried (0.7000)" in ed
    assert "learning rate 0.02" in dec and "0.6000 against 0.8000 in use" in dec
    assert "the largest learning rate tried" in dec and "smallest" not in ed
    assert order.endswith(f"{ED}, DEC; another with each model's best: DEC, {ED}")
    # Each model's own values are in use, a teacher's dropout among them.
    teacher = [line("t", 1e-2, 0.5, True, dropout=0.3), line("t", 1e-2, 0.6)]
    assert all("is in use and the best" in verdicts([*rows, *teacher])[i] for i in (1, 2))
    # An unfinished search compares nothing.
    _, one, unfinished = verdicts(rows[:4])
    assert "is all that was tried (0.7000)" in one and "finish the search" in unfinished
    # The mean over seeds counts, where all values have them.
    second = [line("DEC", 1e-2, 0.8, True, seed=1), line("DEC", 5e-3, 0.9, seed=1)]
    assert "0.6000 against 0.8000 in use" in verdicts([*rows, *second])[0]
    second.append(line("DEC", 2e-2, 1.4, seed=1))
    assert "is in use and the best" in verdicts([*rows, *second])[0]
    page = search_markdown([*rows, {"kind": "run"}])
    assert "Cost: 6 trials, 6e+12 FLOPs, 0.15 hours of processor time, 0.30 of wall time" in page
    assert search_markdown([*rows, *rows]) == page  # of two files, a trial counts once
    assert search_markdown([]) == ""


def test_an_unfinished_search_of_several_seeds_claims_no_order():
    rows = [line(ED, 1e-2, 0.7, True), line(ED, 1e-2, 0.6, True, seed=1), line(ED, 2e-2, 0.8)]
    rows += [line("DEC", 1e-2, 0.69, True), line("DEC", 2e-2, 0.75)]
    ed, _, unfinished = verdicts(rows)
    assert "(0.7000)" in ed and "finish the search" in unfinished
    # Nor do models that have tried the same, one value with more seeds than the other.
    assert "finish the search" in verdicts([*rows, line("DEC", 1e-2, 0.69, True, seed=1)])[2]
    rows += [line("DEC", 1e-2, 0.69, True, seed=1)]
    rows += [line(row, 2e-2, 0.8, seed=1) for row in (ED, "DEC")]
    ed, _, order = verdicts(rows)
    assert "(0.6500)" in ed and f"{ED}, DEC; the same" in order


@pytest.fixture
def search(inputs, tmp_path):
    """A search whose runs are imitated, and its columns."""
    setting = parse_setting(load_config(f"{inputs / 'config.py'}").to_dict())
    corpora = types.SimpleNamespace(records=lambda column, split: f"{column}/{split}", data="d")
    results = tmp_path / "results.jsonl"
    return rate_search.Search(setting, tmp_path, corpora, results, print), setting.columns, results


def test_a_learning_rate_that_diverges_is_noted_and_the_search_goes_on(search, capsys, monkeypatch):
    search, columns, results = search
    seen = []

    def imitated(run, folder):
        seen.append(run.optimizer.learning_rate)
        if run.optimizer.learning_rate == 0.5:
            raise NonFiniteError("step 1: loss is nan", 1)
        folder.mkdir(parents=True)
        row = {"step": 2, "eval/bits_per_byte": 8}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(rate_search, "train", imitated)
    grid = Grid((ED,), (0.5, 0.02, 0.01), (0.1,), Fraction(2, 3))
    first = search.run(grid, columns)
    assert search.run(grid, columns) == first == read_results(results)
    assert seen == [0.01, 0.5, 0.02]
    _, line, finite = first
    assert (line["bits_per_byte"], line["diverged"]) == (None, "step 1: loss is nan")
    assert line["diverged_step"] == 1 and finite["diverged_step"] is None
    assert line["training_flops"] * 2 == finite["training_flops"] and finite["diverged"] is None
    assert "-0.5-0.1-2-0: diverged: step 1" in capsys.readouterr().out
    page = search_markdown(first)
    assert "| 0.5 | 0.1 | 1 | diverged |" in page
    assert "is in use and the best tried (8.0000)" in page


def test_a_trial_that_another_process_has_just_ended_is_not_repeated(search, monkeypatch):
    search, columns, results = search
    monkeypatch.setattr(rate_search, "train", lambda run, folder: pytest.fail("trained"))
    grid = Grid((ED,), (0.01,), (0.1,), Fraction(2, 3))
    [trial] = planned_trials(search._setting, grid, columns)

    @contextlib.contextmanager
    def late(path):
        """A lock that is free because the other process has written its line."""
        line = dataclasses.asdict(trial) | {"kind": "search", "setting": search._digest(ED)}
        line["data"] = "d"
        append_results(results, [line])
        yield True

    monkeypatch.setattr(rate_search, "sole_process", late)
    [line] = search.run(grid, columns)
    assert line["row"] == ED and len(read_results(results)) == 1


def test_verdicts_on_what_diverged():
    rows = [line(ED, 1e-2, 0.7, True), line(ED, 1e-2, 0.6, True, seed=1)]
    rows += [line(ED, 2e-2, None), line(ED, 2e-2, 0.5, seed=1)]
    [text] = verdicts(rows)
    assert "is in use and the best tried (0.6500)" in text
    assert "| diverged in 1 |" in search_markdown(rows)
    assert verdicts([line(ED, 2e-2, None)]) == [f"{ED}: all that was tried diverged"]
    ed, _, order = verdicts([*rows[:1], line("DEC", 1e-2, None, True)])
    assert "no order" in order


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--learning_rates=0.01,0"], "--learning_rates has 0.0; expected numbers above 0"),
        (["--dropouts=1"], "--dropouts has 1.0; expected numbers from 0"),
        (["--dropouts=0.1,0.1"], "expected each once"),
        (["--fraction=3/2"], "--fraction has 3/2; expected numbers above 0, 1 at most"),
        (["--rows=x"], "--rows names 'x'; known: DEC, ED 2/3-1/3, teacher"),
        (["--config.pretrain.steps=3"], "search with --config.pretrain.steps=0"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(inputs, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        main([*arguments(inputs, tmp_path / "work"), *flags])
    assert not (tmp_path / "work").exists()
