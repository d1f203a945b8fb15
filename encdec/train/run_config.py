"""What a run is: its typed configuration, and every check that needs neither data nor devices.

A config file (``configs/*.py``) returns an ml_collections ``ConfigDict`` of what differs from the
defaults, here and in ``encdec.train.run_fields``; ``complete`` adds the rest, so that each field
can be overridden from the command line, and ``parse_config`` turns it into the frozen
``RunConfig`` that the training code reads.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import ml_collections
from ml_collections import config_dict

from encdec import fields
from encdec.config_files import field_names, read_config_file, with_overrides
from encdec.errors import ConfigError
from encdec.fields import Require, field_types, requirements, value_of
from encdec.model.execution import INFERENCE_FIELDS, ExecutionConfig
from encdec.model.model_config import ModelConfig
from encdec.model.presets import preset, preset_names
from encdec.storage import user_place
from encdec.train.run_fields import (
    RANGES,
    READ_WITH,
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EvalConfig,
    FreezeConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    ProfileConfig,
    ScheduleConfig,
)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run; ``parse_config`` makes one whose numbers of steps are steps.

    Raises:
        ConfigError: from ``parse_config``, before anything is computed or written.
    """

    # Preset, see `encdec describe`; or the directory of a trained or imported model, for its
    # architecture and its parameters together
    model: str = "330m"
    model_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 128  # rows in one optimizer step, over all devices
    accumulation: int = 1  # micro-batches that make up one optimizer step
    steps: int = 100_000  # optimizer steps of the whole run
    seed: int = 0  # of the initial parameters, dropout and the rows' order
    init_from: str = ""  # work directory whose parameters the run starts from; empty: random
    # If the architecture differs from the source's: stop, use the source's instead of the preset's,
    # or keep the run's (for example with a longer context)
    init_architecture: Literal["refuse", "source", "run"] = "refuse"
    # Parameters that may be initialized randomly, or dropped from the source: patterns of names
    # with unrolled layers, as in "encoder/*,*/layers_3/*"; empty: none
    init_partial: str = ""
    init_grow: bool = False  # randomly initialize rows that the source's vocabulary tables lack
    log_every: int = 50  # steps between two lines of metrics
    trackers: str = ""  # further writers of metrics: "wandb", "mlflow" or "wandb,mlflow"
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    freeze: FreezeConfig = dataclasses.field(default_factory=FreezeConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)

    def model_config(self) -> ModelConfig:
        """The preset with its overrides.

        Raises:
            ConfigError: a directory that ``warm_start.with_source_model`` has not read.
        """
        if is_directory(self.model) and "architecture" not in self.model_overrides:
            raise ConfigError(
                f"config.model={self.model} is a model's directory, which only training can use; "
                "name a preset"
            )
        return self.base_model().replace(**self.model_overrides)

    def base_model(self) -> ModelConfig:
        """What ``model_overrides`` change."""
        return ModelConfig() if is_directory(self.model) else preset(self.model)

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // self.accumulation


# Numbers of steps that may be given as a part of the run, below 1; ``parse_config`` turns them into
# steps, so that a shorter run is one with another ``config.steps``.
PARTS_OF_THE_RUN = (
    "schedule.warmup_steps",
    "freeze.steps",
    "distill.warmup_steps",
    "eval.every",
    "checkpoint.every",
)

# Fields that may change when a run is continued: they say where and how it runs and what it
# reports, not which function of the data it computes. Records and teachers are compared by
# content instead.
OPERATIONAL = (
    "data.records",
    "data.eval_records",
    "distill.teacher",
    "log_every",
    "trackers",
    "loss.vocab_tile",
    "mesh.",
    "eval.",
    "checkpoint.",
    "profile.",
)


WHAT = "the run's configuration"  # in messages


def parse_config(config: RunConfig | Mapping[str, Any] | ml_collections.ConfigDict) -> RunConfig:
    """Checks a run's configuration and freezes it.

    Raises:
        ConfigError: unknown field (naming the nearest), wrong type, or a value out of range.
    """
    if isinstance(config, RunConfig):
        config = to_dict(config)
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    overrides = config.get("model_overrides")
    if isinstance(overrides, Mapping):
        set_ones = {k: v for k, v in overrides.items() if v is not None}
        for name in set_ones.keys() & {*INFERENCE_FIELDS, "kernel_parts"}:
            raise unknown_field(f"model_overrides.{name}", [])
        config = {**config, "model_overrides": set_ones}
    run = fields.build(RunConfig, config, label="config", what=WHAT)
    run = _with_paths(_in_steps(_from_directory(run)))
    _check_values(run)
    if not is_directory(run.model):
        run.model_config()
    return run


