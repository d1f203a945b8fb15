"""What a step does across the mesh: gathering parameters, summing gradients, naming axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from encdec.train.run_fields import MeshConfig
from encdec.train.sharding import ShardingRules


def compute_params(
    config: MeshConfig, dtype: str, rules: ShardingRules, mesh: Mesh, logical_axes: Any
) -> Callable[[Any], Any]:
    """A function from master parameters to those that a step computes with; differentiable.

    With ``config.gather`` "step", parameters split over fsdp are gathered once, before their use;
    with ``config.reduce_dtype`` "bfloat16", matrices become ``dtype`` first, so that this is what
    is communicated. Backward, each gradient is summed over the devices in the dtype of the
    computation, straight to where its master is: a reduce-scatter where that is split.

    Args:
        config: of the mesh.
        dtype: the model's compute dtype.
        rules: those that fit the mesh.
        mesh: the devices.
        logical_axes: a tuple of names for each parameter.
    """
    whole_rules = rules.without("fsdp") if config.gather == "step" else rules

    def prepare(names: tuple[str | None, ...], master: jax.Array) -> jax.Array:
        matrix = "embed" in names and set(names) - {"embed", "layers"}
        kept, whole = (NamedSharding(mesh, r.parameter_spec(names)) for r in (rules, whole_rules))
        small = matrix and config.reduce_dtype == "bfloat16"
        cast = jnp.dtype(dtype) if small else master.dtype
        return _computed(master, kept, whole, cast)

    return lambda params: jax.tree.map(
        prepare, logical_axes, params, is_leaf=lambda x: isinstance(x, tuple)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _computed(
    master: jax.Array, kept: NamedSharding, whole: NamedSharding, dtype: Any
) -> jax.Array:
    # Cast where it is, then gathered: so the smaller of the two travels.
    cast = jax.lax.with_sharding_constraint(master.astype(dtype), kept)
    return jax.lax.with_sharding_constraint(cast, whole)


def _computed_forward(master, kept, whole, dtype):
    return _computed(master, kept, whole, dtype), master


def _computed_backward(kept, whole, dtype, master, gradient):
    return (jax.lax.with_sharding_constraint(gradient, kept).astype(master.dtype),)


_computed.defvjp(_computed_forward, _computed_backward)


def on_mesh(function: Callable[..., Any], mesh: Mesh, rules: ShardingRules) -> Callable[..., Any]:
    """The function, traced where logical axis names have a meaning; for ``jax.jit``."""

    def traced(*arguments: Any) -> Any:
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            nn.logical_axis_rules(rules.pairs()),
        ):
            return function(*arguments)

    traced.__name__ = getattr(function, "__name__", "traced")
    return traced


def on_each_shard(gradient: Callable[..., Any]) -> Callable[..., Any]:
    """The gradients of each device's own rows, not yet summed over devices.

    Args:
        gradient: ``gradient(params, batch, key, *more)``, a tree; to be traced within ``on_mesh``.

    Returns:
        A function of the same arguments whose results have a leading axis of ``N`` shards of the
        rows, one on each device along data and fsdp. Each shard has a key of its own.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), ShardingRules().batch
    shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)
    # Rows are split already; what else the rules say holds within a shard, too.
    rules = [(name, None if name == "batch" else to) for name, to in nn.get_logical_axis_rules()]

    def apart(params: Any, batch: Any, key: jax.Array, *more: Any) -> Any:
        def one(rows: Any, shard: jax.Array) -> Any:
            with nn.logical_axis_rules(rules):
                return gradient(params, rows, jax.random.fold_in(key, shard), *more)

        split = jax.tree.map(lambda x: x.reshape(shards, x.shape[0] // shards, *x.shape[1:]), batch)
        return jax.vmap(one, spmd_axis_name=None if mesh.empty else axes)(split, jnp.arange(shards))

    return apart


def keep_apart(x_NxP: jax.Array) -> jax.Array:
    """The array, its leading axis spread as ``on_each_shard`` leaves it."""
    mesh, unset = jax.sharding.get_abstract_mesh(), PartitionSpec.UNCONSTRAINED
    if mesh.empty:
        return x_NxP
    return jax.lax.with_sharding_constraint(
        x_NxP, PartitionSpec(ShardingRules().batch, *(unset,) * (x_NxP.ndim - 1))
    )


def summed_over_shards(x_NxP: jax.Array) -> jax.Array:
    """The sum over the leading axis of ``on_each_shard``, in the array's own dtype: that is what
    travels between devices (``jnp.sum`` would send float32 in place of bfloat16)."""
    zero = jnp.zeros((), x_NxP.dtype)
    return jax.lax.reduce(x_NxP, zero, jax.lax.add, (0,))
