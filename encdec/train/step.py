"""One training step and one evaluation step, as pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from encdec.model import Model
from encdec.train.across_mesh import keep_apart, on_each_shard, summed_over_shards
from encdec.train.distillation_losses import alpha_schedule
from encdec.train.losses import LossSums, Teaching, loss_positions, target_losses
from encdec.train.optimizer import make_schedule
from encdec.train.run_config import RunConfig
from encdec.train.run_fields import DistillConfig, LossConfig
from encdec.train.state import TrainState, step_key

Batch = Mapping[str, jax.Array]


class Metrics(flax.struct.PyTreeNode):
    """The result of a batch: sums and counts, which add up exactly over batches and hosts.

    Attributes:
        losses: sums over target positions.
        source_tokens: int32, input tokens without padding.
        target_tokens: int32, target tokens without padding.
    """

    losses: LossSums
    source_tokens: jax.Array
    target_tokens: jax.Array


class StepMetrics(flax.struct.PyTreeNode):
    """A training step's sums, and what describes the step as a whole (float32 scalars).

    ``alpha`` is the teacher's weight; None without distillation.
    """

    sums: Metrics
    gradient_norm: jax.Array
    param_norm: jax.Array
    learning_rate: jax.Array
    alpha: jax.Array | None = None


def batch_metrics(
    model: Model,
    params: Any,
    batch: Batch,
    loss: LossConfig,
    targets_length: int,
    dropout_key: jax.Array | None = None,
    distill: DistillConfig | None = None,
    alpha: jax.Array | None = None,
) -> Metrics:
    """Runs the model on a batch and sums its losses; dropout is on when a key is given.

    With ``alpha``, the batch's teacher_* fields take part as ``distill`` says.
    """
    teaching = None
    if alpha is not None:
        assert distill is not None
        fields = {name: x for name, x in batch.items() if name.startswith("teacher_")}
        teaching = Teaching(fields, distill, alpha)
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    hidden: Any = model.apply(
        {"params": params}, batch, deterministic=dropout_key is None, rngs=rngs, method="hidden"
    )
    target_tokens = jnp.sum(batch["decoder_loss_weights"] > 0, dtype=jnp.int32)
    if model.config.is_encoder_decoder:
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        source_tokens = jnp.sum(batch["encoder_segment_ids"] > 0, dtype=jnp.int32)
    else:
        tokens = jnp.sum(batch["decoder_segment_ids"] > 0, dtype=jnp.int32)
        source_tokens = tokens - target_tokens
        hidden, targets, weights = loss_positions(hidden, batch, targets_length)
    head: Any = lambda x, *tile: model.apply({"params": params}, x, *tile, method="logits")
    return Metrics(
        target_losses(head, hidden, targets, weights, loss, model.config.vocab_size, teaching),
        source_tokens,
        target_tokens,
    )


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    run: RunConfig,
    targets_length: int,
    computed: Callable[[Any], Any] = lambda params: params,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """``train_step(state, batch) -> (state, metrics)``: pure, to be jitted and donated.

    The objective is the mean over all target positions of the whole batch, however many
    micro-batches it is worked through in: gradients of sums are added in float32, over devices
    once a step, and divided once. ``computed`` turns master parameters into those that the model
    is run with.
    """

    schedule = make_schedule(run)
    distill = run.distill
    alphas = alpha_schedule(
        distill.alpha_schedule,
        distill.alpha,
        distill.warmup_steps,
        schedule,
        run.optimizer.learning_rate,
    )

    def objective(
        params: Any, batch: Batch, key: jax.Array, alpha: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        metrics = batch_metrics(model, params, batch, run.loss, targets_length, key, distill, alpha)
        return metrics.losses.objective, metrics

    gradient = jax.grad(objective, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        alpha = alphas(state.step) if distill.teacher else None
        key = step_key(run.seed, state.step)
        params, to_masters = jax.vjp(computed, state.params)
        sums, metrics = (
            gradient(params, batch, key, alpha)
            if run.accumulation == 1
            else _accumulated(
                gradient,
                params,
                batch,
                key,
                alpha,
                run.accumulation,
                apart=run.mesh.gather == "step",
            )
        )
        (sums,) = to_masters(sums)
        # Avoid dividing by zero when a batch has no target tokens; its gradient is zero.
        count = jnp.maximum(metrics.losses.weight, 1.0)
        gradients = jax.tree.map(lambda g: g / count, sums)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), StepMetrics(
            metrics,
            optax.global_norm(gradients),
            optax.global_norm(params),
            jnp.asarray(schedule(state.step), jnp.float32),
            alpha,
        )

    return train_step


def _accumulated(
    gradient: Callable[..., tuple[Any, Metrics]],
    params: Any,
    batch: Batch,
    key: jax.Array,
    alpha: jax.Array | None,
    pieces: int,
    apart: bool,
) -> tuple[Any, Metrics]:
    """Gradients and metrics of a batch in micro-batches, added up in float32.

    Every device adds up what its own rows give, and the sums go over the network once. Not so
    where parameters stay split over devices (``apart`` False): whole sums would not fit there.
    """
    one, place, summed = (
        (on_each_shard(gradient), keep_apart, summed_over_shards)
        if apart
        else (gradient, lambda x: x, lambda x: x)
    )
    micro_batches = jax.tree.map(lambda x: _split(x, pieces), batch)
    wide = lambda x: (
        jnp.promote_types(x.dtype, jnp.float32)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x.dtype
    )
    zeros = jax.tree.map(
        lambda x: place(jnp.zeros(x.shape, wide(x))),
        jax.eval_shape(one, params, jax.tree.map(lambda x: x[0], micro_batches), key, alpha),
    )

    def add(sums: Any, piece: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        index, micro_batch = piece
        new = one(params, micro_batch, jax.random.fold_in(key, index), alpha)
        return jax.tree.map(lambda a, b: place(a + b), sums, new), None

    gradients, metrics = jax.lax.scan(add, zeros, (jnp.arange(pieces), micro_batches))[0]
    # Rounded before they travel, if the run sums gradients in less than float32.
    gradients = jax.tree.map(lambda g, p: summed(g.astype(p.dtype)), gradients, params)
    return gradients, jax.tree.map(summed, metrics)


def make_eval_step(model: Model, targets_length: int) -> Callable[[Any, Batch], Metrics]:
    """``eval_step(params, batch) -> metrics``: plain cross entropy, without dropout."""

    def eval_step(params: Any, batch: Batch) -> Metrics:
        return batch_metrics(model, params, batch, LossConfig(z_loss=0.0), targets_length)

    return eval_step


def _split(x_BxN: jax.Array, pieces: int) -> jax.Array:
    """[B, ...] to [pieces, B / pieces, ...], each piece spread over the same devices as before.

    Piece p takes rows p, p + pieces, ...: rows of one device stay on that device.
    """
    batch = x_BxN.shape[0]
    return x_BxN.reshape(batch // pieces, pieces, *x_BxN.shape[1:]).swapaxes(0, 1)
