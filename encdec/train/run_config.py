"""What a run is: its typed configuration, and every check that needs neither data nor devices.

The defaults below are the recipe of pretraining: the paper's where it states one (AdamW's decay
rates, weight decay, clipping, cosine to 0, batch of 128), ours else. A config file
(``configs/*.py``) returns an ml_collections ``ConfigDict`` of what differs from them;
``complete`` adds the rest, so that each field can be overridden from the command line, and
``parse_config`` turns it into the frozen ``RunConfig`` that the training code reads.
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

Divergence = Literal["forward_kl", "soft_cross_entropy", "reverse_kl", "jensen_shannon"]
AlphaSchedule = Literal["constant", "warmup", "learning_rate"]
Tail = Literal["merged", "dropped"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    records: str = ""  # directory made by `encdec prepare`
    eval_records: str = ""  # the held-out directory; empty: no evaluation
    shuffle: bool = True  # a different order of the rows in every epoch


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, which stands for the rest."""

    data: int = -1  # copies of the model
    fsdp: int = 1  # shards of parameters and optimizer state, each with its own rows
    tensor: int = 1  # shards of heads, MLP and vocabulary, which share their rows
    # When fsdp's shards are gathered: once per step (each device holds the whole model in the
    # compute dtype), or at every use (least memory)
    gather: Literal["step", "use"] = "step"
    # dtype in which gradients are produced and all-reduced; with bfloat16, gathered weights use it
    # too. (Sums over micro-batches are always float32.)
    reduce_dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3  # at the schedule's peak
    weight_decay: float = 0.01  # times the learning rate; matrices only, never norms and biases
    clip_norm: float = 1.0  # global gradient norm; 0 switches clipping off
    b1: float = 0.9  # AdamW: decay of the first moment
    b2: float = 0.98  # AdamW: decay of the second moment
    eps: float = 1e-8  # AdamW: added to the root of the second moment
    momentum: float = 0.95  # Muon: decay of the momentum
    decay_rate: float = 0.8  # Adafactor: second moment decays by 1 - step^-decay_rate
    # Groups with a different learning rate, as in "encoder/*=0.5,*/encoder_attention/*=2": patterns
    # of names with unrolled layers, the last that matches decides; empty: none
    factors: str = ""


@dataclasses.dataclass(frozen=True)
class FreezeConfig:
    """Parameters that are frozen at first, together with their part of the optimizer."""

    # Patterns of names with unrolled layers; the last that matches decides, and "!" excludes, as
    # in "*,!*/encoder_attention/*": all but cross-attention; empty: none
    parameters: str = ""
    steps: float = 0.0  # for how long; below 1: a fraction of the run; 0: the whole run


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Linear warmup, then a decay; fractions are of the peak or of the run, in [0, 1]."""

    name: Literal["cosine", "linear", "rsqrt", "wsd", "constant"] = "cosine"
    warmup_steps: float = 0.01  # up to the peak; below 1: a fraction of the run
    final_fraction: float = 0.0  # of the peak, at the last step (cosine, linear, wsd)
    decay_fraction: float = 0.2  # wsd: the fraction of the run spent decaying linearly


@dataclasses.dataclass(frozen=True)
class LossConfig:
    z_loss: float = 1e-4  # weight of log(sum(exp(logits)))^2, which keeps logits small (PaLM)
    label_smoothing: float = 0.0  # probability spread evenly over the vocabulary
    vocab_tile: int = 0  # vocabulary entries scored at a time; 0: all at once


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The objective is alpha x the teacher's divergence + (1 - alpha) x cross entropy on gold."""

    teacher: str = ""  # directory made by `encdec score` on data.records; empty: no distillation
    loss: Divergence = "forward_kl"  # see encdec/train/distillation_losses.py
    alpha: float = 0.9  # weight of the teacher, in [0, 1]
    alpha_schedule: AlphaSchedule = "constant"  # "warmup" rises, "learning_rate" decays
    warmup_steps: float = 0.0  # of alpha's "warmup" schedule; below 1: a fraction of the run
    temperature: float = 1.0  # of both distributions; as in the stored teacher
    beta: float = 0.5  # jensen_shannon: the teacher's share of the mixture
    tail: Tail = "merged"  # top-k rows: the mass left out is one outcome, or ignored (biased)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    # Steps between evaluations; below 1: a fraction of the run; 0: only after the last step
    every: float = 0.05
    batches: int = 0  # batches evaluated each time; 0: every row once
    batch_size: int = 0  # rows; 0: as many as one training micro-batch
    patience: int = 0  # evaluations without a lower loss after which the run ends; 0: never
    at_start: bool = False  # also before the first step: what a start from other weights gives


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    # Steps between checkpoints; below 1: a fraction of the run; 0: only the last step's, which is
    # always saved
    every: float = 0.05
    keep: int = 2  # newest checkpoints kept; 0 keeps all
    keep_best: int = 0  # also keep this many with the lowest held-out loss; 0: none
    keep_every: int = 0  # also keep each checkpoint whose step is a multiple; 0: none


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    first_step: int = 0  # start a profiler trace at this step; 0: no profile
    steps: int = 5  # steps in the trace


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
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    freeze: FreezeConfig = FreezeConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()

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


