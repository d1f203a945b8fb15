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

from encdec.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TimedAnswer:
    """One request's answer.

    Attributes:
        text: all of it.
        tokens: their texts.
        log_probs: of each token.
        finish: why it ended.
        first_token_seconds: as its client saw it.
        seconds: until its end.
    """

    text: str
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
            text, tokens, log_probs, finish = "", [], [], ""
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    raise RuntimeError((await response.aread()).decode())
                async for line in response.aiter_lines():
                    part = line.removeprefix("data: ") if body["stream"] else line
                    if not part.startswith("{"):
                        continue
                    first = first or time.perf_counter() - begin
                    for choice in json.loads(part)["choices"]:  # none where only usage is told
                        text += choice["text"]
                        told = choice.get("logprobs") or {}  # some servers have none at the end
                        tokens += told.get("tokens", ())
                        log_probs += told.get("token_logprobs", ())
                        finish = choice["finish_reason"] or finish
            seconds = time.perf_counter() - begin
            return TimedAnswer(text, tokens, log_probs, finish, first, seconds)
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


def served_model(url: str) -> str:
    """The name of the first model that a server of OpenAI's protocol has.

    Raises:
        ConfigError: no such server answers there.
    """
    import httpx

    try:
        reply = httpx.get(f"{url}/v1/models", timeout=30)
        return str(reply.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"--against={url}: no server of OpenAI's protocol tells its models there ({error}); "
            "start it, and give an address such as http://127.0.0.1:8000"
        ) from error


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
