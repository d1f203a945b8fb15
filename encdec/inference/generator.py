"""Texts in, texts out: batches of like lengths through the compiled programs."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from encdec.data.vocabulary import Vocabulary, load_vocabulary, recorded_vocabulary
from encdec.errors import ConfigError, DataError
from encdec.inference.beam import Hypotheses, beam_search
from encdec.inference.decoding import Decoding, DecodingPlan, advance_compiled, start_compiled
from encdec.inference.ready import ready_for_decoding
from encdec.inference.sampling import Choosing, RowSettings
from encdec.inference.settings import GenerationSettings
from encdec.inference.text import PromptFormat, TextStream, find_stop, text_after, tokens_to_stop
from encdec.model import ModelConfig, abstract_params, build_model, logical_axes
from encdec.train.config import MeshConfig
from encdec.train.sharding import ShardingRules, make_mesh, param_shardings
from encdec.train.workdir import read_config

# States of the rows; what is sent back says which of them to finish early, bool [R].
Rows = collections.abc.Generator[Decoding, np.ndarray | None, None]
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
        score: beam search's, by which answers are ordered; None otherwise.
        truncated: whether the input's end was cut off.
    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    finish: Finish
    score: float | None = None
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class PreparedInput:
    """A text as the model reads it."""

    number: int  # of the whole job: part of the random key
    place: int  # among the texts of the call
    ids: list[int]
    truncated: bool


def bucket(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that holds ``length``: few shapes, little waste."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class RowDecoder(Protocol):
    """What runs a model for a ``TextGenerator``: rows of tokens in, rows of tokens out.

    Attributes:
        config: the model.
        rows_at_once: how many inputs it reads together; 0 is any number.
    """

    config: ModelConfig
    rows_at_once: int

    def run(
        self,
        inputs: Sequence[PreparedInput],
        settings: GenerationSettings,
        prompts: PromptFormat,
        limit: int,
        steps: int,
    ) -> Rows:
        """The state after the first token, and then every ``steps`` tokens until all finish.

        The caller may send back which rows to finish early, bool [R]. ``limit`` is the most new
        tokens of a row.
        """

    def search(
        self,
        inputs: Sequence[PreparedInput],
        settings: GenerationSettings,
        prompts: PromptFormat,
        limit: int,
    ) -> Hypotheses:
        """The best answers by beam search.

        Raises:
            ConfigError: it has no beam search.
        """


class CompiledRows:
    """``RowDecoder`` of our own compiled programs; ``Generator`` explains the arguments."""

    rows_at_once = 0

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        dtype: str | None = None,
        devices: Sequence[jax.Device] = (),
        tensor: int = 1,
    ):
        self.config, self.params = ready_for_decoding(config, params, dtype)
        self._rows_sharding: NamedSharding | None = None
        if len(devices) > 1 or tensor > 1:
            self._spread(devices, tensor)

    def _spread(self, devices: Sequence[jax.Device], tensor: int) -> None:
        """Shards the parameters over a mesh, and rows with them."""
        copies = len(devices) // max(tensor, 1)
        if tensor < 1 or len(devices) % tensor or copies & (copies - 1):
            raise ConfigError(
                f"{len(devices)} devices cannot share batches of rows with each copy "
                f"of the model over tensor = {tensor} of them; expected 1, 2, 4, 8, "
                "... times tensor"
            )
        mesh = make_mesh(MeshConfig(data=copies, fsdp=1, tensor=tensor), devices)
        model = build_model(self.config)
        shardings, _, _ = param_shardings(
            ShardingRules(), mesh, abstract_params(model), logical_axes(model)
        )
        self.params = jax.device_put(self.params, shardings)
        self._rows_sharding = NamedSharding(mesh, PartitionSpec("data"))

    def _arrays(self, inputs: Sequence[PreparedInput]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, S] and lengths [B]; both sizes rounded up, padding rows of one pad token."""
        rows = 1 << (len(inputs) - 1).bit_length()
        if self._rows_sharding:
            rows = max(rows, self._rows_sharding.mesh.shape["data"])
        width = bucket(max(len(item.ids) for item in inputs))
        tokens_BxS, lengths_B = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
        for row, item in enumerate(inputs):
            tokens_BxS[row, : len(item.ids)] = item.ids
            lengths_B[row] = len(item.ids)
        if self._rows_sharding:
            return jax.device_put((tokens_BxS, lengths_B), self._rows_sharding)
        return tokens_BxS, lengths_B

    def run(
        self,
        inputs: Sequence[PreparedInput],
        settings: GenerationSettings,
        prompts: PromptFormat,
        limit: int,
        steps: int,
    ) -> Rows:
        tokens_BxS, lengths_B = self._arrays(inputs)
        choosing = choosing_of(settings, prompts.vocabulary.size)
        plan = DecodingPlan(choosing, bucket(limit), prompts.decoder_start_id)
        rows = row_settings(settings, inputs, len(tokens_BxS), limit, prompts.vocabulary.eos_id)
        decoding = start_compiled(self.config, plan, self.params, tokens_BxS, lengths_B, rows)
        while True:
            stop_R = yield decoding
            if stop_R is not None:
                decoding = decoding.replace(finished_R=decoding.finished_R | stop_R)
            if bool(jnp.all(decoding.finished_R)):
                return
            decoding = advance_compiled(self.config, plan, self.params, decoding, steps)

    def search(
        self,
        inputs: Sequence[PreparedInput],
        settings: GenerationSettings,
        prompts: PromptFormat,
        limit: int,
    ) -> Hypotheses:
        return beam_search(
            self.config,
            self.params,
            *self._arrays(inputs),
            settings.length_penalty,
            limit,
            beams=settings.beams,
            room=bucket(limit),
            start_id=prompts.decoder_start_id,
            eos_id=prompts.vocabulary.eos_id,
            vocabulary_size=prompts.vocabulary.size,
        )


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
                f"the vocabulary has {prompts.vocabulary.size:,} ids and the model's table "
                f"{rows.config.vocab_size:,}; give the vocabulary that the model was trained with"
            )
        self._rows, self.config = rows, rows.config
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.batch_rows = min(batch_rows, rows.rows_at_once or batch_rows)

    def generate(
        self,
        texts: Sequence[str],
        settings: GenerationSettings = GenerationSettings(),
        *,
        truncate: bool = False,
        first_number: int = 0,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[list[Generation]]:
        """Answers to each text, in the texts' order: ``settings.samples`` each, for beams the best.

        Args:
            texts: inputs; all are checked before anything is compiled.
            settings: how to generate.
            truncate: cut the end of long inputs instead of refusing them.
            first_number: number of the first text in a longer job, so that drawing does not
                depend on how the job is cut.
            on_batch: called after each batch with the numbers of inputs and of tokens it made.

        Raises:
            DataError: an empty or too long text.
        """
        return self._answers(self._encode(texts, truncate, first_number), settings, on_batch)

    def generate_from_tokens(
        self,
        sources: Sequence[Sequence[int]],
        settings: GenerationSettings = GenerationSettings(),
        *,
        numbers: Sequence[int] | None = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[list[Generation]]:
        """As ``generate``, from inputs that are tokens already, EOS included where it belongs.

        ``numbers`` are part of each input's random key, by default its place.

        Raises:
            DataError: an input without tokens, or with one that the model has not.
        """
        for place, ids in enumerate(sources):
            if not len(ids):
                raise DataError(f"input {place} has no tokens; give at least one")
            if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
                raise DataError(
                    f"input {place} has tokens from {min(ids)} to {max(ids)}; the "
                    f"model has 0 to {self.config.vocab_size - 1}"
                )
        numbers = range(len(sources)) if numbers is None else numbers
        inputs = [
            PreparedInput(number, place, list(map(int, ids)), False)
            for place, (number, ids) in enumerate(zip(numbers, sources))
        ]
        return self._answers(inputs, settings, on_batch)

    def _answers(
        self,
        inputs: list[PreparedInput],
        settings: GenerationSettings,
        on_batch: Callable[[int, int], None] | None,
    ) -> list[list[Generation]]:
        results: list[list[Generation]] = [[] for _ in inputs]
        answer = self._beam_batch if settings.beams > 1 else self._batch
        # Like lengths together, longest first: what needs most memory comes at once.
        inputs.sort(key=lambda item: -len(item.ids))
        at_once = max(1, self.batch_rows // max(settings.samples, settings.beams))
        for begin in range(0, len(inputs), at_once):
            part = inputs[begin : begin + at_once]
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
            ConfigError: several samples or beams.
            DataError: an empty or too long text.
        """
        if settings.samples > 1 or settings.beams > 1:
            raise ConfigError(
                f"a stream shows one answer as it grows; samples is {settings.samples} and beams "
                f"is {settings.beams}, expected 1 and 1: use generate"
            )
        return self._stream(self._encode([text], truncate, 0), settings, steps)

    def _stream(
        self, inputs: list[PreparedInput], settings: GenerationSettings, steps: int
    ) -> Iterator[str]:
        pieces = TextStream(self.prompts.vocabulary, settings.stop)
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
        decoding = next(run)
        while True:
            # Copies: the buffers themselves are given over to the next steps.
            tokens, counts, log_probs = map(
                np.array, (decoding.tokens_RxN, decoding.counts_R, decoding.log_probs_RxN)
            )
            stopped_R = None
            if stop:
                stopped_R = np.zeros(len(counts), bool)
                for row in range(rows):
                    text = self.prompts.vocabulary.decode(tokens[row, : counts[row]])
                    stopped_R[row] = find_stop(text, stop) is not None
            try:
                decoding = run.send(stopped_R)
            except StopIteration:
                break
        vocabulary = self.prompts.vocabulary
        made = [
            generation_of(
                vocabulary, tokens[row, : counts[row]].tolist(), log_probs[row].tolist(), stop
            )
            for row in range(rows)
        ]
        return [made[i : i + settings.samples] for i in range(0, rows, settings.samples)]

    def _beam_batch(
        self, inputs: Sequence[PreparedInput], settings: GenerationSettings
    ) -> list[list[Generation]]:
        found = self._rows.search(inputs, settings, self.prompts, self._limit(settings))
        found = jax.tree.map(np.asarray, found)
        return [
            [
                generation_of(
                    self.prompts.vocabulary,
                    found.tokens_BxKxN[row, beam, : found.counts_BxK[row, beam]].tolist(),
                    found.log_probs_BxKxN[row, beam].tolist(),
                    (),
                    float(found.scores_BxK[row, beam]),
                )
                for beam in range(settings.samples)
                if np.isfinite(found.scores_BxK[row, beam])
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
    ):
        rows = CompiledRows(config, params, dtype, devices, tensor)
        super().__init__(rows, prompts, max_tokens=max_tokens, batch_rows=batch_rows)


def generation_of(
    vocabulary: Vocabulary,
    tokens: list[int],
    log_probs: list[float],
    stop: Sequence[str],
    score: float | None = None,
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
    return Generation(text, tokens, log_probs[: len(tokens)], finish, score)


def choosing_of(settings: GenerationSettings, vocabulary_size: int) -> Choosing:
    """The smallest sampler program that covers these settings."""
    sampled = settings.temperature > 0
    return Choosing(
        vocabulary_size,
        sampled,
        sampled and (settings.top_k > 0 or settings.top_p < 1),
        settings.repetition_penalty != 1
        or settings.presence_penalty != 0
        or settings.frequency_penalty != 0,
        settings.no_repeat_ngram > 0,
        biases=len(settings.logit_bias),
    )


def row_settings(
    settings: GenerationSettings,
    inputs: Sequence[PreparedInput],
    batch: int,
    limit: int,
    eos_id: int,
) -> RowSettings:
    """The same settings for every row, keys by the input's number; surplus rows do nothing."""
    rows, samples = batch * settings.samples, settings.samples
    numbers_R = np.zeros(rows, np.uint32)
    numbers_R[: len(inputs) * samples] = np.repeat([item.number for item in inputs], samples)
    limits_R = np.zeros(rows, np.int32)
    limits_R[: len(inputs) * samples] = limit
    samples_R = np.arange(rows, dtype=np.uint32) % samples
    return settings_of_answers(settings, numbers_R, samples_R, limits_R, eos_id)


def settings_of_answers(
    settings: GenerationSettings,
    numbers_R: np.ndarray,
    samples_R: np.ndarray,
    limits_R: np.ndarray,
    eos_id: int,
    *,
    biases: int | None = None,
    given: int = 0,
    alternatives: int = 0,
) -> RowSettings:
    """Rows of answers, each known by its input's number and its own among that input's samples.

    Args:
        settings: of all of them.
        numbers_R: of the inputs, uint32.
        samples_R: among the input's samples, uint32.
        limits_R: tokens at most, int32.
        eos_id: ends an answer.
        biases: places for them in the program; as many as the settings have where it is None.
        given: tokens with which every answer begins.
        alternatives: above 0, the likeliest tokens of each place are kept.
    """
    rows = len(limits_R)
    # NumPy's arrays, which the compiled program takes as it takes its own.
    as_array = functools.partial(cast, jax.Array)
    fill = lambda value, dtype: as_array(np.full(rows, value, dtype))
    places = len(settings.logit_bias) if biases is None else biases
    bias_ids, bias_values = np.full(places, -1, np.int32), np.zeros(places, np.float32)
    for place, (token, bias) in enumerate(settings.logit_bias):
        bias_ids[place], bias_values[place] = token, bias
    return RowSettings(
        temperature_R=fill(settings.temperature, np.float32),
        top_k_R=fill(settings.top_k, np.int32),
        top_p_R=fill(settings.top_p, np.float32),
        repetition_penalty_R=fill(settings.repetition_penalty, np.float32),
        presence_penalty_R=fill(settings.presence_penalty, np.float32),
        frequency_penalty_R=fill(settings.frequency_penalty, np.float32),
        bias_ids_RxB=as_array(np.tile(bias_ids, (rows, 1))),
        biases_RxB=as_array(np.tile(bias_values, (rows, 1))),
        no_repeat_ngram_R=fill(settings.no_repeat_ngram, np.int32),
        given_R=fill(given, np.int32),
        alternatives_R=fill(alternatives, np.int32),
        limit_R=as_array(limits_R),
        eos_R=fill(eos_id, np.int32),
        keys_R=_keys(np.uint32(settings.seed), numbers_R, samples_R),
    )


@jax.jit
def _keys(seed: jax.Array, numbers_R: jax.Array, samples_R: jax.Array) -> jax.Array:
    fold_each = jax.vmap(jax.random.fold_in)
    keys_R = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), numbers_R)
    return fold_each(keys_R, samples_R)


def read_prompt_format(
    workdir: str | os.PathLike[str], *, max_input_tokens: int | None = None
) -> tuple[PromptFormat, int]:
    """The prompt format of a work directory, and the length its answers were trained at.

    Args:
        workdir: what ``encdec train --workdir=`` wrote.
        max_input_tokens: longest input allowed; by default the longest in training.

    Raises:
        CheckpointError: it is no work directory.
        DataError: its vocabulary is missing or another one.
    """
    content = read_config(workdir)
    data, recorded = content["data"], recorded_vocabulary(content, workdir)
    vocabulary = load_vocabulary(recorded, directory=pathlib.Path(workdir))
    prompts = PromptFormat(
        vocabulary,
        data["decoder_start_id"],
        data["inputs_eos"],
        max_input_tokens or data["inputs_length"],
        inputs_prefix=tuple(data.get("inputs_prefix", ())),
    )
    return prompts, data["targets_length"]
