"""The clients of the serving benchmarks: all requests of a pass, and how long they took."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class TimedAnswer:
    """One request's answer.

    Attributes:
        tokens: their texts.
        log_probs: of each token.
        finish: why it ended.
        first_token_seconds: as its client saw it.
        seconds: until its end.
    """

    tokens: list[str]
    log_probs: list[float]
    finish: str
    first_token_seconds: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Pass:
    """All requests, answered once.

    Attributes:
        seconds: for all of them.
        processor_seconds: of all threads of this process, client and server.
        answers: in the requests' order.
    """

    seconds: float
    processor_seconds: float
    answers: list[TimedAnswer]

    @property
    def tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


async def ask_all(url: str, requests: Sequence[Mapping[str, Any]], at_once: int) -> Pass:
    """Answers to all requests, streamed or not, so many at once."""
    import httpx

    # A client for each connection: the work of one pool grows with the square of its connections,
    # and would be measured as the server's.
    free: asyncio.Queue[httpx.AsyncClient] = asyncio.Queue()

    async def ask(body: Mapping[str, Any]) -> TimedAnswer:
        client = await free.get()
        try:
            begin, first = time.perf_counter(), 0.0
            tokens, log_probs, finish = [], [], ""
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    raise RuntimeError((await response.aread()).decode())
                async for line in response.aiter_lines():
                    part = line.removeprefix("data: ") if body["stream"] else line
                    if not part.startswith("{"):
                        continue
                    first = first or time.perf_counter() - begin
                    (choice,) = json.loads(part)["choices"]
                    tokens += choice["logprobs"]["tokens"]
                    log_probs += choice["logprobs"]["token_logprobs"]
                    finish = choice["finish_reason"] or finish
            return TimedAnswer(tokens, log_probs, finish, first, time.perf_counter() - begin)
        finally:
            free.put_nowait(client)

    async with contextlib.AsyncExitStack() as stack:
        for _ in range(min(at_once, len(requests))):
            client = httpx.AsyncClient(base_url=url, timeout=3600, verify=False)
            free.put_nowait(await stack.enter_async_context(client))
        begin, worked = time.perf_counter(), time.process_time()
        answers = await asyncio.gather(*map(ask, requests))
        seconds, worked = time.perf_counter() - begin, time.process_time() - worked
        return Pass(seconds, worked, answers)


def about_machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def latencies(passes: Sequence[Pass]) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of times until the first token and the end."""
    answers = [answer for one in passes for answer in one.answers]
    found = {}
    for name, times in (
        ("first_token_seconds", sorted(answer.first_token_seconds for answer in answers)),
        ("answer_seconds", sorted(answer.seconds for answer in answers)),
    ):
        p95 = times[int(0.95 * (len(times) - 1))]
        found[name] = {"median": statistics.median(times), "p95": p95}
    return found
