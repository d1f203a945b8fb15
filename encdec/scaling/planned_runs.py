"""The runs of a ladder, fully planned: rows, steps, batch and learning rate of each.

On every rung, which is one size at one budget, the reference is the encoder-decoder of the first
split; its budget gives the rows that it reads, and all other series are matched to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from encdec.cost.flops import ParameterCount, count_parameters, training_flops
from encdec.data.records import DatasetCard
from encdec.errors import ConfigError
from encdec.fields import did_you_mean, merged
from encdec.model import ModelConfig, preset
from encdec.scaling.ladder import BatchRule, Ladder, LearningRateRule
from encdec.scaling.matching import DECODER_ONLY, distilled_name, matched, with_split
from encdec.train.run_config import RunConfig, parse_config, to_dict

FLOPS_TOLERANCE = 0.01
_BYTES_PER_PARAMETER = 16  # float32: master, gradient, and AdamW's two moments


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
        """Training FLOPs, rows counted whole; the teacher's pass over them is not included."""
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
            for name, split in ladder.series()
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
    values = merged(to_dict(RunConfig()), ladder.run)
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
        # Of distilled series; a run without a teacher reads none of it.
        "distill": values["distill"] | {"teacher": run.teacher} if run.teacher else {},
    }
    return parse_config(values)


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
