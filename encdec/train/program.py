"""Everything that is compiled for a run, made from configurations and a mesh alone.

A ``Program`` needs no data and draws no parameters, so the same one can be trained, benchmarked,
or only compiled for a machine that is not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from encdec.data.features import DECODER_FIELDS, ENCODER_FIELDS
from encdec.data.teacher_rows import PAIR_FIELDS
from encdec.errors import ConfigError
from encdec.model import Model, ModelConfig, abstract_params, build_model, logical_axes
from encdec.train.across_mesh import compute_params, on_mesh
from encdec.train.compiler_options import compiler_options
from encdec.train.optimizer import make_optimizer
from encdec.train.run_config import RunConfig
from encdec.train.sharding import (
    ShardingRules,
    Unsharded,
    data_shards,
    like_params,
    param_shardings,
)
from encdec.train.state import TrainState, create_state
from encdec.train.step import make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions of a run, with the shapes and places of what they take.

    Attributes:
        model: the flax module.
        mesh: the devices.
        init: () -> TrainState, drawn in place on the mesh.
        train_step: (state, batch) -> (state, StepMetrics); the state is donated.
        eval_step: (params, batch) -> Metrics.
        abstract_state: shapes, dtypes and shardings of the state.
        batch_sharding: of every field of a batch.
        unsharded: the parameters that a rule expected split but that stay whole.
    """

    model: Model
    mesh: Mesh
    init: Callable[[], TrainState]
    train_step: Any
    eval_step: Any
    abstract_state: TrainState
    batch_sharding: NamedSharding
    unsharded: tuple[Unsharded, ...]


def check_batch(run: RunConfig, mesh_shards: int) -> None:
    """Raises ConfigError unless every micro-batch, held-out ones too, splits over the mesh."""
    if run.micro_batch_size % mesh_shards:
        wanted = mesh_shards * run.accumulation
        raise ConfigError(
            f"config.batch_size is {run.batch_size}, in {run.accumulation} micro-batches of "
            f"{run.micro_batch_size}; expected a multiple of {wanted} = {mesh_shards} data shards "
            f"(mesh.data x mesh.fsdp) x {run.accumulation} (accumulation): for example "
            f"{max(wanted, run.batch_size // wanted * wanted)}"
        )
    if run.eval.batch_size % mesh_shards:
        raise ConfigError(
            f"config.eval.batch_size is {run.eval.batch_size}; expected a multiple of "
            f"the {mesh_shards} data shards (mesh.data x mesh.fsdp)"
        )


def build_program(
    run: RunConfig,
    model_config: ModelConfig,
    mesh: Mesh,
    targets_length: int,
    rules: ShardingRules = ShardingRules(),
) -> Program:
    """Sets up a run's functions without computing anything on a device.

    Args:
        run: the run.
        model_config: its model.
        mesh: (data, fsdp, tensor).
        targets_length: T, the most target tokens in a row.
        rules: where logical axes go.

    Raises:
        ConfigError: rules that collide, or a batch that does not split over the mesh.
    """
    check_batch(run, data_shards(mesh))
    model = build_model(model_config)
    axes, params = logical_axes(model), abstract_params(model)
    optimizer = make_optimizer(run, axes, params)
    shardings, fitted, unsharded = param_shardings(rules, mesh, params, axes)

    create = lambda: create_state(model, optimizer, run.seed)
    state = jax.eval_shape(create)
    everywhere = NamedSharding(mesh, PartitionSpec())
    state_shardings: Any = TrainState(
        cast(Any, everywhere), shardings, like_params(state.opt_state, params, shardings, mesh)
    )
    abstract_state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_shardings,
    )
    batch_sharding = NamedSharding(mesh, fitted.spec(("batch",)))

    return Program(
        model=model,
        mesh=mesh,
        init=jax.jit(create, out_shardings=state_shardings),
        train_step=jax.jit(
            on_mesh(
                make_train_step(
                    model,
                    optimizer,
                    run,
                    targets_length,
                    compute_params(run.mesh, model_config.dtype, fitted, mesh, axes),
                ),
                mesh,
                fitted,
            ),
            in_shardings=(state_shardings, batch_sharding),
            out_shardings=(state_shardings, everywhere),
            donate_argnums=0,
            compiler_options=compiler_options(mesh.devices.flat[0].device_kind),
        ),
        eval_step=jax.jit(
            on_mesh(make_eval_step(model, targets_length), mesh, fitted),
            in_shardings=(shardings, batch_sharding),
            out_shardings=everywhere,
        ),
        abstract_state=abstract_state,
        batch_sharding=batch_sharding,
        unsharded=tuple(unsharded),
    )


def abstract_batch(
    program: Program, rows: int, inputs_length: int, targets_length: int, teacher_pairs: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and places of a global batch with rows of these lengths.

    ``teacher_pairs``: stored pairs a row of a teacher's draws; 0 without distillation.
    """
    encoder_decoder = program.model.config.is_encoder_decoder
    decoder_length = targets_length if encoder_decoder else inputs_length + targets_length
    lengths = {name: inputs_length for name in ENCODER_FIELDS} if encoder_decoder else {}
    lengths |= {name: decoder_length for name in DECODER_FIELDS}
    if teacher_pairs:
        lengths |= {name: teacher_pairs for name in PAIR_FIELDS}
        lengths["teacher_entropy"] = targets_length
    floats = ("decoder_loss_weights", "teacher_weights", "teacher_entropy")
    return {
        name: jax.ShapeDtypeStruct(
            (rows, length),
            jnp.float32 if name in floats else jnp.int32,
            sharding=program.batch_sharding,
        )
        for name, length in lengths.items()
    }
