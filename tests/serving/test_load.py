"""A thousand requests at once: each gets the answer it gets alone, killed neighbours or not."""

from __future__ import annotations

import asyncio
import json
import random
import resource

import httpx
import pytest

from encdec.serving.server import running
from tests.serving.examples import events, make_engine, make_service, until

KILLED = 100
SECONDS = 300.0


def kinds() -> list[dict]:
    """Forty requests of all sorts."""
    made = []
    for number in range(40):
        fields = {
            "prompt": f"request {number} " + "word " * (number % 5),
            "max_tokens": 16,
            "temperature": 0,
        }
        if number % 2:
            fields |= {"temperature": 0.5 + number / 20, "seed": number}
        if number % 3 == 1 and number % 2:
            fields |= {"top_k": 20, "n": 2}
        if number % 4 == 1:
            fields |= {"presence_penalty": 1.0, "logit_bias": {"80": 2}}
        if number % 5 == 2:
            fields |= {"no_repeat_ngram": 2}
        if number % 7 == 3:
            fields |= {"prompt": [fields["prompt"], "and another"]}
        made.append(fields)
    return made


async def ask(client: httpx.AsyncClient, fields: dict, stream: bool) -> list[tuple[str, str]]:
    """Text and end of every choice."""
    response = await client.post("/v1/completions", json=fields | {"stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        return [(x["text"], x["finish_reason"]) for x in response.json()["choices"]]
    *pieces, done = events(response.text)
    assert done == "[DONE]"
    choices: dict[int, tuple[str, str]] = {}
    for piece in pieces:
        (part,) = piece["choices"]
        text, finish = choices.get(part["index"], ("", None))
        assert finish is None
        choices[part["index"]] = (text + part["text"], part["finish_reason"])
    return [choices[index] for index in sorted(choices)]


async def ask_and_go(url: str, fields: dict, rng: random.Random) -> None:
    """Sends a request and closes the connection some time later."""
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(fields | {"stream": rng.random() < 0.5}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: "
        + str(len(body)).encode()
        + b"\r\n\r\n"
        + body
    )
    await writer.drain()
    await asyncio.sleep(rng.random())
    writer.transport.abort()


@pytest.mark.slow
@pytest.mark.parametrize("name, requests", [("encoder_decoder", 1_000), ("decoder_only", 200)])
def test_a_thousand_requests_at_once(name, requests):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * (requests + KILLED) + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this machine allows {hard} open files, and {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    service = make_service(
        make_engine(name, slots=16, max_queue=4 * requests), timeout_seconds=SECONDS
    )
    rng = random.Random(0)

    async def scene(url: str) -> None:
        limits = httpx.Limits(max_connections=requests, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=SECONDS) as client:
            sorts = kinds()
            alone = [await ask(client, fields, False) for fields in sorts]
            assert len({json.dumps(answer) for answer in alone}) > 0.8 * len(alone)
            order = [number % len(sorts) for number in range(requests)]
            rng.shuffle(order)
            tasks = [ask(client, sorts[kind], place % 3 == 0) for place, kind in enumerate(order)]
            killed = [ask_and_go(url, rng.choice(sorts), rng) for _ in range(KILLED)]
            async with asyncio.timeout(SECONDS):
                answers = await asyncio.gather(*tasks, *killed)
        for kind, answer in zip(order, answers):
            assert answer == alone[kind]

    with running(service) as (url, _):
        asyncio.run(scene(url))
        engine = service.engine
        until(lambda: engine.idle)
        text = httpx.get(f"{url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    total = lambda name: sum(float(value) for key, value in values.items() if key.startswith(name))
    assert total('encdec_http_requests_total{route="/v1/completions",status="200"}') >= (
        requests + len(kinds())
    )
    assert total('encdec_http_requests_total{route="/v1/completions",status="5') == 0
    assert total("encdec_slots_active") == total("encdec_answers_waiting") == 0
