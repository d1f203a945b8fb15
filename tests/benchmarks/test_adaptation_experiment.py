"""What the experiment on adaptation reads off its curves, and that every row can be run."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from encdec.benchmarks import adaptation_experiment
from encdec.benchmarks.adaptation_experiment import (
    AdaptationExperiment,
    budget,
    run_experiment,
    source_flops,
    source_model,
    table_rows,
    teacher_flops,
)
from encdec.benchmarks.adaptation_results import (
    crossing,
    draw,
    first_step_at,
    mean_curve,
    steps_worth,
    summary,
)
from encdec.cost.flops import training_flops
from encdec.data.card import read_card
from encdec.errors import ConfigError, DataError
from encdec.train.run_config import load_config, parse_config

FRESH = np.array([[10, 100.0, 6.0], [20, 200.0, 4.0], [40, 400.0, 2.0]])
ADAPTED = np.array([[10, 50.0, 3.0], [40, 200.0, 2.5], [80, 400.0, 2.4]])


def test_a_step_is_worth_as_many_as_reach_its_loss():
    # From 4.0 at step 20 to 2.0 at step 40: 3.0 halfway.
    assert steps_worth(ADAPTED, FRESH) == [(10, 30), (40, 35), (80, 36)]
    assert steps_worth(ADAPTED - [0, 0, 5], FRESH) == []
    assert steps_worth(ADAPTED + [0, 0, 9], FRESH)[0] == (10, 10)
    assert first_step_at(ADAPTED, 2.45) == pytest.approx(60.0)


def test_curves_cross_between_evaluations_or_not_at_all():
    # At 200: 2.5 and 4.0; at 400: 2.4 and 2.0. The gap goes from -1.5 to 0.4.
    assert crossing(ADAPTED, FRESH) == pytest.approx(200 + 200 * 1.5 / 1.9)
    assert crossing(ADAPTED - [0, 0, 1], FRESH) is None
    # Also where one evaluation has the same loss; not where they meet and part again.
    met = np.array([[10, 100.0, 5.0], [20, 200.0, 4.0], [40, 400.0, 3.0]])
    assert crossing(met, FRESH) == 200
    assert crossing(met - [[0, 0, 0], [0, 0, 0], [0, 0, 2]], FRESH) is None


def line(curve, seed=0, higher=0.0):
    curve = curve + [0, 0, higher]
    return {
        "parameters": 7,
        "curve": curve.tolist(),
        "loss": curve[-1, 2],
        "seed": seed,
        "source_flops": 100.0,
    }


def test_the_summary_gives_flops_intervals_and_differences_of_equal_seeds():
    # Differences 0.3, 0.5: mean 0.4, half width 12.706 * 0.1414 / sqrt(2).
    results = {
        "adapted all-all": [line(ADAPTED, 0), line(ADAPTED, 1, 0.1), line(ADAPTED, 2, 0.1)],
        "scratch all-all": [line(FRESH, 0, 0.1), line(FRESH, 1), line(FRESH, 5)],
    }
    text = summary(results)
    cells = "| adapted all-all | 7 | 80 | 400 | 0 | 500 | 3.067 | 2.467 [2.323, 2.610] | 3 |"
    assert cells in text and "| scratch all-all | 7 | 40 | 400 | 0 | 400 |" in text
    assert "| adapted all-all minus scratch all-all | +0.400 [-0.871, +1.671] | 2 |" in text


def test_a_teachers_flops_are_counted_where_they_are_known():
    """Lines of before they were counted say so."""
    name = "adapted all-all, distilled"
    text = summary({name: [line(ADAPTED) | {"teacher_flops": 60.0}]})
    assert f"| {name} | 7 | 80 | 400 | 60 | 560 |" in text
    assert f"| {name} | 7 | 80 | 400 | not counted | 500 |" in summary({name: [line(ADAPTED)]})


def test_runs_of_other_budgets_have_no_mean():
    """Of an earlier version's budget, with as many evaluations."""
    with pytest.raises(DataError, match="'a' were evaluated .* 80, 90.; remove the lines"):
        mean_curve(
            [{"row": "a"} | line(ADAPTED), line(ADAPTED + [[0, 0, 0], [0, 0, 0], [10, 0, 0]])]
        )


