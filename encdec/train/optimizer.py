"""Optimizers and learning-rate schedules, composed from optax.

Which parameters are matrices, and which of their dimensions are inputs, follows from the model's
logical axes, so that stacked (scanned) and three-dimensional attention kernels are treated as
the layers' matrices that they are.
"""

from __future__ import annotations

from typing import Any, assert_never

import jax
import optax

from encdec.model.kernels import platform
from encdec.train.groups import factor_tree, frozen_at_first, frozen_tree, with_factors
from encdec.train.muon import muon
from encdec.train.run_config import RunConfig
from encdec.train.run_fields import OptimizerConfig

Tree = Any

# Kernels map the model's width to features or back; the sides tell which.
_FEATURES = ("heads", "kv_heads", "head_dim", "mlp")
_VECTORS = ("bias", "scale")

# Muon's updates times this have the root mean square of AdamW's, so that both share one learning
# rate and one weight decay (arXiv 2502.16982, section 2.2).
_MUON_RMS = 0.2


def make_schedule(run: RunConfig) -> optax.Schedule:
    """Learning rate of step 0, 1, ...: linear warmup, then the decay that ``run.schedule`` names.

    The warmup's first step already learns (peak / warmup_steps). "rsqrt" decays by
    sqrt(warmup_steps / step) as long as the run continues; "wsd" stays at the peak and falls
    linearly in the last ``decay_fraction`` of the run; "constant" stays.
    """
    config, peak, steps = run.schedule, run.optimizer.learning_rate, run.steps
    warmup, final = config.warmup_steps, config.final_fraction
    rest = max(1, steps - warmup)
    if config.name == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=final)
    elif config.name == "linear":
        decay = optax.linear_schedule(peak, peak * final, rest)
    elif config.name == "rsqrt":
        decay = lambda step: peak * jax.lax.rsqrt((step + warmup) / warmup)
    elif config.name == "wsd":
        falling = min(rest, max(1, round(steps * config.decay_fraction)))
        decay = optax.linear_schedule(peak, peak * final, falling, rest - falling)
    elif config.name == "constant":
        decay = optax.constant_schedule(peak)
    else:
        assert_never(config.name)
    if not warmup:
        return decay
    first = peak / warmup
    return optax.join_schedules(
        [optax.linear_schedule(first, peak + first, warmup), decay], [warmup]
    )


def make_optimizer(
    run: RunConfig, logical_axes: Tree, abstract_params: Tree
) -> optax.GradientTransformation:
    """The optimizer of ``run.optimizer`` for parameters with these logical axes and shapes.

    AdamW (arXiv 1711.05101), Adafactor (arXiv 1804.04235) without its own step size rule, or
    Muon (arXiv 2502.16982) for the layers' matrices with AdamW for embeddings, heads, norms and
    biases. Gradients are clipped first; decay is decoupled, times the learning rate, and on
    matrices alone (embeddings included). What ``run.freeze`` holds is left out of all that, and
    ``run.optimizer.factors`` multiplies the learning rates of groups.

    Raises:
        ConfigError: a pattern of names that matches no parameter, naming the nearest.
    """
    config, schedule = run.optimizer, make_schedule(run)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def rule(start: int) -> optax.GradientTransformation:
        """The update rule, begun at a step of the run."""
        since = (lambda count: schedule(count + start)) if start else schedule
        return _update_rule(config, since, logical_axes)

    if run.freeze.parameters:
        frozen = frozen_tree(run, abstract_params)
        optimizer = frozen_at_first(clip, rule, frozen, int(run.freeze.steps))
    else:
        optimizer = optax.chain(clip, rule(0))
    if not config.factors:
        return optimizer
    return optax.chain(optimizer, with_factors(factor_tree(run, abstract_params)))


def _update_rule(
    config: OptimizerConfig, schedule: optax.Schedule, logical_axes: Tree
) -> optax.GradientTransformation:
    decay_mask = decayed(logical_axes)
    if config.name == "adafactor":
        return optax.chain(
            # 64, a head's width, so that attention kernels [M, H, D] are factored, too.
            optax.scale_by_factored_rms(decay_rate=config.decay_rate, min_dim_size_to_factor=64),
            # With scanned layers a block is the stack of all layers' copies of a parameter.
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay, _masked_like(decay_mask)),
            optax.scale_by_learning_rate(schedule),
        )
    adamw = optax.adamw(
        schedule,
        config.b1,
        config.b2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=_masked_like(decay_mask),
    )
    if config.name == "adamw":
        return adamw
    if config.name != "muon":
        assert_never(config.name)  # a name without a rule
    dimensions = muon_dimensions(logical_axes)
    matrices = muon(
        schedule,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        rms=_MUON_RMS,
        dimensions=_masked_like(dimensions),
        together=_on_one_cpu,
        exact=lambda: platform() == "cpu",
    )
    labels = jax.tree.map(
        lambda spec: "adamw" if spec is None else "muon", dimensions, is_leaf=_is_spec
    )
    return optax.partition({"muon": matrices, "adamw": adamw}, _masked_like(labels))


def _on_one_cpu() -> bool:
    """Whether what is traced runs on one CPU device: stacking matrices there moves nothing between
    devices, and accelerators do well with each layer's own."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.empty or mesh.size == 1)


def decayed(logical_axes: Tree) -> Tree:
    """True for matrices: kernels, embeddings and heads; False for biases and norm scales."""
    return _map_axes(lambda name, axes: name not in _VECTORS, logical_axes)


def muon_dimensions(logical_axes: Tree) -> Tree:
    """Input and output dimensions of the matrices that Muon updates; None for all else.

    Embeddings and vocabulary heads are left to AdamW, as Muon's authors do. Dimensions that are
    neither, such as stacked layers, hold separate matrices.
    """

    def dimensions(name: str, axes: tuple[str | None, ...]) -> Any:
        if name in _VECTORS or "vocab" in axes or "embed" not in axes:
            return None
        width = (axes.index("embed"),)
        features = tuple(i for i, axis in enumerate(axes) if axis in _FEATURES)
        if not features:
            return None
        sides = (width, features) if width < features else (features, width)
        return optax.contrib.MuonDimensionNumbers(*sides)

    return _map_axes(dimensions, logical_axes)


def _map_axes(function: Any, logical_axes: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(
        lambda path, axes: function(path[-1].key, axes),
        logical_axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _masked_like(tree: Tree) -> Any:
    """``tree`` as a function of parameters of which ``optax.partition`` may have masked some."""
    flat = dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_spec))
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: flat[path], params)


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
