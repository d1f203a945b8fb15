"""Losses of target tokens, as sums that add up over rows, hosts and micro-batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from encdec.train.distillation_losses import distillation_losses, picked_logits, sparse_losses
from encdec.train.run_fields import DistillConfig, LossConfig


@dataclasses.dataclass(frozen=True)
class Teaching:
    """What a teacher knows of a batch's targets, and how much it counts.

    Attributes:
        fields: the batch's teacher_* fields; see ``encdec.data.teacher_rows.Teacher.fields``.
        config: which divergence.
        alpha: scalar weight of the divergence; cross entropy gets the rest.
    """

    fields: Mapping[str, jax.Array]
    config: DistillConfig
    alpha: jax.Array


class TeacherSums(flax.struct.PyTreeNode):
    """Sums over loss-bearing target positions, nats; float32 scalars.

    Attributes:
        divergence: of the student from the teacher, times the temperature squared.
        entropy: the teacher's own: what no student's soft cross entropy can go below.
    """

    divergence: jax.Array
    entropy: jax.Array


class LossSums(flax.struct.PyTreeNode):
    """Sums over loss-bearing target positions; float32 scalars.

    Attributes:
        objective: what is minimised: smoothed cross entropy plus z-loss, or with a teacher
            alpha x its divergence + (1 - alpha) x smoothed cross entropy + z-loss.
        cross_entropy: nats, against the targets as they are: the loss that is reported.
        z_loss: its part of the objective.
        correct: positions whose most likely token is the target.
        weight: the positions' loss weights; the number of target tokens where these are 0 or 1.
        teacher: of distillation; None without a teacher.
    """

    objective: jax.Array
    cross_entropy: jax.Array
    z_loss: jax.Array
    correct: jax.Array
    weight: jax.Array
    teacher: TeacherSums | None = None


def target_losses(
    head: Callable[..., jax.Array],
    hidden_BxTxM: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    config: LossConfig,
    vocab_size: int = 0,
    teaching: Teaching | None = None,
) -> LossSums:
    """Sums the losses of every position, from hidden activations and the vocabulary head.

    With ``config.vocab_tile`` the vocabulary is worked through in tiles: logits [B, T, V] never
    exist whole, neither forward nor backward, at the price of computing them twice.

    Args:
        head: activations [..., M] to float32 logits [..., V]; called with (activations, start,
            stop), to the logits of that part of the vocabulary.
        hidden_BxTxM: the model's last activations.
        targets_BxT: int32 target ids.
        weights_BxT: float32; 0 for padding and whatever else carries no loss.
        config: z-loss (arXiv 2204.02311, section 5), label smoothing (arXiv 1512.00567), tile.
        vocab_size: V; needed for tiles only.
        teaching: of distillation. Only full rows make a teacher tensor [B, T, V]; they take no
            tiles.
    """
    divergence_BxT = jnp.zeros(())  # without a teacher
    if 0 < config.vocab_tile < vocab_size:
        (log_normaliser, target_logits, largest, mean), student = _tiled_statistics(
            head, hidden_BxTxM, targets_BxT, config.vocab_tile, vocab_size, teaching
        )
        if teaching:
            picked_BxP, student_normaliser = student
            divergence_BxT = sparse_losses(
                picked_BxP, student_normaliser, teaching.fields, **_kind(teaching.config)
            )
    else:
        logits_BxTxV = head(hidden_BxTxM)
        log_normaliser = jax.nn.logsumexp(logits_BxTxV, axis=-1)
        target_logits = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
        largest, mean = jnp.max(logits_BxTxV, axis=-1), jnp.mean(logits_BxTxV, axis=-1)
        if teaching:
            divergence_BxT = distillation_losses(
                logits_BxTxV, teaching.fields, **_kind(teaching.config)
            )
    cross_entropy = log_normaliser - target_logits
    objective = cross_entropy
    if config.label_smoothing:
        objective += config.label_smoothing * (log_normaliser - mean - cross_entropy)
    if teaching:
        objective = teaching.alpha * divergence_BxT + (1 - teaching.alpha) * objective
    z_loss = config.z_loss * jnp.square(log_normaliser)
    if config.z_loss:
        objective += z_loss
    correct = target_logits >= largest
    total = lambda values: jnp.sum(values * weights_BxT, dtype=jnp.float32)
    teacher = None
    if teaching:
        teacher = TeacherSums(total(divergence_BxT), total(teaching.fields["teacher_entropy"]))
    return LossSums(
        total(objective),
        total(cross_entropy),
        total(z_loss),
        total(correct),
        jnp.sum(weights_BxT, dtype=jnp.float32),
        teacher,
    )


def _kind(config: DistillConfig) -> dict[str, Any]:
    """The arguments of the functions in ``encdec.train.distillation_losses``."""
    return {
        "divergence": config.loss,
        "temperature": config.temperature,
        "beta": config.beta,
        "tail": config.tail,
    }


def _tiled_statistics(
    head: Callable[..., jax.Array],
    hidden_BxTxM: jax.Array,
    targets_BxT: jax.Array,
    tile: int,
    vocab_size: int,
    teaching: Teaching | None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """(log-normalizer, target's logit, largest logit, mean logit), each [B, T], tile by tile.

    With a teacher, second, (logits of its pairs [B, P], log-normalizer [B, T]) of the student at
    its temperature; nothing otherwise.

    The tiles are unrolled: each one's gradient of the table is then written where it belongs,
    while a loop would add up whole tables.
    """

    # Recomputed backward, or the tiles' logits would all be in memory after all.
    @functools.partial(jax.checkpoint, static_argnums=(2, 3))
    def statistics(hidden: jax.Array, targets: jax.Array, start: int, stop: int):
        logits = head(hidden, start, stop)
        inside = (targets >= start) & (targets < stop)
        place = jnp.clip(targets - start, 0, stop - start - 1)
        target = jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]
        found = (
            jax.nn.logsumexp(logits, axis=-1),
            jnp.where(inside, target, 0.0),
            jnp.max(logits, axis=-1),
            jnp.sum(logits, axis=-1),
        )
        if not teaching:
            return found
        logits = logits / teaching.config.temperature
        return (
            *found,
            picked_logits(logits, teaching.fields, start),
            jax.nn.logsumexp(logits, axis=-1),
        )

    parts = [
        statistics(hidden_BxTxM, targets_BxT, start, min(start + tile, vocab_size))
        for start in range(0, vocab_size, tile)
    ]
    normalisers, targets, largest, sums, *student = (jnp.stack(part) for part in zip(*parts))
    taught: tuple[jax.Array, ...] = ()
    if student:
        taught = jnp.sum(student[0], axis=0), jax.nn.logsumexp(student[1], axis=0)
    return (
        jax.nn.logsumexp(normalisers, axis=0),
        jnp.sum(targets, axis=0),
        jnp.max(largest, axis=0),
        jnp.sum(sums, axis=0) / vocab_size,
    ), taught


def loss_positions(
    hidden_BxNxM: jax.Array, batch: Mapping[str, jax.Array], count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gathers each row's loss-bearing positions, at most ``count`` of them, in order.

    A decoder-only row holds sources and targets, of which only the targets are predicted; gathering
    them first means that the vocabulary head is paid per target token, as in an encoder-decoder.

    Args:
        hidden_BxNxM: activations of whole rows.
        batch: the decoder_* fields [B, N].
        count: T, the most target tokens per row can have.

    Returns:
        hidden [B, T, M], targets [B, T] and weights [B, T]; unused places have weight 0.
    """
    weights_BxN = batch["decoder_loss_weights"]
    bearing_BxN = weights_BxN > 0
    length = weights_BxN.shape[1]
    # Rank among the loss-bearing positions; the others go to a place that is dropped.
    rank_BxN = jnp.where(bearing_BxN, jnp.cumsum(bearing_BxN, axis=1) - 1, count)
    places_BxN = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), rank_BxN.shape)
    put = lambda rank, place: jnp.full((count,), length, jnp.int32).at[rank].set(place, mode="drop")
    index_BxT = jax.vmap(put)(rank_BxN, places_BxN)
    take = lambda x: jnp.take_along_axis(
        x, index_BxT.reshape(index_BxT.shape + (1,) * (x.ndim - 2)), axis=1, mode="clip"
    )
    weights_BxT = jnp.where(index_BxT < length, take(weights_BxN), 0.0)
    return take(hidden_BxNxM), take(batch["decoder_target_tokens"]), weights_BxT