def test_steps_and_crossings_stay_within_what_was_measured():
    both = {"adapted all-all": [line(ADAPTED)], "scratch all-all": [line(FRESH)]}
    text = summary(both)
    assert "after 10 steps the adapted model matches 30 from scratch, 3 for each" in text
    assert "after 80 steps the adapted model matches 36 from scratch, 0.45 for each" in text
    assert "cross at 358 FLOPs: the model from scratch is ahead at the end" in text
    both["adapted all-all"] = [line(ADAPTED, higher=-0.7)]
    text = summary(both)
    assert "after 10 steps the adapted model matches 37 from scratch" in text
    assert "after 40 steps, 1.800, is beyond the measured range: 40 steps from scratch" in text
    both["adapted all-all"] = [line(ADAPTED, higher=-1)]
    text = summary(both)
    assert "do not cross: the adapted model is ahead" in text
    assert "is reached by the adapted model's evaluation after 10 steps" in text
    # With the source's FLOPs on both sides: at 400, 1.95 and 2.0; at 500, 1.9 and 1.0.
    longer = np.concatenate([FRESH, [[50, 500.0, 1.0]]])
    both["scratch all-all, source's FLOPs too"] = [line(longer)]
    both["adapted all-all"] = [line(ADAPTED - [0, 0, 0.5])]
    assert "the source's FLOPs too: after 10 steps the adapted model matches 35" in summary(both)
    assert "cross at 405 FLOPs" in summary(both)


def test_the_budget_is_what_the_source_would_cost_further():
    setting = AdaptationExperiment(
        pathlib.Path("w"), model="test", layers=6, further_steps=10, batch_size=4
    )
    one = training_flops(source_model(setting), setting.inputs, setting.targets, batch_size=4)
    rows = table_rows(setting)
    assert budget(setting, rows[0]) == budget(setting, rows[4]) == 10 * one
    # All tokens of the source's rows are targets, which pay for the head.
    whole = training_flops(source_model(setting), 0, 256 + 64, batch_size=4)
    assert whole > one and source_flops(setting) == setting.steps * whole
    both = 10 * one + setting.steps * whole
    assert budget(setting, rows[5]) == budget(setting, rows[6]) == both
    assert len({row.folder for row in rows}) == len(rows)
    assert rows[3].layers == ("4", "2") and sum(row.headline for row in rows) == 5


@pytest.mark.parametrize(
    "row, further, peak",
    [("adapted 2/3-1/3", 0.2, 0.2), ("adapted 2/3-1/3", 0, 0.5), ("scratch 2/3-1/3", 0.2, 0.5)],
)
def test_a_start_has_a_learning_rate_of_its_own(row, further, peak, tmp_path, monkeypatch):
    runs = []

    class Enough(Exception):
        pass

    def train(run, folder):
        runs.append(run)
        raise Enough

    setting = AdaptationExperiment(
        tmp_path, optimizer="muon", learning_rate=0.5, further_learning_rate=further, model="test"
    )
    monkeypatch.setattr(adaptation_experiment, "train", train)
    monkeypatch.setattr(adaptation_experiment, "_start", lambda *_: tmp_path)
    monkeypatch.setattr(adaptation_experiment, "read_config", lambda _: None)
    monkeypatch.setattr(adaptation_experiment, "model_config_of", lambda _: source_model(setting))
    [wanted] = [one for one in table_rows(setting) if one.name == row]
    with pytest.raises(Enough):
        adaptation_experiment._run(setting, wanted, 0, tmp_path, print)
    [run] = runs
    assert (run.optimizer.name, run.optimizer.learning_rate) == ("muon", peak)
    assert bool(run.init_from) == row.startswith("adapted")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": 4}, "multiple of 3"),
        ({"eval_text": ("a",)}, "no --text"),
        ({"seeds": 0}, "1 or"),
        (
            {"rows": ("adapted",)},
            "--row: 'adapted' is unknown; expected some of decoder-only, trained on;",
        ),
    ],
)
def test_settings_that_cannot_be_run_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_experiment(AdaptationExperiment(tmp_path / "work", **changes), print)
    assert not (tmp_path / "work").exists()


