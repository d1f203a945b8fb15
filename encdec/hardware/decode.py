"""Compiles generation for a TPU topology: prefill, and one decode step of all rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from encdec.cost.flops import generation_flops
from encdec.errors import ConfigError
from encdec.hardware.compile import CompiledProgram, compile_lowered
from encdec.hardware.topology import Topology
from encdec.inference.decoding import decode_step, prefill
from encdec.model import ModelConfig, abstract_params, build_model, for_decoding, logical_axes
from encdec.train.across_mesh import on_mesh
from encdec.train.compiler_options import compiler_options as chip_options
from encdec.train.run_config import RunConfig
from encdec.train.sharding import ShardingRules, data_shards, make_mesh, param_shardings

START_ID = 0  # which token it is changes no time


@dataclasses.dataclass(frozen=True)
class CompiledDecoding:
    """Generation compiled for a topology, with predictions.

    Attributes:
        run: the run whose model it is; its batch size is the number of rows.
        topology: where it would run.
        mesh: devices along (data, fsdp, tensor).
        inputs: source tokens per row.
        targets: new tokens per row, the cache's capacity for them.
        prefill: from the inputs to the first token's logits.
        step: one token more in every row, with the cache at its full length.
        unsharded: parameters that stay whole against the rules, as text.
    """

    run: RunConfig
    topology: Topology
    mesh: tuple[int, ...]
    inputs: int
    targets: int
    prefill: CompiledProgram
    step: CompiledProgram
    unsharded: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """For all new tokens of a batch of rows."""
        return self.prefill.step_seconds + (self.targets - 1) * self.step.step_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first, all rows together."""
        return self.run.batch_size / self.step.step_seconds

    @property
    def prefill_mfu(self) -> float:
        row = generation_flops(self.run.model_config(), self.inputs, 1).first_token.total
        peak = self.topology.generation.chip.bf16_flops * len(self.topology.devices)
        return self.run.batch_size * row / (self.prefill.step_seconds * peak)

    @property
    def bytes_floor_seconds(self) -> float:
        """What reading a step's arguments (weights, keys and values) once takes at HBM speed."""
        memory = self.step.memory
        rate = self.topology.generation.chip.hbm_bytes_per_second
        return (memory.parameters + memory.batch) / rate


def check_decoding(run: RunConfig, topology: Topology) -> None:
    """Checks, without compiling, that mesh and rows divide.

    Raises:
        ConfigError: they do not.
    """
    shards = data_shards(make_mesh(run.mesh, topology.devices))
    if run.batch_size % shards:
        raise ConfigError(
            f"config.batch_size is {run.batch_size}; expected a multiple of {shards}, "
            "the mesh's data x fsdp"
        )


def compile_decoding(
    run: RunConfig,
    topology: Topology,
    inputs: int,
    targets: int,
    compiler_options: dict[str, str] | None = None,
) -> CompiledDecoding:
    """Compiles prefill and decode step of ``run``'s model with ``run.batch_size`` rows.

    Weights are in the compute dtype and layers unrolled, as the generator has them.

    Raises:
        ConfigError: rows that do not divide over the mesh.
        DoesNotFit: the compiler ran out of memory; its reason is the message.
    """
    check_decoding(run, topology)
    mesh = make_mesh(run.mesh, topology.devices)
    config, params, fitted, unsharded = _parameters(run.model_config(), mesh)
    rows = NamedSharding(mesh, fitted.spec(("batch",)))
    ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    read = functools.partial(prefill, config, start_id=START_ID, capacity=targets)
    options = chip_options(mesh.devices.flat[0].device_kind)
    lowered = jax.jit(on_mesh(read, mesh, fitted), compiler_options=options).lower(
        params, ids(run.batch_size, inputs), ids(run.batch_size)
    )
    first = compile_lowered(lowered, topology, mesh, compiler_options)
    memory = jax.tree.map(  # sharded as by the prefill: rows over the devices
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), lowered.out_info[1]
    )
    further = jax.jit(
        on_mesh(functools.partial(decode_step, config), mesh, fitted),
        donate_argnums=1,
        compiler_options=options,
    )
    step = compile_lowered(
        further.lower(params, memory, ids(run.batch_size)), topology, mesh, compiler_options
    )
    first, step = (
        dataclasses.replace(part, memory=part.memory.split(params)) for part in (first, step)
    )
    return CompiledDecoding(
        run,
        topology,
        tuple(mesh.devices.shape),
        inputs,
        targets,
        first,
        step,
        tuple(map(str, unsharded)),
    )


def _parameters(
    config: ModelConfig, mesh: jax.sharding.Mesh
) -> tuple[ModelConfig, Any, ShardingRules, list[Any]]:
    config, _ = for_decoding(config.replace(scan_layers=False), {})
    model = build_model(config)
    shapes = abstract_params(model)
    shardings, fitted, unsharded = param_shardings(
        ShardingRules(), mesh, shapes, logical_axes(model)
    )

    def place(path: Any, leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype if path[-1].key == "scale" else jnp.dtype(config.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return config, jax.tree_util.tree_map_with_path(place, shapes, shardings), fitted, unsharded
