"""Likelihood of the references: perplexity, bits per byte, and calibration error.

The model reads each source and its first reference once (teacher forcing), independently of its
own answer. Only sums are kept per example, so that every score, with its interval, is one addition
per bootstrap sample.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from encdec.data.features import LAYOUTS
from encdec.data.records import encode_row
from encdec.evaluation.predictions import Example, OnBatch, TooLong, is_skipped, open_windows
from encdec.evaluation.share_files import ShareFiles
from encdec.inference.shapes import bucket
from encdec.inference.text_io import PromptFormat
from encdec.metrics.score import Score, bits_per_byte, ratio_score
from encdec.model import ModelConfig, build_model
from encdec.train.losses import loss_positions

# Long texts are read a few at a time: attention scores grow with the square of the length; for
# 64 essays of 2,000 tokens they took 15 GB.
TOKENS_AT_ONCE = 2**14
CALIBRATION_BINS = 15  # as in Guo et al. 2017


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Sums over one reference's tokens, EOS included.

    Attributes:
        nats: negative log-probability; NaN if the example was skipped.
        tokens: how many.
        text_bytes: of the reference in UTF-8.
        bins: CALIBRATION_BINS times (tokens, summed confidence, number correct) of the most likely
            token at each position, by confidence.
    """

    nats: float
    tokens: int
    text_bytes: int
    bins: tuple[tuple[float, float, float], ...]


SKIPPED = Likelihood(math.nan, 0, 0, ((0.0, 0.0, 0.0),) * CALIBRATION_BINS)


class LikelihoodFiles:
    """One task's likelihoods, stored with its predictions and checked by the same settings.

    Args:
        directory: of the task's ``PredictionFiles``.
    """

    def __init__(self, directory: pathlib.Path):
        self._shares = ShareFiles(directory, "likelihood", "a likelihood of this command")
        self.writing = self._shares.writing

    def read(self) -> dict[int, Likelihood]:
        """All stored likelihoods, by the example's index; an unfinished last line is left out.

        Raises:
            DataError: a malformed line.
        """
        return dict(row for _, row in self._shares.read(_likelihood))

    def append(self, shard: int, made: Mapping[int, Likelihood]) -> None:
        """Appends likelihoods by the example's index; they are on disk on return."""
        self._shares.append(
            shard,
            (
                {
                    "index": index,
                    "nats": None if one is SKIPPED else one.nats,
                    "tokens": one.tokens,
                    "bytes": one.text_bytes,
                    "bins": one.bins,
                }
                for index, one in made.items()
            ),
        )


def _likelihood(row: Mapping[str, Any]) -> tuple[int, Likelihood]:
    """A stored row: the example's index, and its likelihood."""
    if row["nats"] is None:
        return row["index"], SKIPPED
    bins = tuple(map(tuple, row["bins"]))
    return row["index"], Likelihood(row["nats"], row["tokens"], row["bytes"], bins)


