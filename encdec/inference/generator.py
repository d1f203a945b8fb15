"""Texts in, texts out: batches of similar lengths through the compiled programs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from encdec.data.vocabulary import Vocabulary, load_vocabulary, recorded_vocabulary
from encdec.errors import ConfigError
from encdec.inference.drafting import Draft
from encdec.inference.generation_settings import AUTO, GenerationSettings
from encdec.inference.rows import CompiledRows, PreparedInput, RowDecoder, Rows
from encdec.inference.shapes import rows_within
from encdec.inference.text_io import (
    SOURCE,
    PromptFormat,
    TextStream,
    after_eos,
    find_stop,
    text_after,
    tokens_to_stop,
)
from encdec.model import ModelConfig
from encdec.saved.saved_config import read_config

# Steps between two looks at the answers: for stop strings, interrupts and progress.
STEPS_BETWEEN_LOOKS = 32

Finish = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the answer, without EOS and stop string.
        tokens: ids, with EOS or what completed the stop string.
        log_probs: the model's log-probability of each of these tokens, in nats.
        finish: why it ended.
        normalized_log_prob: of the answer, divided by beam search's length penalty, which orders
            answers; None otherwise.
        truncated: whether the input's end was cut off.
    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    finish: Finish
    normalized_log_prob: float | None = None
    truncated: bool = False


class TextGenerator:
    """Texts in, texts out, whatever runs the model.

    Args:
        rows: what runs it.
        prompts: how texts become inputs.
        max_tokens: new tokens where the settings leave it open.
        batch_rows: rows decoded together at most (inputs times samples or beams).

    Raises:
        ConfigError: the vocabulary is larger than the model's.
    """

    def __init__(
        self, rows: RowDecoder, prompts: PromptFormat, *, max_tokens: int, batch_rows: int
    ):
        if prompts.vocabulary.size > rows.config.vocab_size:
            raise ConfigError(
                f"the vocabulary has {prompts.vocabulary.size:,} ids, but the model's table only "
                f"{rows.config.vocab_size:,}; give the vocabulary that the model was trained with"
            )
        self._rows, self.config, self.paces = rows, rows.config, rows.paces
        self.prompts = prompts
        self.step = 0  # of the checkpoint; exports, and models that are given as such, have none
        self.max_tokens = max_tokens
        self.batch_rows = min(batch_rows, rows.rows_at_once or batch_rows)

    def generate(
        self,
        texts: Sequence[str],
        settings: GenerationSettings = GenerationSettings(),
        *,
        truncate: bool = False,
        first_number: int = 0,
        follow: int = 0,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[list[Generation]]:
        """Answers to each text, in the texts' order: ``settings.samples`` each, for beams the best.

        Args:
            texts: inputs; all are checked before anything is compiled.
            settings: how to generate.
            truncate: cut the end of long inputs instead of refusing them.
            first_number: number of the first text in a longer job, so that drawing does not
                depend on how the job is cut.
            follow: texts that later calls will give, for which it may pay to compile more.
            on_batch: called after each batch with the numbers of inputs and of tokens it made.

        Raises:
            ConfigError: a text instead of texts, which would be one for each character.
            DataError: an empty or too long text.
        """
        if isinstance(texts, str):
            raise ConfigError(f"texts is the text {texts[:40]!r}; expected a list of texts")
        inputs = self._encode(texts, truncate, first_number)
        return self._answers(inputs, settings, on_batch, follow)

    def generate_from_tokens(
        self,
        sources: Sequence[Sequence[int] | np.ndarray],
        settings: GenerationSettings = GenerationSettings(),
        *,
        numbers: Sequence[int] | None = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[list[Generation]]:
        """As ``generate``, from inputs that are tokens already, EOS included where it belongs.

        ``numbers`` are part of each input's random key, by default its place.

        Raises:
            DataError: an input without tokens, or with a token outside the vocabulary: the model's
                table may be larger, but such tokens have no text.
        """
        for place, ids in enumerate(sources):
            self.prompts.check_tokens(list(map(int, ids)), f"input {place}")
        numbers = range(len(sources)) if numbers is None else numbers
        inputs = [
            PreparedInput(number, place, list(map(int, ids)), False)
            for place, (number, ids) in enumerate(zip(numbers, sources, strict=True))
        ]
        return self._answers(inputs, settings, on_batch)

    def _answers(
        self,
        inputs: list[PreparedInput],
        settings: GenerationSettings,
        on_batch: Callable[[int, int], None] | None,
        follow: int = 0,
    ) -> list[list[Generation]]:
        results: list[list[Generation]] = [[] for _ in inputs]
        answer = self._beam_batch if settings.beams > 1 else self._batch
        # Like lengths together, longest first: what needs most memory comes at once.
        inputs.sort(key=lambda item: -len(item.ids))
        # As many as fill a program's rows.
        at_once = rows_within(max(1, self.batch_rows // max(settings.samples, settings.beams)))
        for begin in range(0, len(inputs), at_once):
            part = inputs[begin : begin + at_once]
            self.paces.budget.left = -(-(len(inputs) - begin + follow) // at_once) - 1
            answers = answer(part, settings)
            for item, made in zip(part, answers):
                results[item.place] = [
                    dataclasses.replace(one, truncated=item.truncated) for one in made
                ]
            if on_batch:
                on_batch(len(part), sum(len(one.tokens) for made in answers for one in made))
        return results

    def stream(
        self,
        text: str,
        settings: GenerationSettings = GenerationSettings(),
        *,
        truncate: bool = False,
        steps: int = 1,
    ) -> Iterator[str]:
        """The answer to one text piece by piece, as it is made; joined, ``generate``'s text.

        Args:
            text: the input.
            settings: one sample, no beams.
            truncate: cut the end of a long input instead of refusing it.
            steps: tokens between two pieces.

        Raises:
            ConfigError: several samples or beams, or no steps.
            DataError: an empty or too long text.
        """
        if steps < 1:
            raise ConfigError(f"steps is {steps}; expected 1 or more")
        if settings.samples > 1 or settings.beams > 1:
            raise ConfigError(
                f"a stream shows a single answer; samples is {settings.samples} and beams is "
                f"{settings.beams}, expected 1 and 1: use generate"
            )
        return self._stream(self._encode([text], truncate, 0), settings, steps)

    def _stream(
        self, inputs: list[PreparedInput], settings: GenerationSettings, steps: int
    ) -> Iterator[str]:
        pieces = TextStream(self.prompts.vocabulary, settings.stop, self._context(inputs[0]))
        for decoding in self._run(inputs, settings, steps):
            ids = np.array(decoding.tokens_RxN)[0, : int(decoding.counts_R[0])]
            last = bool(decoding.finished_R[0])
            piece = pieces.push(ids.tolist(), last=last)
            if piece:
                yield piece
            if pieces.stopped or last:
                return

    def _encode(
        self, texts: Sequence[str], truncate: bool, first_number: int
    ) -> list[PreparedInput]:
        inputs = []
        for place, text in enumerate(texts):
            number = first_number + place
            name = "the input" if len(texts) == 1 and not number else f"input {number}"
            ids, cut = self.prompts.encode(text, truncate=truncate, name=name)
            inputs.append(PreparedInput(number, place, ids, cut))
        return inputs

    def _context(self, item: PreparedInput) -> list[int]:
        """The tokens whose text an answer continues: a decoder-only model's input, unless EOS
        ends it. Without them a vocabulary that puts a space before every text, as Llama's, would
        leave out an answer's first space."""
        if self.config.is_encoder_decoder or self.prompts.inputs_eos:
            return []
        own = item.ids[len(self.prompts.inputs_prefix) :]
        return after_eos(own, self.prompts.vocabulary.eos_id)

    def _limit(self, settings: GenerationSettings) -> int:
        return settings.max_tokens or self.max_tokens

    def _run(
        self, inputs: Sequence[PreparedInput], settings: GenerationSettings, steps: int
    ) -> Rows:
        return self._rows.run(inputs, settings, self.prompts, self._limit(settings), steps)

    def _batch(
        self, inputs: Sequence[PreparedInput], settings: GenerationSettings
    ) -> list[list[Generation]]:
        run = self._run(inputs, settings, STEPS_BETWEEN_LOOKS)
        rows, stop = len(inputs) * settings.samples, settings.stop
        contexts = [self._context(item) for item in inputs for _ in range(settings.samples)]
        decoding = next(run)
        while True:
            # Copies: the buffers themselves are donated to the next steps.
            tokens, counts, log_probs = map(
                np.array, (decoding.tokens_RxN, decoding.counts_R, decoding.log_probs_RxN)
            )
            stopped_R = None
            if stop:
                stopped_R = np.zeros(len(counts), bool)
                for row in range(rows):
                    made = tokens[row, : counts[row]].tolist()
                    text = text_after(self.prompts.vocabulary, contexts[row], made)
                    stopped_R[row] = find_stop(text, stop) is not None
            try:
                decoding = run.send(stopped_R)
            except StopIteration:
                break
        vocabulary = self.prompts.vocabulary
        answers = [
            generation_of(
                vocabulary,
                tokens[row, : counts[row]].tolist(),
                log_probs[row].tolist(),
                stop,
                context=contexts[row],
            )
            for row in range(rows)
        ]
        return [answers[i : i + settings.samples] for i in range(0, rows, settings.samples)]

    def _beam_batch(
        self, inputs: Sequence[PreparedInput], settings: GenerationSettings
    ) -> list[list[Generation]]:
        found = self._rows.search(inputs, settings, self.prompts, self._limit(settings))
        return [
            [
                generation_of(
                    self.prompts.vocabulary,
                    found.tokens_BxKxN[row, beam, : found.counts_BxK[row, beam]].tolist(),
                    found.log_probs_BxKxN[row, beam].tolist(),
                    (),
                    float(found.totals_BxK[row, beam]),
                    self._context(inputs[row]),
                )
                for beam in range(settings.samples)
                if np.isfinite(found.totals_BxK[row, beam])
            ]
            for row in range(len(inputs))
        ]


