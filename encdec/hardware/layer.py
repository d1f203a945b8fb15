"""Compiles one layer, forward and backward, for one chip: in seconds, where a step takes minutes.

Layers take most of a step's time. So changes to attention, MLP, remat and compiler options are
tried here first, one at a time, and only the best ones on whole steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from encdec.cost.flops import training_flops
from encdec.hardware.compile import CompiledProgram, compile_lowered, one_device
from encdec.hardware.topology import Topology
from encdec.model import ModelConfig
from encdec.model.attention import packed_attention
from encdec.model.positions import rope_table
from encdec.model.stacks import LayerInputs, Stack
from encdec.train.compiler_options import compiler_options as chip_options
from encdec.train.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class CompiledLayer(CompiledProgram):
    """Layers of the encoder (of the decoder in a decoder-only model) on one device.

    The time includes the stack's final norm and reading its input.

    Attributes:
        run: the run whose model it is.
        topology: of the device.
        rows: on the device.
        length: tokens per row.
        layers: how many.
        model_flops: forward and backward; rematerialization does not count.
    """

    run: RunConfig
    topology: Topology
    rows: int
    length: int
    layers: int
    model_flops: float

    @property
    def share_of_peak(self) -> float:
        return self.model_flops / (self.step_seconds * self.topology.generation.chip.bf16_flops)


def compile_layer(
    run: RunConfig,
    topology: Topology,
    length: int,
    layers: int = 1,
    compiler_options: dict[str, str] | None = None,
) -> CompiledLayer:
    """Compiles ``layers`` layers with the rows that ``run`` gives each device of ``topology``.

    Matrices are in the compute dtype, as in a step; nothing is sharded.
    """
    config = run.model_config()
    rows = max(1, run.micro_batch_size // len(topology.devices))
    mesh = one_device(topology)
    here = jax.NamedSharding(mesh, jax.P())
    shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=here)
    stack, dtype = Stack(config, layers), jnp.dtype(config.dtype)
    dropout = max(config.mlp_dropout, config.residual_dropout, config.attention_dropout) > 0

    def inputs(ids: jax.Array) -> LayerInputs:
        rope = rope_table(config, ids)
        causal = not config.is_encoder_decoder
        return LayerInputs(
            packed_attention(ids, ids, rope, rope, causal=causal), deterministic=not dropout
        )

    def init() -> Any:
        x = jnp.zeros((1, length, config.d_model), dtype)
        key = jax.random.key(0)
        return nn.unbox(
            stack.init(
                {"params": key, "dropout": key}, x, inputs(jnp.zeros((1, length), jnp.int32))
            )
        )

    def both_ways(params: Any, x: jax.Array, gradient: jax.Array, ids: jax.Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            rngs = {"dropout": jax.random.key(ids[0, 0])} if dropout else {}
            forward = lambda params, x: stack.apply(params, x, inputs(ids), rngs=rngs)[0]
            result, backward = jax.vjp(forward, params, x)
            return result, backward(gradient)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        params = jax.tree.map(
            lambda x: shape(x.shape, dtype if x.ndim > 1 else x.dtype), jax.eval_shape(init)
        )
    x, ids = shape((rows, length, config.d_model), dtype), shape((rows, length), jnp.int32)
    options = chip_options(topology.devices[0].device_kind)
    lowered = jax.jit(both_ways, compiler_options=options).lower(params, x, x, ids)
    compiled = compile_lowered(lowered, topology, mesh, compiler_options)
    return CompiledLayer(
        **(vars(compiled) | {"memory": compiled.memory.split(params)}),
        run=run,
        topology=topology,
        rows=rows,
        length=length,
        layers=layers,
        model_flops=rows * layers * _layer_flops(config, length),
    )


def _layer_flops(config: ModelConfig, length: int) -> float:
    """Training FLOPs of one row in one layer: the model's minus those with one layer less."""
    name = "encoder_layers" if config.is_encoder_decoder else "decoder_layers"
    inputs, targets = (length, 1) if config.is_encoder_decoder else (length - 1, 1)
    flops = lambda layers: training_flops(config.replace(**{name: layers}), inputs, targets)
    return flops(2) - flops(1)
