"""The ``encdec`` command: one table of commands, each imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable

import encdec
from encdec.errors import ConfigError, EncdecError
from encdec.fields import nearest
from encdec.logs import logger, restored, show_error
from encdec.startup import keep_memory, use_compilation_cache
from encdec.storage import refusals_explained

_LOG = logger(__name__)

# name: (module:function, what it does). The function takes the arguments after the name and
# returns an exit code or None. To add a command, add its line.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "encdec.quickstart:main",
        "the whole workflow on this machine: data, two models and a student, compared and timed",
    ),
    "prepare": ("encdec.data.prepare_command:main", "turn text into records for training"),
    "vocab": ("encdec.data.vocab_command:main", "train a vocabulary"),
    "data": ("encdec.data.data_command:main", "list tasks, show examples, verify records"),
    "describe": ("encdec.describe:main", "parameters, FLOPs and bytes of a model and its peers"),
    "config": (
        "encdec.config_command:main",
        "a run's configuration: every field, its value, meaning and default",
    ),
    "train": ("encdec.train.train_command:main", "train a model on records, or resume a run"),
    "average": ("encdec.saved.average:main", "the mean of a run's last checkpoints, as a model"),
    "distill": (
        "encdec.distill.distill_command:main",
        "a teacher's logits on records, rollouts, and rounds of both",
    ),
    "compile": (
        "encdec.hardware.compile_command:main",
        "predict a run's memory, time and cost on a TPU pod",
    ),
    "import": (
        "encdec.interop.import_command:main",
        "convert a Hugging Face model to a work directory",
    ),
    "adapt": (
        "encdec.adapt.adapt_command:main",
        "turn a trained decoder-only model into an encoder-decoder",
    ),
    "export": (
        "encdec.export.export_command:main",
        "write a model for Hugging Face, LiteRT or onnxruntime",
    ),
    "generate": ("encdec.inference.generate_command:main", "generate text from a trained model"),
    "serve": (
        "encdec.serving.serve_command:main",
        "serve a trained model over HTTP, with OpenAI's API",
    ),
    "evaluate": (
        "encdec.evaluation.evaluate_command:main",
        "a model's answers on tasks, scored with intervals",
    ),
    "paper": (
        "encdec.paper.paper_command:main",
        "the paper's table: models pretrained, fine-tuned, distilled",
    ),
    "report": (
        "encdec.evaluation.run_page:main",
        "runs side by side as one HTML file: curves, configurations, answers",
    ),
    "scaling": (
        "encdec.scaling.scaling_command:main",
        "scaling curves: plan, run, fit and plot a ladder",
    ),
    "completion": (
        "encdec.completion:main",
        "a script that completes commands and flags in your shell",
    ),
    "benchmark": ("encdec.cli:benchmark", "measure one part: `encdec benchmark` lists them"),
}

BENCHMARKS: dict[str, tuple[str, str]] = {
    "prepare": (
        "encdec.benchmarks.data_benchmark:prepare_main",
        "prepare against raw vocabulary encoding",
    ),
    "data": ("encdec.benchmarks.data_benchmark:read_main", "reading batches of records"),
    "distill": (
        "encdec.benchmarks.distill_benchmark:main",
        "students of a teacher's full, drawn and top-k rows against plain ones",
    ),
    "adaptation": (
        "encdec.benchmarks.adaptation_benchmark:main",
        "adapted encoder-decoders against ones from scratch and their source at equal FLOPs",
    ),
    "edge": (
        "encdec.benchmarks.edge_benchmark:main",
        "one model on this CPU by JAX, LiteRT, onnxruntime and transformers, float32 to int4",
    ),
    "inference": (
        "encdec.benchmarks.inference_benchmark:main",
        "generation by an encoder-decoder and by decoder-only models of equal cost",
    ),
    "serving": (
        "encdec.benchmarks.serving_benchmark:main",
        "requests served at once against one after the other",
    ),
    "speculate": (
        "encdec.benchmarks.speculate_benchmark:main",
        "drafted tokens: what a step of several costs, and what tasks gain",
    ),
    "beam": ("encdec.benchmarks.beam_benchmark:main", "answers by beam search against greedy ones"),
    "accelerator": (
        "encdec.benchmarks.accelerator_benchmark:main",
        "on a GPU or TPU: kernels, MFU, generation and a profile, in ten minutes",
    ),
    "train": (
        "encdec.benchmarks.train_benchmark:main",
        "our training step next to PyTorch's, and where its time goes",
    ),
    "loop": (
        "encdec.benchmarks.loop_benchmark:loop_main",
        "the training loop against its bare step",
    ),
}

KEPT = "Finished work is kept, and incomplete files are recognized: run the same command again."
# Commands that had another name once: the former and today's. They are accepted and in no help.
FORMER = {("score",): ["distill", "logits"], ("scaling", "score"): ["scaling", "evaluate"]}
# Commands that take training steps, and would be given the same memory again at each.
_TRAINING = [
    *([name] for name in ("quickstart", "train", "paper", "scaling")),
    *(["benchmark", name] for name in ("train", "loop", "distill", "adaptation")),
    *(["distill", name] for name in ("rollout", "rounds")),
]

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: list[str] | None = None) -> int:
    """Runs ``encdec ARGV`` (default: the process's arguments) and returns its exit code.

    An ``EncdecError`` is printed without a traceback and gives its own exit code; an interrupt
    gives 130; every other exception is a bug and keeps its traceback.
    """
    with restored():
        code = _main(sys.argv[1:] if argv is None else list(argv))
    if argv is None and code == INTERRUPTED and "jax" in sys.modules:
        # A compilation continues in jax's threads: the interpreter's end would wait for it, and
        # then crash, because the device client that it uses is gone (jaxlib 0.10.2).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _main(arguments: list[str]) -> int:
    began = time.monotonic()
    arguments = _today(arguments)
    use_compilation_cache()
    if arguments[:1] in _TRAINING or arguments[:2] in _TRAINING:
        keep_memory()
    try:
        if arguments and arguments[0] in ("-V", "--version"):
            print(f"encdec {encdec.__version__}")
            return 0
        # A full disk or a missing right is not a bug in the program: one line instead of the
        # traceback of whichever library met it.
        with refusals_explained(lambda: KEPT, _output(arguments)):
            code = _dispatch("encdec", COMMANDS, arguments)
        _LOG.debug("done in %.1f s", time.monotonic() - began)
        sys.stdout.flush()  # a closed pipe shows itself here, not when Python exits
        return code
    except EncdecError as error:
        return show_error(error)
    except KeyboardInterrupt:
        print("encdec: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has seen enough, as in `encdec data list | head`. Standard output
        # goes nowhere from now on, or Python would complain when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _today(arguments: list[str]) -> list[str]:
    """The arguments with a command's former name replaced."""
    for former, today in FORMER.items():
        if tuple(arguments[: len(former)]) == former:
            names = " ".join(former), " ".join(today)
            _LOG.info("encdec %s is now called encdec %s", *names)
            return today + arguments[len(former) :]
    return arguments


def _output(arguments: list[str]) -> str:
    """Where a command writes, for refusals that do not say it."""
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--out", "--workdir", "--work"):
            return value if equals else "".join(arguments[number + 1 : number + 2])
    return ""


def benchmark(argv: list[str]) -> int:
    """``encdec benchmark NAME ...``: runs one benchmark, or lists them."""
    return _dispatch("encdec benchmark", BENCHMARKS, argv)


def load(target: str) -> Callable[[list[str]], int | None]:
    """The function named by ``package.module:function``."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _dispatch(program: str, table: dict[str, tuple[str, str]], arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage(program, table))
        return 0 if arguments else ConfigError.exit_code
    name, rest = arguments[0], arguments[1:]
    if name not in table:
        near = nearest(name, table)
        hint = f"; did you mean `{program} {near}`?" if near else ""
        raise ConfigError(
            f"unknown command {name!r}{hint} (one of {', '.join(table)}; see `{program} --help`)"
        )
    return load(table[name][0])(rest) or 0


def _usage(program: str, table: dict[str, tuple[str, str]]) -> str:
    width = max(map(len, table)) + 2
    placeholder = "COMMAND" if table is COMMANDS else "NAME"
    lines = [f"usage: {program} {placeholder} [arguments]", ""]
    if table is COMMANDS:
        lines += [(encdec.__doc__ or "").strip(), ""]
    lines += [f"  {name:{width}}{text}" for name, (_, text) in table.items()]
    lines += ["", f"`{program} {placeholder} --help` explains one of them."]
    if table is COMMANDS:
        lines += ["`encdec --version` prints the version."]
    return "\n".join(lines)