# Fields that some choices alone read: with another they keep their defaults. No choices: any value
# of the other field but an empty one or 0.
READ_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "optimizer.b1": ("optimizer.name", ("adamw", "muon")),
    "optimizer.b2": ("optimizer.name", ("adamw", "muon")),
    "optimizer.eps": ("optimizer.name", ("adamw", "muon")),
    "optimizer.momentum": ("optimizer.name", ("muon",)),
    "optimizer.decay_rate": ("optimizer.name", ("adafactor",)),
    "freeze.steps": ("freeze.parameters", ()),
    "schedule.final_fraction": ("schedule.name", ("cosine", "linear", "wsd")),
    "schedule.decay_fraction": ("schedule.name", ("wsd",)),
    "distill.loss": ("distill.teacher", ()),
    "distill.alpha": ("distill.teacher", ()),
    "distill.alpha_schedule": ("distill.teacher", ()),
    "distill.temperature": ("distill.teacher", ()),
    "distill.tail": ("distill.teacher", ()),
    "distill.warmup_steps": ("distill.alpha_schedule", ("warmup",)),
    "distill.beta": ("distill.loss", ("jensen_shannon",)),
    "eval.batches": ("data.eval_records", ()),
    "eval.at_start": ("data.eval_records", ()),
    "eval.batch_size": ("data.eval_records", ()),
    "profile.steps": ("profile.first_step", ()),
}

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
    for name in ("batch_size", "accumulation", "steps", "log_every"):
        require(getattr(run, name) > 0, name, "a positive number")
    require(
        run.batch_size % run.accumulation == 0,
        "batch_size",
        f"a multiple of config.accumulation = {run.accumulation}",
    )
    require(0 <= run.seed < 2**31, "seed", "a number from 0 to 2^31 - 1")
    require(run.profile.steps > 0, "profile.steps", "a positive number")
    _check_read_fields(run, require)
    _check_optimizer(run, require)
    _check_losses(run, require)
    _check_evaluation_and_checkpoints(run, require)
    _check_mesh(run, require)


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


def _check_optimizer(run: RunConfig, require: Require) -> None:
    optimizer, schedule = run.optimizer, run.schedule
    require(optimizer.learning_rate > 0, "optimizer.learning_rate", "a positive number")
    require(optimizer.eps > 0, "optimizer.eps", "a positive number")
    for name in ("weight_decay", "clip_norm"):
        require(getattr(optimizer, name) >= 0, f"optimizer.{name}", "0 (off) or a positive number")
    for name in ("b1", "b2", "momentum"):
        require(0 <= getattr(optimizer, name) < 1, f"optimizer.{name}", "a number in [0, 1)")
    require(0 < optimizer.decay_rate < 1, "optimizer.decay_rate", "a number in (0, 1)")
    require(
        0 <= schedule.warmup_steps < run.steps,
        "schedule.warmup_steps",
        f"0 or more, and less than config.steps = {run.steps}",
    )
    require(
        0 <= run.freeze.steps < run.steps,
        "freeze.steps",
        f"0 (the whole run), or less than config.steps = {run.steps}",
    )
    require(
        schedule.name != "rsqrt" or schedule.warmup_steps > 0,
        "schedule.warmup_steps",
        "1 or more with the rsqrt schedule, whose decay starts from it",
    )
    for name in ("final_fraction", "decay_fraction"):
        require(0 <= getattr(schedule, name) <= 1, f"schedule.{name}", "a fraction in [0, 1]")


def _check_losses(run: RunConfig, require: Require) -> None:
    require(run.loss.z_loss >= 0, "loss.z_loss", "0 (off) or a positive number")
    require(0 <= run.loss.label_smoothing < 1, "loss.label_smoothing", "a number in [0, 1)")
    require(run.loss.vocab_tile >= 0, "loss.vocab_tile", "0 (all at once) or a positive number")
    distill = run.distill
    require(0 <= distill.alpha <= 1, "distill.alpha", "a weight in [0, 1]")
    require(distill.temperature > 0, "distill.temperature", "a positive number")
    require(0 < distill.beta < 1, "distill.beta", "a share between 0 and 1")
    require(
        distill.alpha_schedule != "warmup" or distill.warmup_steps > 0,
        "distill.warmup_steps",
        "1 or more with config.distill.alpha_schedule = 'warmup'",
    )


def _check_evaluation_and_checkpoints(run: RunConfig, require: Require) -> None:
    for name in (
        "distill.warmup_steps",
        "eval.every",
        "eval.batches",
        "eval.batch_size",
        "eval.patience",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.keep_best",
        "checkpoint.keep_every",
        "profile.first_step",
    ):
        require(value_of(run, name) >= 0, name, "0 or a positive number")
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


def _check_mesh(run: RunConfig, require: Require) -> None:
    sizes = (run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    for name, size in zip(("data", "fsdp", "tensor"), sizes):
        require(size == -1 or size > 0, f"mesh.{name}", "a positive number, or -1 for the rest")
    if sizes.count(-1) > 1:
        raise ConfigError(
            f"config.mesh is data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}; "
            "expected -1 on at most one axis"
        )
