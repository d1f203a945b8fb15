"""Whether to draft, from what, and how much: the host's side of speculative decoding.

``auto`` drafts by look-up where that was measured to pay and is exact up to float32's rounding: for
large models on one CPU device, in float32, with few rows. It begins with plain steps, and drafts
when hindsight says that the tokens they gave could have been copied. Elsewhere nothing is drafted:
in bfloat16 the two likeliest tokens are often equal or one rounding apart, and a product of several
rows may round otherwise than that of one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from encdec.inference.compile_budget import BatchPrograms, CompileBudget
from encdec.inference.decoding import Decoding, DecodingPlan, advance_compiled
from encdec.inference.drafts import LookupTexts, hindsight
from encdec.inference.generation_settings import AUTO, OFF
from encdec.inference.pace import LONGEST_DRAFT, PLAIN, SIZES, Pace
from encdec.inference.speculation import Drafting, begin_drafting_compiled, speculate_compiled
from encdec.model import ModelConfig, Params

MOST_ROWS = 4  # at which ``auto`` drafts
FIRST_LOOK = 12  # plain steps before the first hindsight
FEW_STEPS = 4  # enough to time verifying steps; the time of fewer plain ones is mostly the call's


@dataclasses.dataclass(frozen=True, eq=False)
class DraftModel:
    """A small model of the same vocabulary that drafts for a larger one.

    Attributes:
        config: the model, ready for decoding.
        params: its parameters.
        start_id: its decoder's first input.
    """

    config: ModelConfig
    params: Params
    start_id: int


# "off", "auto", "lookup" or a model.
Draft = str | DraftModel


@dataclasses.dataclass
class SpeculativeDecoding:
    """Makes the tokens of one batch, by plain and by verifying steps.

    Attributes:
        pace: chooses between them; None: plain steps alone.
        plain: so many plain steps.
        verify: so many verifying steps of a size; with the answers, how many there were and, by
            j, from how many rows and steps more than j tokens came.
        texts: what drafts are looked up in, NumPy's; None where a draft model makes them.
        programs: of the batch's shapes; None where no step compiles anything.
        fixed: the rows are those of one batch, which ends with the slowest of them; otherwise
            others take the places of those that have ended.
    """

    pace: Pace | None
    plain: Callable[[Decoding, int], Decoding]
    verify: Callable[[Decoding, int, int], tuple[Decoding, int, np.ndarray]]
    texts: LookupTexts | None
    programs: BatchPrograms | None = None
    fixed: bool = True

    def __post_init__(self) -> None:
        self.steps = 0  # that were made, of either kind
        self._wanted = FEW_STEPS  # verifying steps of the last call
        self._verifying = 0  # verifying steps
        self._verified = np.zeros(2)  # rows' verifying steps, and tokens that they made
        self._first: int | None = None  # tokens of the longest answer at the beginning

    def advance(self, decoding: Decoding, steps: int) -> Decoding:
        """About ``steps`` more tokens per row."""
        if self.pace is None:
            self.steps += steps
            return self.plain(decoding, steps)
        sizes = SIZES if self.programs is None else self.programs.sizes(self.pace)
        size, trial = self.pace.size(sizes), self.pace.trial
        if size == PLAIN and not trial and sizes and self._probes(self.pace):
            size, trial = sizes[0], True
        if size == PLAIN:
            # What is to be compared with verifying steps is a call of as many.
            wanted = min(steps, max(FEW_STEPS, self._wanted)) if trial else steps
            return self._plain_steps(self.pace, decoding, wanted)
        wanted = math.ceil(steps / self.pace.tokens(size))
        self._wanted = wanted = min(wanted, FEW_STEPS) if trial else wanted
        counts_R = np.array(decoding.counts_R)  # reading of new inputs does not count
        self._first = int(counts_R.max()) if self._first is None else self._first
        begin = time.perf_counter()
        decoding, done, made_K = self.verify(decoding, size, wanted)
        seconds = time.perf_counter() - begin
        self.steps += done
        self._verifying += done
        self._verified += made_K[0], made_K.sum()
        saved = self.pace.saved(size, seconds)
        if self.programs is not None and self.programs.note(size, seconds, saved):
            self.pace.note_compiling(size)
        elif done:
            self.pace.note_seconds(size, seconds / done)
        self.pace.note_made(made_K)
        self._note_end(self.pace, decoding)
        return decoding

    def _note_end(self, pace: Pace, decoding: Decoding) -> None:
        """Once all rows have finished: how much longer the slowest took than they on average."""
        rows, steps = len(decoding.counts_R), self._verifying
        if rows == 1 or not self.fixed or steps < FEW_STEPS or self._first is None:
            return
        if np.asarray(decoding.finished_R).all() and self._verified[0]:
            longest = int(np.asarray(decoding.counts_R).max()) - self._first
            plain = self.steps - steps
            mean = self._verified[1] / self._verified[0]
            pace.note_batch(float(mean), max((longest - plain) / steps, 1.0))

    def _probes(self, pace: Pace) -> bool:
        """Whether to try a draft model again that did not pay: there is no hindsight of it."""
        return self.texts is None and pace.shares is not None and pace.knows(PLAIN) and pace.looks()

    def _plain_steps(self, pace: Pace, decoding: Decoding, steps: int) -> Decoding:
        if pace.shares is None:
            steps = min(steps, FIRST_LOOK)
        counts_R = np.array(decoding.counts_R)
        self._first = int(counts_R.max()) if self._first is None else self._first
        begin = time.perf_counter()
        decoding = self.plain(decoding, steps)
        later_R = np.asarray(decoding.counts_R)
        seconds = time.perf_counter() - begin
        done = int((later_R - counts_R).max())
        self.steps += done
        # Fewer than wanted are the end of the last answers.
        if self.programs is not None and self.programs.note(PLAIN, seconds):
            pace.note_compiling(PLAIN)
        elif done and done >= min(steps, FEW_STEPS):
            pace.note_seconds(PLAIN, seconds / done)
        self._note_end(pace, decoding)
        if self.texts is not None:
            self._look_back(pace, self.texts, decoding, later_R)
        return decoding

    def _look_back(
        self, pace: Pace, texts: LookupTexts, decoding: Decoding, counts_R: np.ndarray
    ) -> None:
        """Tells the pace what drafts would have given; less often while that is little."""
        if not pace.looks():
            return
        tokens_RxN, eos_R = map(np.asarray, (decoding.tokens_RxN, decoding.settings.eos_R))
        shares = hindsight(texts, tokens_RxN, counts_R, eos_R, LONGEST_DRAFT)
        if shares is None:
            return
        pace.note_hindsight(shares)


class Drafters:
    """Drafts for the batches of one model.

    Args:
        config: the model, ready for decoding.
        params: its parameters.
        draft: what drafts are made of.
        rows_sharding: of arrays of rows; None on one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        draft: Draft,
        rows_sharding: jax.sharding.Sharding | None = None,
    ):
        self._config, self._params, self._draft = config, params, draft
        self._sharding = rows_sharding
        self.paces = Paces(draft, rows_sharding is None and drafting_pays(config))

    def begin(
        self,
        plan: DecodingPlan,
        tokens_BxS: np.ndarray,
        lengths_B: np.ndarray,
        times: int,
        prefix: int,
    ) -> Callable[[Decoding, int], Decoding]:
        """Makes about this many more tokens of the answers to a batch of inputs.

        Args:
            plan: the batch's.
            tokens_BxS: inputs.
            lengths_B: tokens of each.
            times: answers to each.
            prefix: tokens with which every input begins, which are no text.
        """
        pace = self.paces.of(len(tokens_BxS) * times)

        def plain(decoding: Decoding, steps: int) -> Decoding:
            return advance_compiled(self._config, plan, self._params, decoding, steps)

        if pace is None:
            return plain
        texts = None
        config: ModelConfig | None = None
        params: Any = None
        if isinstance(self._draft, DraftModel):
            config, params = self._draft.config, self._draft.params
            drafting = begin_drafting_compiled(
                config,
                params,
                *self._placed((tokens_BxS, lengths_B)),
                start_id=self._draft.start_id,
                capacity=plan.capacity,
                times=times,
            )
        else:
            texts = texts_of(tokens_BxS, lengths_B, times, prefix)
            drafting = Drafting(self._placed(texts))

        def verify(decoding: Decoding, size: int, steps: int) -> tuple[Decoding, int, np.ndarray]:
            nonlocal drafting
            decoding, drafting, tally = speculate_compiled(
                self._config, plan, size, config, self._params, params, decoding, drafting, steps
            )
            return decoding, int(tally.steps), np.asarray(tally.made_K)

        programs = self.paces.budget.programs((plan, tokens_BxS.shape, times))
        return SpeculativeDecoding(pace, plain, verify, texts, programs).advance

    def _placed(self, arrays: Any) -> Any:
        """Row arrays where the rows are computed, to be given over to a program."""
        if self._sharding:
            return jax.device_put(arrays, self._sharding)
        return jax.tree.map(jnp.array, arrays)


