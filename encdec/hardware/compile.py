"""Compiles a run's actual training step for a TPU topology, without a TPU."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from encdec.cost.flops import training_flops
from encdec.errors import ConfigError
from encdec.hardware import hlo
from encdec.hardware.predict import TimePrediction, predict
from encdec.hardware.topology import Topology
from encdec.train.compiler_options import compiler_options as chip_options
from encdec.train.program import abstract_batch, build_program, check_batch
from encdec.train.run_config import RunConfig
from encdec.train.sharding import data_shards, make_mesh

DRAWS = 50  # a teacher's draws per token: the default of `encdec distill logits`


class DoesNotFit(ConfigError):
    """The program does not fit a chip's memory; the message is the compiler's."""


@dataclasses.dataclass(frozen=True)
class PeakMemory:
    """Bytes of one device's HBM, by part; the parts add up to ``peak``.

    Attributes:
        parameters: master parameters.
        optimizer: the optimizer's state.
        batch: the step's inputs other than the state.
        temporary: activations, gradients and other values within the step.
        outputs: results that do not reuse the donated state's memory.
        code: the program.
        limit: memory that the compiler lets a program use.
    """

    parameters: int
    optimizer: int
    batch: int
    temporary: int
    outputs: int
    code: int
    limit: int

    @property
    def peak(self) -> int:
        return sum(vars(self).values()) - self.limit

    def split(self, params: Any, opt_state: Any = ()) -> PeakMemory:
        """With the state, two sharded trees, separated from the other arguments in ``batch``."""
        parameters, optimizer = device_bytes(params), device_bytes(opt_state)
        batch = max(0, self.batch - parameters - optimizer)
        return dataclasses.replace(self, parameters=parameters, optimizer=optimizer, batch=batch)


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program compiled for a topology, with predictions.

    Attributes:
        memory: of each device.
        prediction: of its time.
        compile_seconds: how long the compiler took here.
        text: the compiled HLO.
    """

    memory: PeakMemory
    prediction: TimePrediction
    compile_seconds: float
    text: str = dataclasses.field(repr=False)

    @property
    def step_seconds(self) -> float:
        return self.prediction.step_seconds


@dataclasses.dataclass(frozen=True)
class CompiledStep(CompiledProgram):
    """A training step compiled for a topology.

    Attributes:
        run: the run.
        topology: where it would run.
        mesh: devices along (data, fsdp, tensor).
        inputs: source tokens per row.
        targets: target tokens per row.
        model_flops: of one step, all devices together; rematerialization does not count.
        unsharded: parameters that stay unsharded against the rules, as text.
    """

    run: RunConfig
    topology: Topology
    mesh: tuple[int, ...]
    inputs: int
    targets: int
    model_flops: float
    unsharded: tuple[str, ...]

    @property
    def mfu(self) -> float:
        peak = self.topology.generation.chip.bf16_flops * len(self.topology.devices)
        return self.model_flops / (self.step_seconds * peak)

    @property
    def tokens_per_second(self) -> float:
        return self.run.batch_size * (self.inputs + self.targets) / self.step_seconds

    @property
    def chip_hours(self) -> float:
        """Chip-hours of the run's whole token budget, ``steps`` steps."""
        return self.run.steps * self.step_seconds * self.topology.chips / 3600

    @property
    def tokens(self) -> int:
        return self.run.steps * self.run.batch_size * (self.inputs + self.targets)


def check_step(run: RunConfig, topology: Topology) -> None:
    """Checks, without compiling, that mesh and batch divide.

    Raises:
        ConfigError: they do not.
    """
    check_batch(run, data_shards(make_mesh(run.mesh, topology.devices)))


def compile_step(
    run: RunConfig,
    topology: Topology,
    inputs: int,
    targets: int,
    compiler_options: dict[str, str] | None = None,
) -> CompiledStep:
    """Compiles ``run``'s training step for rows of these lengths and predicts its cost.

    Raises:
        ConfigError: mesh or batch do not divide.
        DoesNotFit: the compiler ran out of memory; its reason is the message.
    """
    mesh = make_mesh(run.mesh, topology.devices)
    config = run.model_config()
    program = build_program(run, config, mesh, targets)
    # The most pairs that every token's draws can give; a run's shards have the real number.
    pairs = DRAWS * targets if run.distill.teacher else 0
    batch = abstract_batch(program, run.batch_size, inputs, targets, pairs)
    compiled = compile_lowered(
        program.train_step.lower(program.abstract_state, batch), topology, mesh, compiler_options
    )
    state = program.abstract_state
    memory = compiled.memory.split(state.params, state.opt_state)
    return checked(
        CompiledStep(
            **(vars(compiled) | {"memory": memory}),
            run=run,
            topology=topology,
            mesh=tuple(mesh.devices.shape),
            inputs=inputs,
            targets=targets,
            unsharded=tuple(map(str, program.unsharded)),
            model_flops=training_flops(config, inputs, targets, batch_size=run.batch_size),
        )
    )


