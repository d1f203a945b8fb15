"""The server over loopback: routes, streams, limits, clients that go, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading

import httpx
import jax
import pytest

from encdec.data.vocabulary import ByteVocabulary
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.pace import PLAIN, SIZES
from encdec.serving.server import running
from tests.serving.examples import (
    NAME,
    SlowEngine,
    events,
    generator,
    make_engine,
    make_service,
    noisy_draft,
    until,
)

GREEDY = {"temperature": 0}
LONG = {"prompt": "short", "temperature": 0, "max_tokens": 16, "no_repeat_ngram": 1}


@pytest.fixture(scope="module")
def server():
    service = make_service(make_engine(), max_body_bytes=5000)
    with running(service) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        yield client, service


@contextlib.contextmanager
def slow_server(slots=1, max_queue=64, grace_seconds=10.0, **settings):
    engine = make_engine(kind=SlowEngine, slots=slots, max_queue=max_queue)
    engine.warm_up()
    service = make_service(engine, **settings)
    with running(service, grace_seconds) as (url, server):
        yield url, service, server


def post(client, **fields):
    return client.post("/v1/completions", json=fields)


def test_completions(server):
    client, _ = server
    texts = ["short", "a text of twenty bytes"]
    response = post(client, prompt=texts, logprobs=0, **GREEDY)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["object"] == "text_completion" and body["model"] == NAME
    made = generator().generate(texts)
    for choice, (wanted,) in zip(body["choices"], made, strict=True):
        assert choice["text"] == wanted.text
        assert choice["finish_reason"] == ("stop" if wanted.finish == "eos" else "length")
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted.log_probs, abs=1e-4)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == sum(len(one.tokens) for (one,) in made)
    assert body["usage"]["prompt_tokens"] == 6 + 23
    drawn = post(client, prompt=texts, n=3, seed=7, temperature=1.2, top_k=30, max_tokens=9)
    wanted = generator().generate(
        texts, GenerationSettings(samples=3, seed=7, temperature=1.2, top_k=30, max_tokens=9)
    )
    assert [choice["text"] for choice in drawn.json()["choices"]] == [
        one.text for made in wanted for one in made
    ]


@pytest.mark.parametrize("more", [{"logprobs": 0}, {"logprobs": 3, "echo": True, "stop": "e"}])
def test_streams_join_to_the_whole(server, more):
    client, _ = server
    prompts = ["short", "x"] if "echo" not in more else ["short</s>", "x</s>y"]
    fields = {"prompt": prompts, "max_tokens": 15} | more | GREEDY
    whole = post(client, **fields).json()
    response = post(client, stream=True, stream_options={"include_usage": True}, **fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, usage, done = events(response.text)
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert all(part["usage"] is None for part in pieces)  # as OpenAI's
    for index, choice in enumerate(whole["choices"]):
        parts = [part["choices"][0] for part in pieces if part["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [
            choice["finish_reason"]
        ]
        for field, wanted in choice["logprobs"].items():
            if wanted is not None:
                assert [x for part in parts for x in part["logprobs"][field]] == wanted
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert len({part["id"] for part in pieces}) == 1


def test_settings_are_obeyed(server):
    client, _ = server
    ask = lambda **fields: post(client, prompt="short", **fields).json()["choices"]
    text = lambda **fields: ask(**fields)[0]["text"]
    greedy = text(**GREEDY)
    assert text(temperature=0.001) == text(top_p=0) == text(temperature=0, top_p=0.3) == greedy
    assert [one["text"] for one in ask(n=2, **GREEDY)] == [greedy] * 2
    code = ByteVocabulary().encode("~")[0]
    assert text(logit_bias={str(code): 100}, max_tokens=4, **GREEDY) == "~~~~"
    mixed = {str(code): 40, str(code - 1): 39.5}
    assert text(logit_bias=mixed, max_tokens=4, **GREEDY) == "~~~~"
    penalised = text(logit_bias=mixed, frequency_penalty=2, max_tokens=4, **GREEDY)
    assert sorted(penalised) == sorted("~~}}")
    [nothing] = ask(max_tokens=0, **GREEDY)
    assert (nothing["text"], nothing["finish_reason"]) == ("", "length")
    [most] = ask(max_tokens=10_000, logit_bias={"1": -100}, **GREEDY)
    assert len(most["text"]) == 16 and most["finish_reason"] == "length"
    begun = [70, 1, *[71] * 12]  # leaves four tokens to its own answer
    both = post(client, prompt=[begun, ByteVocabulary().encode("short")], max_tokens=8, **GREEDY)
    assert both.json()["choices"][1]["text"] == greedy[:8]
    drawn = {"temperature": 1.5, "seed": 3, "logprobs": 0}
    mean = lambda one: sum(one["logprobs"]["token_logprobs"]) / len(one["logprobs"]["tokens"])
    every = sorted(ask(n=5, **drawn), key=mean, reverse=True)
    chosen = ask(n=2, best_of=5, **drawn)
    assert [one["text"] for one in chosen] == [one["text"] for one in every[:2]]
    assert [one["index"] for one in chosen] == [0, 1]


def test_chats(server):
    client, service = server
    fields = {"messages": [{"role": "user", "content": "short"}], "model": NAME} | GREEDY
    whole = client.post(
        "/v1/chat/completions", json=fields | {"logprobs": True, "top_logprobs": 2}
    ).json()
    [choice], plain = whole["choices"], post(client, prompt="short", **GREEDY).json()
    text = plain["choices"][0]["text"]
    assert whole["object"] == "chat.completion" and whole["usage"] == plain["usage"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    kept = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in kept) == text
    assert bytes(byte for one in kept for byte in one["bytes"]) == text.encode()
    assert all(len(one["top_logprobs"]) == 2 for one in kept)
    response = client.post(
        "/v1/chat/completions",
        json=fields | {"stream": True, "stream_options": {"include_usage": True}},
    )
    *pieces, usage, done = events(response.text)
    assert done == "[DONE]" and usage["usage"] == whole["usage"]
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas[0]["role"] == "assistant" and not any("role" in one for one in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == text
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert pieces[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_openais_own_client(server):
    openai = pytest.importorskip("openai", reason="the client is not installed")
    client = openai.OpenAI(base_url=f"{server[0].base_url}/v1", api_key="x", max_retries=0)
    made = client.completions.create(model=NAME, prompt="short", temperature=0, logprobs=2)
    assert "".join(made.choices[0].logprobs.tokens) == made.choices[0].text
    chat = {"model": NAME, "temperature": 0, "messages": [{"role": "user", "content": "short"}]}
    whole = client.chat.completions.create(**chat, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.content == made.choices[0].text
    stream = client.chat.completions.create(**chat, stream=True)
    parts = [part.choices[0].delta.content for part in stream]
    assert "".join(parts) == made.choices[0].text
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="short", suffix="x")
    assert caught.value.param == "suffix"


@contextlib.contextmanager
def compilations():
    """Programs that XLA compiles meanwhile, as JAX itself counts them."""
    counted = []

    def note(event: str, seconds: float, **more) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counted.append(more)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize(
    "name, draft", [("encoder_decoder", "encoder_decoder"), ("decoder_only", None)]
)
def test_everything_is_compiled_before_it_listens(name, draft, monkeypatch):
    settings = {"slots": 3, "max_tokens": 14}  # of no other test, so nothing is there
    engine = make_engine(name, draft=noisy_draft(draft) if draft else "off", **settings)
    with compilations() as before:
        engine.warm_up()
    assert len(before) >= len(engine.widths()) + 3
    if draft:
        engine._answering.pace.note_seconds(PLAIN, 1.0)
        assert engine._answering.pace.knows(PLAIN)  # a first time is without compilation
        sizes = itertools.cycle([*SIZES, PLAIN])
        monkeypatch.setattr(engine._answering.pace, "size", lambda _: next(sizes))
    with running(make_service(engine)) as (url, _), httpx.Client(base_url=url) as client:
        with compilations() as after:
            for fields in (
                {"prompt": "short", "temperature": 0},
                {"prompt": ["x" * 15, "x" * 20, "x" * 30, "x" * 39], "temperature": 0},
                {"prompt": "x", "temperature": 1.3, "top_k": 5, "top_p": 0.5, "seed": 1, "n": 4},
                {"prompt": "x", "presence_penalty": 1, "repetition_penalty": 2},
                {"prompt": "x", "no_repeat_ngram": 2, "logit_bias": {"70": 3}, "stop": "e"},
                {"prompt": "x", "logprobs": 5, "stream": True, "best_of": 1},
                {"prompt": "x</s>yz", "echo": True, "logprobs": 1, "max_tokens": 1},
                {"prompt": "y" * 30 + "</s>z", "echo": True, "logprobs": 5, "max_tokens": 0},
            ):
                response = post(client, **fields)
                assert response.status_code == 200, response.text
            chat = {"messages": [{"role": "user", "content": "x"}]}
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
    assert after == []


def test_the_other_routes(server):
    client, service = server
    post(client, prompt="x", **GREEDY)
    until(lambda: service.engine.idle)  # the slot is free shortly after the answer is there
    health = client.get("/healthz")
    assert health.status_code == 200 and health.json()["status"] == "ok"
    assert client.get("/v1/models").json()["data"][0]["id"] == NAME
    assert client.get(f"/v1/models/{NAME}").json()["object"] == "model"
    info = client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["chat_template"]) == ("</s>", None)
    asked = {"prompt": "é</s>b", "add_special_tokens": False}  # as lm-eval asks
    ids = client.post("/tokenize", json=asked).json()["tokens"]
    assert ids == [*ByteVocabulary().encode("é"), 1, *ByteVocabulary().encode("b")]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "é</s>b"}
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['encdec_http_requests_total{route="/v1/completions",status="200"}']) >= 1
    assert float(values["encdec_output_tokens_total"]) > 0
    assert float(values["encdec_slots"]) == 4 and float(values["encdec_slots_active"]) == 0
    assert float(values["encdec_first_token_seconds_count"]) >= 1


def test_wrong_requests_get_a_reason_in_openais_shape(server):
    client, _ = server
    for response, status, param, message in (
        (post(client, prompt=" "), 400, "prompt", "empty"),
        (post(client, prompt="x" * 60), 400, "prompt", "has 61 tokens"),
        (post(client, prompt=[264]), 400, "prompt", "the token 264"),
        (post(client, prompt="x", top_p=3), 400, "top_p", "expected above 0"),
        (
            post(client, prompt="x", suffix="y"),
            400,
            "suffix",
            "this server does not support suffix",
        ),
        (client.post("/v1/chat/completions", json={}), 400, "messages", "no messages"),
        (client.post("/detokenize", json={"tokens": [999]}), 400, "tokens", "id 999"),
        (client.post("/tokenize", content=b"{"), 400, None, "not valid JSON"),
        (client.post("/tokenize", json={"text": "x"}), 400, "text", "unknown field 'text'"),
        (client.post("/tokenize", json={}), 400, "prompt", "the request has no prompt"),
        (client.post("/detokenize", json={"model": NAME}), 400, "tokens", "has no tokens"),
        (
            client.post("/tokenize", json={"prompt": "x", "add_special_tokens": True}),
            400,
            "add_special_tokens",
            "does not support add_special_tokens",
        ),
        (post(client, prompt="x", model="other"), 404, "model", "this server has"),
        (post(client, prompt="x" * 6000), 413, None, "longer than 5,000 bytes"),
        (client.post("/v1/completions", content=iter([b"y" * 3000] * 3)), 413, None, "longer"),
        (client.post("/v1/completions", content=b"nonsense"), 400, None, "not valid JSON"),
        (client.get("/v1/completions"), 405, None, "the route does not support GET"),
        (client.get("/v1/nothing"), 404, None, "does not exist"),
        (client.get("/v1/models/other"), 404, "model", "no model 'other'"),
    ):
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert message in error["message"] and error["param"] == param
        assert error["type"] == "invalid_request_error"
    assert post(client, prompt="x", **GREEDY).status_code == 200


def test_a_full_queue_says_when_to_come_again():
    with slow_server(max_queue=1) as (url, service, _), httpx.Client(base_url=url) as client:

        def ask():
            assert client.post("/v1/completions", json=LONG, timeout=60).status_code == 200

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for number, thread in enumerate(threads):
            thread.start()
            until(lambda number=number: service.engine.active + service.engine.waiting > number)
        refused = client.post("/v1/completions", json=LONG)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert client.get("/healthz").status_code == 200
        for thread in threads:
            thread.join()
        assert client.post("/v1/completions", json=LONG, timeout=60).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_slot(stream, monkeypatch):
    """The one slot there is: the next request would wait for the first one's end."""
    with slow_server() as (url, service, _), httpx.Client(base_url=url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(SlowEngine, "seconds", 2.0)  # 12 s for the whole answer
            body = json.dumps(LONG | {"stream": stream}).encode()
            host, port = url.removeprefix("http://").split(":")
            connection = socket.create_connection((host, int(port)))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: "
                + str(len(body)).encode()
                + b"\r\n\r\n"
                + body
            )
            until(lambda: service.engine.active)
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            connection.close()
            until(lambda: not service.engine.active, seconds=9)
        assert client.post("/v1/completions", json=LONG, timeout=60).status_code == 200
        text = client.get("/metrics").text
        assert 'encdec_answers_total{finish="cancelled"} 1.0' in text


