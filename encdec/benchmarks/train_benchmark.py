"""Our training step next to PyTorch's: ``encdec benchmark train``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from encdec.benchmarks.device_rates import all_devices, measure_rates
from encdec.benchmarks.generation import random_params
from encdec.benchmarks.loop_benchmark import write_random_records
from encdec.benchmarks.step_profile import seconds_by_part
from encdec.benchmarks.transformers_runtime import missing
from encdec.cost.chips import peak_flops
from encdec.cost.flops import training_flops
from encdec.data.records import open_records
from encdec.errors import ConfigError, DataError
from encdec.files import write_json
from encdec.flags import Parser
from encdec.logs import logger
from encdec.model import ModelConfig
from encdec.storage import local_path
from encdec.train.feed import on_devices, open_batches
from encdec.train.program import Program, abstract_batch, build_program
from encdec.train.run_config import RunConfig, parse_config
from encdec.train.sharding import make_mesh

_LOG = logger(__name__)

# (rows, input tokens, target tokens) by preset; others take the first's.
SHAPES = {
    "quickstart": (8, 256, 48),
    "micro-1m": (8, 256, 48),
    "micro-8m": (8, 256, 48),
    "330m": (2, 512, 128),
}
OURS, EAGER, COMPILED = "ours", "PyTorch", "PyTorch, compiled"
LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class StepSetting:
    """One comparison: a model, its shape, its dtype and optimizer."""

    model: str
    dtype: str
    optimizer: str
    rows: int
    inputs: int
    targets: int
    overrides: tuple[tuple[str, Any], ...] = ()  # of the preset's fields

    def run(self) -> RunConfig:
        """The run that has this step, without dropout: PyTorch's side has none."""
        return parse_config(
            {
                "model": self.model,
                "model_overrides": {
                    "dtype": self.dtype,
                    "attention_dropout": 0.0,
                    "mlp_dropout": 0.0,
                    **dict(self.overrides),
                },
                "batch_size": self.rows,
                "steps": 1_000_000,
                "optimizer": {"name": self.optimizer, "learning_rate": LEARNING_RATE},
                "schedule": {"name": "constant", "warmup_steps": 0},
                "loss": {"z_loss": 0.0},
            }
        )


@dataclasses.dataclass
class MeasuredStep:
    """The result of one setting.

    Attributes:
        setting: what was measured.
        flops: of a step; see ``encdec.cost.flops.training_flops``.
        matmul_flops: FLOP/s of a square product in the setting's dtype, of all devices.
        seconds: of every timed step, by who took it.
        losses: of the first steps, by who took them: the same parameters, the same batch.
        compile_seconds: until the first step was done.
        parts: seconds of our step by part of the model, from the profiler.
        host_seconds: until our step has been handed to the device.
        data_seconds: to read and move a batch of random records.
        mfu: our step's share of the accelerators' peak; None where that is unknown.
    """

    setting: StepSetting
    flops: float
    matmul_flops: float
    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]
    compile_seconds: dict[str, float]
    parts: dict[str, float]
    host_seconds: float
    data_seconds: float
    mfu: float | None = None

    def median(self, who: str) -> float:
        return statistics.median(self.seconds[who])

    def ratio(self, who: str) -> float:
        """How many times our step fits into theirs."""
        return self.median(who) / self.median(OURS)

    def share(self, who: str) -> float:
        """Of the machine's matmul rate."""
        return self.flops / self.median(who) / self.matmul_flops


class SetStep(Protocol):
    """A training step to build: its run and the shape of its batch."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""

    @property
    def inputs(self) -> int:
        """Length of its sources."""

    @property
    def targets(self) -> int:
        """Length of its targets."""

    def run(self) -> RunConfig:
        """The run that has this step."""


class OurStep:
    """The program that ``encdec train`` runs, on one batch.

    Attributes:
        program: the program.
        batch: host arrays of rows without packing: one source and one target fill each.
    """

    def __init__(self, setting: SetStep) -> None:
        run = setting.run()
        self.config: ModelConfig = run.model_config()
        self.program: Program = build_program(
            run, self.config, make_mesh(run.mesh), setting.targets
        )
        self.batch = unpacked_batch(self.program, setting)
        self._on_device = jax.device_put(self.batch, self.program.batch_sharding)
        state = self.program.init()
        self._compiled = self.program.train_step.lower(state, self._on_device).compile()
        self._state = state

    def __call__(self) -> float:
        """Takes the step and waits for it; the loss before it."""
        self._state, metrics = self._compiled(self._state, self._on_device)
        losses = jax.block_until_ready((self._state, metrics))[1].sums.losses
        return float(losses.cross_entropy / losses.weight)

    def host_seconds(self) -> float:
        """Until a step has been handed over; the device is done before and waited for after."""
        jax.block_until_ready(self._state)
        begin = time.perf_counter()
        self._state, _ = self._compiled(self._state, self._on_device)
        taken = time.perf_counter() - begin
        jax.block_until_ready(self._state)
        return taken

    def parts(self, steps: int) -> dict[str, float]:
        """Seconds by part of the model."""
        return seconds_by_part(self, self._compiled.as_text(), steps)


def unpacked_batch(program: Program, setting: SetStep) -> dict[str, np.ndarray]:
    """Random ids in rows that one source and one target fill; the loss on targets alone."""
    draw, batch = np.random.default_rng(0), {}
    spec = abstract_batch(program, setting.rows, setting.inputs, setting.targets)
    for name, field in spec.items():
        if name.endswith("tokens"):
            values = draw.integers(3, program.model.config.vocab_size, field.shape)
        elif name.endswith("positions"):
            values = np.broadcast_to(np.arange(field.shape[1]), field.shape)
        else:
            values = np.ones(field.shape)
        batch[name] = np.asarray(values, field.dtype)
    if not program.model.config.is_encoder_decoder:
        batch["decoder_loss_weights"][:, : setting.inputs] = 0
    return batch


def torch_steps(
    setting: StepSetting, ours: OurStep, compiled: bool
) -> dict[str, Callable[[], float]]:
    """PyTorch's steps, from the parameters that ours begins with."""
    from encdec.benchmarks.inference_benchmark import torch_device
    from encdec.benchmarks.torch_training import TorchStep, build

    params = random_params(ours.config, setting.run().seed)
    optimizer = setting.run().optimizer
    steps: dict[str, Callable[[], float]] = {}
    loss = lambda step: float(step())
    for name in (EAGER, COMPILED) if compiled else (EAGER,):
        step = TorchStep(
            build(ours.config, params, setting.targets),
            ours.config,
            optimizer,
            ours.batch,
            compiled=name == COMPILED,
            device=torch_device(),
        )
        steps[name] = functools.partial(loss, step)
    return steps


