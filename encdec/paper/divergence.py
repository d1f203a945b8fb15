"""Runs that diverge: noted in their result row and shown, never averaged nor repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from encdec.errors import NonFiniteError
from encdec.train.metrics import read_metrics

BITS = "eval/bits_per_byte"


@dataclasses.dataclass
class Divergence:
    """What became of a run.

    Attributes:
        message: why it counts as diverged; None while it does not.
        step: at which that was noted.
        pretraining_step: of the pretraining, if it is what diverged.
    """

    message: str | None = None
    step: int | None = None
    pretraining_step: int | None = None

    def __bool__(self) -> bool:
        return self.message is not None

    def fields(self) -> dict[str, Any]:
        """Of its result row."""
        return {"diverged": self.message, "diverged_step": self.step}


@contextlib.contextmanager
def noting_divergence() -> Iterator[Divergence]:
    """Ends the body at a NaN or an infinity in training, and notes it."""
    noted = Divergence()
    try:
        yield noted
    except NonFiniteError as error:
        noted.message, noted.step = str(error), error.step


def finite_curve(folder: pathlib.Path, noted: Divergence) -> list[tuple[int, float]]:
    """(step, held-out bits per byte) of a run's finite evaluations.

    A run that ended with none is noted as diverged; one that is noted already has no curve.
    """
    if noted:
        return []
    found = [(int(row["step"]), row[BITS]) for row in read_metrics(folder) if BITS in row]
    curve = [(step, bits) for step, bits in found if math.isfinite(bits)]
    if not curve:
        noted.message = f"no evaluation was finite: {found}"
        noted.step = found[-1][0] if found else None
    return curve


def has_diverged(row: Mapping[str, Any]) -> bool:
    """Whether a result row is of a run that diverged."""
    return bool(row.get("diverged"))
