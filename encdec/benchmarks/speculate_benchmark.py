"""``encdec benchmark speculate``: cost of a step of several tokens, gain from drafts."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from encdec.benchmarks import edge_paths
from encdec.benchmarks.generation import START_ID
from encdec.benchmarks.inference_benchmark import numbers
from encdec.benchmarks.speculate_expected import expected_table
from encdec.benchmarks.speculate_tasks import (
    PEER,
    STEP_SIZES,
    TaskRate,
    measure_task,
    measure_transformers,
)
from encdec.benchmarks.transformers_runtime import missing
from encdec.errors import ConfigError
from encdec.export.export_model import export_model
from encdec.flags import Parser
from encdec.inference.decoding import DecodingPlan, Memory, prefill, start_compiled, verify_step
from encdec.inference.decoding_compiler import LazilyCompiled
from encdec.inference.drafting import Drafters
from encdec.inference.exported import export_format, load_exported_model
from encdec.inference.generation_settings import LOOKUP, OFF
from encdec.inference.load_generator import load
from encdec.inference.pace import Insistent
from encdec.inference.ready import ready_for_decoding
from encdec.inference.sampling import Choosing, first_highest, greedy_rows
from encdec.model import ModelConfig, Params, build_model, init_params, preset
from encdec.shipped import checkpoint, model_directory
from encdec.storage import local_path

STEPS = 12  # of one size, timed together
REGROUPED = 16  # rows of the other batches; 1 where there are as many already
TOKENS = 256  # made where every draft is wrong
RUNTIMES = (
    "jax",
    *(f"{kind}-{weights}" for kind in ("onnx", "litert") for weights in ("float32", "int8")),
)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Seconds of one step by the number of tokens that it feeds each row."""

    runtime: str
    rows: int
    seconds: dict[int, float]

    def ratio(self, size: int) -> float:
        """Against a step of one token."""
        return self.seconds[size] / self.seconds[1]


def jax_steps(config: ModelConfig, params: Params, inputs: int, rows: int) -> Callable[[int], None]:
    """What makes STEPS steps of a size after inputs that were read once."""
    capacity = STEPS + max(STEP_SIZES)
    tokens_BxS = _drawn(config, rows, inputs)
    read = jax.jit(prefill, static_argnums=0, static_argnames=("start_id", "capacity"))
    lengths_B = np.full(rows, inputs, np.int32)
    _, memory = read(config, params, tokens_BxS, lengths_B, start_id=START_ID, capacity=capacity)
    begin_R = np.array(memory.slots_R)

    @functools.partial(LazilyCompiled, static_argnums=0, donate_argnums=2)
    def several(size: int, params: Params, memory: Memory) -> Memory:
        def step(_: int, carry: tuple[Memory, jax.Array]) -> tuple[Memory, jax.Array]:
            memory, fed_RxK = carry
            logits_RxKxV, memory = verify_step(config, params, memory, fed_RxK)
            return memory.replace(slots_R=memory.slots_R + 1), first_highest(logits_RxKxV)

        return jax.lax.fori_loop(0, STEPS, step, (memory, jnp.ones((rows, size), jnp.int32)))[0]

    def run(size: int) -> None:
        nonlocal memory
        memory = several(size, params, memory.replace(slots_R=jnp.array(begin_R)))
        jax.block_until_ready(memory)

    return run


def exported_steps(model: Any, inputs: int, rows: int) -> Callable[[int], None]:
    """The same of an exported model; no step keeps what it fed, so that all have one cache."""
    tokens_BxS = _drawn(model.config, rows, inputs).astype(np.int64)

    def run(size: int) -> None:
        fed_RxK, none_R = np.ones((rows, size), np.int64), np.zeros(rows, np.int64)
        for _ in range(STEPS):
            memory.verify(fed_RxK)
            memory.keep(none_R)

    _, memory = model.prefill(tokens_BxS, np.full(rows, inputs), START_ID, max(STEP_SIZES))
    return run


