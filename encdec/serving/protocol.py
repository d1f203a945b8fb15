"""OpenAI's completions protocol: requests checked and translated, answers in its shapes.

https://platform.openai.com/docs/api-reference/completions; what our models cannot do is refused
by name, never ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from encdec.data.vocabulary import Vocabulary
from encdec.errors import ConfigError, DataError
from encdec.inference.settings import GenerationSettings
from encdec.inference.text import PromptFormat

# Fields of ours beside OpenAI's are those of ``encdec generate``.
_FIELDS = (
    "model",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
    "repetition_penalty",
    "no_repeat_ngram",
    "truncate",
    "user",
)
# OpenAI's that we have not, with the values that ask for nothing.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
_OUR_NAMES = {"n": "samples"}  # GenerationSettings' names, where they differ


class ApiError(Exception):
    """A request that gets an error instead of an answer, in OpenAI's shape.

    Attributes:
        status: of HTTP.
        message: what is wrong and what mends it.
        kind: OpenAI's ``type``.
        param: the field at fault.
        code: a word for programs.
        headers: more for the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_tokens: new tokens of an answer.
        default_max_tokens: where the request leaves it open.
        max_answers: prompts times ``n``.
    """

    max_tokens: int
    default_max_tokens: int
    max_answers: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """A request, checked.

    Attributes:
        inputs: its prompts as the model reads them, EOS included.
        settings: for all of them.
        stream: whether the answer comes piece by piece.
        include_usage: a stream ends with the number of tokens.
        log_probs: whether log-probabilities come with the answers.
    """

    inputs: list[list[int]]
    settings: GenerationSettings
    stream: bool
    include_usage: bool
    log_probs: bool


def parse_completion(
    body: bytes, *, model: str, prompts: PromptFormat, limits: Limits
) -> Completion:
    """The request in a body.

    Raises:
        ApiError: anything in it that cannot be answered as asked.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body is {_kind(values)}; wanted an object")
    values = {name: value for name, value in values.items() if value is not None}
    _check_names(values)
    asked = values.get("model", model)
    if asked != model:
        raise ApiError(
            404,
            f"model is {asked!r}; this server has {model!r}",
            param="model",
            code="model_not_found",
        )
    settings = _settings(values, limits)
    inputs = _inputs(values, prompts)
    if (answers := len(inputs) * settings.samples) > limits.max_answers:
        raise ApiError(
            400,
            f"the request asks for {answers} answers ({len(inputs)} prompts, n = "
            f"{settings.samples}); wanted at most {limits.max_answers}",
            param="n",
        )
    options = _typed(values, "stream_options", dict, {})
    stream = _typed(values, "stream", bool, False)
    if options and not stream:
        raise ApiError(
            400, "stream_options is for stream = true; leave it out", param="stream_options"
        )
    log_probs = _typed(values, "logprobs", int, None)
    if log_probs not in (None, 0):
        raise ApiError(
            400,
            f"logprobs is {log_probs}; wanted 0, which gives each token's own "
            "log-probability: those of other tokens are not kept",
            param="logprobs",
        )
    return Completion(
        inputs, settings, stream, bool(options.get("include_usage", False)), log_probs is not None
    )


