"""Reports of programs compiled for a topology: for people, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from encdec.cost.flops import count_parameters
from encdec.hardware.compile import (
    PRODUCT_SIDE,
    SUM_SIDE,
    Calibration,
    CompiledProgram,
    CompiledStep,
    PeakMemory,
)
from encdec.hardware.decode import CompiledDecoding
from encdec.hardware.layer import CompiledLayer
from encdec.hardware.search import Searched
from encdec.model.execution import EXECUTION_FIELDS
from encdec.train.run_config import RunConfig
from encdec.train.sharding import MESH_AXES

GIB = 2**30
COSTLIEST = 10
# Contents of the parts of ``PeakMemory``, in the order of the tables.
TRAINING_PARTS = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "batch": "batch",
    "temporary": "activations and gradients",
    "outputs": "outputs",
    "code": "code",
}
DECODING_PARTS = {
    "parameters": "weights",
    "batch": "tokens, and input keys and values",
    "temporary": "activations",
    "outputs": "outputs, and new keys and values",
    "code": "code",
}


def model_name(run: RunConfig) -> str:
    """The preset, with its parameters where overrides make another model of it."""
    if not run.model_overrides.keys() - set(EXECUTION_FIELDS):
        return run.model
    parameters = count_parameters(run.model_config()).total
    return f"{run.model} with other fields ({parameters:,} parameters)"


def as_json(step: CompiledStep) -> dict[str, Any]:
    """All figures of the report in plain values; units are in the names."""
    prediction, run = step.prediction, step.run
    config = run.model_config()
    return {
        "topology": step.topology.name,
        "devices": len(step.topology.devices),
        "chips": step.topology.chips,
        "mesh": dict(zip(MESH_AXES, step.mesh)),
        "model": run.model,
        "model_overrides": dict(run.model_overrides),
        "batch_size": run.batch_size,
        "accumulation": run.accumulation,
        "inputs": step.inputs,
        "targets": step.targets,
        "scan_layers": config.execution.scan_layers,
        "remat": config.execution.remat,
        **_figures(step),
        "model_flops": step.model_flops,
        "step_seconds": step.step_seconds,
        "tokens_per_second": step.tokens_per_second,
        "mfu": step.mfu,
        "mfu_without_collectives": _mfu_at(step, step.step_seconds - prediction.exposed_seconds),
        "mfu_if_pallas_at_half_roofline": _mfu_at(
            step, step.step_seconds + prediction.pallas_seconds
        ),
        "token_budget": step.tokens,
        "chip_hours": step.chip_hours,
        "unsharded": list(step.unsharded),
    }


def searched_as_json(searched: Searched) -> list[dict[str, Any]]:
    """Every variant that fits, the fastest first and marked; it lists those that do not fit."""
    reports = [as_json(step) | {"best": False} for step in searched.steps]
    reports[0] |= {
        "best": True,
        "does_not_fit": [
            {
                "mesh": {name: getattr(run.mesh, name) for name in MESH_AXES},
                "remat": run.model_config().execution.remat,
                "batch_size": run.batch_size,
                "reason": reason,
            }
            for run, reason in searched.unfit
        ],
    }
    return reports


def show(step: CompiledStep, console: Console) -> None:
    """Prints one readable report."""
    run = step.run
    config = run.model_config()
    mesh = _mesh_text(step.mesh)
    layers = "scanned" if config.execution.scan_layers else "unrolled"
    pieces = f" in {run.accumulation} micro-batches" if run.accumulation > 1 else ""
    console.print(
        f"[bold]{escape(model_name(run))}[/] on {step.topology.name}, {len(step.topology.devices)} "
        f"devices, {mesh}; {run.batch_size} rows of {step.inputs} + {step.targets} tokens{pieces}; "
        f"layers {layers}, remat {config.execution.remat}; compiled in {step.compile_seconds:.0f} s"
    )
    console.print(_memory_table({"GiB per device": step.memory}, TRAINING_PARTS))
    console.print(_time_table(step))
    _show_collectives(step, console)
    _show_costs(step, console, title=f"{COSTLIEST} costliest operations")
    for line in step.unsharded:
        console.print(f"note: {escape(line)}")


def compare(steps: list[CompiledStep], console: Console) -> None:
    """One table over several topologies or settings."""
    table = Table(
        "topology",
        "model",
        "rows",
        "peak GiB",
        "step ms",
        "compute",
        "kernels",
        "collectives exposed",
        "tokens/s",
        "MFU %",
        "chip-hours",
        title="Predicted",
    )
    for step in steps:
        p = step.prediction
        table.add_row(
            step.topology.name,
            model_name(step.run),
            str(step.run.batch_size),
            f"{step.memory.peak / GIB:.1f} of {step.memory.limit / GIB:.1f}",
            _ms(step.step_seconds),
            _ms(p.compute_seconds),
            _ms(p.pallas_seconds),
            f"{_ms(p.exposed_seconds)} of {_ms(p.collective_seconds)}",
            f"{step.tokens_per_second:,.0f}",
            f"{100 * step.mfu:.1f}",
            f"{step.chip_hours:,.0f}",
        )
    console.print(table)


def decoding_as_json(decoding: CompiledDecoding) -> dict[str, Any]:
    """All figures of generation's report in plain values; units are in the names."""
    parts = {
        name: _part_as_json(part)
        for name, part in (("prefill", decoding.prefill), ("step", decoding.step))
    }
    return {
        "topology": decoding.topology.name,
        "devices": len(decoding.topology.devices),
        "mesh": dict(zip(MESH_AXES, decoding.mesh)),
        "model": decoding.run.model,
        "model_overrides": dict(decoding.run.model_overrides),
        "rows": decoding.run.batch_size,
        "inputs": decoding.inputs,
        "targets": decoding.targets,
        **parts,
        "prefill_mfu": decoding.prefill_mfu,
        "step_bytes_floor_seconds": decoding.bytes_floor_seconds,
        "tokens_per_second": decoding.tokens_per_second,
        "seconds": decoding.seconds,
        "unsharded": list(decoding.unsharded),
    }