def _drawn(config: ModelConfig, rows: int, inputs: int) -> np.ndarray:
    return np.random.default_rng(0).integers(2, config.vocab_size, (rows, inputs), np.int32)


def measure_steps(
    steps: Mapping[str, Callable[[int], None]],
    rows: int,
    repeats: int,
    largest: Mapping[str, int] = {},
) -> list[StepCost]:
    """Medians of alternating runs of every runtime and size, after one of each to compile.

    ``largest``: sizes that a runtime takes at most, where it does not take all.
    """
    sizes = {name: [k for k in STEP_SIZES if k <= largest.get(name, k)] for name in steps}
    turns = [(name, size) for name in steps for size in sizes[name]]
    for name, size in turns:
        steps[name](size)
    taken: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    for _ in range(repeats):
        for name, size in turns:
            begin = time.perf_counter()
            steps[name](size)
            taken[name, size].append((time.perf_counter() - begin) / STEPS)
    return [
        StepCost(name, rows, {size: statistics.median(taken[name, size]) for size in sizes[name]})
        for name in steps
    ]


def wrong_drafts_cost(config: ModelConfig, params: Params, inputs: int, repeats: int) -> float:
    """Seconds of one answer whose drafts are all wrong over those of plain decoding.

    Its source is hidden from the drafts, and what they find in the answer is never right: TOKENS
    tokens of one row, drawn from almost nothing, of which none comes twice.
    """
    plan = DecodingPlan(Choosing(config.vocab_size, ngrams=True), TOKENS, START_ID)
    settings = greedy_rows(1, TOKENS).replace(no_repeat_ngram_R=jnp.ones(1, jnp.int32))
    tokens_1xS = _drawn(config, 1, inputs)
    lengths_1 = np.full(1, inputs, np.int32)

    def seconds(drafters: Drafters) -> float:
        decoding = start_compiled(config, plan, params, tokens_1xS, lengths_1, settings)
        advance = drafters.begin(plan, tokens_1xS[:, :0], lengths_1 * 0, 1, 0)
        begin = time.perf_counter()
        while not bool(decoding.finished_R.all()):
            decoding = advance(decoding, 32)
        return time.perf_counter() - begin

    both = Drafters(config, params, OFF), Drafters(config, params, LOOKUP)
    for drafters in both:
        seconds(drafters)
    taken = [[seconds(drafters) for drafters in both] for _ in range(repeats)]
    plain, drafted = map(statistics.median, zip(*taken))
    return drafted / plain


def main(argv: list[str]) -> int:
    """Measures, prints tables, and writes JSON; 1 where a drafted answer is a fault.

    Raises:
        ConfigError: nothing to measure, or a runtime that is not known.
        CheckpointError, DataError: no model or no texts there.
    """
    options = _parser().parse_args(argv)
    if options.transformers and (why := missing("float32")):
        raise ConfigError(f"--transformers is given, but {why}")
    if not options.model and not options.checkpoint:
        raise ConfigError(
            "nothing to measure; give --model=PRESET, or --checkpoint=DIR --jsonl=FILE"
        )
    if bool(options.checkpoint) != bool(options.jsonl):
        raise ConfigError("--checkpoint=DIR and --jsonl=FILE go together; give both or none")
    console = Console(width=None if Console().is_terminal else 160)
    report: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    if options.model:
        costs, wrong = _costs(options)
        console.print(_cost_table(costs, options.model))
        console.print(f"drafts that are always wrong: {wrong:.2f} of plain decoding's time")
        report |= {"costs": [dataclasses.asdict(cost) for cost in costs], "always_wrong": wrong}
    rates = _rates(options) if options.checkpoint else []
    if options.model and rates:
        one_row = {x.runtime: {k: x.ratio(k) for k in x.seconds} for x in costs if x.rows == 1}
        allowed = {f"{x.runtime}, {x.task}": x.allowed for x in rates if x.allowed}
        console.print(expected_table(one_row, allowed))
    faults = [rate for rate in rates if rate.runtime != PEER and set(rate.different) - {*rate.ties}]
    if rates:
        console.print(_rate_table(rates))
        report["tasks"] = [dataclasses.asdict(rate) for rate in rates]
    if options.out:
        out = pathlib.Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "speculate.json").write_text(json.dumps(report, indent=2) + "\n")
        console.print(str(out / "speculate.json"), highlight=False)
    return int(bool(faults))


