"""What a ladder of runs is: its typed configuration, and every check that needs no records.

A ladder is a grid of sizes, architectures and budgets, matched as configured. Its config file
(``configs/scaling.py``) returns a ConfigDict; ``parse_ladder`` checks it, and
``encdec.scaling.planned_runs`` turns it into runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from encdec.errors import ConfigError
from encdec.fields import Require, build, merged, requirements, value_of
from encdec.scaling.matching import DECODER_ONLY, Match, encoder_share, series_name
from encdec.train.run_config import RunConfig

BUDGET_KINDS = ("flops", "rows", "tokens_per_parameter")
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

    ``teachers``: by name, ``rows``, a directory of ``encdec distill logits`` on the ladder's
    records, and ``loss``, the teacher's own on the ladder's held-out records in nats per target
    token (0: unknown; the distillation law needs it). Entries without rows are skipped; more may
    be added.
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

    def series(self) -> list[tuple[str, str]]:
        """(name, split) of each series without a teacher; the decoder-only one has no split."""
        names = [(series_name(split), split) for split in self.splits]
        return names + [(DECODER_ONLY, "")] * self.decoder_only


def parse_ladder(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Ladder:
    """Checks a ladder's configuration and freezes it.

    What it leaves out, in groups such as ``run`` too, has its default, whether it comes from a
    config file or from Python.

    Raises:
        ConfigError: unknown field (naming the nearest), wrong type, or a value out of range.
    """
    given = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    values = merged(dataclasses.asdict(Ladder()), given)
    ladder = build(Ladder, values, label="ladder", what="the ladder")
    _check(ladder)
    return ladder


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Adds the fields that a configuration left out, so that each can be overridden."""
    return ml_collections.ConfigDict(merged(dataclasses.asdict(Ladder()), config.to_dict()))


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
    names = {f"{value:.3g}" for value in budgets.values}  # of runs, see ``planned_runs``
    unequal = "values that differ in their first three digits"
    require(len(names) == len(budgets.values), "budgets.values", unequal)
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
    distilled, names = ladder.distilled, [name for name, _ in ladder.series()]
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
            "`encdec distill logits` on the ladder's records"
        )
