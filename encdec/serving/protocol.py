"""OpenAI's protocols: requests checked and translated.

https://platform.openai.com/docs/api-reference/completions and .../chat; fields that
our models do not support are refused by name, never ignored, except with a value that has no
effect.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from encdec.errors import ConfigError, DataError
from encdec.fields import did_you_mean
from encdec.inference.generation_settings import GenerationSettings
from encdec.serving.chat import ChatTemplate
from encdec.serving.prompts import Prompt, PromptReader
from encdec.serving.request_body import ApiError, count_of, kind_of, number_of, read_body, typed

# Fields in addition to OpenAI's: those of ``encdec generate``.
_SHARED = (
    "model",
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
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "repetition_penalty",
    "no_repeat_ngram",
    "truncate",
    "user",
)
_TEXT_FIELDS = (*_SHARED, "prompt", "echo", "best_of")
_CHAT_FIELDS = (*_SHARED, "messages", "max_completion_tokens", "top_logprobs")
# OpenAI fields that are not supported, with the values that have no effect.
_TEXT_ABSENT: dict[str, tuple[Any, ...]] = {"suffix": ("",)}
_CHAT_ABSENT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_STREAM_OPTIONS = {"include_usage": (True, False), "include_obfuscation": (False,)}
MOST_LOG_PROBS = 5  # alternatives per position, as in OpenAI's completions; compiled in
_NUMBERS = (
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "no_repeat_ngram",
)
# Below this temperature sampling is greedy, except between nearly equal tokens.
LEAST_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        max_tokens: most new tokens of an answer.
        default_max_tokens: used if the request gives no max_tokens.
        max_answers: prompts times ``n``.
    """

    max_tokens: int
    default_max_tokens: int
    max_answers: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """A checked request.

    Attributes:
        prompts: as the model reads them.
        settings: of all answers.
        samples: answers generated for each prompt.
        keep: how many of these are returned, the most likely ones.
        max_tokens: most new tokens of an answer.
        stream: whether the answer is streamed.
        include_usage: whether a stream ends with token counts.
        log_probs: how many most likely tokens are returned with each token and its
            log-probability; None: no log-probabilities.
        echo: the answers' texts begin with their prompts.
        is_chat: whether it is a chat completion.
    """

    prompts: list[Prompt]
    settings: GenerationSettings
    samples: int
    keep: int
    max_tokens: int
    stream: bool
    include_usage: bool
    log_probs: int | None
    echo: bool = False
    is_chat: bool = False


def parse_completion(
    body: bytes, *, model: str, reader: PromptReader, limits: Limits
) -> Completion:
    """The request in a body of /v1/completions.

    Raises:
        ApiError: a part of it is malformed or not supported.
    """
    values = read_body(body)
    check_names(values, _TEXT_FIELDS, _TEXT_ABSENT)
    check_model(values, model)
    echo = typed(values, "echo", bool, False)
    log_probs = typed(values, "logprobs", int, None)
    _check_log_probs("logprobs", log_probs)
    prompts = _prompts(values, reader, marked=echo)
    if echo and log_probs is not None and reader.is_encoder_decoder:
        _check_split(prompts, reader)
    keep = count_of(values, "n", 1)
    samples = count_of(values, "best_of", keep)
    if samples < keep:
        raise ApiError(
            400, f"best_of is {samples}; expected at least n, which is {keep}", param="best_of"
        )
    _check_biases(values, reader)
    return _completion(values, limits, prompts, keep, samples, log_probs, echo=echo)


def parse_chat(
    body: bytes, *, model: str, reader: PromptReader, limits: Limits, template: ChatTemplate
) -> Completion:
    """The request in a body of /v1/chat/completions.

    Raises:
        ApiError: a part of it is malformed or not supported.
    """
    values = read_body(body)
    check_names(values, _CHAT_FIELDS, _CHAT_ABSENT)
    check_model(values, model)
    if (longest := values.pop("max_completion_tokens", None)) is not None:
        if values.get("max_tokens", longest) != longest:
            raise ApiError(
                400,
                f"max_completion_tokens is {longest!r} and max_tokens, its former name, "
                f"{values['max_tokens']!r}; leave max_tokens out",
                param="max_tokens",
            )
        values["max_tokens"] = longest
    asked = typed(values, "logprobs", bool, False)
    others = typed(values, "top_logprobs", int, None)
    if others is not None and not asked:
        raise ApiError(400, "top_logprobs needs logprobs = true", param="top_logprobs")
    _check_log_probs("top_logprobs", others)
    if "messages" not in values:
        raise ApiError(400, "the request has no messages; expected an array", param="messages")
    truncate = typed(values, "truncate", bool, False)
    try:
        prompt = template.prompt(values["messages"], reader, truncate=truncate)
    except DataError as error:
        raise ApiError(400, _without_flags(str(error)), param="messages") from None
    message = dataclasses.replace(prompt, context=[])  # an answer is a text of its own
    keep = count_of(values, "n", 1)
    _check_biases(values, reader)
    return _completion(
        values, limits, [message], keep, keep, (others or 0) if asked else None, is_chat=True
    )


