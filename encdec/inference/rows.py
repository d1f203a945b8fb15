"""Rows of tokens in, rows of tokens out: batches through the compiled programs."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from encdec.errors import ConfigError
from encdec.inference.beam import Hypotheses, beam_search
from encdec.inference.beam_steps import BeamPlan
from encdec.inference.cache_memory import check_batch
from encdec.inference.decoding import Decoding, DecodingPlan, start_compiled
from encdec.inference.drafting import Draft, Drafters, DraftModel, Paces
from encdec.inference.generation_settings import AUTO, GenerationSettings
from encdec.inference.leaving import LeavingRows, rows_leave
from encdec.inference.ready import ready_for_decoding
from encdec.inference.sampling import Choosing, RowSettings
from encdec.inference.shapes import bucket, row_count
from encdec.inference.text_io import PromptFormat
from encdec.model import ModelConfig, abstract_params, build_model, logical_axes
from encdec.train.run_fields import MeshConfig
from encdec.train.sharding import ShardingRules, make_mesh, param_shardings

# States of the rows; what is sent back says which of them to finish early, bool [R].
Rows = collections.abc.Generator[Decoding, np.ndarray | None, None]


@dataclasses.dataclass(frozen=True)
class PreparedInput:
    """A text as the model reads it."""

    number: int  # of the whole job: part of the random key
    place: int  # among the texts of the call
    ids: list[int]
    truncated: bool


class RowDecoder(Protocol):
    """What runs a model for a ``TextGenerator``: rows of tokens in, rows of tokens out.

    Attributes:
        config: the model.
        rows_at_once: how many inputs it reads together; 0 is any number.
        paces: what was learned of drafting.
    """

    config: ModelConfig
    rows_at_once: int
    paces: Paces

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


def check_division(devices: int, tensor: int) -> int:
    """The copies of a model on so many devices; ConfigError where they do not divide."""
    copies = devices // max(tensor, 1)
    if tensor < 1 or devices % tensor or copies & (copies - 1):
        raise ConfigError(
            f"{devices} devices cannot hold copies of the model over tensor = {tensor} devices "
            "each; expected tensor times 1, 2, 4, 8, ..."
        )
    return copies


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
        draft: Draft = AUTO,
    ):
        self.config, self.params = ready_for_decoding(config, params, dtype)
        self._rows_sharding: NamedSharding | None = None
        if len(devices) > 1 or tensor > 1:
            self._spread(devices, tensor)
            if isinstance(draft, DraftModel):
                assert self._rows_sharding is not None
                whole = NamedSharding(self._rows_sharding.mesh, PartitionSpec())
                draft = dataclasses.replace(draft, params=jax.device_put(draft.params, whole))
        self._drafters = Drafters(self.config, self.params, draft, self._rows_sharding)
        self.paces = self._drafters.paces

    def _spread(self, devices: Sequence[jax.Device], tensor: int) -> None:
        """Shards the parameters over a mesh, and rows with them."""
        copies = check_division(len(devices), tensor)
        mesh = make_mesh(MeshConfig(data=copies, fsdp=1, tensor=tensor), devices)
        model = build_model(self.config)
        shardings, _, _ = param_shardings(
            ShardingRules(), mesh, abstract_params(model), logical_axes(model)
        )
        self.params = jax.device_put(self.params, shardings)
        self._rows_sharding = NamedSharding(mesh, PartitionSpec("data"))

    def _arrays(self, inputs: Sequence[PreparedInput]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, S] and lengths [B]; both sizes rounded up, padding rows of one pad token."""
        copies = self._rows_sharding.mesh.shape["data"] if self._rows_sharding else 1
        rows = row_count(len(inputs), copies)
        width = bucket(max(len(item.ids) for item in inputs))
        tokens_BxS, lengths_B = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
        for row, item in enumerate(inputs):
            tokens_BxS[row, : len(item.ids)] = item.ids
            lengths_B[row] = len(item.ids)
        return tokens_BxS, lengths_B

    def _placed(self, arrays: tuple[np.ndarray, ...]) -> Any:
        """Row arrays where the rows are computed."""
        return jax.device_put(arrays, self._rows_sharding) if self._rows_sharding else arrays

    def run(
        self,
        inputs: Sequence[PreparedInput],
        settings: GenerationSettings,
        prompts: PromptFormat,
        limit: int,
        steps: int,
    ) -> Rows:
        tokens_BxS, lengths_B = self._arrays(inputs)
        check_batch(self.config, tokens_BxS.shape, settings.samples, bucket(limit))
        choosing = choosing_of(settings, prompts.vocabulary.size)
        plan = DecodingPlan(choosing, bucket(limit), prompts.decoder_start_id)
        rows = row_settings(settings, inputs, len(tokens_BxS), limit, prompts.vocabulary.eos_id)
        arrays = self._placed((tokens_BxS, lengths_B))
        decoding = start_compiled(self.config, plan, self.params, *arrays, rows)
        advance = self._drafters.begin(
            plan, tokens_BxS, lengths_B, settings.samples, len(prompts.inputs_prefix)
        )
        count = len(rows.limit_R)
        if rows_leave() and self._rows_sharding is None and self.paces.of(count) is None:
            advance = LeavingRows(self.config, self.params, advance, count).advance
        yield from until_finished(decoding, advance, steps)

    def search(
        self,
        inputs: Sequence[PreparedInput],
        settings: GenerationSettings,
        prompts: PromptFormat,
        limit: int,
    ) -> Hypotheses:
        plan = BeamPlan(
            beams=settings.beams,
            capacity=bucket(limit),
            start_id=prompts.decoder_start_id,
            eos_id=prompts.vocabulary.eos_id,
            vocabulary_size=prompts.vocabulary.size,
        )
        tokens_BxS, lengths_B = self._arrays(inputs)
        check_batch(self.config, tokens_BxS.shape, settings.beams, plan.capacity)
        tokens_BxS, lengths_B = self._placed((tokens_BxS, lengths_B))
        return beam_search(
            self.config,
            plan,
            self.params,
            tokens_BxS,
            lengths_B,
            settings.length_penalty,
            limit,
            inputs=len(inputs),
            sharding=self._rows_sharding,
        )


def until_finished(
    decoding: Decoding, advance: Callable[[Decoding, int], Decoding], steps: int
) -> Rows:
    """The state now and after every ``steps`` tokens, until every row has finished."""
    while True:
        stop_R = yield decoding
        if stop_R is not None:
            decoding = decoding.replace(finished_R=decoding.finished_R | stop_R)
        if np.asarray(decoding.finished_R).all():
            return
        decoding = advance(decoding, steps)


def choosing_of(settings: GenerationSettings, vocabulary_size: int) -> Choosing:
    """The smallest sampler program that covers these settings.

    Raises:
        ConfigError: a bias of a token that the vocabulary does not have.
    """
    for token, _ in settings.logit_bias:
        if type(token) is not int or not 0 <= token < vocabulary_size:
            raise ConfigError(
                f"logit_bias has the token {token!r}, but the vocabulary has ids from 0 to "
                f"{vocabulary_size - 1}"
            )
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
