"""``encdec benchmark beam``: what answers by beam search cost, next to greedy ones."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

import jax
from rich.table import Table

from encdec.benchmarks.console import text_table, wide_console
from encdec.benchmarks.inference_benchmark import numbers
from encdec.errors import ConfigError
from encdec.files import write_json
from encdec.flags import Parser
from encdec.inference.answer_files import read_inputs
from encdec.inference.generation_settings import OFF, GenerationSettings
from encdec.inference.generator import TextGenerator
from encdec.inference.load_generator import load
from encdec.storage import local_path


@dataclasses.dataclass(frozen=True)
class BeamCost:
    """One model's answers to the same inputs with one number of beams.

    Attributes:
        model: its directory.
        beams: hypotheses of each input; 1: greedy.
        inputs: how many.
        tokens: of the best answers.
        seconds: wall time of all inputs, median over the repeats, without compiling.
        cpu_seconds: processor time of all threads of the process, the same.
        first_seconds: wall time of the first answers, which also compiles.
    """

    model: str
    beams: int
    inputs: int
    tokens: int
    seconds: float
    cpu_seconds: float
    first_seconds: float


def measure_beams(
    model: str,
    generator: TextGenerator,
    texts: Sequence[str],
    beams: Sequence[int],
    max_tokens: int | None,
    repeats: int,
) -> list[BeamCost]:
    """Answers all texts with each number of beams, alternating, once more before to compile."""
    asked = [GenerationSettings(max_tokens=max_tokens, beams=count) for count in beams]

    def once(settings: GenerationSettings) -> tuple[float, float, int]:
        wall, cpu = time.perf_counter(), time.process_time()
        answers = generator.generate(texts, settings, truncate=True)
        tokens = sum(len(best[0].tokens) for best in answers)
        return time.perf_counter() - wall, time.process_time() - cpu, tokens

    first = [once(settings) for settings in asked]
    taken = list(zip(*([once(settings) for settings in asked] for _ in range(repeats))))
    return [
        BeamCost(
            model,
            settings.beams,
            len(texts),
            tokens,
            statistics.median(wall for wall, *_ in runs),
            statistics.median(cpu for _, cpu, _ in runs),
            compiled,
        )
        for settings, (compiled, _, tokens), runs in zip(asked, first, taken)
    ]


def main(argv: list[str]) -> int:
    """Measures, prints a table, and writes JSON.

    Raises:
        ConfigError: a number that cannot be, or a file without texts.
        CheckpointError, DataError: no model or no texts there.
    """
    options = _parser().parse_args(argv)
    texts = read_inputs(options.jsonl)[: options.max_examples]
    if not texts:
        raise ConfigError(f"--jsonl={options.jsonl} has no inputs; give a file that has some")
    costs = []
    for directory in options.checkpoint:
        generator = load(directory, batch_rows=options.batch_rows, draft=OFF)
        costs += measure_beams(
            directory, generator, texts, options.beams, options.max_tokens, options.repeats
        )
    console = wide_console(160)
    console.print(cost_table(costs))
    if options.out:
        out = pathlib.Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        report = {
            "device": jax.devices()[0].device_kind,
            "costs": [dataclasses.asdict(cost) for cost in costs],
        }
        write_json(out / "beam.json", report)
        console.print(str(out / "beam.json"), highlight=False)
    return 0


def cost_table(costs: Sequence[BeamCost]) -> Table:
    """A line per model and number of beams; the ratio is to the model's first line."""
    base = {cost.model: cost for cost in reversed(costs)}
    columns: dict[str, Callable[[BeamCost], str]] = {
        "model": lambda one: pathlib.Path(one.model).name,
        "beams": lambda one: str(one.beams),
        "inputs": lambda one: f"{one.inputs:,}",
        "tokens": lambda one: f"{one.tokens:,}",
        "tokens/s": lambda one: f"{one.tokens / one.seconds:,.0f}",
        "seconds": lambda one: f"{one.seconds:.2f}",
        "CPU seconds": lambda one: f"{one.cpu_seconds:.2f}",
        "CPU ms per input": lambda one: f"{1e3 * one.cpu_seconds / one.inputs:.1f}",
        "CPU ratio": lambda one: f"{one.cpu_seconds / base[one.model].cpu_seconds:.2f}",
        "first time, seconds": lambda one: f"{one.first_seconds:.1f}",
    }
    return text_table("answers to a file, without compiling", costs, columns)


def _parser() -> Parser:
    parser = Parser(
        prog="encdec benchmark beam",
        description="Time of a trained model's answers to a file by beam search and greedily, "
        "alternating; processor time tells more than wall time on a shared machine.",
        epilog="Example: encdec benchmark beam --checkpoint=runs/mine --jsonl=dev.jsonl",
    )
    parser.add(
        "--checkpoint",
        "a trained model; may be given several times",
        local_path,
        action="append",
        required=True,
    )
    parser.add("--jsonl", "texts, in 'source'", local_path, required=True, metavar="FILE")
    parser.add("--beams", "hypotheses per input", numbers, (1, 5), metavar="N,N")
    for name, default, text in (
        ("batch_rows", 128, "answers made together at most: inputs times beams"),
        ("max_examples", 64, "texts of the file"),
        ("max_tokens", None, "longest answer (default: as in training)"),
        ("repeats", 3, "timed runs of each number of beams"),
    ):
        parser.add(f"--{name}", text, int, default, least=1)
    parser.add("--out", "write beam.json there", local_path)
    return parser