def _completion(
    values: Mapping[str, Any],
    limits: Limits,
    prompts: list[Prompt],
    keep: int,
    samples: int,
    log_probs: int | None,
    **kind: bool,
) -> Completion:
    """Fields that both protocols share."""
    if (answers := len(prompts) * samples) > limits.max_answers:
        name = "n" if samples == keep else "best_of"
        raise ApiError(
            400,
            f"the request asks for {answers} answers ({len(prompts)} prompts, {name} = "
            f"{samples}); expected at most {limits.max_answers}",
            param=name,
        )
    stream = typed(values, "stream", bool, False)
    if stream and samples != keep:
        raise ApiError(
            400,
            f"best_of is {samples}, but n is {keep}: a stream cannot select the best answers; set "
            "best_of to n",
            param="best_of",
        )
    include_usage = _include_usage(values, stream)
    return Completion(
        prompts,
        _settings(values),
        samples,
        keep,
        _max_tokens(values, prompts, limits),
        stream,
        include_usage,
        log_probs,
        **kind,
    )


def check_model(values: Mapping[str, Any], model: str) -> None:
    """Raises ApiError for a model other than this server's."""
    asked = values.get("model", model)
    if asked != model:
        raise ApiError(
            404,
            f"model is {asked!r}; this server has {model!r}",
            param="model",
            code="model_not_found",
        )


