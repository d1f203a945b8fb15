"""Ladders of runs: a fully planned grid of sizes, architectures and budgets, matched as configured.

A ladder's config file (``configs/scaling.py``) returns a ConfigDict; ``parse_ladder`` checks it,
and ``plan`` turns it into runs. On every rung, which is one size at one budget, the reference is
the encoder-decoder of the first split; its budget gives the rows that it reads, and all other
series are matched to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from encdec.cost.flops import ParameterCount, count_parameters, training_flops
from encdec.data.records import DatasetCard
from encdec.errors import ConfigError
from encdec.fields import Require, build, did_you_mean, requirements, value_of
from encdec.model import ModelConfig, preset
from encdec.scaling.matching import (
    DECODER_ONLY,
    Match,
    distilled_name,
    encoder_share,
    matched,
    series_name,
    with_split,
)
from encdec.train.run_config import RunConfig, parse_config, to_dict

BUDGET_KINDS = ("flops", "rows", "tokens_per_parameter")
FLOPS_TOLERANCE = 0.01
_POSITIVE = (
    "inputs",
    "targets",
    "evaluations",
    "budgets.min_steps",
    "budgets.max_epochs",
    "batch.rows",
    "batch.reference_rows",
    "batch.smallest",
    "seeds.count",
    "learning_rate.peak",
    "learning_rate.reference_width",
    "learning_rate.reference_batch",
)
_BYTES_PER_PARAMETER = 16  # float32: master, gradient, and AdamW's two moments


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Training budgets of each size, for the reference of a rung.

    ``flops``: training FLOPs. ``rows``: rows read. ``tokens_per_parameter``: source and target
    tokens over all parameters.
    """

    kind: str = "flops"
    values: tuple[float, ...] = ()  # each size is trained at each of these
    min_steps: int = 50  # a rung with fewer steps is left out: warmup would be all of it
    max_epochs: float = 4.0  # a rung that reads its records more often is left out


@dataclasses.dataclass(frozen=True)
class BatchRule:
    """Rows per step: ``rows`` (reading / reference_rows)^exponent, as a power of two in bounds."""

    rows: int = 128
    reference_rows: int = 2_000_000
    exponent: float = 0.5
    smallest: int = 8
    largest: int = 4096


