"""``encdec benchmark serving``: requests served concurrently and one after the other."""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from encdec import shipped
from encdec.benchmarks.serving_client import Pass, about_machine, ask_all, latencies
from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.inference.generation_settings import LOOKUP
from encdec.storage import local_path

ALONE, AT_ONCE = "one after the other", "at once"
# Flags for random weights, and flags for a trained model.
OF_RANDOM = ("model", "inputs_from", "inputs_to", "tokens_from", "tokens_to")
OF_TRAINED = ("draft", "mixed", "against")


def main(argv: list[str]) -> int:
    """Two servers of one model in this process, over loopback: one slot and requests one after the
    other, against many slots and all requests at once; the two alternate. Or servers of a trained
    model with different drafts (``serving_drafts``); 1 where drafts changed an answer.

    Raises:
        ConfigError: flags out of range, or without effect.
        CheckpointError, DataError: no model or no texts there.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    _check(options, parser)
    if options.checkpoint:
        from encdec.benchmarks import serving_drafts

        report = serving_drafts.summary(options, serving_drafts.measure(options))
        text = serving_drafts.text_of(report)
        wrong = any(
            arm["equal_answers"] < arm["answers"]
            for name, arm in report["arms"].items()
            if name != serving_drafts.AGAINST
        )
    else:
        report, wrong = summary(options, measure(options)), False
        text = text_of(report)
    print(text)
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(report, indent=2) + "\n")
    return int(wrong)


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for low, high in (("inputs_from", "inputs_to"), ("tokens_from", "tokens_to")):
        if getattr(options, low) > getattr(options, high):
            raise ConfigError(
                f"{high} is {getattr(options, high)}; expected {low} = "
                f"{getattr(options, low)} or more"
            )
    if bool(options.checkpoint) != bool(options.jsonl):
        raise ConfigError("--checkpoint=DIR and --jsonl=FILE go together; give both or none")
    unused = OF_RANDOM if options.checkpoint else OF_TRAINED
    for name in unused:
        if (value := getattr(options, name)) != parser.get_default(name):
            state = "with" if options.checkpoint else "without"
            raise ConfigError(
                f"{name} is {value}, which has no effect {state} --checkpoint; leave it out"
            )
    options.draft = options.draft or [LOOKUP]
    options.against = options.against.rstrip("/").removesuffix("/v1")
    if options.against and not options.against.startswith(("http://", "https://")):
        raise ConfigError(
            f"--against={options.against} is not an address; expected one such as http://127.0.0.1:8000"
        )


def measure(options: argparse.Namespace) -> list[dict[str, Pass]]:
    """The passes of every round, after one round of warming up."""
    import contextlib

    import jax

    from encdec.data.vocabulary import ByteVocabulary
    from encdec.inference.text_io import PromptFormat
    from encdec.model import build_model, init_params, preset
    from encdec.serving.app import Service
    from encdec.serving.engine import Engine
    from encdec.serving.protocol import Limits
    from encdec.serving.server import running

    config = preset(options.model)
    # Random weights say anything; an EOS among it is one in thousands.
    params = init_params(build_model(config), jax.random.key(options.seed))
    prompts = PromptFormat(ByteVocabulary(), max_input_tokens=options.inputs_to + 1)
    requests = make_requests(options)
    arms = {ALONE: (1, 1), AT_ONCE: (options.slots, options.requests)}
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, (slots, _) in arms.items():
            engine = Engine(
                config,
                params,
                prompts,
                max_tokens=options.tokens_to,
                slots=slots,
                max_queue=options.requests,
            )
            engine.warm_up()
            service = Service(engine, options.model, Limits(options.tokens_to, 16, 1), 3600.0)
            urls[name], _ = stack.enter_context(running(service))
        rounds = []
        for number in range(options.repeats + 1):
            order = list(arms) if number % 2 else list(arms)[::-1]
            made = {
                name: asyncio.run(ask_all(urls[name], requests, arms[name][1])) for name in order
            }
            if number:
                rounds.append(made)
    return rounds


def make_requests(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Bodies of mixed lengths, the same in every round: tokens in, and tokens out at most."""
    import numpy as np

    rng = np.random.default_rng(options.seed)
    return [
        {
            "prompt": rng.integers(
                3, 259, rng.integers(options.inputs_from, options.inputs_to + 1)
            ).tolist(),
            "max_tokens": int(rng.integers(options.tokens_from, options.tokens_to + 1)),
            "temperature": 1.0,
            "seed": number,
            "stream": True,
            "logprobs": 0,
        }
        for number in range(options.requests)
    ]


