"""Setting of the paper's table: sizes, splits, columns, and the models that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from encdec.cost.flops import count_parameters
from encdec.errors import ConfigError
from encdec.evaluation.results_table import PAPER
from encdec.fields import build
from encdec.model import ModelConfig, preset
from encdec.scaling.matching import DECODER_ONLY, encoder_share, matched, series_name
from encdec.train.config import RunConfig, parse_config

TEACHER = "teacher"  # the row's name, and the model's
DEC = "DEC"
TEACHER_RATIO = 4.0  # smallest teacher, as a multiple of its student's parameters
EVALUATIONS = 2  # evaluations per run; a fine-tuned model's best checkpoint is evaluated
# Fields that add runs, but do not change any run.
GROWING = ("seeds", "distilled")


@dataclasses.dataclass(frozen=True)
class Column:
    """One fine-tuning and its evaluation tasks; fields as in configs/paper.py."""

    name: str
    tasks: tuple[str, ...]
    train_file: str
    inputs: int
    targets: int
    batch_size: int
    steps: int
    too_long: str
    train_examples: int
    validation_examples: int


@dataclasses.dataclass(frozen=True)
class OptimizerSetting:
    """Optimization settings of every run; ``warmup_fraction`` is relative to its steps."""

    name: Literal["adamw", "adafactor", "muon"]
    learning_rate: float
    weight_decay: float
    b2: float
    warmup_fraction: float
    z_loss: float


@dataclasses.dataclass(frozen=True)
class DistillSetting:
    alpha: float
    draws: int


@dataclasses.dataclass(frozen=True)
class PretrainSetting:
    inputs: int
    targets: int
    batch_size: int
    steps: int
    document_bytes: int
    held_out_every: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """Fields as in configs/paper.py."""

    model: str
    teacher: str
    teacher_layers: int
    splits: tuple[str, ...]
    distilled: tuple[str, ...]
    vocabulary: int
    vocabulary_bytes: int
    seeds: int
    optimizer: OptimizerSetting
    distill: DistillSetting
    pretrain: PretrainSetting
    columns: tuple[Column, ...]

    def identity(self) -> dict[str, Any]:
        """Everything that determines finished runs, as plain values."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in GROWING}


def parse_setting(values: Mapping[str, Any]) -> Setting:
    """The Setting for a config file's values.

    Raises:
        ConfigError: a value is out of range, or a model is impossible.
    """
    words = {"label": "config", "what": "the experiment"}
    columns = []
    for name, column in values["columns"].items():
        where = f"columns.{name}."
        columns.append(build(Column, {"name": name, **column}, prefix=where, **words))
    rest = {name: value for name, value in values.items() if name != "columns"}
    setting = dataclasses.replace(
        build(Setting, rest | {"columns": ()}, **words), columns=tuple(columns)
    )
    _check(setting)
    return setting


def _check(setting: Setting) -> None:
    rows = table_rows(setting)
    for name in setting.distilled:
        if name not in rows:
            known = ", ".join(rows)
            raise ConfigError(f"config.distilled names {name!r}; expected some of {known}")
    if setting.seeds < 1:
        raise ConfigError(f"config.seeds is {setting.seeds}; expected 1 or more")
    for column in setting.columns:
        where = f"config.columns.{column.name}"
        if column.too_long not in ("skip", "cut"):
            raise ConfigError(f"{where}.too_long is {column.too_long!r}; expected 'skip' or 'cut'")
        if column.train_file and len(column.tasks) != 1:
            raise ConfigError(
                f"{where}.train_file is {column.train_file!r}, but the column has "
                f"{len(column.tasks)} tasks; expected one"
            )
        if min(column.train_examples, column.validation_examples) < 0:
            raise ConfigError(f"{where} has a negative number of examples; expected 0 (all) or up")
    teacher = count_parameters(model_of(setting, TEACHER)).total
    for name in setting.distilled:
        student = count_parameters(model_of(setting, name)).total
        if teacher < TEACHER_RATIO * student:
            raise ConfigError(
                f"the teacher {setting.teacher} has {teacher:,} parameters, its student {name} "
                f"{student:,}; expected at least {TEACHER_RATIO:g} times as many: raise "
                "config.teacher_layers, name another config.teacher, or leave the student out of "
                "config.distilled"
            )