def test_overdue_requests_get_504_or_an_event(monkeypatch):
    monkeypatch.setattr(SlowEngine, "seconds", 0.6)  # 3.6 s for the whole answer
    with (
        slow_server(timeout_seconds=1.5) as (url, service, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        late = client.post("/v1/completions", json=LONG)
        assert late.status_code == 504 and late.json()["error"]["type"] == "timeout"
        parts = client.post("/v1/completions", json=LONG | {"stream": True}).text.split("\n\n")
        assert "no answer within 1.5 s" in parts[-2] and "[DONE]" not in parts[-2]
        until(lambda: service.engine.idle)
        text = client.get("/metrics").text
        assert 'encdec_answers_total{finish="timeout"} 2.0' in text and "cancelled" not in text


def test_the_end_finishes_what_runs_and_refuses_what_comes():
    with slow_server() as (url, service, server):

        async def scene():
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                ask = lambda: asyncio.ensure_future(client.post("/v1/completions", json=LONG))
                running = [ask(), ask()]  # one in the slot, one waiting
                while service.engine.active + service.engine.waiting < 2:
                    await asyncio.sleep(0.005)
                server.handle_exit(15, None)
                while not service.engine.closing:
                    await asyncio.sleep(0.005)
                refused = await ask()
                health = await client.get("/healthz")
                return await asyncio.gather(*running), refused, health

        finished, refused, health = asyncio.run(scene())
        assert [response.status_code for response in finished] == [200, 200]
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert refused.json()["error"]["code"] == "shutting_down"
        assert health.status_code == 503 and health.json()["status"] == "closing"
        until(lambda: server.should_exit)


def test_the_end_waits_no_longer_than_it_was_told(monkeypatch):
    monkeypatch.setattr(SlowEngine, "seconds", 0.5)
    with slow_server(grace_seconds=0.1) as (url, service, server):

        async def scene():
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                running = asyncio.ensure_future(client.post("/v1/completions", json=LONG))
                while not service.engine.active:
                    await asyncio.sleep(0.005)
                server.handle_exit(15, None)
                return await running

        assert asyncio.run(scene()).status_code == 503
        until(lambda: server.should_exit)
