"""How many tokens to verify per step, from how often drafts were right and how long steps took."""

from __future__ import annotations

import collections
import itertools

import numpy as np

PLAIN = 1
SIZES = (4, 8)  # of verifying steps; each is a compiled program
LONGEST_DRAFT = SIZES[-1] - 1
# A step of k tokens is taken to cost this much more for each of the others until one was timed:
# the 330M model on two CPU cores.
GUESSED_COST = 0.06
GAIN = 1.05  # that drafting must promise
NEWEST = 0.5  # weight of what the last steps say of drafts
MOST_SKIPPED = 31  # looks at what drafts would give, while that is too little
TIMED = 9  # the last times of a size that count
RETIMED = 24  # times that drafts are verified before a plain step is timed again


class Pace:
    """Chooses between plain steps and verifying steps of each size, by tokens per second.

    Args:
        rows: of the batch; each pays for its drafted tokens.
        eager: draft before anything is known.
    """

    def __init__(self, rows: int, eager: bool):
        self._rows, self._eager = rows, eager
        self._seconds: dict[int, collections.deque[float]] = {}
        self._drafting = 0  # times that drafts were verified since a plain step
        self._seen: set[int] = set()
        self.shares: np.ndarray | None = None  # how often the first j of a draft are right
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
        """Expected of a step, each row."""
        return 1.0 if self.shares is None else float(self.shares[:size].sum())

    def size(self) -> int:
        """Tokens that the next steps should feed."""
        if self.shares is None:
            return SIZES[0] if self._eager else PLAIN
        timed = [size for size in SIZES if size in self._seconds]
        if timed and (PLAIN not in self._seconds or self._drafting >= RETIMED):
            return PLAIN  # nothing else tells whether drafting pays, now as before
        if self._eager and not timed and self.tokens(SIZES[0]) > GAIN:
            return SIZES[0]  # until now only its compiling was; with many rows guesses rule it out
        rates = {size: self.tokens(size) / self._cost(size) for size in (PLAIN, *SIZES)}
        best = max(SIZES, key=rates.__getitem__)
        again, self._again = self._again, False
        if rates[best] <= GAIN * rates[PLAIN]:
            return SIZES[0] if again else PLAIN
        self._skip = 0  # from now on, looks may change something
        return best

    def knows(self, size: int) -> bool:
        """Whether steps of this size were timed."""
        return size in self._seconds

    def _cost(self, size: int) -> float:
        """Of a step, in those of a plain one."""
        if PLAIN in self._seconds:
            plain = self._usual(PLAIN)
            if size in self._seconds:
                return self._usual(size) / plain
            for timed in SIZES:  # what one size costs tells better than a guess what others do
                if timed in self._seconds:
                    more = max(0.0, self._usual(timed) / plain - 1)
                    return 1 + more * (size - 1) / (timed - 1)
        return 1 + GUESSED_COST * (size - 1) * self._rows

    def _usual(self, size: int) -> float:
        """The median of a size's last times, of two the shorter.

        Not their least: it falls with every time that is taken, so that on a busy machine the size
        that is used would seem faster than the one that is not.
        """
        times = sorted(self._seconds[size])
        return times[(len(times) - 1) // 2]

    def note_compiled(self) -> None:
        """All programs are compiled, so that the first time of each counts, too."""
        self._seen.update((PLAIN, *SIZES))

    def note_seconds(self, size: int, seconds: float) -> None:
        """How long a step took, on average of some; the first time is compiling's."""
        self._drafting = 0 if size == PLAIN else self._drafting + 1
        if size not in self._seen:
            self._seen.add(size)
            return
        self._seconds.setdefault(size, collections.deque(maxlen=TIMED)).append(seconds)

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
    """Verifies whether it pays or not, with steps of every size in turn: for checks that drafts
    change no answer."""

    def __init__(self, rows: int, eager: bool):
        super().__init__(rows, eager)
        self._sizes = itertools.cycle(SIZES)

    def size(self) -> int:
        return next(self._sizes)
