"""Setting of the paper's table: sizes, splits, columns, and the models and runs that follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from encdec.cost.flops import count_parameters
from encdec.errors import ConfigError
from encdec.evaluation.results_table import PAPER
from encdec.fields import build
from encdec.model import ModelConfig, preset
from encdec.result_lines import setting_digest
from encdec.scaling.matching import DECODER_ONLY, encoder_share, matched, series_name
from encdec.train.run_config import RunConfig, parse_config
from encdec.train.run_fields import OptimizerName

TEACHER = "teacher"  # the row's name, and the model's
DEC = "DEC"
TEACHER_RATIO = 4.0  # smallest teacher, as a multiple of its student's parameters
BY_PARAMETERS = " (parameters)"  # ends the name of a row that matches the measure's parameters
# How a student is taught, and what that adds to its row's name: on gold targets alone, also by the
# teacher's stored draws, or on the teacher's own answers in place of gold.
TEACHING = {"": "", "draws": "+KD", "answers": "+SeqKD"}
# Fields that add runs, but do not change any run.
GROWING = ("seeds", "distilled", "answers", "one_seed", "by_parameters")
# Fields that concern the teacher and its pupils alone, and the values that mean "as the students".
# With those they change nothing, so that lines from before there were such fields stay valid.
TEACHERS_OWN: dict[str, Any] = {"teacher_steps": 0, "teacher_dropout": -1.0}


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
    too_long: Literal["skip", "cut"]
    train_examples: int
    validation_examples: int
    evaluated_inputs: int
    evaluated_targets: int


@dataclasses.dataclass(frozen=True)
class OptimizerSetting:
    """Optimization settings of every run; ``warmup_fraction`` is relative to its steps."""

    name: OptimizerName
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
    by_parameters: tuple[str, ...]
    distilled: tuple[str, ...]
    answers: tuple[str, ...]
    one_seed: tuple[str, ...]
    vocabulary: int
    vocabulary_bytes: int
    seeds: int
    dropout: float
    evaluations: int
    beams: int
    optimizer: OptimizerSetting
    distill: DistillSetting
    pretrain: PretrainSetting
    columns: tuple[Column, ...]
    teacher_steps: int = TEACHERS_OWN["teacher_steps"]
    teacher_dropout: float = TEACHERS_OWN["teacher_dropout"]

    def identity(self, with_teacher: bool = True) -> dict[str, Any]:
        """Everything that determines finished runs, as plain values.

        Args:
            with_teacher: False for students that learn from gold targets alone, whose runs stay
                valid when the teacher is trained in another way.
        """
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in GROWING}
        for name, as_students in TEACHERS_OWN.items():
            if not with_teacher or values[name] == as_students:
                del values[name]
        return values

    def digest(self, with_teacher: bool = True) -> str:
        """Names the settings of ``identity`` in result rows."""
        return setting_digest(self.identity(with_teacher))


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
    for field, known in (
        ("by_parameters", [row for row in rows if not row.endswith(BY_PARAMETERS)]),
        ("distilled", list(rows)),
        ("answers", list(rows)),
        ("one_seed", list(rows)),
    ):
        if strange := [name for name in getattr(setting, field) if name not in known]:
            raise ConfigError(
                f"config.{field} names {strange[0]!r}; expected some of {', '.join(known)}"
            )
    for field, least in (("seeds", 1), ("evaluations", 1), ("beams", 1)):
        if getattr(setting, field) < least:
            raise ConfigError(
                f"config.{field} is {getattr(setting, field)}; expected {least} or more"
            )
    # One value alone means "as the students", so that equal settings have one identity.
    as_students = TEACHERS_OWN["teacher_dropout"]
    own = setting.teacher_dropout
    if setting.teacher_steps < 0 or not (own == as_students or 0 <= own < 1):
        raise ConfigError(
            f"config.teacher_steps is {setting.teacher_steps} and config.teacher_dropout {own}; "
            "expected 0 or more steps (0: as the students) and a dropout from 0 up to 1 "
            f"({as_students:g}: as the students)"
        )
    if setting.pretrain.steps < 0:
        raise ConfigError(
            f"config.pretrain.steps is {setting.pretrain.steps}; expected 0 (none) or more"
        )
    tasks = [task for column in setting.columns for task in column.tasks]
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise ConfigError(
            f"the task {twice[0]} is {tasks.count(twice[0])} times in config.columns, but its "
            "examples are chosen once, by one column's lengths; leave it out of the others, or "
            "run those with a --workdir of their own"
        )
    for column in setting.columns:
        where = f"config.columns.{column.name}"
        if column.train_file and len(column.tasks) != 1:
            raise ConfigError(
                f"{where}.train_file is {column.train_file!r}, but the column has "
                f"{len(column.tasks)} tasks; expected one"
            )
        if min(column.train_examples, column.validation_examples) < 0:
            raise ConfigError(
                f"{where} has a negative number of examples; expected 0 (all) or more"
            )
        if min(column.evaluated_inputs, column.evaluated_targets) < 0:
            raise ConfigError(
                f"{where} has a negative length; expected 0 (the row's length) or more"
            )
    if not taught(setting):
        return
    teacher = count_parameters(model_of(setting, TEACHER)).total
    for name in taught(setting):
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
    """The students' rows of the table, and the split of each ("" for DEC).

    All match the training FLOPs of the first split; a name that ends in BY_PARAMETERS its
    parameters.
    """
    rows = {DEC: "", **{row_name(split): split for split in setting.splits}}
    if strange := [name for name in rows if name not in PAPER]:
        raise ConfigError(
            f"config.splits gives {strange[0]!r}, which is not in the paper; expected "
            "some of 1/3, 1/2, 2/3"
        )
    return rows | {name + BY_PARAMETERS: rows.get(name, "") for name in setting.by_parameters}


def taught(setting: Setting) -> list[str]:
    """The students that learn from the teacher, in the order of the settings."""
    return list(dict.fromkeys(setting.distilled + setting.answers))


@dataclasses.dataclass(frozen=True)
class Run:
    """One fine-tuning and its evaluation.

    Attributes:
        row: student's name in ``table_rows``, or TEACHER.
        column: name.
        seed: of fine-tuning.
        teaching: one of TEACHING.
    """

    row: str
    column: str
    seed: int = 0
    teaching: str = ""

    @property
    def title(self) -> str:
        """Name of the row in the results: ``ED 2/3-1/3+KD``."""
        return self.row + TEACHING[self.teaching]

    @property
    def with_teacher(self) -> bool:
        """Whether it depends on the teacher's settings."""
        return self.row == TEACHER or bool(self.teaching)


