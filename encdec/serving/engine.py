"""The thread that owns the model: a queue of answers to be made, and the slots they are made in."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from encdec.errors import ConfigError
from encdec.inference.decoding import DecodingPlan, advance_compiled
from encdec.inference.generator import bucket, generation_of, settings_of_answers
from encdec.inference.ready import ready_for_decoding
from encdec.inference.sampling import Choosing, RowSettings
from encdec.inference.settings import GenerationSettings
from encdec.inference.text import PromptFormat, TextStream, find_stop
from encdec.model import ModelConfig
from encdec.serving.prometheus_metrics import Metrics
from encdec.serving.slots import (
    Prefilled,
    SlotPlan,
    empty,
    insert_compiled,
    read_compiled,
    release_compiled,
)

# Between two looks at the answers: long against the cost of a look, short against a reader.
LOOK_SECONDS = 0.01
MOST_STEPS = 32

Failure = Literal["timeout", "shutdown", "error"]


class Busy(Exception):
    """The queue has no room; ``retry_seconds`` from now it may."""

    def __init__(self, retry_seconds: int):
        super().__init__(f"try again in {retry_seconds} s")
        self.retry_seconds = retry_seconds


class Closing(Exception):
    """The server takes no more requests."""


@dataclasses.dataclass(frozen=True)
class Update:
    """News of one answer.

    Attributes:
        index: which answer of the request.
        text: what is new of it.
        tokens: ids that are new.
        log_probs: the model's log-probabilities of these.
        finish: why it ended, or None while it grows.
    """

    index: int
    text: str
    tokens: list[int]
    log_probs: list[float]
    finish: str | None = None


class Ticket:
    """A request's place in the engine.

    Args:
        inputs: its prompts, as tokens.
        settings: the same for all prompts, with ``samples`` answers each.
        deliver: called on the engine's thread, with an ``Update`` or, once and then nothing more,
            with why it failed.
        stream: deliver text as it grows; otherwise only whole answers.
        timeout_seconds: from now until it is given up.
    """

    def __init__(
        self,
        inputs: Sequence[Sequence[int]],
        settings: GenerationSettings,
        deliver: Callable[[Update | Failure], None],
        *,
        stream: bool,
        timeout_seconds: float,
    ):
        self.inputs, self.settings, self.deliver, self.stream = inputs, settings, deliver, stream
        self.arrived = time.monotonic()
        self.deadline = self.arrived + timeout_seconds
        self.ended = False  # cancelled or failed: nobody waits any more


@dataclasses.dataclass
class _Answer:
    """One answer to be made, waiting or in a slot."""

    ticket: Ticket
    place: int  # of its prompt in the request
    sample: int
    seen: int = 0  # tokens looked at
    pieces: TextStream | None = None

    @property
    def index(self) -> int:
        return self.place * self.ticket.settings.samples + self.sample


class Engine:
    """Makes answers in a thread of its own.

    Args:
        config: the model.
        params: its parameters, scanned or not.
        prompts: its vocabulary and the longest input.
        max_tokens: new tokens at most in any answer.
        slots: answers made at once.
        max_queue: answers that may wait for a slot.
        metrics: what is counted.
        dtype: see ``ready_for_decoding``.

    Raises:
        ConfigError: the vocabulary is larger than the model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        prompts: PromptFormat,
        *,
        max_tokens: int,
        slots: int = 16,
        max_queue: int = 256,
        metrics: Metrics | None = None,
        dtype: str | None = None,
    ):
        vocabulary = prompts.vocabulary
        if vocabulary.size > config.vocab_size:
            raise ConfigError(
                f"the vocabulary has {vocabulary.size:,} ids and the model's table "
                f"{config.vocab_size:,}; give the vocabulary that the model was trained with"
            )
        self.config, self._params = ready_for_decoding(config, params, dtype)
        self.prompts, self.max_tokens, self.max_queue = prompts, max_tokens, max_queue
        everything = Choosing(vocabulary.size, True, True, True, True)
        self.plan = SlotPlan(
            DecodingPlan(everything, max_tokens, prompts.decoder_start_id),
            slots,
            prompts.max_input_tokens,
        )
        self.metrics = metrics or Metrics()
        self.metrics.slots.set(slots)
        self.metrics.watch(lambda: self.active, lambda: self.waiting)
        self._decoding = empty(self.config, self.plan, self._params)
        self._rows: list[_Answer | None] = [None] * slots
        self._queue: collections.deque[_Answer] = collections.deque()
        self._read: tuple[Ticket, int, Prefilled] | None = None  # the input read last
        self._wakeup = threading.Condition()
        self._closing = self._stopping = False
        self.broken: str | None = None
        self._step_seconds = LOOK_SECONDS
        self._answer_seconds = 1.0
        self._thread = threading.Thread(target=self._run, name="encdec-engine", daemon=True)

    # What other threads call.

    @property
    def active(self) -> int:
        """Slots with an answer in them."""
        return sum(answer is not None for answer in self._rows)

    @property
    def waiting(self) -> int:
        """Answers without a slot."""
        return len(self._queue)

    @property
    def closing(self) -> bool:
        """Whether requests are refused because the server ends."""
        return self._closing

    def widths(self) -> list[int]:
        """Lengths to which inputs are padded: one program each."""
        longest = self.plan.longest_input
        return sorted({min(bucket(n), longest) for n in range(1, longest + 1)})

    def warm_up(self) -> int:
        """Compiles every program, before ``start``; returns how many."""
        widths = self.widths()
        settings = self._settings(GenerationSettings(), 0, 0)
        for width in widths:
            prefilled = read_compiled(
                self.config, self.plan, self._params, np.zeros((1, width), np.int32), np.int32(1)
            )
        # An answer of no tokens: nothing is left behind.
        settings = settings.replace(limit_R=settings.limit_R * 0)
        self._decoding = insert_compiled(
            self.config, self.plan, self._decoding, np.int32(0), prefilled, settings
        )
        self._release(np.zeros(self.plan.slots, bool))
        # Once for the program, once for what its results look like on the device.
        for _ in range(2):
            self._decoding = advance_compiled(
                self.config, self.plan.decoding, self._params, self._decoding, np.int32(1)
            )
        jax.block_until_ready(self._decoding)
        return len(widths) + 3

    def start(self) -> None:
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queues a request, all of its answers or none.

        Raises:
            Busy: the queue has no room for them.
            Closing: no more requests are taken.
        """
        answers = [
            _Answer(ticket, place, sample)
            for place in range(len(ticket.inputs))
            for sample in range(ticket.settings.samples)
        ]
        with self._wakeup:
            if self._closing or self.broken:
                raise Closing
            free = self._rows.count(None)
            if len(self._queue) + len(answers) > self.max_queue + free:
                raise Busy(self._retry_seconds(len(answers)))
            self._queue.extend(answers)
            self._wakeup.notify()

    def _retry_seconds(self, more: int) -> int:
        """When so many answers may find room, from the time that answers took so far."""
        rounds = (len(self._queue) + more) / self.plan.slots
        return max(1, min(60, math.ceil(rounds * self._answer_seconds / 2)))

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for this request any more: its slots become free at the next look."""
        with self._wakeup:
            ticket.ended = True
            self._wakeup.notify()

    def close(self) -> None:
        """Takes no more requests; those that are here are finished."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()

    def stop(self) -> None:
        """Ends, with whatever is not finished failing as "shutdown"."""
        with self._wakeup:
            self._closing = self._stopping = True
            self._wakeup.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def idle(self) -> bool:
        return not self._queue and not self.active

    # What the engine's thread does.

    def _run(self) -> None:
        try:
            while self._wait():
                self._sweep()
                self._admit()
                if self.active:
                    self._advance()
                    self._look()
            self._fail_all("shutdown")
        except BaseException as error:
            logging.getLogger("encdec").exception("the engine failed")
            self.broken = f"{type(error).__name__}: {error}"
            self._fail_all("error")

    def _wait(self) -> bool:
        """Until there is something to do; False at the end."""
        with self._wakeup:
            while self.idle and not self._closing:
                self._wakeup.wait()
            return not self._stopping and not (self.idle and self._closing)

    def _fail_all(self, failure: Failure) -> None:
        with self._wakeup:
            self._closing = True
            tickets = {answer.ticket for answer in [*self._rows, *self._queue] if answer}
            self._queue.clear()
            self._rows = [None] * len(self._rows)
        for ticket in tickets:
            self._fail(ticket, failure)

    def _fail(self, ticket: Ticket, failure: Failure) -> None:
        if not ticket.ended:
            ticket.ended = True
            self.metrics.answers.labels(failure).inc()
            ticket.deliver(failure)

    def _sweep(self) -> None:
        """Drops what nobody waits for any more, and what is overdue."""
        now = time.monotonic()
        with self._wakeup:
            everything = [answer for answer in [*self._rows, *self._queue] if answer]
        for answer in everything:
            if now > answer.ticket.deadline:
                self._fail(answer.ticket, "timeout")
        gone_R = np.array([row is not None and row.ticket.ended for row in self._rows])
        with self._wakeup:
            if any(answer.ticket.ended for answer in self._queue):
                kept = [answer for answer in self._queue if not answer.ticket.ended]
                self._queue.clear()
                self._queue.extend(kept)
        if gone_R.any():
            self.metrics.answers.labels("cancelled").inc(int(gone_R.sum()))
            self._release(gone_R)

    def _release(self, free_R: np.ndarray) -> None:
        self._decoding = release_compiled(self._decoding, free_R)
        for row in np.flatnonzero(free_R):
            self._rows[row] = None

    def _admit(self) -> None:
        """Fills free slots from the queue, in order."""
        for row, taken in enumerate(self._rows):
            if taken is not None:
                continue
            with self._wakeup:
                if not self._queue:
                    return
                answer = self._queue.popleft()
                self._rows[row] = answer
            ticket = answer.ticket
            if ticket.stream or ticket.settings.stop:
                answer.pieces = TextStream(self.prompts.vocabulary, ticket.settings.stop)
            self._decoding = insert_compiled(
                self.config,
                self.plan,
                self._decoding,
                np.int32(row),
                self._prefilled(ticket, answer.place),
                self._settings(ticket.settings, answer.place, answer.sample),
            )

    def _prefilled(self, ticket: Ticket, place: int) -> Prefilled:
        """The input, read; once for all samples of it."""
        if self._read is None or self._read[0] is not ticket or self._read[1] != place:
            ids = ticket.inputs[place]
            width = min(bucket(len(ids)), self.plan.longest_input)
            tokens_1xS = np.zeros((1, width), np.int32)
            tokens_1xS[0, : len(ids)] = ids
            prefilled = read_compiled(
                self.config, self.plan, self._params, tokens_1xS, np.int32(len(ids))
            )
            self._read = ticket, place, prefilled
            self.metrics.input_tokens.inc(len(ids))
        return self._read[2]

    def _settings(self, settings: GenerationSettings, number: int, sample: int) -> RowSettings:
        """Of one row: the key is that of ``Generator``'s answer to input ``number``."""
        limit = min(settings.max_tokens or self.max_tokens, self.max_tokens)
        return settings_of_answers(
            settings,
            np.array([number], np.uint32),
            np.array([sample], np.uint32),
            np.array([limit], np.int32),
            self.prompts.vocabulary.eos_id,
        )

    def _advance(self) -> None:
        """As many steps as fit between two looks."""
        begin = time.perf_counter()
        steps = int(min(MOST_STEPS, max(1, LOOK_SECONDS / self._step_seconds)))
        self._decoding = advance_compiled(
            self.config, self.plan.decoding, self._params, self._decoding, np.int32(steps)
        )
        jax.block_until_ready(self._decoding.counts_R)
        taken = (time.perf_counter() - begin) / steps
        self._step_seconds += 0.2 * (taken - self._step_seconds)
        self.metrics.steps.inc(steps)

    def _look(self) -> None:
        """Tells of what is new, and frees the slots of finished answers."""
        decoding = self._decoding
        # Copies: the buffers themselves are given over to the next steps.
        counts_R, finished_R, tokens_RxN, log_probs_RxN = map(
            np.array,
            (decoding.counts_R, decoding.finished_R, decoding.tokens_RxN, decoding.log_probs_RxN),
        )
        free_R = np.zeros(len(self._rows), bool)
        for row, answer in enumerate(self._rows):
            if answer is not None and not answer.ticket.ended:
                count = counts_R[row]
                free_R[row] = self._tell(
                    answer,
                    tokens_RxN[row, :count],
                    log_probs_RxN[row, :count],
                    bool(finished_R[row]),
                )
        if free_R.any():
            self._release(free_R)

    def _tell(
        self, answer: _Answer, ids: np.ndarray, log_probs: np.ndarray, finished: bool
    ) -> bool:
        """Delivers what is new of one answer; whether it has ended."""
        ticket, now = answer.ticket, time.monotonic()
        if not answer.seen and len(ids):
            self.metrics.first_token.observe(now - ticket.arrived)
        piece = ""
        if answer.pieces and ticket.stream:
            piece = answer.pieces.push(ids.tolist(), last=finished)
            finished |= answer.pieces.stopped
        elif answer.pieces and not finished:
            text = self.prompts.vocabulary.decode(ids)
            finished = find_stop(text, ticket.settings.stop) is not None
        end, finish = len(ids), None
        if finished:
            made = generation_of(self.prompts.vocabulary, ids, log_probs, ticket.settings.stop)
            end, finish = len(made.tokens), made.finish
            piece = piece if ticket.stream else made.text
        if finished or (ticket.stream and (piece or end > answer.seen)):
            start = answer.seen if ticket.stream else 0
            ticket.deliver(
                Update(
                    answer.index,
                    piece,
                    ids[start:end].tolist(),
                    log_probs[start:end].tolist(),
                    finish,
                )
            )
        if finished:
            seconds = now - ticket.arrived
            self._answer_seconds += 0.1 * (seconds - self._answer_seconds)
            self.metrics.duration.observe(seconds)
            self.metrics.answers.labels(finish).inc()
            self.metrics.output_tokens.inc(end)
        answer.seen = end
        return finished
