"""The thread that owns the model: a queue of waiting answers, and the slots that generate them."""

from __future__ import annotations

import collections
import math
import threading
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from encdec.errors import ConfigError
from encdec.inference.decoding import Decoding, DecodingPlan, advance_compiled
from encdec.inference.drafting import Draft, DraftModel, Paces, SpeculativeDecoding
from encdec.inference.generation_settings import AUTO, MOST_BIASES, GenerationSettings
from encdec.inference.generator import generation_of
from encdec.inference.pace import SIZES
from encdec.inference.ready import ready_for_decoding
from encdec.inference.rows import settings_of_answers
from encdec.inference.sampling import Choosing, RowSettings
from encdec.inference.shapes import bucket
from encdec.inference.text_io import PromptFormat, TextStream, find_stop, text_after
from encdec.logs import logger
from encdec.model import ModelConfig
from encdec.serving.prometheus_metrics import ServerMetrics
from encdec.serving.prompts import Prompt
from encdec.serving.protocol import MOST_LOG_PROBS
from encdec.serving.slot_drafts import SlotDrafts
from encdec.serving.slots import (
    Prefilled,
    SlotPlan,
    empty,
    insert_compiled,
    read_compiled,
    read_with_log_probs_compiled,
    release_compiled,
)
from encdec.serving.tickets import Answer, Failure, Ticket, TokenLogProbs, Update

_LOG = logger(__name__)

# Between two polls of the answers: long compared with a poll, short for a reader.
POLL_SECONDS = 0.01
MOST_STEPS = 32


class Busy(Exception):
    """The queue is full; it may have capacity in ``retry_seconds``."""

    def __init__(self, retry_seconds: int):
        super().__init__(f"try again in {retry_seconds} s")
        self.retry_seconds = retry_seconds


class Closing(Exception):
    """The server accepts no more requests."""