def summary(options: argparse.Namespace, rounds: Sequence[dict[str, Pass]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratio of each round's rates."""
    ratios = [made[AT_ONCE].rate / made[ALONE].rate for made in rounds]
    report: dict[str, Any] = {
        "settings": vars(options),
        **about_machine(),
        "arms": {},
        "throughput_ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    for name in (ALONE, AT_ONCE):
        passes = [made[name] for made in rounds]
        report["arms"][name] = {
            "tokens_per_second": statistics.median(one.rate for one in passes),
            "requests_per_second": statistics.median(
                options.requests / one.seconds for one in passes
            ),
            "tokens": passes[0].tokens,
            **latencies(passes),
        }
    return report


def text_of(report: dict[str, Any]) -> str:
    settings = report["settings"]
    lines = [
        f"{settings['model']}, {report['device']}, {report['cores']} cores: {settings['requests']} "
        f"requests of {settings['inputs_from']} to {settings['inputs_to']} tokens in and "
        f"{settings['tokens_from']} to {settings['tokens_to']} out, {settings['repeats']} rounds"
    ]
    for name, slots in ((ALONE, 1), (AT_ONCE, settings["slots"])):
        arm = report["arms"][name]
        first, whole = arm["first_token_seconds"], arm["answer_seconds"]
        lines.append(
            f"{name:20} {slots:3} slots  {arm['tokens_per_second']:8,.0f} tokens/s  "
            f"{arm['requests_per_second']:7.1f} requests/s  first token {first['median']:.3f} s "
            f"(p95 {first['p95']:.3f})  answer {whole['median']:.3f} s (p95 {whole['p95']:.3f})"
        )
    spread = f"{min(report['ratios']):.2f} to {max(report['ratios']):.2f}"
    ratio = report["throughput_ratio"]
    lines.append(f"throughput at once: {ratio:.2f} times that of one after the other ({spread})")
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(
        prog="encdec benchmark serving",
        description="Throughput of continuous batching, over HTTP on loopback, against the same "
        "requests one after the other on a server of one slot. With --checkpoint: of a trained "
        "model's server with drafts against the same without; exit code 1 where an answer differs.",
        epilog="Example: encdec benchmark serving --checkpoint=java2cs --jsonl=dev.jsonl "
        "--draft=lookup --requests=1000 --mixed",
    )
    add = lambda name, default, text: parser.add(
        f"--{name}", text, int, default, least=int(name != "seed")
    )
    parser.add("--model", "preset, with random weights", default="micro-8m")
    add("requests", 64, "requests in a pass")
    add("slots", 16, "slots of the server that takes all at once")
    add("inputs_from", 32, "shortest input, in tokens")
    add("inputs_to", 128, "longest input")
    add("tokens_from", 16, "shortest answer")
    add("tokens_to", 64, "longest answer")
    add("repeats", 3, "passes of each kind")
    add("seed", 0, "seed of the requests")
    parser.add("--checkpoint", "a trained model to serve", shipped.checkpoint, metavar="DIR")
    parser.add("--jsonl", "its inputs, in the field 'source'", local_path, metavar="FILE")
    parser.add(
        "--draft",
        "drafts of a server of --checkpoint; may be given several times (default lookup)",
        local_path,
        [],
        metavar="lookup|DIR",
    )
    parser.add(
        "--mixed",
        "every second request of --jsonl has other settings: drawn, limited, with penalties or "
        "stop strings; otherwise all are greedy",
        default=False,
    )
    parser.add(
        "--against",
        "a running server of OpenAI's protocol, such as an earlier version, that is asked for the "
        "same answers in turn with ours of --checkpoint: ratios, and how many answers are equal",
        default="",
        metavar="URL",
    )
    parser.add("--out", "receives the numbers", local_path, metavar="FILE.json")
    return parser
