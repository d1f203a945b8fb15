"""What the quickstart's models learn, and how long each part of it takes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class QuickTask:
    """What the models learn.

    Attributes:
        task: its name, see ``encdec data list``.
        does: what a model does with a function, for headings.
        inputs, targets: row lengths, tokens. Attention between the packed functions of a row is
            masked but computed, so rows are as short as the longest functions allow.
        batch_size: rows of an optimizer step; small, because a short run needs many steps.
        steps: optimizer steps of each model.
        new_tokens: longest answer.
        metrics: of the table, the first for the ratios.
        held_out: functions that are answered, from the first.
    """

    task: str
    does: str
    inputs: int
    targets: int
    batch_size: int
    steps: int
    new_tokens: int
    metrics: tuple[str, ...]
    held_out: int


TASKS = {
    # Answers depend on every token of the source, so a small model shows what it has learned.
    "repair": QuickTask(
        "stdlib_repair",
        "repairs of faulty functions",
        96,
        96,
        16,
        650,
        96,
        ("exact_match", "rougeL"),
        300,
    ),
    # About one function in seven is shortened.
    "summaries": QuickTask(
        "stdlib_code_summarization",
        "summaries of functions",
        256,
        48,
        8,
        600,
        32,
        ("rougeL_stemmed",),  # as in published summarization
        300,
    ),
}
TRY = {  # as printf takes it
    "repair": "'function add(this, number):\\n    this.total =+ number\\n'",
    "summaries": "'def add(a, b):\\n    return a + b\\n'",
}
# Seconds of each part on two cores of an AMD EPYC (Zen 5), whose float32 products reach
# REFERENCE_RATE: the trainings as measured, the other parts so that the sum is the measured run's
# 6.4 minutes (docs/quickstart.md). TRAINED grow with the steps.
REFERENCE_RATE = 463e9
REFERENCE_SECONDS = {
    "data": 30.0,
    "two trainings": 159.0,
    "distillation": 95.0,
    "answers": 48.0,
    "timings": 52.0,
}
TRAINED = ("two trainings", "distillation")


def plan_text(task: QuickTask, rate: float) -> str:
    """How long each part will take on a machine with this rate of float32 products, in FLOP/s."""
    slower = REFERENCE_RATE / rate
    steps = task.steps / TASKS["repair"].steps
    parts = {
        name: slower * seconds * (steps if name in TRAINED else 1)
        for name, seconds in REFERENCE_SECONDS.items()
    }
    return (
        f"float32 products here: {rate / 1e9:,.0f} GFLOP/s. Expected: "
        + ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in parts.items())
        + f"; about {sum(parts.values()) / 60:.1f} minutes in all if nothing else runs"
    )
