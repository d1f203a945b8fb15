"""``encdec benchmark inference``: an encoder-decoder against its decoder-only peers, in one run."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import pathlib
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.table import Table

from encdec.benchmarks import transformers_runtime
from encdec.benchmarks.console import shown_mib, text_table, wide_console
from encdec.benchmarks.device_rates import DeviceRates, ReadRate, measure_rates
from encdec.benchmarks.generation import GenerationTiming, random_params, time_generation
from encdec.benchmarks.generation_memory import measure_peaks, peaks_by_process
from encdec.cost.flops import (
    BYTES_PER_VALUE,
    cache_bytes,
    count_parameters,
    generation_flops,
    weight_bytes,
)
from encdec.cost.peers import PeerMatch, match_decoder_only
from encdec.errors import ConfigError
from encdec.files import write_json
from encdec.flags import Parser
from encdec.logs import logger
from encdec.model import ModelConfig, preset
from encdec.storage import local_path

_LOG = logger(__name__)

PEERS: dict[str, PeerMatch] = {"parameters": "parameters", "flops": "training_flops"}
OURS = "encoder-decoder"
# The encoder-decoder by transformers' `generate`; the precision, or None for that of --dtype.
RUNTIMES = {"transformers": None, "transformers-bfloat16": "bfloat16"}
# arXiv 2501.16273, abstract: of the encoder-decoder against decoder-only models of its size.
PAPER = {
    "first token": "-47 %",
    "tokens per second": "4.7x",
    "memory": "-11 to -16 %",
    "FLOPs": "-22 %",
}


@dataclasses.dataclass(frozen=True)
class MeasuredModel:
    """One model at one setting: its timing, and the figures from the formulas.

    Attributes:
        timing: see ``GenerationTiming``.
        flops: of one generation, all rows.
        memory_bytes: weights and cache, computed.
        cache_bytes: of that, keys and values.
        bytes_moved: of weights and cache read in one generation; weights count once a pass.
        first_token_rate: FLOP/s up to the first token, over the machine's measured rate.
        decode_floor_share: seconds that reading weights and cache for each later token takes at
            the measured bandwidth, over those that it took; 0 for uncached generation.
        peak_bytes: of a process (of the device's memory, on an accelerator) that holds this model
            alone and generates; 0 where it was not measured.
    """

    timing: GenerationTiming
    flops: float
    memory_bytes: int
    cache_bytes: int
    bytes_moved: float
    first_token_rate: float
    decode_floor_share: float
    peak_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        timing = self.timing
        return {
            "model": timing.model,
            "cached": timing.cached,
            "batch": timing.batch,
            **timing.to_dict(),
            "flops": self.flops,
            "memory_bytes": self.memory_bytes,
            "cache_bytes": self.cache_bytes,
            "bytes_moved": self.bytes_moved,
            "first_token_rate": self.first_token_rate,
            "decode_floor_share": self.decode_floor_share,
            "peak_bytes": self.peak_bytes,
            "same_tokens": timing.same_tokens,
        }


def evaluate(
    timing: GenerationTiming, config: ModelConfig, rates: DeviceRates, dtype: str
) -> MeasuredModel:
    """Compares a timing with the formulas and the machine's rates."""
    rows, inputs, outputs = timing.batch, timing.input_length, timing.output_length
    flops = generation_flops(config, inputs, outputs, cached=timing.cached)
    first = rows * flops.first_token.total / timing.first_token.median
    # A weight that a token passes through costs two FLOPs and is read once for all rows.
    later, share = flops.later_tokens, 0.0
    held = weight_bytes(config, dtype)
    if timing.cached:
        read = (later.decoder + later.head) / 2 * BYTES_PER_VALUE[dtype]
        read += (outputs - 1) * cache_bytes(
            config, inputs, max(1, outputs // 2), batch_size=rows, dtype=dtype
        )
        taken = timing.total.median - timing.first_token.median
        share = read / rates.bytes_per_second / taken
    else:
        read = (outputs - 1) * held
    cache = cache_bytes(config, inputs, outputs, batch_size=rows, dtype=dtype)
    return MeasuredModel(
        timing,
        rows * flops.total,
        held + cache * timing.cached,
        cache * timing.cached,
        held + read,
        first / rates.flops_per_second,
        share,
    )


def measure(
    configs: Mapping[str, ModelConfig],
    inputs: Sequence[int],
    outputs: Sequence[int],
    batches: Sequence[int],
    *,
    repeats: int = 5,
    uncached_inputs: Sequence[int] | None = None,
    dtype: str = "float32",
    precisions: Mapping[str, str] | None = None,
    folder: pathlib.Path | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> tuple[DeviceRates, list[MeasuredModel]]:
    """Times every model at every setting, alternating, with random parameters.

    The values of parameters change no time. ``precisions`` are those of RUNTIMES that run OURS,
    whose export is in ``folder``. Raises ConfigError for a setting that cannot be.
    """
    models = {name: (config, random_params(config)) for name, config in configs.items()}
    if precisions and folder is None:
        raise ConfigError(f"{', '.join(precisions)} read an export; name the folder to write it to")
    loaded = {
        name: transformers_runtime.TransformersModel(
            transformers_runtime.artefact(*models[OURS], folder), precision, torch_device()
        )
        for name, precision in (precisions or {}).items()
        if folder is not None
    }
    # What ``time_generation`` asks of a runtime.
    runtime = lambda model: lambda tokens, count: (lambda: model.start(tokens, count), model.finish)
    runtimes = {name: runtime(model) for name, model in loaded.items()}
    dtypes = dict.fromkeys(configs, dtype) | dict(precisions or {})
    rates = {one: _rates(one) for one in dict.fromkeys(dtypes.values())}
    found = []
    for batch in batches:
        for output in outputs:
            timings = time_generation(
                models,
                inputs,
                output,
                batch=batch,
                repeats=repeats,
                uncached_lengths=uncached_inputs,
                dtype=dtype,
                runtimes=runtimes,
                on_progress=on_progress,
            )
            found += [
                evaluate(timing, configs.get(timing.model, configs[OURS]), rates[one], one)
                for timing in timings
                for one in (dtypes[timing.model],)
            ]
    return rates[dtype], found


def _rates(dtype: str) -> DeviceRates:
    """``measure_rates``; a CPU reads bfloat16 as fast as float32, of which it is measured."""
    found = measure_rates(dtype)
    return (
        found
        if found.bytes_per_second
        else dataclasses.replace(found, bytes_per_second=ReadRate().best(5))
    )


def torch_device() -> str:
    """torch's name of the kind of device that JAX uses."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def ratios(found: Sequence[MeasuredModel]) -> list[dict[str, Any]]:
    """The encoder-decoder against each peer at each setting, as the paper states its claims."""
    settings = lambda one: (one.timing.batch, one.timing.output_length, one.timing.input_length)
    ours = {settings(one): one for one in found if one.timing.model == OURS}
    rows = []
    for one in found:
        if one.timing.model == OURS:
            continue
        mine = ours[settings(one)]
        rows.append(
            {
                "peer": one.timing.model,
                "cached": one.timing.cached,
                "batch": one.timing.batch,
                "inputs": one.timing.input_length,
                "outputs": one.timing.output_length,
                "first token": mine.timing.first_token.median / one.timing.first_token.median - 1,
                "tokens per second": mine.timing.tokens_per_second.median
                / one.timing.tokens_per_second.median,
                "memory": mine.memory_bytes / one.memory_bytes - 1,
                "peak memory": mine.peak_bytes / one.peak_bytes - 1 if one.peak_bytes else None,
                "FLOPs": mine.flops / one.flops - 1,
            }
        )
    return rows


def main(argv: list[str]) -> int:
    """Times, prints two tables, and writes JSON and pictures.

    Raises:
        ConfigError: an unknown model or peer, or a length that cannot be.
    """
    options = _parser().parse_args(argv)
    console = wide_console(200)
    configs, precisions = _models(options), _precisions(options)
    for length in options.uncached_inputs or ():
        if length not in options.inputs_length:
            raise ConfigError(
                f"--uncached_inputs has {length}; expected some of --inputs_length, "
                f"{','.join(map(str, options.inputs_length))}"
            )
    settings = list(itertools.product(options.batches, options.inputs_length, options.outputs))
    peaks: dict[tuple[str, tuple[int, int, int]], int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if not options.no_memory:  # before this process takes much of an accelerator's memory
            _LOG.info("memory, each model in its own process")
            peaks = measure_peaks(configs, settings, options.dtype)
            peaks |= _peaks_of_runtimes(configs[OURS], precisions, folder, settings)
        rates, found = measure(
            configs,
            options.inputs_length,
            options.outputs,
            options.batches,
            repeats=options.repeats,
            uncached_inputs=options.uncached_inputs,
            dtype=options.dtype,
            precisions=precisions,
            folder=folder,
            on_progress=_LOG.info,
        )

    def peak(timing: GenerationTiming) -> int:
        setting = timing.batch, timing.input_length, timing.output_length
        return peaks.get((timing.model, setting), 0) if timing.cached else 0

    found = [dataclasses.replace(one, peak_bytes=peak(one.timing)) for one in found]
    console.print(
        f"{jax.devices()[0].device_kind}, {platform.machine()}: "
        f"{rates.bytes_per_second / 1e9:.1f} GB/s read, "
        f"{rates.flops_per_second / 1e9:.0f} GFLOP/s in a matrix product, "
        f"{options.dtype}",
        highlight=False,
    )
    console.print(_measured_table(found, configs))
    console.print(_ratio_table(ratios(found)))
    if options.out:
        for path in write(found, rates, configs, pathlib.Path(options.out), options.dtype):
            console.print(str(path), highlight=False)
    return 0


def write(
    found: Sequence[MeasuredModel],
    rates: DeviceRates,
    configs: Mapping[str, ModelConfig],
    folder: pathlib.Path,
    dtype: str,
) -> list[pathlib.Path]:
    """inference.json and, as PNG and SVG, time against input length for each batch and output."""
    from encdec.benchmarks.generation_plot import draw

    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "inference.json"
    write_json(
        report,
        {
            "device": jax.devices()[0].device_kind,
            "machine": platform.machine(),
            "dtype": dtype,
            "bytes_per_second": rates.bytes_per_second,
            "flops_per_second": rates.flops_per_second,
            "models": {name: config.to_dict() for name, config in configs.items()},
            "paper": PAPER,
            "ratios": ratios(found),
            "measured": [one.to_dict() for one in found],
        },
    )
    return [report, *draw([one.timing for one in found], folder)]


def _precisions(options: argparse.Namespace) -> dict[str, str]:
    """Of each of RUNTIMES that was asked for; both libraries will have to share a GPU's memory.

    Raises:
        ConfigError: one that cannot run here.
    """
    found = {peer: RUNTIMES[peer] or options.dtype for peer in options.peers if peer in RUNTIMES}
    if found:  # JAX would take three quarters of a GPU's memory when it is first used
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    for peer, precision in found.items():
        if why := transformers_runtime.missing(precision, torch_device()):
            raise ConfigError(f"--peers has {peer!r}, but {why}")
    return found


def _peaks_of_runtimes(
    config: ModelConfig,
    precisions: Mapping[str, str],
    folder: pathlib.Path,
    settings: Sequence[tuple[int, int, int]],
) -> dict[tuple[str, tuple[int, int, int]], int]:
    """As ``measure_peaks`` has it, of transformers."""
    if not precisions:
        return {}
    directory = transformers_runtime.artefact(config, random_params(config), folder)
    return {
        (name, setting): peak
        for name, precision in precisions.items()
        for setting, peak in peaks_by_process(
            "encdec.benchmarks.transformers_runtime",
            name,
            settings,
            {"directory": str(directory), "precision": precision, "device": torch_device()},
        ).items()
    }


def _models(options: argparse.Namespace) -> dict[str, ModelConfig]:
    ours = preset(options.model)
    if not ours.is_encoder_decoder:
        raise ConfigError(
            f"--model={options.model} is decoder-only; expected an encoder-decoder, to which peers "
            "are matched"
        )
    longest = max(options.inputs_length), max(options.outputs)
    return {OURS: ours} | {
        f"decoder-only, equal {peer}": match_decoder_only(
            ours, by=PEERS[peer], inputs=longest[0], targets=longest[1]
        )
        for peer in options.peers
        if peer in PEERS
    }


def _measured_table(found: Sequence[MeasuredModel], configs: Mapping[str, ModelConfig]) -> Table:
    size = lambda name: count_parameters(configs.get(name, configs[OURS])).total
    columns: dict[str, Callable[[MeasuredModel], str]] = {
        "model": lambda one: one.timing.model + ", no cache" * (not one.timing.cached),
        "parameters": lambda one: f"{size(one.timing.model) / 1e6:.1f}M",
        "batch": lambda one: str(one.timing.batch),
        "in": lambda one: str(one.timing.input_length),
        "out": lambda one: str(one.timing.output_length),
        "first token, ms": lambda one: one.timing.first_token.shown(1e3),
        "tokens/s": lambda one: one.timing.tokens_per_second.shown(),
        "memory": lambda one: shown_mib(one.memory_bytes),
        "peak memory": lambda one: shown_mib(one.peak_bytes),
        "read, GB": lambda one: f"{one.bytes_moved / 1e9:,.1f}",
        "GFLOP": lambda one: f"{one.flops / 1e9:,.1f}",
        "of matmul rate": lambda one: f"{one.first_token_rate:.0%}",
        "of read floor": lambda one: f"{one.decode_floor_share:.0%}" * one.timing.cached,
    }
    return text_table("Medians (quartiles)", found, columns)


def _ratio_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    change = lambda row, name: "" if row[name] is None else f"{row[name]:+.0%}"
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "peer": lambda row: row["peer"] + ", no cache" * (not row["cached"]),
        "batch": lambda row: str(row["batch"]),
        "in": lambda row: str(row["inputs"]),
        "out": lambda row: str(row["outputs"]),
        "first token": lambda row: change(row, "first token"),
        "tokens per second": lambda row: f"{row['tokens per second']:.2f}x",
        "memory": lambda row: change(row, "memory"),
        "peak memory": lambda row: change(row, "peak memory"),
        "FLOPs": lambda row: change(row, "FLOPs"),
    }
    table = text_table("The encoder-decoder against each peer", rows, columns)
    table.add_section()
    figures = [PAPER.get(name, "") for name in columns]
    table.add_row("the paper (lengths, batch not stated)", *figures[1:])
    return table


def _parser() -> Parser:
    parser = Parser(
        may_be_empty=("--uncached_inputs",),
        prog="encdec benchmark inference",
        description="Greedy generation by an encoder-decoder and by decoder-only peers of equal "
        "parameters and of equal training FLOPs, cached and uncached, alternating in one run; "
        "parameters are random, since their values do not affect the time.",
    )
    parser.add("--model", "preset of the encoder-decoder", default="330m")
    parser.add(
        "--peers",
        "decoder-only models of equal parameters or flops; transformers "
        "and transformers-bfloat16: the encoder-decoder by transformers' generate, "
        "in --dtype or in bfloat16",
        _names,
        ("parameters", "flops"),
        metavar="A,B",
    )
    for name, default, text in (
        ("inputs_length", (128, 512, 2048), "input tokens"),
        ("outputs", (64,), "new tokens"),
        ("batches", (1,), "rows"),
    ):
        parser.add(f"--{name}", text, numbers, default, metavar="N,N")
    parser.add("--repeats", "timed runs of each", int, 5, least=1)
    parser.add(
        "--dtype",
        "dtype of weights, cache and products",
        default="float32",
        choices=("float32", "bfloat16"),
    )
    parser.add(
        "--uncached_inputs",
        "those of --inputs_length at which decoder-only models "
        "generate without a cache, too, which takes the longer the longer they "
        "are (all; empty: none)",
        lambda text: numbers(text) if text else (),
        metavar="N,N",
    )
    parser.add(
        "--no_memory",
        "leave the peak memory out, for which each model runs once more in a "
        "process of its own; what weights and cache take is always computed",
        default=False,
    )
    parser.add("--out", "write JSON and pictures there", local_path)
    return parser


def numbers(text: str) -> tuple[int, ...]:
    """Positive numbers, separated by commas."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{text!r} is not a list of numbers; expected for example 128,512"
        ) from None
    if min(numbers) < 1:
        raise ConfigError(f"{text!r} has a number below 1; expected positive numbers")
    return numbers


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in PEERS | RUNTIMES:
            known = ", ".join(PEERS | RUNTIMES)
            raise ConfigError(f"--peers has {name!r}; expected some of {known}")
    return names