def _check_names(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in _ABSENT:
            if value not in _ABSENT[name]:
                raise ApiError(
                    400,
                    f"{name} is {value!r}, and this server has no {name}; leave it out",
                    param=name,
                )
        elif name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ApiError(
                400, f"unknown field {name!r}{hint} (known: {', '.join(_FIELDS)})", param=name
            )


def _kind(value: Any) -> str:
    return {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }[type(value)]


def _typed(values: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = values.get(name, default)
    if value is default or type(value) is kind:
        return value
    wanted = {dict: "an object", bool: "true or false", int: "a whole number"}[kind]
    raise ApiError(400, f"{name} is {value!r}; wanted {wanted}", param=name)


def _settings(values: Mapping[str, Any], limits: Limits) -> GenerationSettings:
    """Sampling settings; the defaults are OpenAI's, so temperature is 1."""
    given: dict[str, Any] = {"temperature": 1.0, "max_tokens": limits.default_max_tokens}
    for name in (
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "seed",
        "repetition_penalty",
        "no_repeat_ngram",
    ):
        if name not in values:
            continue
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ApiError(400, f"{name} is {value!r}; wanted a number", param=name)
        given[_OUR_NAMES.get(name, name)] = value
    given.setdefault("seed", secrets.randbits(32))
    stop = values.get("stop", [])
    given["stop"] = [stop] if isinstance(stop, str) else stop
    if not isinstance(given["stop"], list):
        raise ApiError(400, f"stop is {stop!r}; wanted a string or an array of them", param="stop")
    try:
        settings = GenerationSettings(**given)
    except (ConfigError, OverflowError) as error:
        message = str(error)
        name = message.split()[0]
        theirs = next((k for k, v in _OUR_NAMES.items() if v == name), name)
        raise ApiError(400, message.replace(name, theirs, 1), param=theirs) from None
    if settings.max_tokens > limits.max_tokens:
        raise ApiError(
            400,
            f"max_tokens is {settings.max_tokens:,}; this server gives at most "
            f"{limits.max_tokens:,}",
            param="max_tokens",
        )
    return settings


def _inputs(values: Mapping[str, Any], prompts: PromptFormat) -> list[list[int]]:
    """The prompts: a text, tokens, or an array of either; EOS is added where the model wants it."""
    if "prompt" not in values:
        raise ApiError(
            400,
            "the request has no prompt; wanted a text, or an array of texts or of tokens",
            param="prompt",
        )
    prompt, truncate = values["prompt"], _typed(values, "truncate", bool, False)
    is_tokens = lambda x: isinstance(x, list) and all(type(i) is int for i in x)
    if isinstance(prompt, str) or (prompt and is_tokens(prompt)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(
            400,
            f"prompt is {_kind(prompt)}{' without anything' * (prompt == [])}; "
            "wanted a text, or an array of texts or of tokens",
            param="prompt",
        )
    inputs = []
    for number, part in enumerate(prompt):
        name = "the prompt" if len(prompt) == 1 else f"prompt {number}"
        try:
            if isinstance(part, str):
                ids, _ = prompts.encode(part, truncate=truncate, name=name)
            elif is_tokens(part):
                ends = bool(part) and prompts.inputs_eos and part[-1] == prompts.vocabulary.eos_id
                ids, _ = prompts.fit(part[:-1] if ends else part, truncate=truncate, name=name)
            else:
                raise ApiError(
                    400,
                    f"{name} is {_kind(part)}; wanted a text or an array of tokens",
                    param="prompt",
                )
        except DataError as error:
            raise ApiError(400, _without_flags(str(error)), param="prompt") from None
        inputs.append(ids)
    return inputs


def _without_flags(message: str) -> str:
    """A message for users of the command, for those of the server."""
    return message.replace(
        "cut its end with --truncate, or allow more than the model was trained "
        "on with --max_input_tokens",
        "or cut its end with truncate = true",
    ).replace(
        "; leave it out, or have the model read it as its unknown token with --keep_unknown",
        "; leave it out",
    )


class Shaper:
    """Answers of one request in OpenAI's shapes."""

    def __init__(self, model: str, vocabulary: Vocabulary, completion: Completion):
        self._model, self._vocabulary, self._completion = model, vocabulary, completion
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[int],
        log_probs: Sequence[float],
        finish: str | None,
        before: Sequence[int] = (),
    ) -> dict[str, Any]:
        """One choice or a piece of it; ``before`` are the tokens that came before the piece."""
        kept = None
        if self._completion.log_probs:
            whole = [*before, *tokens]
            kept = {
                "tokens": [self._vocabulary.piece(token) for token in tokens],
                "token_logprobs": [round(value, 6) for value in log_probs],
                "top_logprobs": None,
                "text_offset": [
                    len(self._vocabulary.decode(whole[: len(before) + i]))
                    for i in range(len(tokens))
                ],
            }
        reason = "length" if finish == "length" else "stop" if finish else None
        return {"text": text, "index": index, "logprobs": kept, "finish_reason": reason}

    def body(self, choices: Sequence[dict[str, Any]], output_tokens: int | None) -> dict[str, Any]:
        """A response or, without a number of tokens, a piece of a stream."""
        body = self._head | {"choices": list(choices)}
        if output_tokens is not None:
            inputs = sum(map(len, self._completion.inputs))
            body["usage"] = {
                "prompt_tokens": inputs,
                "completion_tokens": output_tokens,
                "total_tokens": inputs + output_tokens,
            }
        return body