def _costs(options: argparse.Namespace) -> tuple[list[StepCost], float]:
    model = preset(options.model)
    drawn = jax.jit(init_params, static_argnums=0)(build_model(model), jax.random.key(0))
    config, params = ready_for_decoding(model, drawn)
    in_jax = {"jax": (config, params)} if "jax" in options.runtimes else {}
    if options.as_trained:
        in_jax["jax, as trained"] = ready_for_decoding(model, drawn, lay_out=False)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        exported = {
            name: load_exported_model(edge_paths.artefact(name, model, drawn, pathlib.Path(folder)))
            for name in options.runtimes
            if name != "jax"
        }
        del drawn
        for rows in options.batches:
            steps = {
                name: exported_steps(x, options.inputs_length, rows)
                for name, x in exported.items()
                if rows <= (x.rows_at_once or rows)
            }
            steps = {
                name: jax_steps(*one, options.inputs_length, rows) for name, one in in_jax.items()
            } | steps
            largest = {name: x.tokens_at_once for name, x in exported.items() if x.tokens_at_once}
            found += measure_steps(steps, rows, options.repeats, largest)
    return found, wrong_drafts_cost(config, params, options.inputs_length, options.repeats)


def _rates(options: argparse.Namespace) -> list[TaskRate]:
    """Of every checkpoint, runtime, number of rows and file. Exports of checkpoints are written to
    a folder that is removed."""
    found = []
    for directory in options.checkpoint:
        with tempfile.TemporaryDirectory() as folder:
            for name, one in _models(directory, options, pathlib.Path(folder)):
                for rows in options.batches:
                    plain, drafting = (load(one, batch_rows=rows, draft=x) for x in (OFF, LOOKUP))
                    generators = plain, drafting
                    if generators[0].batch_rows < rows:
                        continue  # LiteRT's one row
                    regrouped = None
                    if options.always:
                        generators[1].paces.begin(Insistent)
                        other = 1 if rows == REGROUPED else REGROUPED
                        regrouped = load(one, batch_rows=other, draft=OFF)
                        if regrouped.batch_rows != other:
                            regrouped = None
                    for path in options.jsonl:
                        asked = path, options.max_examples, options.max_tokens
                        found.append(measure_task(name, generators, *asked, regrouped))
            if options.transformers and not export_format(model_directory(directory)):
                out = pathlib.Path(folder) / "hf"
                export_model(directory, out)
                for path in options.jsonl:
                    asked = path, options.max_examples, options.max_tokens
                    found.append(measure_transformers(load(directory), out, *asked))
    return found


def _models(
    directory: str, options: argparse.Namespace, folder: pathlib.Path
) -> Iterator[tuple[str, str | pathlib.Path]]:
    """Names and directories: an export as it is, a work directory by every runtime."""
    short = pathlib.Path(directory).name
    if kind := export_format(model_directory(directory)):
        yield f"{kind} {short}", directory
        return
    for name in options.runtimes:
        if name == "jax":
            yield f"jax {short}", directory
            continue
        kind, precision = name.split("-")
        export_model(directory, folder / name, format=kind, precision=precision)
        yield f"{name} {short}", folder / name


def _cost_table(costs: Sequence[StepCost], model: str) -> Table:
    table = Table(title=f"a step of k tokens, {model}: ms, and times a step of one")
    for column in ("runtime", "rows", *(f"k = {size}" for size in STEP_SIZES)):
        table.add_column(column, justify="left" if column == "runtime" else "right")
    for cost in costs:
        cells = [
            f"{cost.seconds[k] * 1e3:.2f} ({cost.ratio(k):.2f})" if k in cost.seconds else "–"
            for k in STEP_SIZES
        ]
        table.add_row(cost.runtime, str(cost.rows), *cells)
    return table