PRODUCT_SIDE = 8192  # large enough that nothing but the matrix unit counts
SUM_SIDE = 16384  # large enough that nothing stays in on-chip memory


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The compiler's estimates for two programs whose limits are known.

    Attributes:
        topology: of the one device.
        product: of two square bfloat16 matrices, limited by the matrix unit.
        sum: of two bfloat16 arrays of 512 MiB, limited by memory.
    """

    topology: Topology
    product: CompiledProgram
    sum: CompiledProgram

    @property
    def share_of_peak(self) -> float:
        """The product's FLOPs as a share of the chip's peak over the estimated time."""
        rate = 2 * PRODUCT_SIDE**3 / self.product.step_seconds
        return rate / self.topology.generation.chip.bf16_flops

    @property
    def share_of_bandwidth(self) -> float:
        """The sum's reads and writes as a share of the memory's peak over the estimated time."""
        rate = 3 * 2 * SUM_SIDE**2 / self.sum.step_seconds
        return rate / self.topology.generation.chip.hbm_bytes_per_second


def calibrate(topology: Topology, compiler_options: dict[str, str] | None = None) -> Calibration:
    """Compiles both programs for one device, with the options of its chip."""
    mesh = one_device(topology)

    def compiled(function: Callable[..., jax.Array], side: int) -> CompiledProgram:
        square = jax.ShapeDtypeStruct(
            (side, side), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P())
        )
        options = chip_options(topology.devices[0].device_kind)
        jitted = jax.jit(function, compiler_options=options)
        return compile_lowered(jitted.lower(square, square), topology, mesh, compiler_options)

    return Calibration(topology, compiled(jnp.dot, PRODUCT_SIDE), compiled(jnp.add, SUM_SIDE))


def one_device(topology: Topology) -> jax.sharding.Mesh:
    """A mesh of the topology's first device."""
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), ("data",), axis_types=auto, devices=topology.devices[:1])


def compile_lowered(
    lowered: Any,
    topology: Topology,
    mesh: jax.sharding.Mesh,
    compiler_options: dict[str, str] | None = None,
) -> CompiledProgram:
    """Compiles a lowered function; all its arguments count as ``PeakMemory.batch``.

    Raises:
        DoesNotFit: the compiler ran out of memory; its reason is the message.
    """
    start = time.perf_counter()
    with _out_of_memory(), _no_cache():
        compiled = lowered.compile(compiler_options or None)
    seconds, text = time.perf_counter() - start, compiled.as_text()
    places = {device.id: n for n, device in enumerate(topology.devices)}
    order = [places[device.id] for device in mesh.devices.flat]
    analysis = compiled.memory_analysis()
    memory = PeakMemory(
        parameters=0,
        optimizer=0,
        batch=analysis.argument_size_in_bytes,
        temporary=analysis.temp_size_in_bytes,
        outputs=max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        code=analysis.generated_code_size_in_bytes,
        limit=int(topology.generation.hbm_limit_gib * 2**30),
    )
    return CompiledProgram(memory, predict(hlo.parse(text), topology, order), seconds, text)


def checked(step: CompiledStep) -> CompiledStep:
    """The step, unless its prediction is impossible.

    Raises:
        RuntimeError: it exceeds the peak rate, so part of the program was not counted.
    """
    if not 0 < step.mfu <= 1:
        raise RuntimeError(
            f"the prediction of {1e3 * step.step_seconds:.2f} ms per step means an MFU of "
            f"{100 * step.mfu:.0f} %, which no chip reaches: part of the program was not counted. "
            "This is a fault in how encdec reads the compiled program, not in the run"
        )
    return step


def nearest_fit(
    variants: Sequence[RunConfig], attempt: Callable[[RunConfig], Any]
) -> tuple[RunConfig, Any] | None:
    """The first of (six) smaller and smaller variants of a run that ``attempt`` can compile.

    Returns:
        The variant and the result of ``attempt``; None if no variant fits.
    """
    for variant in variants[:6]:
        try:
            return variant, attempt(variant)
        except DoesNotFit:
            continue
        except ConfigError:  # a batch too small to be divided over the mesh
            return None
    return None


def smaller(run: RunConfig) -> list[RunConfig]:
    """Variants whose training step needs less memory: full remat, then batches halved."""
    if run.model_config().execution.remat == "full":
        return halved(run)
    full = with_remat(run, "full")
    return [full, *halved(full)]


def halved(run: RunConfig) -> list[RunConfig]:
    """Variants of half the batch, a quarter, and so on, while micro-batches divide evenly."""
    rows, variants = run.batch_size, []
    while rows and rows % (2 * run.accumulation) == 0:
        rows //= 2
        variants.append(dataclasses.replace(run, batch_size=rows))
    return variants


def with_remat(run: RunConfig, remat: str) -> RunConfig:
    return dataclasses.replace(run, model_overrides=dict(run.model_overrides, remat=remat))


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of sharded shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@contextlib.contextmanager
def _out_of_memory() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_reason(str(error))) from None


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Programs for absent devices cannot be loaded back from a compilation cache."""
    config: Any = jax.config
    old = config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", old)


def _reason(message: str) -> str:
    """The first sentences of the compiler's message, without its list of buffers."""
    text = message.partition("RESOURCE_EXHAUSTED:")[2] or message
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(re.sub(r"\s+", " ", line) for line in lines[:3])
