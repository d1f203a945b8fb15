"""The HTTP routes, as a Starlette application."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from encdec.errors import DataError
from encdec.serving.answers import Shaper, best
from encdec.serving.chat import ChatTemplate
from encdec.serving.engine import Busy, Closing, Engine
from encdec.serving.prometheus_metrics import CONTENT_TYPE
from encdec.serving.prompts import PromptReader
from encdec.serving.protocol import (
    Completion,
    Limits,
    check_model,
    check_names,
    parse_chat,
    parse_completion,
)
from encdec.serving.request_body import ApiError, read_body, typed
from encdec.serving.tickets import Ticket, Update

BODY_SECONDS = 30.0  # for a request's body to arrive


@dataclasses.dataclass
class Service:
    """State that the routes share.

    Attributes:
        engine: makes the answers.
        name: of the model.
        limits: of one request.
        timeout_seconds: from a request's arrival until it is abandoned.
        max_body_bytes: longest body of a request.
        created: when the server began, seconds since 1970.
        template: of chats.
    """

    engine: Engine
    name: str
    limits: Limits
    timeout_seconds: float = 120.0
    max_body_bytes: int = 1 << 20
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    template: ChatTemplate = dataclasses.field(default_factory=ChatTemplate)

    @property
    def reader(self) -> PromptReader:
        return PromptReader(self.engine.prompts, self.engine.config.is_encoder_decoder)


def make_app(service: Service) -> Starlette:
    """The application; the caller starts and stops the engine."""

    # All asynchronous: each synchronous route would occupy a thread.
    async def models(request: Request) -> Response:
        return _models(service, request.path_params.get("name"))

    async def health(request: Request) -> Response:
        return _health(service)

    async def metrics(request: Request) -> Response:
        return Response(service.engine.metrics.text(), media_type=CONTENT_TYPE)

    async def tokenizer(request: Request) -> Response:
        return _tokenizer(service)

    async def tokenize(request: Request) -> Response:
        return await _tokenize(service, request)

    async def detokenize(request: Request) -> Response:
        return await _detokenize(service, request)

    # Starlette calls each with errors of its class alone, which its types do not say.
    handlers: dict[Any, Any] = {HTTPException: _no_route, ApiError: _refuse, Exception: _fault}
    return Starlette(
        routes=[
            Route("/v1/completions", _Completions(service), methods=["POST"]),
            Route("/v1/chat/completions", _Completions(service, chat=True), methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", models, methods=["GET"]),
            Route("/tokenizer_info", tokenizer, methods=["GET"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/healthz", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        exception_handlers=handlers,
    )


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _refuse(request: Request, error: ApiError) -> JSONResponse:
    return _error(error)


async def _fault(request: Request, error: Exception) -> JSONResponse:
    return _error(ApiError(500, "the server failed; see its log", kind="server_error"))


async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    what = {404: "this route does not exist", 405: f"the route does not support {request.method}"}
    message = f"{request.url.path}: {what.get(error.status_code, error.detail)}"
    return JSONResponse(
        ApiError(error.status_code, message).body(), error.status_code, headers=error.headers
    )


def _models(service: Service, name: str | None) -> Response:
    card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "encdec"}
    if name is None:
        return JSONResponse({"object": "list", "data": [card]})
    if name != service.name:
        return _error(
            ApiError(
                404,
                f"no model {name!r}; this server has {service.name!r}",
                param="model",
                code="model_not_found",
            )
        )
    return JSONResponse(card)


def _tokenizer(service: Service) -> Response:
    """Facts for clients that count tokens with this server; the names are those of vLLM's
    route."""
    form = service.engine.prompts
    vocabulary = form.vocabulary
    names = {token: name for name, token in vocabulary.special_tokens.items()}
    return JSONResponse(
        {
            "tokenizer_class": vocabulary.kind,
            "vocab_size": vocabulary.size,
            "model_max_length": form.max_input_tokens,
            "eos_token": names[vocabulary.eos_id],
            "bos_token": None,
            "pad_token": names.get(vocabulary.pad_id),
            "chat_template": service.template.source,
        }
    )


async def _field(
    service: Service, request: Request, name: str, kind: type, **absent: tuple[Any, ...]
) -> Any:
    """The field that a request has, with or without the model's name."""
    values = read_body(await _read(request, service.max_body_bytes))
    check_names(values, ("model", name), absent)
    check_model(values, service.name)
    if name not in values:
        raise ApiError(400, f"the request has no {name}", param=name)
    return typed(values, name, kind, None)


async def _tokenize(service: Service, request: Request) -> Response:
    """Ids of a text; names of special tokens are read as these tokens, and none are added."""
    text = await _field(service, request, "prompt", str, add_special_tokens=(False,))
    try:
        ids = service.engine.prompts.vocabulary.encode_marked(text)
    except UnicodeEncodeError:
        raise ApiError(
            400, "the prompt contains half a character (a lone surrogate)", param="prompt"
        ) from None
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": service.engine.prompts.max_input_tokens,
            "tokens": list(map(int, ids)),
        }
    )


async def _detokenize(service: Service, request: Request) -> Response:
    """The text of ids, special tokens by name."""
    ids = await _field(service, request, "tokens", list)
    if not all(type(token) is int for token in ids):
        raise ApiError(400, "tokens contains a value that is not a whole number", param="tokens")
    try:
        return JSONResponse({"prompt": service.engine.prompts.vocabulary.decode_marked(ids)})
    except DataError as error:
        raise ApiError(400, str(error), param="tokens") from None