class Engine:
    """Generates answers in its own thread.

    Args:
        config: the model.
        params: its parameters, scanned or not.
        prompts: its vocabulary and the longest input.
        max_tokens: most new tokens of an answer.
        slots: answers generated at once.
        max_queue: answers that may wait for a slot.
        metrics: counters of the server.
        dtype: see ``ready_for_decoding``.
        draft: "lookup" and a model draft; "off" and "auto" do not, because how many tokens per
            step verifies depends on all slots, and rounds an answer's log-probabilities otherwise:
            without drafts they are the same bits whatever the neighbours.

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
        metrics: ServerMetrics | None = None,
        dtype: str | None = None,
        draft: Draft = AUTO,
    ):
        vocabulary = prompts.vocabulary
        if vocabulary.size > config.vocab_size:
            raise ConfigError(
                f"the vocabulary has {vocabulary.size:,} ids, but the model's table only "
                f"{config.vocab_size:,}; give the vocabulary that the model was trained with"
            )
        self.config, self._params = ready_for_decoding(config, params, dtype)
        self.prompts, self.max_tokens, self.max_queue = prompts, max_tokens, max_queue
        everything = Choosing(
            vocabulary.size,
            sampled=True,
            truncated=True,
            penalised=True,
            ngrams=True,
            biases=MOST_BIASES,
            alternatives=min(MOST_LOG_PROBS, vocabulary.size),
        )
        self.plan = SlotPlan(
            DecodingPlan(everything, max_tokens, prompts.decoder_start_id),
            slots,
            prompts.max_input_tokens,
        )
        self.metrics = metrics or ServerMetrics()
        self.metrics.slots.set(slots)
        self.metrics.watch(lambda: self.active, lambda: self.waiting)
        self._decoding = empty(self.config, self.plan, self._params)
        self.drafts = SlotDrafts(
            self.config,
            self._params,
            self.plan,
            len(prompts.inputs_prefix),
            draft if isinstance(draft, DraftModel) else None,
        )
        self._draft, self._answering = draft, self._new_answering(draft)
        self._rows: list[Answer | None] = [None] * slots
        self._queue: collections.deque[Answer] = collections.deque()
        # The input read last: its request and prompt.
        self._read: tuple[Ticket, int, Prefilled, TokenLogProbs | None] | None = None
        self._wakeup = threading.Condition()
        self._closing = self._stopping = False
        self.broken: str | None = None
        self._step_seconds = POLL_SECONDS
        self._answer_seconds = 1.0
        self._thread = threading.Thread(target=self._run, name="encdec-engine", daemon=True)

    def _new_answering(self, draft: Draft) -> SpeculativeDecoding:
        pace = Paces(draft, pays=False).of(self.plan.slots)
        drafts = self.drafts
        return SpeculativeDecoding(pace, self._plain, drafts.verify, drafts.texts, fixed=False)

    # Called by other threads.

    @property
    def active(self) -> int:
        """Occupied slots."""
        return sum(answer is not None for answer in self._rows)

    @property
    def waiting(self) -> int:
        """Answers that wait for a slot."""
        return len(self._queue)

    @property
    def closing(self) -> bool:
        """Whether requests are refused because the server is shutting down."""
        return self._closing

    def widths(self) -> list[int]:
        """Lengths to which inputs are padded, with one compiled program each."""
        longest = self.plan.longest_input
        return sorted({min(bucket(n), longest) for n in range(1, longest + 1)})

    def warm_up(self) -> int:
        """Compiles every program, before ``start``; returns how many.

        A request of every width is run twice, and more after drafts: programs are compiled again
        when their arguments come from another program, which may lay them out differently.
        """
        widths = self.widths()
        exact = not self.config.is_encoder_decoder
        served, self.metrics = self.metrics, ServerMetrics()
        drafted = SIZES if self._answering.pace else ()
        for _ in range(2 + bool(drafted)):
            for width in widths:
                for prompt_log_probs in {False, exact}:
                    self._answer_now(width, prompt_log_probs)
            self._decoding = self.drafts.warm_up(self._decoding, widths, drafted)
        self.metrics, self._read = served, None
        self._step_seconds, self._answer_seconds = POLL_SECONDS, 1.0
        self._answering = self._new_answering(self._draft)
        if self._answering.pace:
            self._answering.pace.note_compiled()
        drafted_for = len(drafted) + isinstance(self._draft, DraftModel) * (len(widths) + 1)
        return len(widths) * (1 + exact) + 3 + drafted_for

    def _answer_now(self, width: int, prompt_log_probs: bool) -> None:
        """Answers one request of a width without the thread."""
        failures: list[Update | Failure] = []
        ticket = Ticket(
            [Prompt([0] * width)],
            GenerationSettings(),
            failures.append,
            stream=False,
            timeout_seconds=math.inf,
            max_tokens=min(2, self.max_tokens),
            prompt_log_probs=prompt_log_probs,
        )
        self._queue.append(Answer(ticket, 0, 0))
        while not self.idle:
            self._expire()
            self._fill()
            self._advance()
            self._poll()

    def start(self) -> None:
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queues a request, all of its answers or none.

        Raises:
            Busy: the queue has too little capacity left.
            Closing: no more requests are accepted.
        """
        answers = [
            Answer(ticket, place, sample)
            for place in range(len(ticket.prompts))
            for sample in range(ticket.samples)
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
        """Estimated seconds until this many answers fit, from the time that past answers took."""
        rounds = (len(self._queue) + more) / self.plan.slots
        return max(1, min(60, math.ceil(rounds * self._answer_seconds / 2)))

    def cancel(self, ticket: Ticket) -> None:
        """Cancels a request: its slots become free at the next poll."""
        with self._wakeup:
            ticket.ended = True
            self._wakeup.notify()

    def close(self) -> None:
        """Accepts no more requests; those already accepted are finished."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()

    def stop(self) -> None:
        """Stops; unfinished requests fail as "shutdown"."""
        with self._wakeup:
            self._closing = self._stopping = True
            self._wakeup.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def idle(self) -> bool:
        return not self._queue and not self.active

    # Run by the engine's thread.

    def _run(self) -> None:
        try:
            while self._wait():
                self._expire()
                self._fill()
                if self.active:
                    self._advance()
                    self._poll()
            self._fail_all("shutdown")
        except BaseException as error:
            _LOG.exception("the engine failed")
            self.broken = f"{type(error).__name__}: {error}"
            self._fail_all("error")

    def _wait(self) -> bool:
        """Waits until there is work; False at shutdown."""
        with self._wakeup:
            while self.idle and not self._closing:
                self._wakeup.wait()
            return not self._stopping and not (self.idle and self._closing)

    def _fail_all(self, failure: Failure) -> None:
        with self._wakeup:
            self._closing = True
            answers = [answer for answer in [*self._rows, *self._queue] if answer]
            self._queue.clear()
            self._rows = [None] * len(self._rows)
        for answer in answers:
            self._fail(answer.ticket, failure)
        self._count_gone(answers)

    def _fail(self, ticket: Ticket, failure: Failure) -> None:
        if not ticket.ended:
            ticket.ended, ticket.failure = True, failure
            ticket.deliver(failure)

    def _count_gone(self, answers: Iterable[Answer]) -> None:
        """Counts answers that nobody waits for any more."""
        for answer in answers:
            self.metrics.answers.labels(answer.ticket.failure or "cancelled").inc()

    def _expire(self) -> None:
        """Drops cancelled and overdue requests."""
        now = time.monotonic()
        with self._wakeup:
            everything = [answer for answer in [*self._rows, *self._queue] if answer]
        for answer in everything:
            if now > answer.ticket.deadline:
                self._fail(answer.ticket, "timeout")
        gone_R = np.array([row is not None and row.ticket.ended for row in self._rows])
        gone = [row for row, is_gone in zip(self._rows, gone_R) if row and is_gone]
        with self._wakeup:
            if waiting := [answer for answer in self._queue if answer.ticket.ended]:
                kept = [answer for answer in self._queue if not answer.ticket.ended]
                self._queue.clear()
                self._queue.extend(kept)
        self._count_gone([*gone, *waiting])
        if gone:
            self._release(gone_R)

    def _release(self, free_R: np.ndarray) -> None:
        self._decoding = release_compiled(self._decoding, free_R)
        for row in np.flatnonzero(free_R):
            self._rows[row] = None

    def _fill(self) -> None:
        """Fills free slots from the queue, in order."""
        for row, taken in enumerate(self._rows):
            if taken is not None:
                continue
            with self._wakeup:
                if not self._queue:
                    return
                answer = self._queue.popleft()
                self._rows[row] = answer
            ticket, prompt = answer.ticket, answer.prompt
            if ticket.stream:
                answer.text = TextStream(
                    self.prompts.vocabulary, ticket.settings.stop, prompt.context
                )
            prefilled, answer.input_log_probs = self._prefilled(ticket, answer.place)
            self.drafts.put(row, prompt.ids)
            begun_N = np.zeros(self.max_tokens, np.int32)
            begun_N[: len(prompt.begun)] = prompt.begun
            self._decoding = insert_compiled(
                self.config,
                self.plan,
                self._decoding,
                np.int32(row),
                prefilled,
                begun_N,
                self._settings(answer),
            )

    def _prefilled(self, ticket: Ticket, place: int) -> tuple[Prefilled, TokenLogProbs | None]:
        """The input, prefilled, and (if requested) its log-probabilities; once for all samples."""
        if self._read is None or self._read[0] is not ticket or self._read[1] != place:
            ids = ticket.prompts[place].ids
            width = min(bucket(len(ids)), self.plan.longest_input)
            tokens_1xS = np.zeros((1, width), np.int32)
            tokens_1xS[0, : len(ids)] = ids
            arguments = (self.config, self.plan, self._params, tokens_1xS, np.int32(len(ids)))
            known = None
            if ticket.prompt_log_probs and not self.config.is_encoder_decoder:
                prefilled, found = read_with_log_probs_compiled(*arguments)
                own, begin = ticket.prompts[place].own, ticket.prompts[place].before
                arrays = (found.log_probs_S, found.likeliest_SxK, found.likeliest_log_probs_SxK)
                known = TokenLogProbs.of_arrays(
                    np.array(own, np.int32),
                    *(np.array(array)[begin : begin + len(own)] for array in arrays),
                )
            else:
                prefilled = read_compiled(*arguments)
            self._read = ticket, place, prefilled, known
            self.metrics.input_tokens.inc(len(ids))
        return self._read[2], self._read[3]

    def _settings(self, answer: Answer) -> RowSettings:
        """Sampling settings of one row, with the key that ``Generator`` uses for that input."""
        ticket, given = answer.ticket, len(answer.prompt.begun)
        asked = self.max_tokens if ticket.max_tokens is None else ticket.max_tokens
        return settings_of_answers(
            ticket.settings,
            np.array([answer.place], np.uint32),
            np.array([answer.sample], np.uint32),
            np.array([min(given + asked, self.max_tokens)], np.int32),
            self.prompts.vocabulary.eos_id,
            biases=self.plan.decoding.choosing.biases,
            given=given,
            alternatives=int(ticket.alternatives),
        )

    def _advance(self) -> None:
        """As many steps as fit between two polls; of drafts, as many as give that many tokens."""
        begin, done, pace = time.perf_counter(), self._answering.steps, self._answering.pace
        drafted, accepted = (pace.drafted, pace.accepted) if pace else (0, 0)
        steps = int(min(MOST_STEPS, max(1, POLL_SECONDS / self._step_seconds)))
        self._decoding = self._answering.advance(self._decoding, steps)
        jax.block_until_ready(self._decoding.counts_R)
        taken = (time.perf_counter() - begin) / steps
        self._step_seconds += 0.2 * (taken - self._step_seconds)
        self.metrics.steps.inc(self._answering.steps - done)
        if pace:
            self.metrics.drafted_tokens.inc(pace.drafted - drafted)
            self.metrics.accepted_tokens.inc(pace.accepted - accepted)

    def _plain(self, decoding: Decoding, steps: int) -> Decoding:
        return advance_compiled(
            self.config, self.plan.decoding, self._params, decoding, np.int32(steps)
        )

    def _poll(self) -> None:
        """Delivers the new part of every answer, and frees the slots of finished ones."""
        decoding = self._decoding
        # Copies: the buffers themselves are donated to the next steps.
        counts_R, finished_R, tokens_RxN, log_probs_RxN = map(
            np.array,
            (decoding.counts_R, decoding.finished_R, decoding.tokens_RxN, decoding.log_probs_RxN),
        )
        likeliest: tuple[np.ndarray, ...] = ()
        if any(answer and answer.ticket.alternatives for answer in self._rows):
            likeliest = (
                np.array(decoding.likeliest_RxNxK),
                np.array(decoding.likeliest_log_probs_RxNxK),
            )
        free_R = np.zeros(len(self._rows), bool)
        for row, answer in enumerate(self._rows):
            if answer is None or answer.ticket.ended:
                continue
            count, ticket = int(counts_R[row]), answer.ticket
            if answer.seen <= len(answer.prompt.begun) < count:
                self.metrics.first_token.observe(time.monotonic() - ticket.arrived)
            if not (finished_R[row] or ticket.stream or ticket.settings.stop):
                answer.seen = count
                continue
            arrays = tokens_RxN, log_probs_RxN, *(likeliest if ticket.alternatives else ())
            made = TokenLogProbs.of_arrays(*(array[row, :count] for array in arrays))
            free_R[row] = self._deliver(answer, made, bool(finished_R[row]))
        if free_R.any():
            self._release(free_R)

    def _deliver(self, answer: Answer, made: TokenLogProbs, finished: bool) -> bool:
        """Delivers the new part of one answer; returns whether it has ended."""
        ticket, now, prompt = answer.ticket, time.monotonic(), answer.prompt
        given = len(prompt.begun)
        ids, log_probs = made.tokens[given:], made.log_probs[given:]
        seen = max(0, answer.seen - given)
        piece = ""
        if answer.text:
            piece = answer.text.push(ids, last=finished)
            finished |= answer.text.stopped
        elif ticket.settings.stop and not finished:
            text = text_after(self.prompts.vocabulary, prompt.context, ids)
            finished = find_stop(text, ticket.settings.stop) is not None
        end, finish = len(ids), None
        if finished:
            whole = generation_of(
                self.prompts.vocabulary, ids, log_probs, ticket.settings.stop, None, prompt.context
            )
            end, finish = len(whole.tokens), whole.finish
            piece = piece if ticket.stream else whole.text
        if finished or (ticket.stream and (piece or end > seen)):
            start = seen if ticket.stream else 0
            ticket.deliver(
                Update(
                    answer.index,
                    piece,
                    ids[start:end],
                    log_probs[start:end],
                    finish,
                    made.likeliest[given + start : given + end],
                    None if answer.begun else self._prompt_log_probs(answer, made),
                )
            )
            answer.begun = True
        if finished:
            seconds = now - ticket.arrived
            self._answer_seconds += 0.1 * (seconds - self._answer_seconds)
            self.metrics.duration.observe(seconds)
            self.metrics.answers.labels(finish).inc()
            self.metrics.output_tokens.inc(end)
        answer.seen = given + end
        return finished

    def _prompt_log_probs(self, answer: Answer, made: TokenLogProbs) -> TokenLogProbs | None:
        """Those of the prompt's tokens, from the encoder-side input or the forced answer
        prefix."""
        if not answer.ticket.prompt_log_probs:
            return None
        given = len(answer.prompt.begun)
        begun = TokenLogProbs(made.tokens[:given], made.log_probs[:given], made.likeliest[:given])
        return answer.input_log_probs or begun
