"""Records what the TPU compiler predicts for a few steps: ``python -m tests.hardware.record``.

Run it when a step is meant to have become slower or larger, or with a new compiler, and commit
the file with the reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import sys
import tempfile
from typing import Any

FILE = pathlib.Path(__file__).parent / "recorded.json"
CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "pretrain.py"
_SMALL = ("--inputs_length=256", "--targets_length=128", "--config.batch_size=32")
STEPS: dict[str, tuple[str, ...]] = {
    "micro-8m": (f"--config={CONFIG}:micro-8m", "--topology=v5e:4x4", *_SMALL),
    "micro-8m-dec, state split": (
        f"--config={CONFIG}:micro-8m-dec",
        "--topology=v5e:4x4",
        *_SMALL,
        "--config.mesh.data=1",
        "--config.mesh.fsdp=-1",
        "--config.model_overrides.dtype=bfloat16",
        "--config.model_overrides.remat=attention",
    ),
    # The paper's model with its masks and the MLP's dropout. That on attention's probabilities is
    # off: no fused kernel has it.
    "330m": (
        f"--config={CONFIG}:330m",
        "--topology=v5e:4x4",
        "--rows=16",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=-1",
        "--config.model_overrides.attention_dropout=0.0",
        "--config.model_overrides.remat=dots",
    ),
}
# Of the report: what identifies the step, and what is guarded.
_KEPT = (
    "topology",
    "model",
    "model_overrides",
    "mesh",
    "batch_size",
    "inputs",
    "targets",
    "memory_bytes",
    "compute_seconds",
    "pallas_roofline_seconds",
    "collective_exposed_seconds",
    "step_seconds",
    "mfu",
)


def compiled_report(name: str) -> dict[str, Any]:
    """The report of one of ``STEPS``, compiled now."""
    from encdec.hardware.compile_command import main

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "report.json"
        main([*STEPS[name], f"--out={file}"])
        (report,) = json.loads(file.read_text())
    return report


def read_recorded() -> dict[str, Any]:
    """{"compiler": its version, "steps": a part of the report by name}."""
    return json.loads(FILE.read_text())


def record(names: list[str]) -> None:
    """Compiles the named steps, or all, and writes them into ``FILE`` next to the others'."""
    steps = read_recorded()["steps"] if FILE.exists() else {}
    for name in names or STEPS:
        report = compiled_report(name)
        steps[name] = {key: report[key] for key in _KEPT}
    recorded = {"compiler": importlib.metadata.version("libtpu"), "steps": steps}
    FILE.write_text(json.dumps(recorded, indent=2) + "\n")


if __name__ == "__main__":
    record(sys.argv[1:])