def _part_as_json(part: CompiledProgram) -> dict[str, Any]:
    return {"seconds": part.step_seconds, **_figures(part)}


def _figures(part: CompiledProgram) -> dict[str, Any]:
    """Figures common to all compiled programs."""
    p = part.prediction
    return {
        "memory_bytes": dataclasses.asdict(part.memory) | {"peak": part.memory.peak},
        "compute_seconds": p.compute_seconds,
        "pallas_roofline_seconds": p.pallas_seconds,
        "collective_seconds": p.collective_seconds,
        "collective_exposed_seconds": p.exposed_seconds,
        "collectives": _by_kind(part),
        "costliest": [dataclasses.asdict(cost) for cost in p.costs[:COSTLIEST]],
        "unknown_loops": list(p.unknown_loops),
        "operations_without_estimate": p.unestimated,
        "compile_seconds": part.compile_seconds,
    }


def show_decoding(decoding: CompiledDecoding, console: Console) -> None:
    """Prints generation's report."""
    console.print(
        f"[bold]{escape(model_name(decoding.run))}[/] generating on {decoding.topology.name}, "
        f"{len(decoding.topology.devices)} devices, {_mesh_text(decoding.mesh)}; "
        f"{decoding.run.batch_size} rows of {decoding.inputs} input tokens, at most "
        f"{decoding.targets} new ones"
    )
    parts = {"prefill": decoding.prefill, "a later token": decoding.step}
    console.print(
        _memory_table(
            {f"{name}, GiB per device": part.memory for name, part in parts.items()}, DECODING_PARTS
        )
    )
    table = Table("", "ms", "compute", "kernels", "collectives not hidden", title="Predicted")
    for name, part in parts.items():
        p = part.prediction
        table.add_row(
            name,
            _ms(part.step_seconds),
            _ms(p.compute_seconds),
            _ms(p.pallas_seconds),
            f"{_ms(p.exposed_seconds)} of {_ms(p.collective_seconds)}",
        )
    console.print(table)
    for name, part in parts.items():
        _show_collectives(part, console, f"Collectives of {name}")
    console.print(
        f"prefill at {100 * decoding.prefill_mfu:.1f} % MFU; reading weights, keys and "
        f"values once takes {_ms(decoding.bytes_floor_seconds)} ms of a later token; "
        f"{decoding.tokens_per_second:,.0f} tokens/s, all {decoding.targets} tokens of "
        f"all rows in {decoding.seconds:.3f} s"
    )
    _show_costs(decoding.step, console, title=f"{COSTLIEST} costliest operations of a later token")
    for line in decoding.unsharded:
        console.print(f"note: {escape(line)}")


