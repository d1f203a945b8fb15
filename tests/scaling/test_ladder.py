"""Plans are matched as asked, for every ladder that ships."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
from typing import get_args

import pytest

from encdec.cli import main
from encdec.config_files import read_config_file, split_overrides
from encdec.cost.flops import count_parameters, training_flops
from encdec.errors import ConfigError
from encdec.fields import differing_fields, flattened
from encdec.scaling.ladder import Ladder, parse_ladder
from encdec.scaling.matching import Match
from encdec.scaling.planned_runs import plan, run_config
from encdec.scaling.scaling_command import load_ladder
from encdec.train.run_config import RunConfig

LADDERS = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "scaling.py")
OWN = ("name", "sizes")


def planned(name: str, **fields: str):
    overrides = [f"--ladder.{field}={value}" for field, value in fields.items()]
    return plan(parse_ladder(load_ladder(f"{LADDERS}:{name}", overrides)))


# All that each shipped ladder changes of the defaults, except its name and sizes.
SHIPPED = {
    "micro": (
        *("batch.largest", "batch.reference_rows", "batch.rows", "batch.smallest"),
        *("budgets.min_steps", "budgets.values", "evaluations", "inputs"),
        *("learning_rate.batch_exponent", "learning_rate.peak"),
        *("learning_rate.reference_batch", "learning_rate.reference_width"),
        *("run.checkpoint.every", "run.optimizer.name"),
        *("seeds.budgets", "seeds.count", "seeds.sizes", "targets"),
    ),
    "small": (
        *("batch.reference_rows", "batch.smallest", "budgets.min_steps", "budgets.values"),
        *("inputs", "seeds.budgets", "seeds.count", "seeds.sizes", "targets"),
    ),
    "paper": (
        *("batch.reference_rows", "batch.rows", "batch.smallest"),
        *("budgets.kind", "budgets.max_epochs", "budgets.min_steps", "budgets.values"),
        "run.log_every",
    ),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_ladder_is_the_default_but_for_what_it_states(name):
    default, ladder = (
        {key: value for key, value in dataclasses.asdict(one).items() if key not in OWN}
        for one in (Ladder(), parse_ladder(load_ladder(f"{LADDERS}:{name}", [])))
    )
    assert differing_fields(default, ladder) == sorted(SHIPPED[name])
    stated = flattened(read_config_file(f"{LADDERS}:{name}").to_dict())
    assert {key for key in stated if key.split(".")[0] not in OWN} == set(SHIPPED[name])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_ladder_is_the_same_from_a_file_and_from_python(name):
    """So its directory is, too: what a group leaves out has its default either way."""
    stated = read_config_file(f"{LADDERS}:{name}").to_dict()
    stated["distilled"] = {"teachers": {"kd": {"rows": "scored/kd"}}}
    flag = "--ladder.distilled.teachers.kd.rows=scored/kd"
    ladder = parse_ladder(stated)
    assert ladder == parse_ladder(load_ladder(f"{LADDERS}:{name}", [flag]))
    assert ladder.run["checkpoint"]["keep"] == 1
    assert ladder.distilled.named() == {"kd": ("scored/kd", 0.0)}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"optimiser": {"name": "muon"}}, "did you mean 'optimizer'"),
        ({"optimizer": {"nme": "muon"}}, "did you mean 'optimizer.name'"),
        ({"optimizer": {"name": "muons"}}, "ladder.run.optimizer.name is 'muons'; expected one of"),
        ({"optimizer": 3}, "ladder.run.optimizer is 3"),
        ({"optimizer": {"learning_rate": 0.1}}, "ladder.learning_rate.peak instead"),
        ({"schedule": {"warmup_steps": 3}}, "ladder.warmup_fraction instead"),
        ({"eval": {"every": 3}}, "ladder.evaluations instead"),
        ({"steps": 3}, "fields that the ladder does not set itself"),
    ],
)
def test_what_runs_share_is_checked_and_nothing_of_it_is_ignored(run, message):
    with pytest.raises(ConfigError, match=message):
        parse_ladder({**read_config_file(f"{LADDERS}:micro").to_dict(), "run": run})


@pytest.mark.parametrize("match", get_args(Match))
@pytest.mark.parametrize("name", ["micro", "small", "paper"])
def test_rungs_are_matched_as_asked(name, match):
    found = planned(name, match=match)
    rungs = collections.defaultdict(dict)
    for run in found.runs:
        rungs[run.size, run.budget, run.seed][run.series] = run
    assert len(rungs) >= 12
    for rung in rungs.values():
        assert set(rung) == {"ed-2of3", "ed-1of2", "ed-1of3", "dec"}
        reference = rung["ed-2of3"]
        for run in rung.values():
            equal = {
                # By the tested formula and from the model itself, not by the plan's own sums.
                "flops": training_flops(
                    run.model, run.inputs, run.targets, batch_size=run.batch_size
                )
                * run.steps,
                "parameters": count_parameters(run.model).total,
                "data": (run.rows, run.source_tokens, run.target_tokens),
            }
            wanted = {
                "flops": reference.flops,
                "parameters": reference.parameters.total,
                "data": (reference.rows, reference.source_tokens, reference.target_tokens),
            }
            for what in match.split("+"):
                if what == "data":
                    assert equal[what] == wanted[what], run.name
                else:
                    assert equal[what] == pytest.approx(wanted[what], rel=0.01), run.name
            assert run.learning_rate == reference.learning_rate
            assert run.batch_size == reference.batch_size


def test_splits_keep_the_number_of_layers():
    for run in planned("micro").runs:
        total = {"300k": 6, "1m": 6, "3m": 6, "8m": 12}[run.size]
        share = {"ed-2of3": 2 / 3, "ed-1of2": 1 / 2, "ed-1of3": 1 / 3}.get(run.series)
        if share:
            assert run.model.num_layers == total
            assert run.model.encoder_layers == round(share * total)
        else:
            assert run.model.architecture == "decoder_only"


def test_micro_is_as_large_as_promised():
    found = planned("micro")
    sizes = {run.size for run in found.runs}
    assert len(sizes) == 4
    flops = [run.flops for run in found.runs]
    assert max(flops) / min(flops) >= 95  # two decades
    seeds = collections.defaultdict(set)
    for run in found.runs:
        seeds[run.size].add(run.seed)
    assert sum(len(found) >= 3 for found in seeds.values()) == 2


def test_a_planned_run_is_a_valid_training_run():
    for name in ("micro", "paper"):
        found = planned(name)
        for run in found.runs:
            config = run_config(found.ladder, run)
            assert isinstance(config, RunConfig)
            assert config.model_config() == run.model
            assert (config.steps, config.batch_size) == (run.steps, run.batch_size)
            assert config.schedule.name == "cosine" and config.optimizer.b2 == 0.95


def test_names_and_digests_tell_runs_apart():
    runs = planned("micro").runs
    assert len({run.name for run in runs}) == len(runs) == len({run.digest for run in runs})
    # Results are filed under it: those of earlier versions must be found again.
    assert (runs[0].digest, runs[-1].digest) == ("3d6c3882c4d856c3", "0faf9af4ba9cf79f")
    other = planned("micro", **{"learning_rate.peak": "1e-3"}).runs
    assert {run.name for run in other} == {run.name for run in runs}
    assert not {run.digest for run in other} & {run.digest for run in runs}


def test_a_later_field_of_models_changes_no_digest():
    run = planned("micro").runs[0]
    later = dataclasses.make_dataclass(
        "Later",
        [("novelty", bool, dataclasses.field(default=False))],
        bases=(type(run.model),),
        frozen=True,
    )
    model = {field.name: getattr(run.model, field.name) for field in dataclasses.fields(run.model)}
    same = dataclasses.replace(run, model=later(**model))
    assert same.digest == run.digest
    other = dataclasses.replace(run, model=later(**model, novelty=True))
    assert other.digest != run.digest


def test_rungs_that_are_too_short_are_named():
    found = planned("micro", **{"budgets.min_steps": "100"})
    assert any("8m at 5e+10 flops" in text and "min_steps" in text for text in found.left_out)
    assert min(run.steps for run in found.runs) >= 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"match": "everything"}, "ladder.match is 'everything'; expected one of 'flops"),
        ({"splits": "('2/3','3/5')"}, "6 layers cannot be split 3/5"),
        ({"splits": "('2/3','4/3')"}, "split is '4/3'"),
        ({"budgets.values": "(-1.0,)"}, "positive numbers"),
        ({"budgets.values": "(1e9, 1.001e9)"}, "differ in their first three digits"),
        ({"budgets.min_steps": "100000000"}, "no rung is left"),
        ({"seeds.sizes": "('2m',)"}, "sizes of the ladder: 1m, 300k"),
    ],
)
def test_impossible_ladders_are_refused(fields, message):
    with pytest.raises(ConfigError, match="(?s)" + message.replace("(", r"\(")):
        planned("micro", **fields)


def test_unknown_fields_name_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'budgets.values'"):
        load_ladder(f"{LADDERS}:micro", ["--ladder.budget.values=(1.0,)"])
    with pytest.raises(ConfigError, match="unknown ladder 'nano'; known: micro"):
        load_ladder(f"{LADDERS}:nano", [])
    overrides, rest = split_overrides(["--ladder.match", "--json"], "ladder")
    assert rest == ["--json"]
    with pytest.raises(ConfigError, match="ladder.match"):
        load_ladder(f"{LADDERS}:micro", overrides)
    with pytest.raises(ConfigError, match="ladder.seeds is a group of fields"):
        load_ladder(f"{LADDERS}:micro", ["--ladder.seeds=3"])
    with pytest.raises(ConfigError, match="did you mean 'budgets'"):
        parse_ladder({"sizes": {"a": {"preset": "330m"}}, "budget": {}})


def test_plan_prints_every_run_and_the_bill(capsys):
    assert main(["scaling", "plan", f"--ladder={LADDERS}:micro", "--flops_per_second=5e10"]) == 0
    text = capsys.readouterr().out
    for run in planned("micro").runs:
        assert run.name in text
    assert "Total cost" in text and "token slots" in text
    assert main(["scaling", "plan", f"--ladder={LADDERS}:paper", "--chip=v5e", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["flops"] == pytest.approx(sum(run["flops"] for run in content["runs"]))
    hours = content["flops"] / (0.4 * 197e12) / 3600
    assert content["hours"] == pytest.approx(hours)
    # A chip of two devices, at whose rates MFU and predictions count.
    assert main(["scaling", "plan", f"--ladder={LADDERS}:paper", "--chip=tpu7x", "--json"]) == 0
    hours *= 197 / 2307
    assert json.loads(capsys.readouterr().out)["hours"] == pytest.approx(hours)
    assert all(run["epochs"] is None for run in content["runs"])


def test_overrides_belong_to_plan_and_run(capsys):
    assert main(["scaling", "fit", "--results=x", "--ladder.match=flops+data"]) == 2
    assert "has no effect" in capsys.readouterr().err


def test_records_turn_slots_into_tokens(records):
    from encdec.data.records import read_card

    card = read_card(records)
    ladder = parse_ladder(
        {
            "sizes": {"tiny": {"preset": "test", "vocab_size": 264}},
            "inputs": 24,
            "targets": 12,
            "splits": ("2/3",),
            "budgets": {"kind": "rows", "values": (320.0,), "min_steps": 10},
        }
    )
    run = plan(ladder, card).runs[0]
    assert run.rows == 320
    assert run.target_tokens == pytest.approx(3.2 * card.target_tokens)
    assert run.epochs == pytest.approx(3.2)
    assert math.isnan(plan(ladder).runs[0].epochs)
    tight = parse_ladder(
        {
            **_plain(ladder),
            "budgets": {"kind": "rows", "values": (320.0,), "min_steps": 10, "max_epochs": 3.0},
        }
    )
    with pytest.raises(ConfigError, match="reads its records 3.2 times"):
        plan(tight, card)
    with pytest.raises(ConfigError, match=r"24 \+ 12 tokens, the ladder 1024"):
        plan(parse_ladder({**_plain(ladder), "inputs": 1024}), card)


def _plain(ladder) -> dict:
    return {
        "sizes": dict(ladder.sizes),
        "inputs": ladder.inputs,
        "targets": ladder.targets,
        "splits": ladder.splits,
        "budgets": {"kind": "rows", "values": (320.0,), "min_steps": 10},
    }