def is_directory(model: str) -> bool:
    """Whether ``config.model`` names a model's directory instead of a preset."""
    return model not in preset_names() and (os.sep in model or os.path.isdir(model))


def _from_directory(run: RunConfig) -> RunConfig:
    """The run with ``config.model=DIR`` spelled out: where it starts from, and as what."""
    if not is_directory(run.model):
        return run
    place = user_place("config.model", run.model)
    if run.init_from not in ("", run.model, place):
        raise ConfigError(
            f"config.model={run.model} is a model's directory, from which the run starts, but "
            f"config.init_from is {run.init_from}; give one of them"
        )
    if run.init_architecture == "run":
        raise ConfigError(
            f"config.model={run.model} uses that model's architecture, but "
            "config.init_architecture is 'run'; leave one of them out"
        )
    return dataclasses.replace(run, model=place, init_from=place, init_architecture="source")


def _with_paths(run: RunConfig) -> RunConfig:
    """The run with ``~`` expanded; records expand theirs when they are opened, part by part."""
    if run.init_from:
        run = dataclasses.replace(run, init_from=user_place("config.init_from", run.init_from))
    if run.distill.teacher:
        teacher = user_place("config.distill.teacher", run.distill.teacher)
        run = dataclasses.replace(run, distill=dataclasses.replace(run.distill, teacher=teacher))
    return run


def _in_steps(run: RunConfig) -> RunConfig:
    """The run with numbers of steps in place of parts of the run."""
    changes: dict[str, dict[str, int]] = {}
    for name in PARTS_OF_THE_RUN:
        value = value_of(run, name)
        if 0 < value < 1:
            value = max(1, round(value * run.steps))
        elif value != int(value):
            raise ConfigError(
                f"config.{name} is {value!r}; expected a whole number of steps, or a fraction of "
                "the run between 0 and 1"
            )
        group, field = name.split(".")
        changes.setdefault(group, {})[field] = int(value)
    # A warmup of one step in a run of one would leave none to decay in.
    if 0 < run.schedule.warmup_steps < 1:
        warmup = min(changes["schedule"]["warmup_steps"], run.steps - 1)
        changes["schedule"]["warmup_steps"] = warmup
    groups = {
        group: dataclasses.replace(getattr(run, group), **values)
        for group, values in changes.items()
    }
    return dataclasses.replace(run, **groups)


def to_dict(run: RunConfig) -> dict[str, Any]:
    """Nested plain values, the inverse of ``parse_config``."""
    return dataclasses.asdict(run)


