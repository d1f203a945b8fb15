"""Whether to compile one more program for drafts.

Every size of verifying steps, for every shape of a batch, is a program of seconds to compile, which
a file of some hundred short answers may never earn. So what is spent on compiling is kept below a
small share of the time that decoding takes in all, plus what drafts have saved so far; once steps
were measured, plus a part of what they will save in the batches that are known to follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from encdec.inference.pace import PLAIN, SIZES, Pace

SHARE = 0.02  # of all seconds of decoding: what drafts may cost in the end
# Of the saving that is expected of the batches to follow: what is guessed of costs may be wrong.
TRUSTED = 0.5
FIRST = SIZES[1]  # of a size in the middle the others' costs are told best
VERIFYING = 1.5  # a program of verifying steps takes so many times as long as one of plain ones


class CompileBudget:
    """What compiling for drafts has cost, and what they have saved; seconds.

    Args:
        first_free: the first program is compiled in any case, because drafts were asked for.
    """

    def __init__(self, first_free: bool):
        self.first_free = first_free
        self._decoding = 0.0  # steps of either kind, compiling included
        self._stepping = 0.0  # without
        self._compiling = 0.0  # programs of verifying steps
        self._saved = 0.0
        self._cost: float | None = None  # of one more program
        self._batches = 0
        self._shapes: dict[Hashable, int] = {}  # batches of each
        self._compiled: dict[Hashable, set[int]] = {}
        self.left = 0  # batches that are known to follow

    def programs(self, shape: Hashable) -> BatchPrograms:
        """Of a batch that begins."""
        self._batches += 1
        self._shapes[shape] = self._shapes.get(shape, 0) + 1
        return BatchPrograms(self, shape, self._compiled.setdefault(shape, set()))

    def allows(self, shape: Hashable, gain: float) -> bool:
        """Whether one more program for this shape may be compiled.

        ``gain``: tokens per second with it in those of plain steps, as was measured; 1 where
        nothing was.
        """
        if self._cost is None:
            return False
        usual = self._stepping / max(self._batches, 1)  # of a batch
        total = self._decoding + self.left * usual
        follow = self.left * self._shapes.get(shape, 0) / max(self._batches, 1)
        saving = TRUSTED * follow * usual * (1 - 1 / max(gain, 1.0))
        return self._cost <= SHARE * total + self._saved + saving - self._compiling

    def note(self, size: int, seconds: float, compiled: bool, saved: float) -> None:
        """A call for steps of a size; ``compiled`` while it ran, or what it saved."""
        self._decoding += seconds
        self._stepping += 0.0 if compiled else seconds
        self._saved += 0.0 if compiled else saved
        if compiled and size == PLAIN:
            self._cost = VERIFYING * seconds
        elif compiled:
            self.first_free = False
            self._compiling += seconds
            self._cost = seconds


@dataclasses.dataclass
class BatchPrograms:
    """Programs for a batch's shapes.

    Attributes:
        budget: of all batches.
        shape: of this one.
        compiled: sizes, ``PLAIN`` among them; shared by all batches of this shape.
    """

    budget: CompileBudget
    shape: Hashable
    compiled: set[int]

    def sizes(self, pace: Pace) -> tuple[int, ...]:
        """Of verifying steps: those that are compiled, and those that are worth it: the most
        promising one by what was measured, and any whose cost only a guess tells."""
        missing = [size for size in SIZES if size not in self.compiled]
        if not missing:
            return SIZES
        if self.budget.first_free:
            return (FIRST,)
        best = max(SIZES, key=pace.rate)
        gains = {size: 1.0 for size in missing if not pace.compared(size)}
        if best in missing and pace.compares:
            gains[best] = pace.rate(best)
        worth = [size for size, gain in gains.items() if self.budget.allows(self.shape, gain)]
        return tuple(size for size in SIZES if size in self.compiled or size in worth)

    def note(self, size: int, seconds: float, saved: float = 0.0) -> bool:
        """A call of a size; whether it included compiling."""
        compiled = size not in self.compiled
        self.compiled.add(size)
        self.budget.note(size, seconds, compiled, saved)
        return compiled