def measure(
    setting: StepSetting,
    *,
    rounds: int,
    steps: int,
    torch: bool,
    compiled: bool,
    matmul_flops: float,
    profiled: int = 2,
) -> MeasuredStep:
    """Times a setting: ``rounds`` turns of ``steps`` steps each, ours and PyTorch's alternating.

    ``matmul_flops`` is one device's rate.
    """
    taken: dict[str, Callable[[], float]] = {}
    seconds: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    begin = time.perf_counter()
    ours = OurStep(setting)
    taken[OURS] = ours
    spent = time.perf_counter() - begin
    if torch:
        taken |= torch_steps(setting, ours, compiled)
    for name, step in taken.items():
        begin = time.perf_counter()
        losses[name] = [step()]
        first[name] = time.perf_counter() - begin + (spent if name == OURS else 0.0)
        losses[name] += [step(), step()]
        seconds[name] = []
    for _ in range(rounds):
        for name, step in taken.items():
            for _ in range(steps):
                begin = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - begin)
    flops = training_flops(ours.config, setting.inputs, setting.targets, batch_size=setting.rows)
    peak = peak_flops(jax.devices())
    median = statistics.median(seconds[OURS])
    return MeasuredStep(
        setting,
        flops,
        all_devices(matmul_flops),
        seconds,
        losses,
        first,
        ours.parts(profiled) if profiled else {},
        statistics.median([ours.host_seconds() for _ in range(3)]),
        seconds_of_data(setting, ours),
        flops / median / peak if peak else None,
    )


def seconds_of_data(setting: StepSetting, ours: OurStep, batches: int = 5) -> float:
    """To read, shuffle and move one batch of random records of the setting's lengths."""
    with tempfile.TemporaryDirectory() as folder:
        records = open_records(
            write_random_records(
                pathlib.Path(folder), 4 * setting.rows, setting.inputs, setting.targets
            )
        )
        sharding = ours.program.batch_sharding
        feed = on_devices(
            open_batches(records, ours.config, sharding, setting.rows), sharding, 0, batches + 1
        )
        jax.block_until_ready(next(feed))
        begin = time.perf_counter()
        for batch in feed:
            jax.block_until_ready(batch)
        return (time.perf_counter() - begin) / batches


def settings_of(options: argparse.Namespace) -> list[StepSetting]:
    """Every model in every dtype with every optimizer."""
    found = []
    for model in options.models:
        rows, inputs, targets = SHAPES.get(model.split("-dec")[0], SHAPES["quickstart"])
        shape = (
            options.batch_size or rows,
            options.inputs_length or inputs,
            options.targets_length or targets,
        )
        for dtype in options.dtypes:
            for optimizer in options.optimizers:
                found.append(StepSetting(model, dtype, optimizer, *shape))
                found[-1].run()  # an unknown name is told before anything is measured
    return found


def as_json(one: MeasuredStep) -> dict[str, Any]:
    """A row of ``train.json``."""
    return dataclasses.asdict(one) | {
        "device": jax.devices()[0].device_kind,
        "median_seconds": {name: one.median(name) for name in one.seconds},
        "share_of_matmul_rate": {name: one.share(name) for name in one.seconds},
        "ratio": {name: one.ratio(name) for name in one.seconds if name != OURS},
    }