def row_name(split: str) -> str:
    """``ED 2/3-1/3`` for the split 2/3, as the paper has it."""
    share = encoder_share(split)
    return f"ED {share}-{1 - share}"


def table_rows(setting: Setting) -> dict[str, str]:
    """The students' rows of the table, and the split of each ("" for DEC)."""
    rows = {DEC: "", **{row_name(split): split for split in setting.splits}}
    if strange := [name for name in rows if name not in PAPER]:
        raise ConfigError(
            f"config.splits gives {strange[0]!r}, which is not in the paper; expected "
            "some of 1/3, 1/2, 2/3"
        )
    return rows


def slug(row: str) -> str:
    """A row's name in paths: ``dec``, ``ed-2of3``, ``teacher``."""
    if row in (DEC, TEACHER):
        return row.lower()
    return series_name(row.removeprefix("ED ").split("-")[0])


def model_of(setting: Setting, row: str) -> ModelConfig:
    """The model of a row: all students match the first split's training FLOPs.

    Raises:
        ConfigError: no such preset, or no model of these FLOPs within 1 %.
    """
    common = {"vocab_size": setting.vocabulary, "scan_layers": False}
    if row == TEACHER:
        if setting.teacher_layers:
            common["decoder_layers"] = setting.teacher_layers
        model = preset(setting.teacher, **common)
        if model.is_encoder_decoder:
            raise ConfigError(
                f"config.teacher is {setting.teacher}, an encoder-decoder; expected a "
                "decoder-only preset"
            )
        return model
    pretrain = setting.pretrain
    base = preset(setting.model, **common)
    layers = encoder_share(setting.splits[0]) * base.num_layers
    if layers.denominator != 1:
        raise ConfigError(
            f"config.model {setting.model} has {base.num_layers} layers, which "
            f"cannot be split {setting.splits[0]}"
        )
    reference = base.replace(
        encoder_layers=int(layers), decoder_layers=base.num_layers - int(layers)
    )
    split = table_rows(setting)[row]
    if split == setting.splits[0]:
        return reference
    return matched(
        reference,
        series_name(split) if split else DECODER_ONLY,
        split or setting.splits[0],
        "flops+data",
        pretrain.inputs,
        pretrain.targets,
    )


def run_config(
    setting: Setting,
    row: str,
    *,
    records: str,
    eval_records: str,
    batch_size: int,
    steps: int,
    seed: int,
    init_from: str = "",
    teacher: str = "",
) -> RunConfig:
    """The run of a row's model on records, with a teacher's rows if given."""
    model, optimizer = model_of(setting, row), setting.optimizer
    name = setting.teacher if row == TEACHER else setting.model
    base = preset(name)
    every = max(1, steps // EVALUATIONS)
    return parse_config(
        {
            "model": name,
            "model_overrides": model.changes_from(base),
            "init_from": init_from,
            "batch_size": batch_size,
            "steps": steps,
            "seed": seed,
            "log_every": max(1, steps // 10),
            "data": {"records": records, "eval_records": eval_records},
            "optimizer": {
                "name": optimizer.name,
                "learning_rate": optimizer.learning_rate,
                "weight_decay": optimizer.weight_decay,
                "b2": optimizer.b2,
            },
            "schedule": {
                "name": "cosine",
                "warmup_steps": round(optimizer.warmup_fraction * steps),
            },
            "loss": {"z_loss": optimizer.z_loss},
            "distill": {"teacher": teacher, "alpha": setting.distill.alpha},
            "eval": {"every": every, "batch_size": batch_size},
            "checkpoint": {"every": every, "keep": EVALUATIONS + 1},
        }
    )