class LikelihoodModel:
    """A model that reads references.

    Args:
        config: the model.
        params: its parameters, as trained.
        prompts: how texts become inputs; the end of long sources is cut.
        batch_rows: most examples read at once.
        devices: rows are split over these, each with a copy of the parameters; none: the
            parameters' own.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        prompts: PromptFormat,
        *,
        batch_rows: int = 16,
        devices: Sequence[jax.Device] = (),
    ):
        self._config, self.prompts = config, prompts
        self._rows = -(-batch_rows // max(1, len(devices))) * max(1, len(devices))
        self._sharding = None
        if len(devices) > 1:
            mesh = jax.sharding.Mesh(np.array(devices), ("data",))
            spec = jax.sharding.PartitionSpec
            self._sharding = jax.sharding.NamedSharding(mesh, spec("data"))
            params = jax.device_put(params, jax.sharding.NamedSharding(mesh, spec()))
        self._params = params
        self._sums = jax.jit(_sums_function(config), static_argnums=2)

    def of(self, examples: Sequence[Example], on_batch: OnBatch | None = None) -> list[Likelihood]:
        """The likelihood of each example's first reference.

        Args:
            examples: at least one token each.
            on_batch: called with numbers of examples and of reference tokens.
        """
        vocabulary = self.prompts.vocabulary
        pairs = [
            (
                np.array(self.prompts.encode(one.source, truncate=True)[0], np.int32),
                np.array([*vocabulary.encode(one.references[0]), vocabulary.eos_id], np.int32),
            )
            for one in examples
        ]
        found: list[Likelihood] = [SKIPPED] * len(pairs)
        # Texts of similar length together.
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        while order:
            rows = self._rows_at_once(sum(map(len, pairs[order[0]])))
            part, order = order[:rows], order[rows:]
            nats, tokens, bins = self._batch([pairs[i] for i in part], rows)
            for place, index in enumerate(part):
                found[index] = Likelihood(
                    float(nats[place]),
                    int(tokens[place]),
                    len(examples[index].references[0].encode()),
                    tuple((float(n), float(sure), float(right)) for n, sure, right in bins[place]),
                )
            if on_batch:
                on_batch(len(part), int(tokens[: len(part)].sum()))
        return found

    def _rows_at_once(self, longest: int) -> int:
        """Rows of a batch: fewer, by powers of two, for long texts, and at least one per device."""
        least = 1 if self._sharding is None else self._sharding.mesh.size
        rows = self._rows
        while rows % (2 * least) == 0 and rows * longest > TOKENS_AT_ONCE:
            rows //= 2
        return rows

    def _batch(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], size: int
    ) -> tuple[np.ndarray, ...]:
        targets_length = bucket(max(len(target) for _, target in pairs))
        rows = [encode_row([source], [target], "uint32") for source, target in pairs]
        batch = LAYOUTS[self._config.architecture](
            rows + [b""] * (size - len(rows)),
            inputs_length=bucket(max(len(source) for source, _ in pairs)),
            targets_length=targets_length,
            dtype="uint32",
            start_id=self.prompts.decoder_start_id,
        )
        placed = jax.device_put(batch, self._sharding)
        return tuple(map(np.asarray, self._sums(self._params, placed, targets_length)))


def _sums_function(config: ModelConfig) -> Callable[..., tuple[jax.Array, ...]]:
    model = build_model(config)

    def sums(params: Any, batch: Mapping[str, jax.Array], targets_length: int):
        hidden = cast(jax.Array, model.apply({"params": params}, batch, method="hidden"))
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        if not config.is_encoder_decoder:
            hidden, targets, weights = loss_positions(hidden, batch, targets_length)
        logits = cast(jax.Array, model.apply({"params": params}, hidden, method="logits"))
        log_probs_BxTxV = jax.nn.log_softmax(logits.astype(jnp.float32))
        picked = jnp.take_along_axis(log_probs_BxTxV, targets[..., None], axis=-1)[..., 0]
        confidence = jnp.exp(jnp.max(log_probs_BxTxV, axis=-1))
        right = jnp.argmax(log_probs_BxTxV, axis=-1) == targets
        # A bin includes its upper edge, as in the paper.
        place = jnp.clip(
            jnp.ceil(confidence * CALIBRATION_BINS).astype(jnp.int32) - 1, 0, CALIBRATION_BINS - 1
        )
        values = jnp.stack([jnp.ones_like(confidence), confidence, right], axis=-1)
        bins = jnp.einsum(
            "btc,btn->bnc", values * weights[..., None], jax.nn.one_hot(place, CALIBRATION_BINS)
        )
        return -jnp.sum(picked * weights, axis=1), jnp.sum(weights, axis=1), bins

    return sums


def measure(
    model: LikelihoodModel,
    files: LikelihoodFiles,
    examples: Sequence[Example],
    *,
    too_long: TooLong = "cut",
    shard: int = 0,
    shards: int = 1,
    on_batch: OnBatch | None = None,
) -> None:
    """Measures and writes the missing likelihoods of this process's windows, like ``predict``."""
    with files.writing(shard):
        done = set(files.read())
        for window in open_windows(len(examples), done, shard, shards):
            wanted = [index for index in window if index not in done]
            kept = [
                index
                for index in wanted
                if not is_skipped(model.prompts, examples[index].source, too_long)
            ]
            made = dict(zip(kept, model.of([examples[index] for index in kept], on_batch)))
            files.append(shard, {index: made.get(index, SKIPPED) for index in wanted})


def likelihood_scores(found: Sequence[Likelihood]) -> list[Score]:
    """Perplexity per token, bits per byte and the calibration error of those not skipped.

    Perplexity is exp of the mean nats per token, over all tokens; the calibration error is that of
    the likeliest token (Guo et al. 2017), 0 to 100.
    """
    kept = [one for one in found if one.tokens]
    if not kept:
        return []
    nats, tokens = [one.nats for one in kept], [one.tokens for one in kept]
    [mean_nats] = ratio_score("perplexity", nats, tokens)
    bins_ExK = np.array([np.ravel(one.bins) for one in kept])

    def calibration(sums_NxK: np.ndarray) -> np.ndarray:
        count, confidence, right = np.moveaxis(
            sums_NxK.reshape(len(sums_NxK), CALIBRATION_BINS, 3), -1, 0
        )
        return 100 * np.abs(right - confidence).sum(axis=1) / count.sum(axis=1)

    return [
        dataclasses.replace(mean_nats, of_sums=lambda sums: np.exp(mean_nats.of_sums(sums))),
        Score(
            "bits_per_byte",
            np.array([(one.nats, one.text_bytes) for one in kept], np.float64),
            lambda sums: bits_per_byte(*sums.T),
        ),
        Score("calibration_error", bins_ExK, calibration),
    ]