class Paces:
    """What was learned of drafting for batches of each number of rows.

    Args:
        draft: what drafts are made of.
        pays: whether ``auto`` drafts at all.

    Attributes:
        budget: for compiling what verifies drafts.
    """

    def __init__(self, draft: Draft, pays: bool):
        self._draft, self._pays = draft, pays
        self.budget = CompileBudget(first_free=draft != AUTO)
        self._paces: dict[int, Pace] = {}
        self.kind: Callable[[int, bool], Pace] = Pace

    def begin(self, kind: Callable[[int, bool], Pace], compiled: bool = False) -> None:
        """Forgets what was learned.

        Args:
            kind: makes the paces from now on, of the number of rows and whether to draft before
                anything is known.
            compiled: no step's time will include compiling.
        """

        def make(rows: int, eager: bool) -> Pace:
            pace = kind(rows, eager)
            if compiled:
                pace.note_compiled()
            return pace

        self.kind = make
        self._paces.clear()

    @property
    def all(self) -> list[Pace]:
        """Of every number of rows that was drafted for."""
        return list(self._paces.values())

    def of(self, rows: int) -> Pace | None:
        """The pace of batches with this many rows; None where nothing is drafted for them."""
        auto = self._draft == AUTO
        if self._draft == OFF or (auto and not (self._pays and rows <= MOST_ROWS)):
            return None
        return self._paces.setdefault(rows, self.kind(rows, not auto))


def drafting_pays(config: ModelConfig) -> bool:
    """Whether it was measured to, and is exact, where and as this model runs.

    A step of several tokens costs less than as many plain ones where kernels are laid out for it.
    Still smaller models gained nothing.
    """
    return config.execution.laid_out and config.dtype == "float32"


def texts_of(tokens_BxS: np.ndarray, lengths_B: np.ndarray, times: int, prefix: int) -> LookupTexts:
    """What is copied from to answer each input ``times`` times; the prefix is not text."""
    return LookupTexts(
        np.repeat(tokens_BxS[:, prefix:], times, axis=0).astype(np.int32),
        np.repeat(np.maximum(lengths_B - prefix, 0), times).astype(np.int32),
    )