def planned(setting: Setting) -> list[Run]:
    """All fine-tunings, the most telling first.

    Seed 0 of the students that will be taught, in their order; the teacher; their taught
    versions; the other students; then the further seeds.
    """
    headline, columns = taught(setting), [column.name for column in setting.columns]
    others = [row for row in table_rows(setting) if row not in headline]
    teaching = [(row, "draws") for row in setting.distilled]
    teaching += [(row, "answers") for row in setting.answers]
    runs = []
    for seed in range(setting.seeds):
        rows = [row for row in headline + others if not seed or row not in setting.one_seed]
        for part in (headline, others):
            for column in columns:
                runs += [Run(row, column, seed) for row in part if row in rows]
            if part is others or not headline:
                continue
            for column in columns:
                runs += [Run(TEACHER, column)] * (not seed)
                runs += [Run(row, column, seed, how) for row, how in teaching if row in rows]
    return runs


def slug(row: str) -> str:
    """A row's name in paths: ``dec``, ``ed-2of3``, ``dec-parameters``, ``teacher``."""
    if row.endswith(BY_PARAMETERS):
        return slug(row.removesuffix(BY_PARAMETERS)) + "-parameters"
    if row in (DEC, TEACHER):
        return row.lower()
    return series_name(row.removeprefix("ED ").split("-")[0])


def steps_of(setting: Setting, row: str, column: Column) -> int:
    """Steps of a row's fine-tuning on a column."""
    return (setting.teacher_steps if row == TEACHER else 0) or column.steps


def measure_shape(setting: Setting) -> tuple[int, int]:
    """Row lengths, in tokens, at which training FLOPs are equal: pretraining's, or, without any,
    the first column's."""
    shape = setting.pretrain if setting.pretrain.steps else setting.columns[0]
    return shape.inputs, shape.targets


def model_of(setting: Setting, row: str) -> ModelConfig:
    """The model of a row: students match the first split's training FLOPs, or its parameters.

    Raises:
        ConfigError: no such preset, or no model of these FLOPs within 1 %.
    """
    common: dict[str, Any] = {"vocab_size": setting.vocabulary, "scan_layers": False}
    own = row == TEACHER and setting.teacher_dropout >= 0
    if dropout := setting.teacher_dropout if own else setting.dropout:
        # Not on attention probabilities: there it costs a CPU as much as the attention itself.
        common |= {"mlp_dropout": dropout, "residual_dropout": dropout}
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
    by_parameters = row.endswith(BY_PARAMETERS)
    return matched(
        reference,
        series_name(split) if split else DECODER_ONLY,
        split or setting.splits[0],
        "parameters+data" if by_parameters else "flops+data",
        *measure_shape(setting),
    )


def _evaluated(every: int, batch_size: int) -> dict[str, Any]:
    return {
        "eval": {"every": every, "batch_size": batch_size},
        # The best one is what is evaluated.
        "checkpoint": {"every": every, "keep": 1, "keep_best": 1},
    }


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
    every = max(1, steps // setting.evaluations)
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
            "distill": {"teacher": teacher, "alpha": setting.distill.alpha} if teacher else {},
            **(_evaluated(every, batch_size) if eval_records else {}),
        }
    )
