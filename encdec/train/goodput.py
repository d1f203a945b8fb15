"""Where a run's wall time went, over all the processes that have worked on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

# What a process does other than steps: up to its first step's end, evaluations, waiting for saves.
PARTS = ("step", "startup", "evaluation", "checkpoint")


class Goodput:
    """Seconds by what they were spent on.

    Wall time runs from the run's first start, so that pauses between processes are in it. Steps
    that were done again after a crash count once: what an ended process spent is taken from its
    reports up to the step that is resumed from, and the rest is lost.
    """

    def __init__(
        self,
        entered: float,
        started: float,
        before: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """
        Args:
            entered: unix time at which this process began.
            started: unix time of the run's first start.
            before: the report of an earlier process up to the step that is resumed from.
            clock: gives unix time.
        """
        self._entered, self._started, self._clock = entered, min(entered, started), clock
        self._seconds = {part: (before or {}).get(f"goodput/{part}_seconds", 0.0) for part in PARTS}
        self._before = sum(self._seconds.values())

    def add(self, part: str, seconds: float) -> None:
        self._seconds[part] += seconds

    def started_up(self) -> None:
        """Called once, when the first step has ended: all but what is known was startup."""
        here = sum(self._seconds.values()) - self._before
        self.add("startup", max(0.0, self._clock() - self._entered - here))

    def report(self) -> dict[str, float]:
        """``goodput/share`` of wall time spent in steps that stand, and seconds by part.

        A step's seconds include any waiting for input.
        """
        wall = max(self._clock() - self._started, 1e-9)
        lost = max(0.0, wall - sum(self._seconds.values()))
        parts = {f"goodput/{part}_seconds": seconds for part, seconds in self._seconds.items()}
        return {
            "goodput/share": self._seconds["step"] / wall,
            **parts,
            "goodput/lost_seconds": lost,
        }


def last_report(rows: Iterable[Mapping[str, float]], step: int) -> Mapping[str, float] | None:
    """The last row of ``metrics.jsonl`` with a report of goodput, up to ``step``."""
    found = [row for row in rows if "goodput/share" in row and row["step"] <= step]
    return found[-1] if found else None
