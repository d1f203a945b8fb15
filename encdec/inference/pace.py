"""How many tokens to verify per step, from how often drafts were right and how long steps took."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence

import numpy as np

PLAIN = 1
# Of verifying steps; each is a compiled program. XLA's products on CPUs with AVX-512 take five rows
# at a time: the sixth begins another pass through the kernel (docs/edge.md, "A few rows").
SIZES = (2, 5, 10)
LONGEST_DRAFT = SIZES[-1] - 1
# A step of k tokens is taken to cost this much more for each of the others until one was timed:
# the 330M model on two CPU cores.
GUESSED_COST = 0.06
GAIN = 1.05  # that drafting must promise to begin
KEPT_GAIN = 1.02  # and to continue: a time that is a little off changes nothing
BETTER = 1.03  # another size must promise that much more than the one in use
NEWEST = 0.5  # weight of what the last steps say of drafts
MOST_SKIPPED = 31  # looks at what drafts would give, while that is too little
TIMED = 9  # the last comparisons of a size that count
# Times that drafts are verified before a plain step is timed again: few at first, when a single
# comparison decides, then twice as many each time.
FIRST_RETIMED, RETIMED = 3, 24
SURE, HOPELESS = 3, 0.7  # a size that so many comparisons say gives so little is not tried again


class Pace:
    """Chooses between plain steps and verifying steps of each size, by tokens per second.

    Args:
        rows: of the batch; each pays for its drafted tokens.
        eager: draft before anything is known.
    """

    def __init__(self, rows: int, eager: bool):
        self._rows, self._eager = rows, eager
        self._size = PLAIN  # in use
        # What a step of each size cost in those of a plain one: each ratio is of two calls that
        # came one after the other, so that a machine that is busier later distorts none.
        self._ratios: dict[int, collections.deque[float]] = {}
        self._waiting: dict[int, float] = {}  # last times of sizes that no plain one followed yet
        self._plain: float | None = None  # seconds of a plain step, if the last call made some
        self._drafting = 0  # times that drafts were verified since a plain step
        self._retimed = FIRST_RETIMED
        self._turns = itertools.cycle(SIZES)
        self._seen: set[int] = set()
        self._known: set[int] = set()  # sizes that were timed
        self.trial = False  # the size that was asked for last is only to be timed: few steps do
        self.shares: np.ndarray | None = None  # how often the first j of a draft are right
        # A batch ends with its slowest row: what of the rows' mean gain the batch has.
        self._together = 1.0
        self._again = False  # hindsight says that it may be time to try drafts again
        self._skip = self._skipped = 0
        # Of all verifying steps, each row counted: how many, tokens drafted, tokens kept of them.
        self.steps = self.drafted = self.accepted = 0

    def looks(self) -> bool:
        """Whether to find out again what drafts would give, while nothing is drafted.

        To be asked after plain steps: the more often the answer changed nothing, the longer it
        takes until it is wanted again, in whatever batch.
        """
        self._skipped += 1
        if self._skipped <= self._skip:
            return False
        self._skipped, self._skip = 0, min(2 * self._skip + 1, MOST_SKIPPED)
        return True

    def tokens(self, size: int) -> float:
        """Expected of a step, in the row that a batch waits for."""
        if self.shares is None:
            return 1.0
        return 1.0 + self._together * float(self.shares[1:size].sum())

    def rate(self, size: int) -> float:
        """Tokens per second that are expected of a size, in those of plain steps."""
        return self.tokens(size) / self._cost(size)

    def size(self, sizes: Sequence[int] = SIZES) -> int:
        """Tokens that the next steps should feed: ``PLAIN`` or one of ``sizes``."""
        self.trial = False
        if self.shares is None:
            return sizes[0] if self._eager and sizes else PLAIN
        again, self._again = self._again, False
        if not sizes:
            return PLAIN
        if self._size not in sizes:
            self._size = PLAIN
        if any(size not in self._ratios for size in self._known - {PLAIN}):
            self.trial = True
            return PLAIN  # nothing else tells whether drafting pays
        if self._drafting >= self._retimed:
            self.trial = True
            return PLAIN  # nor whether it still does
        if self._eager and not self._ratios and self.tokens(sizes[0]) > GAIN:
            self.trial = True
            return sizes[0]  # until now only its compiling was; with many rows guesses rule it out
        rates = {size: self.rate(size) for size in (PLAIN, *sizes)}
        if self._size != PLAIN and self._plain is not None and (other := self._other(rates)):
            self.trial = True
            return other
        best = max(sizes, key=rates.__getitem__)
        if self._size != PLAIN and rates[best] < BETTER * rates[self._size]:
            best = self._size
        if rates[best] <= (GAIN if self._size == PLAIN else KEPT_GAIN) * rates[PLAIN]:
            self._size, self._retimed, self.trial = PLAIN, FIRST_RETIMED, again
            return best if again else PLAIN
        self._size = best
        self._skip = 0  # from now on, looks may change something
        self.trial = not self.knows(best)
        return best

    def _other(self, rates: dict[int, float]) -> int | None:
        """A size that is not in use, to be timed next to the plain step that just was."""
        for size in itertools.islice(self._turns, len(SIZES)):
            sure = len(self._ratios.get(size, ())) >= SURE
            if size not in rates or size == self._size:
                continue
            if not (sure and rates[size] < HOPELESS * rates[self._size]):
                return size
        return None

    def knows(self, size: int) -> bool:
        """Whether steps of this size were timed."""
        return size in self._known

    def compared(self, size: int) -> bool:
        """Whether its cost was measured."""
        return size in self._ratios

    @property
    def compares(self) -> bool:
        """Whether any was."""
        return bool(self._ratios)

    def _cost(self, size: int) -> float:
        """Of a step, in those of a plain one."""
        if size == PLAIN:
            return 1.0
        if not self._ratios:
            return 1 + GUESSED_COST * (size - 1) * self._rows
        # What one size costs tells better than a guess what others do.
        timed = min(self._ratios, key=lambda other: abs(other - size))
        ratios = sorted(self._ratios[timed])
        # The median, of two the lower. Not the least: it falls with every time that is taken.
        usual = ratios[(len(ratios) - 1) // 2]
        return usual if timed == size else 1 + max(0.0, usual - 1) * (size - 1) / (timed - 1)

    def note_compiled(self) -> None:
        """All programs are compiled, so that the first time of each counts, too."""
        self._seen.update((PLAIN, *SIZES))

    def note_seconds(self, size: int, seconds: float) -> None:
        """How long a step took, on average of some; a size's first time is its compiling's."""
        if size == PLAIN and self._drafting:
            self._drafting, self._retimed = 0, min(2 * self._retimed, RETIMED)
        self._drafting += size != PLAIN
        plain, self._plain = self._plain, None
        if size not in self._seen:
            self._seen.add(size)
            return
        self._known.add(size)
        if size == PLAIN:
            self._plain = seconds
            for other, taken in self._waiting.items():
                self._compare(other, taken, seconds)
            self._waiting.clear()
        elif plain is None:
            self._waiting[size] = seconds
        else:
            self._compare(size, seconds, plain)

    def _compare(self, size: int, seconds: float, plain: float) -> None:
        ratios = self._ratios.setdefault(size, collections.deque(maxlen=TIMED))
        ratios.append(seconds / max(plain, 1e-9))

    def note_compiling(self, size: int) -> None:
        """Steps of this size were made, in a time that says nothing: a program was compiled."""
        self._seen.add(size)
        self._plain = None

    def saved(self, size: int, seconds: float) -> float:
        """Seconds that verifying steps of so many seconds saved; 0 while nothing tells."""
        if size not in self._ratios:
            return 0.0
        return seconds * (self.rate(size) - 1)

    def note_batch(self, mean: float, slowest: float) -> None:
        """Tokens of a verifying step in a batch that has ended: in the mean over its rows, and as
        those plain steps tell that it would have taken otherwise."""
        if mean > GAIN:
            share = min(max((slowest - 1) / (mean - 1), 0.0), 1.0)
            self._together += NEWEST * (share - self._together)

    def note_made(self, made_K: np.ndarray) -> None:
        """How many rows and steps gave more than j tokens, by j."""
        if not made_K[0]:
            return
        self.steps += int(made_K[0])
        self.drafted += int(made_K[0]) * (len(made_K) - 1)
        self.accepted += int(made_K[1:].sum())
        shares = list(made_K / made_K[0])
        while len(shares) <= LONGEST_DRAFT:  # each as often as the last after the one before
            shares.append(shares[-1] * shares[-1] / max(shares[-2], 1e-9))
        self.note_shares(np.array(shares))

    def note_hindsight(self, shares: np.ndarray) -> None:
        """How often drafts would have been right while none were made.

        If they would pay at the guessed cost for one row, they are tried again: the steps may have
        been timed while a program was compiled for a new shape or the machine was busy.
        """
        self.note_shares(shares)
        self._again = self.tokens(SIZES[0]) > GAIN * (1 + GUESSED_COST * (SIZES[0] - 1))

    def note_shares(self, shares: np.ndarray) -> None:
        before = shares if self.shares is None else self.shares
        self.shares = before + NEWEST * (shares - before)


class Insistent(Pace):
    """Verifies whether it pays or not, with steps of the sizes in turn: for checks that drafts
    change no answer, and to have programs compiled."""

    def __init__(self, rows: int, eager: bool, sizes: Sequence[int] = SIZES):
        super().__init__(rows, eager)
        self._sizes = itertools.cycle(sizes)

    def size(self, sizes: Sequence[int] = SIZES) -> int:
        return next(self._sizes)