@dataclasses.dataclass(frozen=True)
class LearningRateRule:
    """Peak: ``peak`` (reference_width / d_model)^width_exponent (batch / reference_batch)^0.5.

    The square root is Adam's rule for the batch (arXiv 2205.10287). All series of a rung share
    width and batch, so they share the rate too.
    """

    peak: float = 1e-3
    reference_width: int = 1024
    width_exponent: float = 0.5
    reference_batch: int = 128
    batch_exponent: float = 0.5


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Repeated runs, to measure the noise between seeds."""

    count: int = 1  # seeds of the rungs below; all others have one
    sizes: tuple[str, ...] = ()  # these sizes ...
    budgets: tuple[float, ...] = ()  # ... at these budgets; none: at all of theirs


@dataclasses.dataclass(frozen=True)
class Distilled:
    """Series that are repeated with a teacher's stored distributions in addition to gold targets.

    "ed-2of3+kd" has the rows, steps and student of "ed-2of3" and the teacher "kd".

    ``teachers``: by name, ``rows``, a directory of ``encdec score`` on the ladder's records, and
    ``loss``, the teacher's own on the ladder's held-out records in nats per target token (0:
    unknown; the distillation law needs it). Entries without rows are skipped; more may be added.
    """

    series: tuple[str, ...] = ()  # names, such as "ed-2of3"; none: no distilled runs
    teachers: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=lambda: {"kd": {"rows": "", "loss": 0.0}}
    )

    def named(self) -> dict[str, tuple[str, float]]:
        """(rows, loss) of each teacher in use."""
        return {
            name: (str(entry["rows"]), float(entry.get("loss", 0.0)))
            for name, entry in self.teachers.items()
            if entry.get("rows")
        }


def _run() -> dict[str, Any]:
    """The schedule ends with the run: a loss in mid-schedule is too high, more so in long runs."""
    return {
        "log_every": 20,
        "accumulation": 1,
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        "distill": {"alpha": 0.9},  # of distilled series
        "optimizer": {
            "name": "adamw",
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "b1": 0.9,
            "b2": 0.95,
        },
        "schedule": {"name": "cosine", "final_fraction": 0.1},
        "loss": {"z_loss": 1e-4},
        "eval": {"batches": 0},
        "checkpoint": {"every": 1000, "keep": 1},
    }


@dataclasses.dataclass(frozen=True)
class Ladder:
    """A ladder as configured; the defaults are those of ``configs/scaling.py``."""

    name: str = "ladder"
    # By name, a preset and changes to it; layers must be divisible by all splits' denominators
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    # The encoder's share of the layers; the first is the reference
    splits: tuple[str, ...] = ("2/3", "1/2", "1/3")
    decoder_only: bool = True  # also run the decoder-only series "dec"
    # What is equal on a rung; the third always differs: "flops+data" the parameters (the paper's
    # claim), "parameters+data" the FLOPs, "flops+parameters" the rows read
    match: Match = "flops+data"
    inputs: int = 1024  # lengths of rows; those of the records
    targets: int = 256
    records: str = ""  # of training; without, plans count slots instead of tokens
    eval_records: str = ""  # held out; their losses make the curves
    warmup_fraction: float = 0.1  # of the steps
    evaluations: int = 4  # of each run; the last alone is fitted
    budgets: Budgets = Budgets()
    batch: BatchRule = BatchRule()
    learning_rate: LearningRateRule = LearningRateRule()
    seeds: Seeds = Seeds()
    distilled: Distilled = Distilled()
    # Fields of RunConfig that all runs share
    run: Mapping[str, Any] = dataclasses.field(default_factory=_run)


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a ladder.

    Attributes:
        name: of its work directory; unique in the ladder.
        series: "ed-2of3", "dec", ...; "ed-2of3+NAME" with the teacher of that name.
        size: the rung's size.
        budget: the rung's budget, in the unit of its kind.
        seed: of parameters and row order.
        preset: the preset from which ``model`` is varied.
        model: the matched model.
        batch_size: rows per step.
        steps: optimizer steps.
        learning_rate: peak.
        warmup_steps: of them.
        eval_every: steps between evaluations.
        inputs, targets: row lengths.
        source_tokens, target_tokens: total tokens read. With records, text tokens by the card's
            average row; else slots, padding included.
        epochs: over the records; NaN without records.
        teacher: directory of its stored distributions; "": gold targets alone.
        teacher_loss: its held-out loss, nats per target token; 0: no teacher, or unknown.
    """

    name: str
    series: str
    size: str
    budget: float
    seed: int
    preset: str
    model: ModelConfig
    batch_size: int
    steps: int
    learning_rate: float
    warmup_steps: int
    eval_every: int
    inputs: int
    targets: int
    source_tokens: float
    target_tokens: float
    epochs: float
    teacher: str = ""
    teacher_loss: float = 0.0

    @property
    def rows(self) -> int:
        return self.batch_size * self.steps

    @property
    def flops(self) -> float:
        """Training FLOPs, rows counted whole; the cost of teacher scoring is not included."""
        return training_flops(self.model, self.inputs, self.targets, batch_size=self.rows)

    @property
    def parameters(self) -> ParameterCount:
        return count_parameters(self.model)

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients and AdamW's moments in float32, over all devices."""
        return _BYTES_PER_PARAMETER * self.parameters.total

    @property
    def digest(self) -> str:
        """Changes with anything that changes the run's outcome."""
        content = dataclasses.asdict(self)
        # The path of a teacher's rows may change; training compares their content.
        del content["name"], content["epochs"], content["teacher"], content["teacher_loss"]
        # Fields at their defaults are left out, so that a later field of models changes no digest.
        content["model"] = self.model.changes_from(type(self.model)())
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def overrides(self) -> dict[str, Any]:
        """The model as changes to its preset, for a run's ``model_overrides``."""
        return self.model.changes_from(preset(self.preset))