class Generator(TextGenerator):
    """A model ready to generate text.

    Args:
        config: the model.
        params: its parameters, as trained (scanned or not).
        prompts: how texts become inputs.
        max_tokens: new tokens where the settings leave it open.
        batch_rows: rows decoded together at most (inputs times samples or beams).
        dtype: see ``ready_for_decoding``.
        devices: rows are split over these; by default all are where the parameters are.
        tensor: over so many devices each copy of the parameters is split (heads, MLP and
            vocabulary), for models that are too large for one or to read them faster.
        draft: what several tokens per step are drafted from; see ``encdec.inference.drafting``.

    Raises:
        ConfigError: the vocabulary is larger than the model's, or a number of devices that
            ``tensor`` does not divide or leaves copies that are no power of two.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        prompts: PromptFormat,
        *,
        max_tokens: int = 128,
        batch_rows: int = 16,
        dtype: str | None = None,
        devices: Sequence[jax.Device] = (),
        tensor: int = 1,
        draft: Draft = AUTO,
    ):
        rows = CompiledRows(config, params, dtype, devices, tensor, draft)
        super().__init__(rows, prompts, max_tokens=max_tokens, batch_rows=batch_rows)


def generation_of(
    vocabulary: Vocabulary,
    tokens: list[int],
    log_probs: list[float],
    stop: Sequence[str],
    normalized_log_prob: float | None = None,
    context: Sequence[int] = (),
) -> Generation:
    """The answer that these tokens make, ended at the first stop string among them.

    ``context`` are tokens of the same text that come before them.
    """
    finish: Finish = "eos" if tokens and tokens[-1] == vocabulary.eos_id else "length"
    count = tokens_to_stop(vocabulary, tokens, stop, context)
    if count is not None:
        tokens, finish = tokens[:count], "stop"
    text = text_after(vocabulary, context, tokens)
    if finish == "stop":
        text = text[: find_stop(text, stop)]
    return Generation(text, tokens, log_probs[: len(tokens)], finish, normalized_log_prob)


def read_prompt_format(
    workdir: str | os.PathLike[str], *, max_input_tokens: int | None = None
) -> tuple[PromptFormat, int]:
    """The prompt format of a work directory, and the length its answers were trained at.

    Args:
        workdir: what ``encdec train --workdir=`` wrote.
        max_input_tokens: longest input allowed; by default the longest in training.

    Raises:
        CheckpointError: it is not a work directory.
        DataError: its vocabulary is missing or another one.
    """
    content = read_config(workdir)
    data, recorded = content["data"], recorded_vocabulary(content, workdir)
    vocabulary = load_vocabulary(recorded, directory=workdir)
    prompts = PromptFormat(
        vocabulary,
        data["decoder_start_id"],
        data["inputs_eos"],
        max_input_tokens or data["inputs_length"],
        inputs_prefix=tuple(data.get("inputs_prefix", ())),
        template=data.get("template", SOURCE),
    )
    return prompts, data["targets_length"]
