"""``encdec benchmark edge``: one model in every runtime on this machine's CPU, alternating."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from encdec.benchmarks.console import shown_mib, text_table, wide_console
from encdec.benchmarks.device_rates import (
    DeviceRates,
    OthersLoad,
    ReadRate,
    measure_rates,
    peak_memory,
)
from encdec.benchmarks.edge_paths import DEFAULT, PATHS, REFERENCE, Halves, chosen_paths, load_path
from encdec.benchmarks.generation import GenerationTiming, Spread, random_params
from encdec.benchmarks.inference_benchmark import numbers
from encdec.cost.flops import BYTES_PER_VALUE, cache_bytes, generation_flops, mlp_weights
from encdec.errors import ConfigError
from encdec.files import write_json
from encdec.flags import Parser
from encdec.model import ModelConfig, preset
from encdec.storage import local_path


@dataclasses.dataclass(frozen=True)
class MeasuredPath:
    """One path at one input length.

    Attributes:
        timing: see ``GenerationTiming``.
        decode_floor_share: seconds that reading the decoder's weights and caches takes at the
            measured bandwidth, over those that the later tokens took.
        neighbouring_floor_share: the same of each timing against the bandwidth measured directly
            before and after its later tokens; the mean of the two counts.
        first_token_rate: FLOP/s up to the first token, over the measured rate of a matrix product
            in the type that this path multiplies in where JAX has it (int8: of bfloat16).
        same_tokens: new tokens before the first that is not JAX float32's; None without it.

    The first and the last hold a median of timings against the best rate of the whole run, which
    is the machine's own limit. A virtual machine may have less for minutes, while others on its
    host read memory, and these shares then fall though the program is the same. The share of
    neighbouring reads says what the program makes of what there was.
    """

    timing: GenerationTiming
    decode_floor_share: float
    neighbouring_floor_share: Spread
    first_token_rate: float
    same_tokens: int | None = None


def measure(
    runs: dict[str, Halves],
    config: ModelConfig,
    inputs: Sequence[int],
    outputs: int,
    repeats: int,
    *,
    read_rate: Callable[[], float],
    calm: float = 1.0,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[tuple[GenerationTiming, tuple[float, ...], int | None]], int]:
    """Times every path at every length, alternating, after an untimed first round.

    Args:
        runs: the paths by name.
        config: the model.
        inputs: lengths of the inputs.
        outputs: new tokens.
        repeats: timings expected of each path.
        read_rate: measures the bandwidth, in bytes per second; called around every timing's later
            tokens.
        calm: a timing during which other processes took more than this share of the cores is
            taken again, in as many as 8 times ``repeats`` turns; what came last then stands.
        between: called between turns.

    Returns:
        The timings, each with the bandwidth around its repeats and ``MeasuredPath.same_tokens``;
        and how many were taken again.
    """
    timings, again = [], 0
    for length in inputs:
        tokens = np.random.default_rng(length).integers(2, config.vocab_size, length)
        taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
        answers = {name: rest(first(tokens), outputs) for name, (first, rest) in runs.items()}
        for turn in range(8 * repeats):
            between()
            for name, (first, rest) in runs.items():
                if len(taken[name]) == repeats:
                    continue
                busy, begin = OthersLoad(), time.perf_counter()
                state = first(tokens)
                first_seconds = time.perf_counter() - begin
                before, begin = read_rate(), time.perf_counter()
                rest(state, outputs)
                total = first_seconds + time.perf_counter() - begin
                around = (before + read_rate()) / 2
                if busy.others() <= calm or turn >= 7 * repeats + len(taken[name]):
                    taken[name].append((first_seconds, total, around))
                else:
                    again += 1
            if all(len(times) == repeats for times in taken.values()):
                break
        for name, times in taken.items():
            firsts, totals, arounds = zip(*times)
            timings.append(
                (
                    GenerationTiming(name, True, length, outputs, 1, firsts, totals),
                    arounds,
                    alike(answers[name], answers[REFERENCE]) if REFERENCE in answers else None,
                )
            )
    return timings, again


def alike(ours_1xN: np.ndarray, theirs_1xN: np.ndarray) -> int:
    """Tokens before the first difference."""
    same_N = np.asarray(ours_1xN)[0] == np.asarray(theirs_1xN)[0]
    return int(np.logical_and.accumulate(same_N).sum())


def evaluate(
    timing: GenerationTiming,
    around: Sequence[float],
    config: ModelConfig,
    rates: DeviceRates,
    fast: DeviceRates,
) -> MeasuredPath:
    """Compares a timing with the formulas and the machine's rates; ``around`` is of each repeat."""
    kind, precision = PATHS[timing.model]
    flops = generation_flops(config, timing.input_length, timing.output_length)
    later, precision = flops.later_tokens, precision if kind != "jax" else "float32"
    # Four bits are for the decoder's MLPs alone.
    mlps = (timing.output_length - 1) * config.decoder_layers * mlp_weights(config)
    others = later.decoder / 2 + later.head / 2 - mlps
    weights = mlps * BYTES_PER_VALUE[precision] + others * max(BYTES_PER_VALUE[precision], 1.0)
    cache = (timing.output_length - 1) * cache_bytes(
        config,
        timing.input_length,
        max(1, timing.output_length // 2),
        dtype="bfloat16" if precision == "bfloat16" else "float32",
    )
    taken = timing.total.median - timing.first_token.median
    reduced = PATHS[timing.model][1] != "float32"
    product_rate = (fast if reduced else rates).flops_per_second
    neighbouring = Spread.of(
        [
            (weights + cache) / rate / (total - first)
            for rate, first, total in zip(around, timing.first_token_seconds, timing.total_seconds)
        ]
    )
    return MeasuredPath(
        timing,
        (weights + cache) / rates.bytes_per_second / taken,
        neighbouring,
        flops.first_token.total / timing.first_token.median / product_rate,
    )


def peak_bytes(arguments: Sequence[str]) -> int:
    """Peak memory of a separate process that loads one path and generates once."""
    done = subprocess.run(
        [sys.executable, "-m", "encdec", "benchmark", "edge", "--peak", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def main(argv: list[str]) -> int:
    """Exports the model if necessary, times every path, prints a table, writes JSON.

    Raises:
        ConfigError: an unknown model or path, or a number that cannot be.
    """
    options = _parser().parse_args(argv)
    config = preset(options.model)
    paths, left_out = chosen_paths(options.paths)
    if not config.is_encoder_decoder:
        raise ConfigError(f"--model={options.model} is decoder-only; expected an encoder-decoder")
    if options.repeats < 1 or options.outputs < 2:
        raise ConfigError(
            f"repeats is {options.repeats} and outputs {options.outputs}; expected at least 1 and 2"
        )
    folder = pathlib.Path(options.artefacts) / options.model
    if options.peak:
        print(_peak(options, config, folder))
        return 0
    params = random_params(config)
    runs = {name: load_path(name, config, params, folder, options.outputs) for name in paths}
    if options.export_only:
        return 0
    del params
    console = wide_console()
    rates: dict[str, list[DeviceRates]] = {"float32": [], "bfloat16": []}

    def measure_machine() -> None:
        for dtype, found in rates.items():
            found.append(measure_rates(dtype, tries=3))

    reading, busy = ReadRate(), OthersLoad()
    timings, again = measure(
        runs,
        config,
        options.inputs_length,
        options.outputs,
        options.repeats,
        calm=options.calm,
        read_rate=lambda: reading.best(2),
        between=measure_machine,
    )
    others = busy.others()
    del runs
    plain, fast = map(_best_rates, rates.values())
    found = [
        dataclasses.replace(evaluate(timing, around, config, plain, fast), same_tokens=same)
        for timing, around, same in timings
    ]
    content = {
        "model": options.model,
        "rates": dataclasses.asdict(plain),
        "others": others,
        "median_bytes_per_second": statistics.median(
            one.bytes_per_second for one in rates["float32"]
        ),
        "taken_again": again,
        "calm": options.calm,
        "bfloat16_flops_per_second": fast.flops_per_second,
        "peak_bytes": {} if options.no_memory else _peaks(options, paths),
        "measured": [_as_json(one) for one in found],
    }
    console.print(_machine_line(content))
    console.print(_table(found, content["peak_bytes"], options.outputs))
    for line in left_out:
        console.print(line, highlight=False)
    if options.out:
        pathlib.Path(options.out).mkdir(parents=True, exist_ok=True)
        write_json(pathlib.Path(options.out) / "edge.json", content)
    return 0


def _best_rates(found: Sequence[DeviceRates]) -> DeviceRates:
    """The machine's rates: the highest that were seen of each."""
    return DeviceRates(
        max(one.bytes_per_second for one in found), max(one.flops_per_second for one in found)
    )


def _machine_line(content: Mapping[str, Any]) -> str:
    rates = content["rates"]
    return (
        f"{platform.processor() or platform.machine()}, batch 1: "
        f"{rates['bytes_per_second'] / 1e9:.1f} GB/s read "
        f"(median {content['median_bytes_per_second'] / 1e9:.1f}), "
        f"{rates['flops_per_second'] / 1e9:.0f} GFLOP/s float32 and "
        f"{content['bfloat16_flops_per_second'] / 1e9:.0f} bfloat16; other processes took "
        f"{content['others']:.0%} of the cores meanwhile, {content['taken_again']} timings were "
        "taken again"
    )


def _peaks(options: argparse.Namespace, paths: Sequence[str]) -> dict[str, int]:
    """Peak memory by path, at the longest input."""
    common = [
        f"--model={options.model}",
        f"--artefacts={options.artefacts}",
        f"--inputs_length={max(options.inputs_length)}",
        f"--outputs={options.outputs}",
    ]
    return {name: peak_bytes([f"--paths={name}", *common]) for name in paths}


def _as_json(one: MeasuredPath) -> dict[str, Any]:
    return {
        "path": one.timing.model,
        **one.timing.to_dict(),
        "decode_floor_share": one.decode_floor_share,
        "neighbouring_floor_share": dataclasses.asdict(one.neighbouring_floor_share),
        "first_token_rate": one.first_token_rate,
        "same_tokens": one.same_tokens,
    }


def _peak(options: argparse.Namespace, config: ModelConfig, folder: pathlib.Path) -> int:
    (name,) = options.paths
    params = random_params(config) if PATHS[name][0] == "jax" else None
    first, rest = load_path(name, config, params, folder, options.outputs)
    rest(first(np.full(max(options.inputs_length), 5)), options.outputs)
    return peak_memory()


def _table(found: Sequence[MeasuredPath], peaks: dict[str, int], outputs: int) -> Table:
    columns: dict[str, Callable[[MeasuredPath], str]] = {
        "path": lambda one: one.timing.model,
        "in": lambda one: str(one.timing.input_length),
        "first token, ms": lambda one: one.timing.first_token.shown(1e3, 0),
        "tokens/s": lambda one: one.timing.tokens_per_second.shown(1, 1),
        "total, s": lambda one: one.timing.total.shown(1, 3),
        "of matmul rate": lambda one: f"{one.first_token_rate:.0%}",
        "of read floor": lambda one: f"{one.decode_floor_share:.0%}",
        "of adjacent reads": lambda one: one.neighbouring_floor_share.shown(100, 0) + " %",
        "peak memory": lambda one: shown_mib(peaks.get(one.timing.model)),
        "same tokens": lambda one: (
            "" if one.same_tokens is None else f"{one.same_tokens} of {outputs}"
        ),
    }
    return text_table(f"Medians (quartiles), {outputs} tokens out", found, columns)


def _parser() -> Parser:
    parser = Parser(
        prog="encdec benchmark edge",
        description="Greedy generation at batch 1 on this machine's CPU by JAX and by exported "
        "models of the same parameters, and by transformers, OpenVINO and CTranslate2 (extras hf "
        "and peers), alternating in one run. "
        '"same tokens" counts those before the first that differs from JAX float32. '
        "Parameters are random: their values do not affect the time.",
    )
    parser.add("--model", "preset of the encoder-decoder", default="330m")
    parser.add(
        "--paths",
        f"paths to time, of {', '.join(PATHS)} ({','.join(DEFAULT)}; of the peers those that "
        "this machine can run)",
        lambda text: tuple(text.split(",")),
        metavar="A,B",
    )
    parser.add("--inputs_length", "input tokens", numbers, (512,), metavar="N,N")
    parser.add("--outputs", "new tokens", int, 64, least=2)
    parser.add("--repeats", "timed runs of each", int, 5, least=1)
    parser.add(
        "--calm",
        "take a timing again during which other processes took more than "
        "this share of the cores (1: never)",
        float,
        1.0,
        least=0,
        most=1,
        metavar="SHARE",
    )
    parser.add("--artefacts", "exports are kept and found here", local_path, "runs/edge")
    parser.add("--export_only", "write exports, time nothing", default=False)
    parser.add(
        "--no_memory",
        "leave the peak memory out, for which each path runs once more in a process of its own",
        default=False,
    )
    parser.add("--out", "write edge.json there", local_path)
    parser.add("--peak", argparse.SUPPRESS, default=False)
    return parser
