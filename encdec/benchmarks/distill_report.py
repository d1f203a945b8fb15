"""The experiment's table, pictures and JSON, from whatever runs are finished."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from encdec.benchmarks.distill_experiment import (
    CE,
    SAMPLED,
    DistillExperiment,
    folder_of,
    step_ratios,
    variants,
)
from encdec.benchmarks.distill_gradients import GradientError, gradient_errors
from encdec.data.teacher_rows import read_teacher_card
from encdec.figures import new_figure
from encdec.files import write_json
from encdec.markup import markdown_table

GRADIENTS_FILE, RATIOS_FILE = "gradients.json", "step_ratios.json"


def write_report(
    setting: DistillExperiment, say: Callable[[str], None], images: pathlib.Path
) -> str:
    """Measures step times and gradients if that is not done, draws, and returns the table."""
    results = json.loads((setting.work / "results.json").read_text())
    ratios = _kept(setting.work / RATIOS_FILE, lambda: _ratios(setting, say))
    for row in results["students"]:
        row["step_ratio"] = ratios.get(row["name"])
    student = folder_of(setting, CE, 0)

    def measure() -> list[dict[str, Any]]:
        say("gradients with draws and with top-k rows, compared with full distributions")
        return [
            dataclasses.asdict(error)
            for error in gradient_errors(student, setting.work / "teacher", setting.records)
        ]

    gradients = _kept(setting.work / GRADIENTS_FILE, measure)
    write_json(setting.work / "report.json", results | {"gradients": gradients})
    images.mkdir(parents=True, exist_ok=True)
    draw_students(results, images / "distillation-students.png")
    draw_gradients(
        [GradientError(**error) for error in gradients], images / "distillation-gradients.png"
    )
    return table(results)


def _ratios(setting: DistillExperiment, say: Callable[[str], None]) -> dict[str, float]:
    say("step times, alternating")
    card = read_teacher_card(setting.work / "scored" / SAMPLED.store)
    kinds = [
        variant
        for variant in variants(card.pairs / card.tokens)
        if not variant.method or (setting.work / "scored" / variant.store).is_dir()
    ]
    return step_ratios(setting, kinds)


def _kept(path: pathlib.Path, measure: Callable[[], Any]) -> Any:
    """A file's content; if the file is missing, it is measured and written first."""
    if not path.is_file():
        write_json(path, measure())
    return json.loads(path.read_text())


def table(results: Mapping[str, Any]) -> str:
    """Markdown: one line for each kind of student, means over seeds with standard deviations."""
    baseline = results["students"][0]["loss"]
    rows = []
    for row in results["students"]:
        size = f"{row['bytes_per_token']:,.1f}" if "bytes_per_token" in row else "0"
        ratio = f"{row['step_ratio']:.2f}" if row.get("step_ratio") else ""
        values = (_pm(row, "loss", 4), f"{row['loss'] / baseline - 1:+.2%}", _pm(row, "ece", 4))
        rows.append((row["name"], str(row["seeds"]), *values, size, ratio))
    teacher = results["teacher"]
    name = f"the teacher, {teacher['parameters']:,} parameters"
    ahead = f"{teacher['loss'] / baseline - 1:+.2%}"
    rows.append((name, "1", f"{teacher['loss']:.4f}", ahead, f"{teacher['ece']:.4f}", "", ""))
    head = (
        "student",
        "seeds",
        "held-out loss",
        "against CE",
        "ECE",
        "bytes per token",
        "step time",
    )
    return "\n".join(markdown_table(head, rows))


def _pm(row: Mapping[str, Any], name: str, digits: int) -> str:
    spread = row.get(f"{name}_std")
    text = f"{row[name]:.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def draw_students(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Held-out loss and calibration error of every student, one point per seed."""
    rows = results["students"]
    figure, axes = new_figure((8.0, 0.9 + 0.36 * len(rows)), 2)
    for axis, name, label in zip(
        axes,
        ("loss", "ece"),
        ("held-out loss, nats per target token", "expected calibration error"),
    ):
        for place, row in enumerate(rows):
            axis.plot(
                [run[name] for run in row["runs"]],
                [place] * len(row["runs"]),
                "o",
                color="#56B4E9",
                markersize=4,
                alpha=0.8,
            )
            axis.plot([row[name]], [place], "D", color="#0072B2", markersize=6)
        axis.set_xlabel(label)
        axis.set_ylim(len(rows) - 0.5, -0.5)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[1].set_yticks(range(len(rows)), [""] * len(rows))
    figure.savefig(path, dpi=150)


_LOOKS = {
    "draws": ("#0072B2", "o", "-"),
    "top-k": ("#D55E00", "s", "--"),
    "top-k, tail merged": ("#009E73", "^", "-."),
}


def draw_gradients(errors: Sequence[GradientError], path: pathlib.Path) -> None:
    """Angle and norm of each format's gradient against its bytes."""
    figure, axes = new_figure((8.0, 3.3), 2)
    for kind, (colour, marker, line) in _LOOKS.items():
        found = [error for error in errors if error.kind == kind]
        size = [error.bytes_per_token for error in found]
        for axis, name in zip(axes, ("angle", "norm_ratio")):
            values = [getattr(error, name) for error in found]
            axis.plot(size, values, color=colour, marker=marker, linestyle=line, label=kind)
            for error, x, y in zip(found, size, values):
                if name == "angle":
                    axis.annotate(
                        str(error.size),
                        (x, y),
                        textcoords="offset points",
                        xytext=(3, 4),
                        fontsize=7,
                        color=colour,
                    )
    axes[0].set_ylabel("degrees from the full gradient")
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylabel("norm relative to the full gradient")
    axes[1].axhline(1, color="#888888", linewidth=0.8)
    for axis in axes:
        axis.set_xlabel(
            "bytes per token (numbers: N or k)" if axis is axes[0] else "bytes per token"
        )
    axes[1].legend()
    figure.savefig(path, dpi=150)