def test_runs_with_a_line_are_not_done_again(tmp_path, monkeypatch):
    """Text is held out by document; a later call runs what lacks a line, headline rows first."""
    text = tmp_path / "text.jsonl"
    words = lambda i: bytes(np.random.default_rng(i).integers(97, 123, 500).tolist()).decode()
    text.write_text("".join(json.dumps({"text": words(i)}) + "\n" for i in range(45)))
    started = []

    def run(setting, row, seed, source, say):
        started.append((row.name, seed))
        if len(started) == 3:
            raise KeyboardInterrupt
        return {"parameters": 7, "curve": [[0, 0.0, 3.0], [2, 8.0, 2.0]], "loss": 2.0}

    monkeypatch.setattr(adaptation_experiment, "_run", run)
    monkeypatch.setattr(adaptation_experiment, "_source", lambda *_: tmp_path)
    few = {"inputs": 8, "targets": 8, "vocabulary": 300, "document_bytes": 400}
    setting = AdaptationExperiment(
        tmp_path / "work", (str(text),), model="test", layers=3, seeds=2, **few
    )
    with pytest.raises(KeyboardInterrupt):
        run_experiment(setting, print)
    held_out = (setting.work / "text" / "held_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in held_out] == [words(19)[:400], words(39)[:400]]
    reports = []
    results = run_experiment(setting, print, lambda found: reports.append(len(found)))
    names = [row.name for row in table_rows(setting)]
    wanted = [(name, 0) for name in names[2:]] + [(name, 1) for name in names[:5]]
    assert started[2:] == [(names[2], 0), *wanted]
    assert list(results) == names and reports[0] == 2
    assert [line["seed"] for line in results["adapted all-all"]] == [0, 1]
    card = read_card(setting.work / "records" / "causal_lm")
    lengths = card.inputs_length, card.targets_length
    step = training_flops(source_model(setting), *lengths, batch_size=setting.batch_size)
    assert results[names[0]][0]["source_flops"] == setting.steps * step
    # A forward pass is a third of a step, and every row is read once.
    rows = read_card(setting.work / "records" / "prefix_lm").rows
    read = training_flops(source_model(setting), 8, 8, batch_size=rows) / 3
    assert teacher_flops(setting) == pytest.approx(read)
    draw(results, tmp_path / "loss.png")
    # The same results elsewhere are done; with other settings they are not.
    results_file, started = setting.results_file, []
    again = dataclasses.replace(setting, work=tmp_path / "other", results=results_file)
    assert run_experiment(again, print) == results and not started
    with pytest.raises(KeyboardInterrupt):
        run_experiment(dataclasses.replace(again, work=tmp_path / "third", steps=7), print)
    # Nor where what is held out is another text, although the vocabulary is the same.
    (again.work / "text" / "held_out.jsonl").write_text(json.dumps({"text": words(99)}) + "\n")
    shutil.rmtree(again.work / "records" / "held_out")
    started.clear()
    with pytest.raises(KeyboardInterrupt):
        run_experiment(again, print)


@pytest.mark.parametrize(
    "argument", ["prefix_lm,smollm2-135m,hold", "ul2,gemma-3-1b", "ul2,hold,qwen3-0.6b"]
)
def test_shapes_of_public_models_are_models(argument):
    run = parse_config(load_config(f"configs/adapt.py:{argument}"))
    model = run.model_config()
    assert model.encoder_layers == model.decoder_layers > 20
    assert run.freeze.steps == 500 * ("hold" in argument) and not model.qkv_bias


@pytest.mark.parametrize("argument", ["x", "ul2,x", "ul2,qwen3-0.6b,smollm2-135m"])
def test_other_words_are_refused(argument):
    with pytest.raises(ConfigError, match="unknown objective 'x'|is not expected"):
        load_config(f"configs/adapt.py:{argument}")