def load_config(source: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The ConfigDict of ``FILE.py[:ARGUMENT]`` with all fields present and overrides applied.

    Raises:
        ConfigError: no such file, a file without ``get_config``, an unknown field (naming the
            nearest), or a value that is not of the field's type.
    """
    return with_overrides(complete(read_config_file(source)), overrides, unknown_field)


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Adds the fields that a config file left out, so that each can be overridden.

    Every field of ModelConfig and of its ExecutionConfig appears under ``model_overrides``, but
    for those that inference chooses; None means the preset's value.
    """
    full = ml_collections.ConfigDict(to_dict(RunConfig()))
    for name, hint in {**field_types(ModelConfig), **field_types(ExecutionConfig)}.items():
        if name != "execution" and name not in INFERENCE_FIELDS:
            kind = type(get_args(hint)[0]) if get_args(hint) else hint
            full.model_overrides[name] = config_dict.placeholder(kind)
    _check_names(config.to_dict(), full)
    try:
        full.update(config)
    except TypeError as error:
        raise ConfigError(f"config file: {error}") from None
    return full


def unknown_field(name: str, names: Sequence[str]) -> ConfigError:
    """The error for a field that a run does not have, with the nearest that it has."""
    if name.rsplit(".", 1)[-1] in (*INFERENCE_FIELDS, "kernel_parts"):
        return ConfigError(
            f"the run's configuration has no field {name!r}: inference chooses it for its machine; "
            "leave it out"
        )
    return fields.unknown_field(name, names, WHAT)


def _check_names(values: Mapping[str, Any], full: ml_collections.ConfigDict) -> None:
    names = field_names(full)

    def visit(group: Mapping[str, Any], prefix: str) -> None:
        for key, value in group.items():
            if prefix + key not in names:
                raise unknown_field(prefix + key, names)
            if isinstance(value, Mapping):
                visit(value, f"{prefix}{key}.")

    visit(values, "")


def _check_values(run: RunConfig) -> None:
    require = requirements(run, "config.")
    for name, (expected, allowed) in RANGES.items():
        require(allowed(value_of(run, name)), name, expected)
    require(
        run.batch_size % run.accumulation == 0,
        "batch_size",
        f"a multiple of config.accumulation = {run.accumulation}",
    )
    # Over the kept ids alone it is least where they have 1/e of the student's mass.
    require(
        run.distill.loss != "reverse_kl" or run.distill.tail == "merged",
        "distill.tail",
        "'merged' with config.distill.loss = 'reverse_kl', which rewards a student for mass on ids "
        "that a dropped tail leaves out",
    )
    _check_read_fields(run, require)
    _check_schedules(run, require)
    _check_evaluation_and_checkpoints(run, require)
    sizes = (run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    if sizes.count(-1) > 1:
        raise ConfigError(
            f"config.mesh is data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}; "
            "expected -1 on at most one axis"
        )


def _check_read_fields(run: RunConfig, require: Require) -> None:
    """Fields that another one makes read have their defaults where it does not."""
    for name in ("init_architecture", "init_partial", "init_grow"):
        require(
            bool(run.init_from) or getattr(run, name) == getattr(RunConfig(), name),
            name,
            f"{getattr(RunConfig(), name)!r} without config.init_from",
        )
    for name, (other, choices) in READ_WITH.items():
        seen = value_of(run, other)
        used = seen in choices if choices else bool(seen)
        default = value_of(RunConfig(), name)
        reader = f"config.{other} = {' or '.join(map(repr, choices))}" if choices else ""
        require(
            used or value_of(run, name) == default,
            name,
            f"{default!r} without {reader or f'config.{other} set'}, which alone reads it",
        )


def _check_schedules(run: RunConfig, require: Require) -> None:
    schedule, distill = run.schedule, run.distill
    require(
        0 <= schedule.warmup_steps < run.steps,
        "schedule.warmup_steps",
        f"0 or more, and less than config.steps = {run.steps}",
    )
    require(
        schedule.name != "rsqrt" or schedule.warmup_steps > 0,
        "schedule.warmup_steps",
        "1 or more with the rsqrt schedule, whose decay starts from it",
    )
    require(
        0 <= run.freeze.steps < run.steps,
        "freeze.steps",
        f"0 (the whole run), or less than config.steps = {run.steps}",
    )
    require(
        distill.alpha_schedule != "warmup" or distill.warmup_steps > 0,
        "distill.warmup_steps",
        "1 or more with config.distill.alpha_schedule = 'warmup'",
    )


def _check_evaluation_and_checkpoints(run: RunConfig, require: Require) -> None:
    require(
        not run.eval.patience or bool(run.eval.every and run.data.eval_records),
        "eval.patience",
        "0, or config.eval.every together with config.data.eval_records",
    )
    keeps_best = run.checkpoint.keep_best or not run.checkpoint.keep
    require(
        not run.checkpoint.keep_best
        or bool(run.eval.every and run.checkpoint.every and run.data.eval_records)
        and run.checkpoint.every % run.eval.every == 0,
        "checkpoint.keep_best",
        "0, or config.data.eval_records with config.checkpoint.every a multiple of "
        f"config.eval.every = {run.eval.every}, so that checkpoints have a held-out loss",
    )
    # The best of them is `patience` evaluations old when the run ends.
    require(
        not run.eval.patience
        or not run.checkpoint.keep
        or run.checkpoint.every == run.eval.every
        and (bool(keeps_best) or run.checkpoint.keep > run.eval.patience),
        "checkpoint.keep",
        f"0 (all), or more than config.eval.patience = {run.eval.patience}, or "
        "config.checkpoint.keep_best, with config.checkpoint.every equal to "
        "config.eval.every, so that the best is kept",
    )
