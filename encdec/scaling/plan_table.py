"""A plan as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from encdec.scaling.compiled import StepFigures
from encdec.scaling.planned_runs import Plan, PlannedRun
from encdec.scaling.results_file import json_value

Figures = Mapping[str, StepFigures]
_GIB = 2**30


def as_json(
    plan: Plan, flops_per_second: float | None = None, figures: Figures | None = None
) -> dict[str, Any]:
    """Every run with its figures, the rungs left out, and the total cost; NaN as null."""
    content = {
        "ladder": dataclasses.asdict(plan.ladder),
        "runs": [_run_json(run, flops_per_second, figures) for run in plan.runs],
        "left_out": list(plan.left_out),
        "flops": plan.flops,
        "hours": plan.flops / flops_per_second / 3600 if flops_per_second else None,
        "chip_hours": chip_hours(plan, figures) if figures else None,
        "do_not_fit": do_not_fit(plan, figures) if figures else None,
    }
    return json_value(content)


def chip_hours(plan: Plan, figures: Figures) -> float:
    """Predicted chip-hours of all runs that fit."""
    return sum(
        figures[run.name].chip_hours(run.steps) for run in plan.runs if not figures[run.name].reason
    )


def do_not_fit(plan: Plan, figures: Figures) -> list[str]:
    return [run.name for run in plan.runs if figures[run.name].reason]


def _run_json(run: PlannedRun, rate: float | None, figures: Figures | None) -> dict[str, Any]:
    count, compiled = run.parameters, None
    if figures:
        step = figures[run.name]
        compiled = dataclasses.asdict(step) | {"chip_hours": step.chip_hours(run.steps)}
    return dataclasses.asdict(run) | {
        "compiled": compiled,
        "rows": run.rows,
        "flops": run.flops,
        "state_bytes": run.state_bytes,
        "parameters": dataclasses.asdict(count) | {"total": count.total},
        "hours": run.flops / rate / 3600 if rate else None,
    }


def show(
    plan: Plan,
    flops_per_second: float | None,
    machine: str,
    console: Console,
    figures: Figures | None = None,
) -> None:
    """Prints all runs and the total cost."""
    ladder = plan.ladder
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("#", "run"):
        table.add_column(name, no_wrap=True)
    headers = [
        "layers",
        "width",
        "MLP",
        "encoder",
        "decoder",
        "embedding",
        "all",
        "source",
        "target",
        "FLOPs",
        "batch",
        "steps",
        "rate",
    ]
    headers += ["peak GiB", "MFU", "chip-hours"] if figures else ["state"]
    headers += [f"{machine} hours"] if flops_per_second else []
    for name in headers:
        table.add_column(name, justify="right", no_wrap=True)
    for number, run in enumerate(plan.runs):
        step = figures[run.name] if figures else None
        table.add_row(str(number), escape(run.name), *_cells(run, flops_per_second, step))
    console.print(table)
    words = "tokens" if ladder.records else "token slots (no records given)"
    console.print(
        f"\n{len(plan.runs)} runs, {short(plan.flops)} training FLOPs; matched: {ladder.match}; "
        f"rows of {ladder.inputs} + {ladder.targets} tokens; source and target are {words}"
        + ("." if figures else "; state is float32 parameters, gradients and AdamW's moments.")
    )
    rule = ladder.learning_rate
    console.print(
        f"Learning rate: {rule.peak:g} x ({rule.reference_width} / width)^{rule.width_exponent:g} "
        f"x (batch / {rule.reference_batch})^{rule.batch_exponent:g}."
    )
    if any(run.teacher for run in plan.runs):
        console.print(
            "Series named with + have a teacher; its training and its logits "
            "(`encdec distill logits --dry_run`) are not in the FLOPs."
        )
    if flops_per_second:
        hours = plan.flops / flops_per_second / 3600
        console.print(
            f"Total cost: {hours:,.2f} {machine} hours at {short(flops_per_second)} model FLOP/s "
            "each, start-up and compilation not included."
        )
    if figures:
        _show_bill(plan, figures, console)
    for text in plan.left_out:
        console.print(f"Left out: {escape(text)}")


def _show_bill(plan: Plan, figures: Figures, console: Console) -> None:
    step = next(iter(figures.values()))
    console.print(
        f"Total cost: {chip_hours(plan, figures):,.2f} chip-hours on {step.topology} ({step.chips} "
        "chips), predicted by compiling every step (see docs/prediction.md for limits); memory is "
        "the peak of one device; evaluations, start-up and compilation not included."
    )
    for name in do_not_fit(plan, figures):
        console.print(
            f"Does not fit, not in the total: {escape(name)}: {escape(figures[name].reason)}"
        )
    if do_not_fit(plan, figures):
        console.print(
            "Shard the parameters (--ladder.run.mesh.fsdp=-1 --ladder.run.mesh.data=1), "
            "or use micro-batches (--ladder.run.accumulation=2)."
        )


def _cells(run: PlannedRun, rate: float | None, step: StepFigures | None) -> list[str]:
    model, count = run.model, run.parameters
    layers = f"{model.encoder_layers}+" * model.is_encoder_decoder + str(model.decoder_layers)
    cells = [
        layers,
        str(model.d_model),
        str(model.mlp_dim),
        short(count.encoder),
        short(count.decoder),
        short(count.embedding + count.head),
        short(count.total),
        short(run.source_tokens),
        short(run.target_tokens),
        short(run.flops),
        str(run.batch_size),
        f"{run.steps:,}",
        f"{run.learning_rate:.2e}",
    ]
    if step is None:
        cells.append(short(run.state_bytes) + "B")
    elif step.reason:
        cells += ["too large", "-", "-"]
    else:
        cells += [
            f"{step.peak_bytes / _GIB:.2f} of {step.limit_bytes / _GIB:.2f}",
            f"{step.mfu:.1%}",
            f"{step.chip_hours(run.steps):,.3g}",
        ]
    return cells + ([f"{run.flops / rate / 3600:,.3g}"] if rate else [])


def short(value: float) -> str:
    """Three digits and a letter: 1.23M; powers of ten beyond T."""
    if value == 0:
        return "0"
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G"), (1e15, "T")):
        if abs(value) < 0.9995 * limit:
            scaled = value / (limit / 1e3)
            return f"{scaled:.3g}{unit}"
    return f"{value:.2e}"