def _rate_table(rates: Sequence[TaskRate]) -> Table:
    table = Table(title="answers to a file, plain and with drafts by look-up")
    for column in (
        "model",
        "task",
        "rows",
        "tokens",
        "plain tokens/s",
        "drafted tokens/s",
        "times",
        "tokens per verifying step",
        "accepted",
        "equal answers",
        "log-probs within",
        "by rows alone",
    ):
        table.add_column(column, justify="left" if column in ("model", "task") else "right")
    for rate in rates:
        table.add_row(
            rate.runtime,
            rate.task,
            str(rate.rows),
            f"{rate.tokens:,}",
            f"{rate.plain_rate:,.0f}",
            f"{rate.drafted_rate:,.0f}",
            f"{rate.drafted_rate / rate.plain_rate:.2f}",
            f"{rate.tokens_a_step:.2f}",
            f"{rate.acceptance:.0%}",
            f"{rate.same_answers:.1%}"
            + (f", but for {rate.different}" if rate.different else "")
            + (f", near-ties {rate.ties}" if rate.ties else ""),
            "–" if rate.runtime == PEER else f"{rate.log_prob_difference:.1e}",
            "–" if rate.regrouped_difference is None else f"{rate.regrouped_difference:.1e}",
        )
    return table


def _parser() -> Parser:
    parser = Parser(
        prog="encdec benchmark speculate",
        description="The cost of a step that verifies several tokens, of a model with random "
        "parameters; and the rate of a trained model's answers with and without drafts, "
        "alternating. Exit code 1 where an answer differs with drafts at more than a near-tie.",
        epilog="Example: encdec benchmark speculate --model=330m --checkpoint=runs/mine "
        "--jsonl=dev.jsonl",
    )
    parser.add("--model", "preset whose steps are timed", default="")
    parser.add(
        "--runtimes",
        "runtimes of --model and of --checkpoint, which is exported for them: some of "
        f"{','.join(RUNTIMES)}; LiteRT's decode one row",
        _runtimes,
        ("jax",),
        metavar="A,B",
    )
    parser.add(
        "--checkpoint",
        "a trained model or an export that answers --jsonl; may be given several times",
        checkpoint,
        [],
        metavar="DIR",
    )
    parser.add(
        "--jsonl",
        "texts, in the field 'source'; may be given several times",
        local_path,
        [],
        needs="--checkpoint",
        metavar="FILE",
    )
    for name, default, text, needs in (
        ("inputs_length", 512, "tokens read before the steps of --model", "--model"),
        ("repeats", 3, "timed runs of each step", "--model"),
        ("max_examples", 64, "texts of each file", "--checkpoint"),
        ("max_tokens", None, "longest answer (default: as in training)", "--checkpoint"),
    ):
        parser.add(f"--{name}", text, int, default, least=1, needs=needs)
    parser.add(
        "--transformers",
        "answer by transformers, too, plain and with its prompt lookup, from an export of "
        "each checkpoint (extra hf)",
        default=False,
        needs="--checkpoint",
    )
    parser.add(
        "--as_trained",
        "also time JAX without the layout of kernels for this machine (docs/edge.md)",
        default=False,
        needs="--model",
    )
    parser.add("--batches", "rows at once", numbers, (1,), metavar="N,N")
    parser.add(
        "--always",
        "verify drafts at every step, whether it pays or not, in steps of every size: a check that "
        "answers to --jsonl are equal, not a measurement of their rate; also compares the log-"
        "probabilities of plain answers in batches of another size",
        default=False,
        needs="--checkpoint",
    )
    parser.add("--out", "write speculate.json there", local_path)
    return parser


def _runtimes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in RUNTIMES:
            raise ConfigError(f"--runtimes has {name!r}; expected some of {', '.join(RUNTIMES)}")
    return names
