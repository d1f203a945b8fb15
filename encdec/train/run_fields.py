"""The groups of a run's fields: meaning, unit and default of each, and what it may be.

The defaults are the recipe of pretraining: the paper's where it states one (AdamW's decay rates,
weight decay, clipping, cosine to 0, batch of 128), ours else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

OptimizerName = Literal["adamw", "adafactor", "muon"]
TeacherLoss = Literal["forward_kl", "soft_cross_entropy", "reverse_kl", "jensen_shannon"]
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
    name: OptimizerName = "adamw"
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
    vocab_tile: int = 0  # vocabulary entries whose logits are computed at a time; 0: all at once


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The objective is alpha x the teacher's divergence + (1 - alpha) x cross entropy on gold."""

    teacher: str = ""  # made by `encdec distill logits` on data.records; empty: no distillation
    loss: TeacherLoss = "forward_kl"  # see encdec/train/distillation_losses.py
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


# The values that a field may have, whatever the others are.
_POSITIVE = "a positive number", lambda value: value > 0
_AT_LEAST_0 = "0 or a positive number", lambda value: value >= 0
_BELOW_1 = "a number in [0, 1)", lambda value: 0 <= value < 1
_UP_TO_1 = "a number in [0, 1]", lambda value: 0 <= value <= 1
_INSIDE = "a number between 0 and 1", lambda value: 0 < value < 1
_DEVICES = "a positive number, or -1 for the rest", lambda value: value == -1 or value > 0
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "batch_size": _POSITIVE,
    "accumulation": _POSITIVE,
    "steps": _POSITIVE,
    "seed": ("a number from 0 to 2^31 - 1", lambda value: 0 <= value < 2**31),
    "log_every": _POSITIVE,
    "mesh.data": _DEVICES,
    "mesh.fsdp": _DEVICES,
    "mesh.tensor": _DEVICES,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.weight_decay": _AT_LEAST_0,
    "optimizer.clip_norm": _AT_LEAST_0,
    "optimizer.b1": _BELOW_1,
    "optimizer.b2": _BELOW_1,
    "optimizer.eps": _POSITIVE,
    "optimizer.momentum": _BELOW_1,
    "optimizer.decay_rate": _INSIDE,
    "schedule.final_fraction": _UP_TO_1,
    "schedule.decay_fraction": _UP_TO_1,
    "loss.z_loss": _AT_LEAST_0,
    "loss.label_smoothing": _BELOW_1,
    "loss.vocab_tile": _AT_LEAST_0,
    "distill.alpha": _UP_TO_1,
    "distill.warmup_steps": _AT_LEAST_0,
    "distill.temperature": _POSITIVE,
    "distill.beta": _INSIDE,
    "eval.every": _AT_LEAST_0,
    "eval.batches": _AT_LEAST_0,
    "eval.batch_size": _AT_LEAST_0,
    "eval.patience": _AT_LEAST_0,
    "checkpoint.every": _AT_LEAST_0,
    "checkpoint.keep": _AT_LEAST_0,
    "checkpoint.keep_best": _AT_LEAST_0,
    "checkpoint.keep_every": _AT_LEAST_0,
    "profile.first_step": _AT_LEAST_0,
    "profile.steps": _POSITIVE,
}

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