def compare_decoding(found: list[CompiledDecoding], console: Console) -> None:
    table = Table(
        "topology",
        "model",
        "rows",
        "prefill ms",
        "token ms",
        "tokens/s",
        "tokens/s per chip",
        title="Predicted",
    )
    for one in found:
        table.add_row(
            one.topology.name,
            model_name(one.run),
            str(one.run.batch_size),
            _ms(one.prefill.step_seconds),
            _ms(one.step.step_seconds),
            f"{one.tokens_per_second:,.0f}",
            f"{one.tokens_per_second / one.topology.chips:,.0f}",
        )
    console.print(table)


def layer_as_json(layer: CompiledLayer) -> dict[str, Any]:
    return _part_as_json(layer) | {
        "topology": layer.topology.name,
        "model": layer.run.model,
        "model_overrides": dict(layer.run.model_overrides),
        "rows": layer.rows,
        "length": layer.length,
        "layers": layer.layers,
        "model_flops": layer.model_flops,
        "share_of_peak": layer.share_of_peak,
    }


def show_layer(layer: CompiledLayer, console: Console) -> None:
    console.print(
        f"{layer.topology.name}: {layer.layers} layers of {escape(model_name(layer.run))}, "
        f"forward and backward, {layer.rows} rows of {layer.length} tokens on one chip: "
        f"{_ms(layer.step_seconds)} ms, of which kernels by roofline "
        f"{_ms(layer.prediction.pallas_seconds)}; {100 * layer.share_of_peak:.1f} % of the peak "
        f"rate; {layer.memory.temporary / GIB:.2f} GiB of activations and gradients; compiled in "
        f"{layer.compile_seconds:.0f} s"
    )
    _show_costs(layer, console, title=f"{COSTLIEST} costliest operations")


def compare_layers(found: list[CompiledLayer], console: Console) -> None:
    table = Table("topology", "model", "rows", "ms", "% of peak", title="Predicted")
    for one in found:
        table.add_row(
            one.topology.name,
            model_name(one.run),
            str(one.rows),
            _ms(one.step_seconds),
            f"{100 * one.share_of_peak:.1f}",
        )
    console.print(table)


def calibration_as_json(found: Calibration) -> dict[str, Any]:
    return {
        "topology": found.topology.name,
        "product_side": PRODUCT_SIDE,
        "product_seconds": found.product.step_seconds,
        "share_of_peak": found.share_of_peak,
        "sum_side": SUM_SIDE,
        "sum_seconds": found.sum.step_seconds,
        "share_of_bandwidth": found.share_of_bandwidth,
    }


def show_calibration(found: Calibration, console: Console) -> None:
    console.print(
        f"{found.topology.name}: a bfloat16 product of side {PRODUCT_SIDE} takes "
        f"{_ms(found.product.step_seconds)} ms, {100 * found.share_of_peak:.1f} % of the peak "
        f"rate; the sum of two bfloat16 arrays of side {SUM_SIDE} "
        f"{_ms(found.sum.step_seconds)} ms, {100 * found.share_of_bandwidth:.1f} % of the "
        "memory's rate"
    )


def compare_calibrations(found: list[Calibration], console: Console) -> None:
    table = Table(
        "topology", "product, ms", "% of peak", "sum, ms", "% of memory's rate", title="Calibration"
    )
    for one in found:
        table.add_row(
            one.topology.name,
            _ms(one.product.step_seconds),
            f"{100 * one.share_of_peak:.1f}",
            _ms(one.sum.step_seconds),
            f"{100 * one.share_of_bandwidth:.1f}",
        )
    console.print(table)


def text_of(found: CompiledStep | CompiledDecoding | Calibration) -> str:
    """The compiled program; for generation a later token's, for a calibration the product's."""
    if isinstance(found, Calibration):
        return found.product.text
    return found.step.text if isinstance(found, CompiledDecoding) else found.text