async def _read(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is longer than ``most`` bytes, or does not arrive in time.
    """
    too_long = ApiError(
        413,
        f"the body is longer than {most:,} bytes, the limit of this server",
        headers={"Connection": "close"},
    )
    if (length := request.headers.get("content-length", "0")).isdecimal() and int(length) > most:
        raise too_long
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_long
                parts.append(part)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {BODY_SECONDS:g} s",
            headers={"Connection": "close"},
        ) from None
    return b"".join(parts)


def _health(service: Service) -> Response:
    """Whether requests are accepted, for load balancers."""
    engine = service.engine
    state = "failed" if engine.broken else "closing" if engine.closing else "ok"
    return JSONResponse(
        {
            "status": state,
            "slots": engine.plan.slots,
            "active": engine.active,
            "waiting": engine.waiting,
        },
        200 if state == "ok" else 503,
    )


def _ended(service: Service) -> ApiError:
    return _failed("error" if service.engine.broken else "shutdown", service)


def _failed(failure: str, service: Service) -> ApiError:
    if failure == "timeout":
        return ApiError(
            504, f"no answer within {service.timeout_seconds:g} s", kind="timeout", code="timeout"
        )
    if failure == "shutdown":
        return ApiError(
            503,
            "the server is shutting down",
            kind="server_error",
            code="shutting_down",
            headers={"Retry-After": "5", "Connection": "close"},
        )
    return ApiError(500, "the model failed; see the server's log", kind="server_error")


class _Completions:
    """POST /v1/completions or /v1/chat/completions, an ASGI application of its own, to notice
    clients that disconnect."""

    def __init__(self, service: Service, *, chat: bool = False):
        self._service, self._chat = service, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 499  # as nginx logs a client that disconnected

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, noting)
        except ApiError as error:
            await _error(error)(scope, receive, noting)
        except (ClientDisconnect, OSError):
            status = 499
        finally:
            self._service.engine.metrics.requests.labels(scope["path"], str(status)).inc()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        if service.engine.closing:
            raise _ended(service)
        body = await _read(Request(scope, receive), service.max_body_bytes)
        known: dict[str, Any] = {
            "model": service.name,
            "reader": service.reader,
            "limits": service.limits,
        }
        if self._chat:
            completion = parse_chat(body, template=service.template, **known)
        else:
            completion = parse_completion(body, **known)
        async with self._running(completion) as (ticket, news):
            shaper = Shaper(service.name, service.engine.prompts.vocabulary, completion)
            answer: Coroutine[Any, Any, JSONResponse | None]
            if completion.stream:
                answer = self._stream(completion, shaper, news, send)
            else:
                answer = self._whole(completion, shaper, news)
            work = asyncio.ensure_future(answer)
            gone = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientDisconnect
                if response := work.result():
                    await response(scope, receive, send)
            finally:
                for task in (work, gone):
                    task.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _running(self, completion: Completion) -> AsyncIterator[tuple[Ticket, asyncio.Queue]]:
        """The request in the engine; leaving frees whatever it still holds there."""
        service, loop = self._service, asyncio.get_running_loop()
        news: asyncio.Queue[Update | str] = asyncio.Queue()

        def deliver(update: Update | str) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop may have ended
                loop.call_soon_threadsafe(news.put_nowait, update)

        ticket = Ticket(
            completion.prompts,
            completion.settings,
            deliver,
            stream=completion.stream,
            timeout_seconds=service.timeout_seconds,
            samples=completion.samples,
            max_tokens=completion.max_tokens,
            alternatives=bool(completion.log_probs),
            prompt_log_probs=completion.echo and completion.log_probs is not None,
        )
        try:
            service.engine.submit(ticket)
        except Busy as busy:
            raise ApiError(
                429,
                f"the queue is full; try again in {busy.retry_seconds} s",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(busy.retry_seconds)},
            ) from None
        except Closing:
            raise _ended(service) from None
        try:
            yield ticket, news
        finally:
            service.engine.cancel(ticket)

    async def _whole(
        self, completion: Completion, shaper: Shaper, news: asyncio.Queue
    ) -> JSONResponse:
        count = len(completion.prompts) * completion.samples
        updates: list[Update] = []
        for _ in range(count):
            update = await news.get()
            if isinstance(update, str):
                raise _failed(update, self._service)
            updates.append(update)
        updates.sort(key=lambda update: update.index)
        kept: list[Update] = []
        for begin in range(0, count, completion.samples):
            kept += best(updates[begin : begin + completion.samples], completion.keep)
        # None has no finish, so every one is a choice.
        choices = [
            choice | {"index": place}
            for place, update in enumerate(kept)
            if (choice := shaper.choice(update))
        ]
        tokens = sum(len(update.tokens) for update in updates)
        return JSONResponse(shaper.body(choices, tokens))

    async def _stream(
        self, completion: Completion, shaper: Shaper, news: asyncio.Queue, send: Send
    ) -> None:
        """Server-sent events; the response starts with the first update, so that earlier failures
        get their own HTTP status."""
        count = len(completion.prompts) * completion.samples
        tokens, begun = 0, False

        async def event(data: str, more: bool = True) -> None:
            await send(
                {
                    "type": "http.response.body",
                    "body": f"data: {data}\n\n".encode(),
                    "more_body": more,
                }
            )

        dump = lambda value: json.dumps(value, ensure_ascii=False)
        while count:
            update = await news.get()
            if isinstance(update, str):
                error = _failed(update, self._service)
                if not begun:
                    raise error
                await event(dump(error.body()), more=False)
                return
            if not begun:
                begun = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": 200,
                        "headers": [
                            (b"content-type", b"text/event-stream; charset=utf-8"),
                            (b"cache-control", b"no-cache"),
                        ],
                    }
                )
            tokens += len(update.tokens)
            count -= update.finish is not None
            if choice := shaper.choice(update):
                await event(dump(shaper.body([choice])))
        if completion.include_usage:
            await event(dump(shaper.body([], tokens)))
        await event("[DONE]", more=False)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