@dataclasses.dataclass(frozen=True)
class Plan:
    """All runs of a ladder in the order in which they run, cheapest first, and the rungs left
    out."""

    ladder: Ladder
    runs: tuple[PlannedRun, ...]
    left_out: tuple[str, ...]

    @property
    def flops(self) -> float:
        return sum(run.flops for run in self.runs)

    def named(self, name: str) -> PlannedRun:
        """The run called ``name``; ConfigError naming the nearest if there is none."""
        names = [run.name for run in self.runs]
        if name not in names:
            raise ConfigError(
                f"ladder {self.ladder.name!r} has no run {name!r}{did_you_mean(name, names)} "
                "(`encdec scaling plan` lists them)"
            )
        return self.runs[names.index(name)]


def parse_ladder(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Ladder:
    """Checks a ladder's configuration and freezes it.

    What it leaves out, in groups such as ``run`` too, has its default, whether it comes from a
    config file or from Python.

    Raises:
        ConfigError: unknown field (naming the nearest), wrong type, or a value out of range.
    """
    given = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    values = _merged(dataclasses.asdict(Ladder()), given)
    ladder = build(Ladder, values, label="ladder", what="the ladder")
    _check(ladder)
    return ladder


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Adds the fields that a configuration left out, so that each can be overridden."""
    return ml_collections.ConfigDict(_merged(dataclasses.asdict(Ladder()), config.to_dict()))


def _merged(full: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``full`` with the values of ``given``, group by group."""
    result = dict(full)
    for name, value in given.items():
        grouped = isinstance(value, Mapping) and isinstance(full.get(name), Mapping)
        result[name] = _merged(full[name], value) if grouped else value
    return result


def plan(ladder: Ladder, card: DatasetCard | None = None) -> Plan:
    """All runs of a ladder.

    Args:
        ladder: the ladder.
        card: of the training records. Without it, tokens are slots of the rows and the number
            of rows is not checked.

    Raises:
        ConfigError: a rung cannot be matched, or the records have other row lengths.
    """
    inputs, targets = ladder.inputs, ladder.targets
    if card and (card.inputs_length, card.targets_length) != (inputs, targets):
        raise ConfigError(
            f"the records have rows of {card.inputs_length} + {card.targets_length} tokens, the "
            f"ladder {inputs} + {targets}; set --ladder.inputs and --ladder.targets, or prepare "
            "records of these lengths"
        )
    runs: list[PlannedRun] = []
    left_out: list[str] = []
    for size, entry in ladder.sizes.items():
        base = preset(entry["preset"], **{k: v for k, v in entry.items() if k != "preset"})
        reference = with_split(base, ladder.splits[0])
        models = {
            name: reference
            if split == ladder.splits[0] and name != DECODER_ONLY
            else matched(reference, name, split, ladder.match, inputs, targets)
            for name, split in _series(ladder)
        }
        for budget in ladder.budgets.values:
            rung = _rung(ladder, size, entry["preset"], reference, models, budget, card)
            if isinstance(rung, str):
                left_out.append(rung)
                continue
            runs += rung
    if not runs:
        raise ConfigError("no rung is left: " + "; ".join(left_out))
    runs.sort(key=lambda run: (run.seed, run.flops))
    return Plan(ladder, tuple(runs), tuple(left_out))


def run_config(ladder: Ladder, run: PlannedRun) -> RunConfig:
    """The RunConfig of a planned run."""
    values = _merged(to_dict(RunConfig()), ladder.run)
    values |= {
        "model": run.preset,
        "model_overrides": run.overrides(),
        "batch_size": run.batch_size,
        "steps": run.steps,
        "seed": run.seed,
        "data": values["data"] | {"records": ladder.records, "eval_records": ladder.eval_records},
        "optimizer": values["optimizer"] | {"learning_rate": run.learning_rate},
        "schedule": values["schedule"] | {"warmup_steps": run.warmup_steps},
        "eval": values["eval"] | {"every": run.eval_every},
        "distill": values["distill"] | {"teacher": run.teacher},
    }
    return parse_config(values)


def _series(ladder: Ladder) -> list[tuple[str, str]]:
    names = [(series_name(split), split) for split in ladder.splits]
    return names + [(DECODER_ONLY, "")] * ladder.decoder_only


def _rung(
    ladder: Ladder,
    size: str,
    base: str,
    reference: ModelConfig,
    models: Mapping[str, ModelConfig],
    budget: float,
    card: DatasetCard | None,
) -> list[PlannedRun] | str:
    """The runs of one size at one budget, or why there are none."""
    inputs, targets = ladder.inputs, ladder.targets
    row_tokens = (
        (card.source_tokens / card.rows, card.target_tokens / card.rows)
        if card
        else (float(inputs), float(targets))
    )
    row_flops = training_flops(reference, inputs, targets)
    wanted = {
        "rows": budget,
        "flops": budget / row_flops,
        "tokens_per_parameter": budget * count_parameters(reference).total / sum(row_tokens),
    }[ladder.budgets.kind]
    batch = _batch_size(ladder.batch, wanted)
    rows = batch * round(wanted / batch)
    label = f"{size} at {budget:.3g} {ladder.budgets.kind}"
    if rows // batch < ladder.budgets.min_steps:
        return (
            f"{label}: {rows // batch} steps of {batch} rows, fewer than min_steps = "
            f"{ladder.budgets.min_steps}"
        )
    repeated = not ladder.seeds.sizes or size in ladder.seeds.sizes
    repeated &= not ladder.seeds.budgets or budget in ladder.seeds.budgets
    runs = []
    for series, model, teacher, teacher_loss in _with_distilled(ladder, models):
        # With equal sizes and equal FLOPs, the amount of data has to differ.
        share = (
            row_flops / training_flops(model, inputs, targets)
            if ladder.match == "flops+parameters"
            else 1.0
        )
        steps = round(rows * share / batch)
        epochs = batch * steps / card.rows if card else math.nan
        if epochs > ladder.budgets.max_epochs:
            return (
                f"{label}: {series} reads its records {epochs:.1f} times, more than "
                f"max_epochs = {ladder.budgets.max_epochs:g}"
            )
        flops = batch * steps * training_flops(model, inputs, targets)
        if "flops" in ladder.match and abs(flops / (rows * row_flops) - 1) > FLOPS_TOLERANCE:
            return (
                f"{label}: {series} comes to {flops:.4g} FLOPs in whole steps, the reference "
                f"to {rows * row_flops:.4g}, more than 1 % apart; use a smaller batch"
            )
        for seed in range(ladder.seeds.count if repeated else 1):
            runs.append(
                PlannedRun(
                    name=f"{series}_{size}_" + f"{budget:.3g}".replace("+", "") + f"_s{seed}",
                    series=series,
                    size=size,
                    budget=budget,
                    seed=seed,
                    preset=base,
                    model=model,
                    batch_size=batch,
                    steps=steps,
                    learning_rate=_learning_rate(ladder.learning_rate, model, batch),
                    warmup_steps=min(round(ladder.warmup_fraction * steps), steps - 1),
                    eval_every=max(1, math.ceil(steps / ladder.evaluations)),
                    inputs=inputs,
                    targets=targets,
                    source_tokens=batch * steps * row_tokens[0],
                    target_tokens=batch * steps * row_tokens[1],
                    epochs=epochs,
                    teacher=teacher,
                    teacher_loss=teacher_loss,
                )
            )
    return runs


def _with_distilled(
    ladder: Ladder, models: Mapping[str, ModelConfig]
) -> list[tuple[str, ModelConfig, str, float]]:
    """(series, model, teacher's rows, its loss): all series, and those repeated with teachers."""
    plain = [(series, model, "", 0.0) for series, model in models.items()]
    return plain + [
        (distilled_name(series, teacher), models[series], rows, loss)
        for series in ladder.distilled.series
        for teacher, (rows, loss) in ladder.distilled.named().items()
    ]


def _batch_size(rule: BatchRule, rows: float) -> int:
    exact = rule.rows * (max(rows, 1) / rule.reference_rows) ** rule.exponent
    power = 2 ** round(math.log2(max(exact, 1)))
    return max(rule.smallest, min(rule.largest, power))


def _learning_rate(rule: LearningRateRule, model: ModelConfig, batch: int) -> float:
    width = (rule.reference_width / model.d_model) ** rule.width_exponent
    rate = rule.peak * width * (batch / rule.reference_batch) ** rule.batch_exponent
    return float(f"{rate:.3g}")


def _check(ladder: Ladder) -> None:
    require = requirements(ladder, "ladder.")
    require(bool(ladder.sizes), "sizes", "at least one size")
    for size, entry in ladder.sizes.items():
        require(
            isinstance(entry, Mapping) and "preset" in entry,
            f"sizes.{size}",
            "a preset and changes to it: {'preset': '330m', ...}",
            entry,
        )
        require(not {"_", "/"} & set(size), "sizes", "names without '_' and '/'", size)
    require(bool(ladder.splits), "splits", "at least one, the reference's first")
    require(len(set(ladder.splits)) == len(ladder.splits), "splits", "no repetition")
    for split in ladder.splits:
        encoder_share(split)
    for name in _POSITIVE:
        require(value_of(ladder, name) > 0, name, "a positive number")
    require(0 <= ladder.warmup_fraction < 1, "warmup_fraction", "a fraction in [0, 1)")
    _check_budgets_and_seeds(ladder, require)
    _check_distilled(ladder, require)
    _check_run(ladder, require)


def _check_budgets_and_seeds(ladder: Ladder, require: Require) -> None:
    budgets, seeds = ladder.budgets, ladder.seeds
    require(budgets.kind in BUDGET_KINDS, "budgets.kind", "one of " + ", ".join(BUDGET_KINDS))
    positive = bool(budgets.values) and min(budgets.values) > 0
    require(positive, "budgets.values", "positive numbers")
    require(len(set(budgets.values)) == len(budgets.values), "budgets.values", "no repetition")
    for size in seeds.sizes:
        known = "sizes of the ladder: " + ", ".join(ladder.sizes)
        require(size in ladder.sizes, "seeds.sizes", known, size)
    for budget in seeds.budgets:
        require(budget in budgets.values, "seeds.budgets", "values of the budgets", budget)


def _check_run(ladder: Ladder, require: Require) -> None:
    """The ladder sets some fields of its runs itself."""
    owned = ("batch_size", "data", "model", "model_overrides", "seed", "steps")
    for field in ladder.run:
        require(
            field not in owned,
            "run",
            f"fields that the ladder does not set itself (it sets {', '.join(owned)})",
            field,
        )
    build(RunConfig, ladder.run, label="ladder.run", what="ladder.run")
    elsewhere = {
        "distill.teacher": "ladder.distilled.teachers instead, so that plain series stay plain",
        "optimizer.learning_rate": "ladder.learning_rate.peak instead, which follows the width",
        "schedule.warmup_steps": "ladder.warmup_fraction instead",
        "eval.every": "ladder.evaluations instead",
    }
    for name, instead in elsewhere.items():
        group, field = name.split(".")
        require(field not in ladder.run.get(group, {}), f"run.{name}", instead)


def _check_distilled(ladder: Ladder, require: Require) -> None:
    distilled, names = ladder.distilled, [name for name, _ in _series(ladder)]
    for series in distilled.series:
        known = f"series of the ladder: {', '.join(names)}"
        require(series in names, "distilled.series", known, series)
    teachers = "distilled.teachers"
    for name, entry in distilled.teachers.items():
        fits = isinstance(entry, Mapping) and set(entry) <= {"rows", "loss"}
        require(fits, f"{teachers}.{name}", "{'rows': DIR, 'loss': NATS}", entry)
        plain = not {"_", "/", "+"} & set(name)
        require(plain, teachers, "names without '_', '/' and '+'", name)
        loss = entry.get("loss", 0.0)
        nats = "nats per target token, or 0 if it is not known"
        require(loss >= 0, f"{teachers}.{name}.loss", nats, loss)
    if distilled.series and not distilled.named():
        raise ConfigError(
            f"ladder.distilled.series is {distilled.series!r}, but no teacher has "
            "rows; expected --ladder.distilled.teachers.NAME.rows=DIR, written by "
            "`encdec score` on the ladder's records"
        )