def _show_costs(compiled: CompiledProgram, console: Console, title: str) -> None:
    table = Table("ms", "times", "operation", "source", title=title)
    for cost in compiled.prediction.costs[:COSTLIEST]:
        table.add_row(
            _ms(cost.seconds),
            str(cost.times),
            escape(_short(cost.op_name) or cost.name),
            escape(cost.source),
        )
    console.print(table)
    for name in compiled.prediction.unknown_loops:
        console.print(f"note: the trip count of loop {name} is unknown; it is counted once")
    if unestimated := compiled.prediction.unestimated:
        listed = ", ".join(f"{n} {kind}" for kind, n in sorted(unestimated.items()))
        console.print(f"note: executions without an estimate, not counted: {listed}")


def _memory_table(columns: Mapping[str, PeakMemory], parts: Mapping[str, str]) -> Table:
    """A column for each program, a row for each of the named parts."""
    table = Table("part", *columns, title="Memory")
    for name, label in parts.items():
        table.add_row(label, *(f"{getattr(memory, name) / GIB:.3f}" for memory in columns.values()))
    table.add_row(
        "peak",
        *(
            f"{memory.peak / GIB:.3f} of {memory.limit / GIB:.2f} "
            f"({100 * memory.peak / memory.limit:.0f} %)"
            for memory in columns.values()
        ),
    )
    return table


def _time_table(step: CompiledStep) -> Table:
    p, half = step.prediction, step.step_seconds + step.prediction.pallas_seconds
    table = Table("predicted", "value", title="Time of one step")
    rows = (
        ("computation, by the compiler's cycles", f"{_ms(p.compute_seconds)} ms"),
        ("Pallas kernels, by roofline (optimistic)", f"{_ms(p.pallas_seconds)} ms"),
        ("collectives not hidden", f"{_ms(p.exposed_seconds)} of {_ms(p.collective_seconds)} ms"),
        ("step", f"{_ms(step.step_seconds)} ms"),
        ("model FLOPs", f"{step.model_flops / 1e12:,.1f} TFLOP"),
        ("MFU", f"{100 * step.mfu:.1f} %"),
        (
            "MFU without collectives",
            f"{100 * _mfu_at(step, step.step_seconds - p.exposed_seconds):.1f} %",
        ),
        ("MFU if kernels reach half their roofline", f"{100 * _mfu_at(step, half):.1f} %"),
        ("tokens/s", f"{step.tokens_per_second:,.0f}"),
        ("token budget", f"{step.tokens / 1e9:,.1f} billion in {step.run.steps:,} steps"),
        ("chip-hours for it", f"{step.chip_hours:,.0f}"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def _show_collectives(part: CompiledProgram, console: Console, title: str = "Collectives") -> None:
    if not part.prediction.collectives:
        return
    table = Table("collective", "count", "MB per device", "ms", "not hidden ms", title=title)
    for kind, row in _by_kind(part).items():
        table.add_row(
            kind,
            str(row["count"]),
            f"{row['bytes'] / 1e6:,.1f}",
            _ms(row["seconds"]),
            _ms(row["exposed_seconds"]),
        )
    console.print(table)


def _by_kind(part: CompiledProgram) -> dict[str, dict[str, float]]:
    kinds: dict[str, dict[str, float]] = {}
    for c in part.prediction.collectives:
        row = kinds.setdefault(
            f"{c.kind} of {c.group}",
            {"count": 0, "bytes": 0.0, "seconds": 0.0, "exposed_seconds": 0.0},
        )
        row["count"] += 1
        row["bytes"] += c.bytes
        row["seconds"] += c.seconds
        row["exposed_seconds"] += c.exposed_seconds
    return kinds


def _mesh_text(sizes: tuple[int, ...]) -> str:
    return " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes))


def _mfu_at(step: CompiledStep, seconds: float) -> float:
    return step.mfu * step.step_seconds / seconds if seconds else 0.0


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _short(op_name: str) -> str:
    """The part of JAX's operation name that distinguishes layers and direction."""
    backward = "backward " if "transpose(" in op_name else ""
    parts = [
        p
        for p in op_name.split("/")
        if p not in ("while", "body", "closed_call", "checkpoint", "rematted_computation", "layers")
    ]
    return backward + "/".join(parts[-3:])
