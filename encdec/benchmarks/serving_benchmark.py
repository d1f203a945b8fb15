"""``encdec benchmark serving``: requests served concurrently and one after the other."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.storage import local_path

ALONE, AT_ONCE = "one after the other", "at once"


@dataclasses.dataclass(frozen=True)
class Pass:
    """All requests, answered once.

    Attributes:
        seconds: for all of them.
        tokens: generated.
        first_token_seconds: of each request, as its client saw it.
        answer_seconds: of each request, until its end.
    """

    seconds: float
    tokens: int
    first_token_seconds: list[float]
    answer_seconds: list[float]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def main(argv: list[str]) -> int:
    """Two servers of one model in this process, over loopback: one slot and requests one after the
    other, against many slots and all requests at once; the two alternate.

    Raises:
        ConfigError: flags out of range.
    """
    options = _parser().parse_args(argv)
    for name in ("requests", "slots", "repeats", "inputs_from", "tokens_from"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} is {getattr(options, name)}; expected 1 or more")
    for low, high in (("inputs_from", "inputs_to"), ("tokens_from", "tokens_to")):
        if getattr(options, low) > getattr(options, high):
            raise ConfigError(
                f"{high} is {getattr(options, high)}; expected {low} = "
                f"{getattr(options, low)} or more"
            )
    rounds = measure(options)
    report = summary(options, rounds)
    print(text_of(report))
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(report, indent=2) + "\n")
    return 0


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
            made = {name: asyncio.run(_pass(urls[name], requests, arms[name][1])) for name in order}
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


async def _pass(url: str, requests: Sequence[dict[str, Any]], at_once: int) -> Pass:
    import httpx

    limits = httpx.Limits(max_connections=at_once)
    gate = asyncio.Semaphore(at_once)

    async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, float, int]:
        async with gate:
            begin, first, tokens = time.perf_counter(), 0.0, 0
            async with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - begin
                        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                        tokens += len(choice["logprobs"]["tokens"])
            return first, time.perf_counter() - begin, tokens

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=3600) as client:
        begin = time.perf_counter()
        results = await asyncio.gather(*(ask(client, body) for body in requests))
        seconds = time.perf_counter() - begin
    firsts, wholes, tokens = zip(*results)
    return Pass(seconds, sum(tokens), list(firsts), list(wholes))


def summary(options: argparse.Namespace, rounds: Sequence[dict[str, Pass]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratio of each round's rates."""
    import jax

    ratios = [made[AT_ONCE].rate / made[ALONE].rate for made in rounds]
    report: dict[str, Any] = {
        "settings": vars(options),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "arms": {},
        "throughput_ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    for name in (ALONE, AT_ONCE):
        passes = [made[name] for made in rounds]
        firsts = sorted(x for one in passes for x in one.first_token_seconds)
        wholes = sorted(x for one in passes for x in one.answer_seconds)
        report["arms"][name] = {
            "tokens_per_second": statistics.median(one.rate for one in passes),
            "requests_per_second": statistics.median(
                options.requests / one.seconds for one in passes
            ),
            "tokens": passes[0].tokens,
            "first_token_seconds": {
                "median": statistics.median(firsts),
                "p95": firsts[int(0.95 * (len(firsts) - 1))],
            },
            "answer_seconds": {
                "median": statistics.median(wholes),
                "p95": wholes[int(0.95 * (len(wholes) - 1))],
            },
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
        "requests one after the other on a server of one slot.",
    )
    add = lambda name, default, text: parser.add(f"--{name}", text, int, default)
    parser.add("--model", "preset, with random weights", default="micro-8m")
    add("requests", 64, "requests in a pass")
    add("slots", 16, "slots of the server that takes all at once")
    add("inputs_from", 32, "shortest input, in tokens")
    add("inputs_to", 128, "longest input")
    add("tokens_from", 16, "shortest answer")
    add("tokens_to", 64, "longest answer")
    add("repeats", 3, "passes of each kind")
    add("seed", 0, "seed of the requests")
    parser.add("--out", "receives the numbers", local_path, metavar="FILE.json")
    return parser