def check_names(
    values: Mapping[str, Any], known: Sequence[str], absent: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raises ApiError for a field that is neither known nor absent with a value without effect."""
    for name, value in values.items():
        if name in absent:
            if value not in absent[name]:
                raise ApiError(
                    400,
                    f"{name} is {value!r}, but this server does not support {name}; leave it out",
                    param=name,
                )
        elif name not in known:
            hint = did_you_mean(name, known)
            raise ApiError(
                400, f"unknown field {name!r}{hint} (known: {', '.join(known)})", param=name
            )


def _check_log_probs(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MOST_LOG_PROBS:
        raise ApiError(400, f"{name} is {value}; expected 0 to {MOST_LOG_PROBS}", param=name)


def _check_split(prompts: Sequence[Prompt], reader: PromptReader) -> None:
    eos = reader.format.vocabulary.eos_id
    for number, prompt in enumerate(prompts):
        if eos not in prompt.own:
            name = next(iter(reader.format.vocabulary.special_tokens))
            raise ApiError(
                400,
                f"prompt {number} is to be echoed with log-probabilities, but an encoder-decoder "
                "gives none of its input; put EOS between input and answer: the token "
                f"{eos}, in texts {name}",
                param="prompt",
            )


def _include_usage(values: Mapping[str, Any], stream: bool) -> bool:
    options = typed(values, "stream_options", dict, {})
    if options and not stream:
        raise ApiError(
            400, "stream_options is for stream = true; leave it out", param="stream_options"
        )
    for name, value in options.items():
        field = f"stream_options.{name}"
        if name not in _STREAM_OPTIONS:
            known = ", ".join(_STREAM_OPTIONS)
            raise ApiError(400, f"unknown field {field!r} (known: {known})", param=field)
        if value is not None and value not in _STREAM_OPTIONS[name] or type(value) is int:
            wanted = " or ".join(str(one).lower() for one in _STREAM_OPTIONS[name])
            raise ApiError(400, f"{field} is {value!r}; expected {wanted}", param=field)
    return bool(options.get("include_usage", False))


def _max_tokens(values: Mapping[str, Any], prompts: Sequence[Prompt], limits: Limits) -> int:
    """Limited to what the server allows; a longer answer then ends as "length"."""
    asked = number_of(values, "max_tokens", limits.default_max_tokens)
    if type(asked) is not int or asked < 0:
        wanted = "a whole number" if type(asked) is not int else "0 or more"
        raise ApiError(400, f"max_tokens is {asked!r}; expected {wanted}", param="max_tokens")
    begun = max(len(prompt.begun) for prompt in prompts)
    if limits.max_tokens - begun < min(asked, 1):
        raise ApiError(
            400,
            f"{begun:,} tokens follow EOS in the prompt and {min(asked, 1)} new is requested, but "
            f"answers of this server have at most {limits.max_tokens:,}; shorten them, or start "
            "the server with a larger max_tokens",
            param="prompt",
        )
    return min(asked, limits.max_tokens)  # the engine counts what each prompt has begun


def _settings(values: Mapping[str, Any]) -> GenerationSettings:
    """Sampling settings; the defaults are OpenAI's, so temperature is 1.

    As there, sampling settings are accepted in greedy requests: temperature 0, or so small that
    only the most likely token is left, and top_p 0, which keeps that token alone.
    """
    temperature, top_p = number_of(values, "temperature", 1.0), number_of(values, "top_p", 1.0)
    given: dict[str, Any] = {
        name: number_of(values, name, 0) for name in _NUMBERS if name in values
    }
    seed = values.get("seed", secrets.randbits(32))
    if type(seed) is not int:
        raise ApiError(400, f"seed is {seed!r}; expected a whole number", param="seed")
    stop = values.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list):
        raise ApiError(
            400, f"stop is {stop!r}; expected a string or an array of them", param="stop"
        )
    greedy = 0 <= temperature < LEAST_TEMPERATURE or top_p == 0
    try:
        settings = GenerationSettings(
            temperature=1.0 if 0 <= temperature < LEAST_TEMPERATURE else temperature,
            top_p=1.0 if top_p == 0 else top_p,
            seed=seed % 2**32,
            stop=stop,
            logit_bias=_logit_bias(values),
            **given,
        )
    except (ConfigError, OverflowError) as error:
        raise ApiError(400, str(error), param=str(error).split()[0]) from None
    if greedy:
        settings = dataclasses.replace(settings, temperature=0.0, top_p=1.0, top_k=0, seed=0)
    return settings


def _check_biases(values: Mapping[str, Any], reader: PromptReader) -> None:
    size = reader.format.vocabulary.size
    for token, _ in _logit_bias(values):
        if token >= size:
            raise ApiError(
                400,
                f"logit_bias has the token {token}, but the vocabulary has ids from 0 to "
                f"{size - 1}",
                param="logit_bias",
            )


def _logit_bias(values: Mapping[str, Any]) -> list[tuple[int, float]]:
    biases = []
    for token, bias in typed(values, "logit_bias", dict, {}).items():
        if not token.isascii() or not token.isdecimal():
            raise ApiError(400, f"logit_bias has {token!r}; expected token ids", param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise ApiError(
                400, f"logit_bias of {token} is {bias!r}; expected a number", param="logit_bias"
            )
        biases.append((int(token[:12]), bias))
    return biases


def _prompts(values: Mapping[str, Any], reader: PromptReader, *, marked: bool) -> list[Prompt]:
    """The prompts: a text, tokens, or an array of either."""
    if "prompt" not in values:
        raise ApiError(
            400,
            "the request has no prompt; expected a text, or an array of texts or of tokens",
            param="prompt",
        )
    prompt, truncate = values["prompt"], typed(values, "truncate", bool, False)
    is_tokens = lambda x: isinstance(x, list) and all(type(i) is int for i in x)
    if isinstance(prompt, str) or (prompt and is_tokens(prompt)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(
            400,
            f"prompt is {'an empty array' if prompt == [] else kind_of(prompt)}; "
            "expected a text, or an array of texts or of tokens",
            param="prompt",
        )
    prompts = []
    for number, part in enumerate(prompt):
        name = "the prompt" if len(prompt) == 1 else f"prompt {number}"
        if not isinstance(part, str) and not is_tokens(part):
            raise ApiError(
                400,
                f"{name} is {kind_of(part)}; expected a text or an array of tokens",
                param="prompt",
            )
        try:
            prompts.append(reader.read(part, marked=marked, truncate=truncate, name=name))
        except DataError as error:
            raise ApiError(400, _without_flags(str(error)), param="prompt") from None
    return prompts


def _without_flags(message: str) -> str:
    """A message for users of the command line, reworded for clients of the server."""
    return message.replace(
        "cut its end with --too_long=cut, or allow more than in training with --max_input_tokens",
        "or cut its end with truncate = true",
    ).replace(
        "; leave it out, or use --keep_unknown to read it as the unknown token", "; leave it out"
    )
