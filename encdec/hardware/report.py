"""The report of a step compiled for a topology: for people, and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from encdec.hardware.compile import CompiledStep

GIB = 2**30
COSTLIEST = 10


def as_json(step: CompiledStep) -> dict[str, Any]:
    """All figures of the report in plain values; units are in the names."""
    prediction, memory, run = step.prediction, step.memory, step.run
    config = run.model_config()
    return {
        "topology": step.topology.name,
        "devices": len(step.topology.devices),
        "mesh": dict(zip(("data", "fsdp", "tensor"), step.mesh)),
        "model": run.model,
        "model_overrides": dict(run.model_overrides),
        "batch_size": run.batch_size,
        "inputs": step.inputs,
        "targets": step.targets,
        "scan_layers": config.scan_layers,
        "remat": config.remat,
        "memory_bytes": {
            "parameters": memory.parameters, "optimizer": memory.optimizer, "batch": memory.batch,
            "temporary": memory.temporary, "outputs": memory.outputs, "code": memory.code,
            "peak": memory.peak, "limit": memory.limit},
        "model_flops": step.model_flops,
        "compute_seconds": prediction.compute_seconds,
        "pallas_roofline_seconds": prediction.pallas_seconds,
        "collective_seconds": prediction.collective_seconds,
        "collective_exposed_seconds": prediction.exposed_seconds,
        "step_seconds": step.step_seconds,
        "tokens_per_second": step.tokens_per_second,
        "mfu": step.mfu,
        "mfu_without_collectives": _mfu_at(step, step.step_seconds - prediction.exposed_seconds),
        "mfu_if_pallas_at_half_roofline": _mfu_at(
            step, step.step_seconds + prediction.pallas_seconds),
        "token_budget": step.tokens,
        "chip_hours": step.chip_hours,
        "collectives": _by_kind(step),
        "costliest": [
            {"name": c.name, "kind": c.kind, "seconds": c.seconds, "times": c.times,
             "source": c.source, "op_name": c.op_name} for c in prediction.costs[:COSTLIEST]],
        "unknown_loops": list(prediction.unknown_loops),
        "operations_without_estimate": prediction.unestimated,
        "unsharded": list(step.unsharded),
        "compile_seconds": step.compile_seconds,
    }


def show(step: CompiledStep, console: Console) -> None:
    """Prints one readable report."""
    run, memory, prediction = step.run, step.memory, step.prediction
    config = run.model_config()
    mesh = " x ".join(f"{name}={n}" for name, n in zip(("data", "fsdp", "tensor"), step.mesh))
    layers = "scanned" if config.scan_layers else "unrolled"
    console.print(
        f"[bold]{escape(run.model)}[/] on {step.topology.name}, {len(step.topology.devices)} "
        f"devices, {mesh}; {run.batch_size} rows of {step.inputs} + {step.targets} tokens; layers "
        f"{layers}, remat {config.remat}; compiled in {step.compile_seconds:.0f} s")
    console.print(_memory_table(memory))
    console.print(_time_table(step))
    if step.prediction.collectives:
        console.print(_collective_table(step))
    table = Table("ms", "times", "operation", "source", title=f"{COSTLIEST} costliest operations")
    for cost in prediction.costs[:COSTLIEST]:
        table.add_row(_ms(cost.seconds), str(cost.times), escape(_short(cost.op_name) or cost.name),
                      escape(cost.source))
    console.print(table)
    for name in prediction.unknown_loops:
        console.print(f"note: the trip count of loop {name} is not known; it counts once")
    if prediction.unestimated:
        listed = ", ".join(f"{n} {kind}" for kind, n in sorted(prediction.unestimated.items()))
        console.print(f"note: executions without an estimate, not counted: {listed}")
    for line in step.unsharded:
        console.print(f"note: {escape(line)}")


def compare(steps: list[CompiledStep], console: Console) -> None:
    """One table over several topologies or settings."""
    table = Table("topology", "model", "rows", "peak GiB", "step ms", "compute", "kernels",
                  "collectives exposed", "tokens/s", "MFU %", "chip-hours", title="Predicted")
    for step in steps:
        p = step.prediction
        table.add_row(
            step.topology.name, step.run.model, str(step.run.batch_size),
            f"{step.memory.peak / GIB:.1f} of {step.memory.limit / GIB:.1f}",
            _ms(step.step_seconds), _ms(p.compute_seconds), _ms(p.pallas_seconds),
            f"{_ms(p.exposed_seconds)} of {_ms(p.collective_seconds)}",
            f"{step.tokens_per_second:,.0f}", f"{100 * step.mfu:.1f}", f"{step.chip_hours:,.0f}")
    console.print(table)


def _memory_table(memory: Any) -> Table:
    table = Table("part", "GiB a device", title="Memory")
    for name in ("parameters", "optimizer", "batch", "temporary", "outputs", "code"):
        label = "activations and gradients" if name == "temporary" else name
        table.add_row(label, f"{getattr(memory, name) / GIB:.3f}")
    table.add_row("peak", f"{memory.peak / GIB:.3f} of {memory.limit / GIB:.2f} "
                  f"({100 * memory.peak / memory.limit:.0f} %)")
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
        ("MFU without collectives",
         f"{100 * _mfu_at(step, step.step_seconds - p.exposed_seconds):.1f} %"),
        ("MFU if kernels reach half their roofline", f"{100 * _mfu_at(step, half):.1f} %"),
        ("tokens/s", f"{step.tokens_per_second:,.0f}"),
        ("token budget", f"{step.tokens / 1e9:,.1f} billion in {step.run.steps:,} steps"),
        ("chip-hours for it", f"{step.chip_hours:,.0f}"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def _collective_table(step: CompiledStep) -> Table:
    table = Table("collective", "count", "MB a device", "ms", "not hidden ms",
                  title="Collectives")
    for kind, row in _by_kind(step).items():
        table.add_row(kind, str(row["count"]), f"{row['bytes'] / 1e6:,.1f}", _ms(row["seconds"]),
                      _ms(row["exposed_seconds"]))
    return table


def _by_kind(step: CompiledStep) -> dict[str, dict[str, float]]:
    kinds: dict[str, dict[str, float]] = {}
    for c in step.prediction.collectives:
        row = kinds.setdefault(f"{c.kind} of {c.group}", {
            "count": 0, "bytes": 0.0, "seconds": 0.0, "exposed_seconds": 0.0})
        row["count"] += 1
        row["bytes"] += c.bytes
        row["seconds"] += c.seconds
        row["exposed_seconds"] += c.exposed_seconds
    return kinds


def _mfu_at(step: CompiledStep, seconds: float) -> float:
    return step.mfu * step.step_seconds / seconds if seconds else 0.0


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _short(op_name: str) -> str:
    """The part of JAX's operation name that tells layers and direction apart."""
    backward = "backward " if "transpose(" in op_name else ""
    parts = [p for p in op_name.split("/") if p not in (
        "while", "body", "closed_call", "checkpoint", "rematted_computation", "layers")]
    return backward + "/".join(parts[-3:])