def kept(path: pathlib.Path) -> list[MeasuredStep]:
    """What an earlier call wrote to ``train.json``; none where there is no file.

    Raises:
        DataError: the file holds something else.
    """
    if not path.is_file():
        return []
    names = {field.name for field in dataclasses.fields(MeasuredStep)}
    found = []
    try:
        for row in json.loads(path.read_text()):
            setting = row["setting"]
            setting["overrides"] = tuple(map(tuple, setting["overrides"]))
            values = {name: value for name, value in row.items() if name in names}
            found.append(MeasuredStep(**values | {"setting": StepSetting(**setting)}))
    except (ValueError, TypeError, KeyError):
        raise DataError(
            f"{path} was not written by this command; give another --out, or remove the file"
        ) from None
    return found


def step_table(found: Sequence[MeasuredStep]) -> Table:
    """Times, rates and ratios."""
    table = Table(title="A training step, medians; ratios within this run", title_justify="left")
    for place, name in enumerate(
        ("model", "rows", "dtype", "optimizer", "by", "ms", "GFLOP/s", "of matmul rate", "ours is")
    ):
        table.add_column(name, justify="right" if place > 4 else "left", no_wrap=True)
    for one in found:
        setting = one.setting
        for name in one.seconds:
            mfu = f", MFU {one.mfu / one.ratio(name):.0%}" if one.mfu else ""
            table.add_row(
                setting.model,
                f"{setting.rows} x {setting.inputs} + {setting.targets}",
                setting.dtype,
                setting.optimizer,
                name,
                f"{1e3 * one.median(name):,.1f}",
                f"{one.flops / one.median(name) / 1e9:,.0f}",
                f"{one.share(name):.0%}{mfu}",
                "" if name == OURS else f"{one.ratio(name):.2f}x as fast",
            )
    return table


def parts_table(found: Sequence[MeasuredStep]) -> Table:
    """Our step by part, in milliseconds."""
    table = Table(title="Our step by part, ms", title_justify="left")
    table.add_column("part")
    rows: dict[str, list[str]] = {}
    for place, one in enumerate(found):
        setting = one.setting
        table.add_column(f"{setting.model}\n{setting.dtype}\n{setting.optimizer}", justify="right")
        told = one.parts | {"host": one.host_seconds, "data": one.data_seconds}
        for part, seconds in told.items():
            rows.setdefault(part, [""] * len(found))[place] = f"{1e3 * seconds:,.1f}"
    for part, cells in rows.items():
        table.add_row(part, *cells)
    return table


def _names(allowed: Sequence[str] = ()) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        for name in found:
            if allowed and name not in allowed:
                raise ConfigError(f"{name!r} is unknown; expected some of {', '.join(allowed)}")
        return found

    return names


def _parser() -> Parser:
    parser = Parser(
        prog="encdec benchmark train",
        description="Our jitted training step next to PyTorch's of the same architecture, "
        "parameters, batch and optimizer, alternating in one run; and where the time of ours "
        "goes.",
    )
    parser.add("--models", "presets", _names(), ("quickstart",), metavar="A,B")
    parser.add(
        "--dtypes",
        "float32 and bfloat16",
        _names(("float32", "bfloat16")),
        ("float32",),
        metavar="A,B",
    )
    parser.add(
        "--optimizers", "adamw and muon", _names(("adamw", "muon")), ("adamw",), metavar="A,B"
    )
    for name, text in (
        ("batch_size", "rows of a batch (default: 8; of 330m 2)"),
        ("inputs_length", "source tokens per row (default: 256; for 330m 512)"),
        ("targets_length", "target tokens per row (default: 48; for 330m 128)"),
    ):
        parser.add(f"--{name}", text, int, 0, least=0)
    parser.add("--repeats", "turns of each", int, 5, least=1)
    parser.add("--steps", "steps of a turn", int, 5, least=1)
    parser.add("--no_torch", "ours alone", default=False)
    parser.add("--no_compile", "PyTorch without torch.compile, which needs g++", default=False)
    kept = "write train.json there; what it has, by as many steps, is not measured again"
    parser.add("--out", kept, local_path)
    return parser


def main(argv: list[str]) -> int:
    """``encdec benchmark train``."""
    options = _parser().parse_args(argv)
    settings = settings_of(options)
    torch = not options.no_torch
    if torch and (why := missing("float32")):
        _LOG.warning(f"{why}; only encdec is measured")
        torch = False
    rates: Mapping[str, float] = {
        dtype: measure_rates(dtype).flops_per_second for dtype in options.dtypes
    }
    path = pathlib.Path(options.out, "train.json") if options.out else None
    found = kept(path) if path else []
    wanted = (OURS, EAGER, COMPILED)[: 1 + torch * (2 - options.no_compile)]
    for setting in settings:
        before = [one for one in found if one.setting == setting]
        if before and all(
            len(before[0].seconds.get(name, ())) >= options.repeats * options.steps
            for name in wanted
        ):
            continue
        found = [one for one in found if one not in before]
        found.append(
            measure(
                setting,
                rounds=options.repeats,
                steps=options.steps,
                torch=torch,
                compiled=not options.no_compile,
                matmul_flops=rates[setting.dtype],
            )
        )
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, [as_json(one) for one in found])
    console = Console(width=140)
    console.print(step_table(found))
    console.print(parts_table(found))
    return 0
