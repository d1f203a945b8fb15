"""Requests checked before anything is queued, and answers in OpenAI's shapes."""

from __future__ import annotations

import json

import pytest

from encdec.data.vocabulary import ByteVocabulary
from encdec.inference.text import PromptFormat
from encdec.serving.protocol import ApiError, Limits, Shaper, parse_completion

PROMPTS = PromptFormat(ByteVocabulary(), max_input_tokens=20)
LIMITS = Limits(max_tokens=50, default_max_tokens=30, max_answers=6)


def parse(**fields):
    return parse_completion(
        json.dumps(fields).encode(), model="mine", prompts=PROMPTS, limits=LIMITS
    )


def test_defaults_are_openais_and_the_models():
    made = parse(prompt="abc")
    assert made.inputs == [PROMPTS.encode("abc")[0]]
    assert (made.settings.temperature, made.settings.top_p, made.settings.samples) == (1.0, 1.0, 1)
    assert made.settings.max_tokens == 30
    assert (made.stream, made.log_probs, made.include_usage) == (False, False, False)
    assert parse(prompt="abc").settings.seed != made.settings.seed  # drawn anew
    # What asks for nothing is let pass, as clients send it.
    assert parse(
        prompt="abc",
        best_of=1,
        echo=False,
        logit_bias={},
        presence_penalty=0.0,
        frequency_penalty=0,
        user="me",
        stop=None,
        model="mine",
        suffix=None,
    )


def test_fields_become_settings():
    made = parse(
        prompt=["abc", "de"],
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        n=3,
        seed=4,
        stop=["x", "yz"],
        max_tokens=9,
        stream=True,
        logprobs=0,
        stream_options={"include_usage": True},
        repetition_penalty=1.2,
        no_repeat_ngram=3,
    )
    settings = made.settings
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.5, 0.9, 7)
    assert (settings.samples, settings.seed, settings.stop) == (3, 4, ("x", "yz"))
    assert (settings.repetition_penalty, settings.no_repeat_ngram) == (1.2, 3)
    assert settings.max_tokens == 9 and made.stream and made.log_probs and made.include_usage
    assert len(made.inputs) == 2
    assert parse(prompt="a", stop="x").settings.stop == ("x",)


def test_tokens_are_prompts_too():
    ids = PROMPTS.encode("abc")[0]
    assert parse(prompt=ids[:-1]).inputs == parse(prompt=ids).inputs == [ids]  # with EOS or without
    assert parse(prompt=[ids, ids[:-1]]).inputs == [ids, ids]
    assert parse(prompt="x" * 30, truncate=True).inputs[0][-1] == 1


@pytest.mark.parametrize(
    "fields, status, param, message",
    [
        ({}, 400, "prompt", "has no prompt"),
        ({"prompt": ""}, 400, "prompt", "the prompt is empty; give a text"),
        ({"prompt": ["fine", " "]}, 400, "prompt", "prompt 1 is empty"),
        ({"prompt": []}, 400, "prompt", "an array without anything"),
        ({"prompt": [[]]}, 400, "prompt", "the prompt has no tokens"),
        ({"prompt": {"a": 1}}, 400, "prompt", "prompt is an object"),
        ({"prompt": ["a", 5]}, 400, "prompt", "prompt 1 is a number"),
        (
            {"prompt": [5, 259]},
            400,
            "prompt",
            "the token 259, and the vocabulary has ids from 0 to",
        ),
        ({"prompt": [-3]}, 400, "prompt", "the token -3"),
        (
            {"prompt": "x" * 20},
            400,
            "prompt",
            "has 21 tokens, and the model takes 20; shorten it, or "
            "cut its end with truncate = true",
        ),
        ({"prompt": "half \ud83d"}, 400, "prompt", "lone surrogate"),
        ({"prompt": "a", "max_tokens": 51}, 400, "max_tokens", "gives at most 50"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "max_tokens is 0; wanted 1 or more"),
        ({"prompt": "a", "max_tokens": "9"}, 400, "max_tokens", "wanted a number"),
        ({"prompt": "a", "max_tokens": 2.5}, 400, "max_tokens", "wanted a whole number"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature", "temperature is -1; wanted 0"),
        ({"prompt": "a", "temperature": float("nan")}, 400, "temperature", "temperature is nan"),
        ({"prompt": "a", "temperature": True}, 400, "temperature", "wanted a number"),
        ({"prompt": "a", "top_p": 1.5}, 400, "top_p", "top_p is 1.5; wanted above 0"),
        ({"prompt": "a", "temperature": 0, "top_p": 0.5}, 400, "top_p", "set temperature above 0"),
        ({"prompt": "a", "top_k": 10**12}, 400, "top_k", "top_k is 1000000000000; wanted 0"),
        ({"prompt": "a", "no_repeat_ngram": -1}, 400, "no_repeat_ngram", "is -1"),
        ({"prompt": "a", "seed": -1}, 400, "seed", "seed is -1"),
        ({"prompt": "a", "n": 0}, 400, "n", "n is 0; wanted 1 or more"),
        (
            {"prompt": "a", "n": 7},
            400,
            "n",
            "asks for 7 answers (1 prompts, n = 7); wanted at most 6",
        ),
        ({"prompt": ["a", "b"], "n": 4}, 400, "n", "asks for 8 answers"),
        ({"prompt": "a", "stop": 5}, 400, "stop", "wanted a string or an array"),
        ({"prompt": "a", "stop": [""]}, 400, "stop", "strings that are not empty"),
        ({"prompt": "a", "logprobs": 5}, 400, "logprobs", "wanted 0"),
        ({"prompt": "a", "stream": "yes"}, 400, "stream", "wanted true or false"),
        ({"prompt": "a", "stream_options": {}}, 200, None, ""),
        (
            {"prompt": "a", "stream_options": {"include_usage": True}},
            400,
            "stream_options",
            "stream =",
        ),
        ({"prompt": "a", "echo": True}, 400, "echo", "echo is True, and this server has no echo"),
        (
            {"prompt": "a", "presence_penalty": 0.5},
            400,
            "presence_penalty",
            "has no presence_penalty",
        ),
        ({"prompt": "a", "temprature": 0.5}, 400, "temprature", "did you mean 'temperature'"),
        ({"prompt": "a", "model": "other"}, 404, "model", "this server has 'mine'"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(fields, status, param, message):
    if status == 200:
        parse(**fields)
        return
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    error = caught.value
    assert (error.status, error.param) == (status, param)
    assert message in error.message and "--" not in error.message
    assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[1]", "an array"),
        (b"3", "a number"),
        (b"[" * 100_000, "no JSON"),
    ],
)
def test_bodies_that_are_no_request(body, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse_completion(body, model="mine", prompts=PROMPTS, limits=LIMITS)
    assert caught.value.status == 400


def test_choices_tell_tokens_and_where_they_stand():
    completion = parse(prompt="abc", logprobs=0)
    shaper = Shaper("mine", ByteVocabulary(), completion)
    ids = ByteVocabulary().encode("h\u00e9!")
    choice = shaper.choice(2, "\u00e9!", ids[1:], [-0.1, -0.2, -0.3], "eos", ids[:1])
    assert choice["finish_reason"] == "stop" and choice["index"] == 2
    assert choice["logprobs"]["token_logprobs"] == [-0.1, -0.2, -0.3]
    assert choice["logprobs"]["text_offset"] == [1, 1, 2]
    assert len(choice["logprobs"]["tokens"]) == 3
    body = shaper.body([choice], 3)
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert shaper.choice(0, "", [], [], None)["finish_reason"] is None
    assert shaper.choice(0, "", [], [], "length")["finish_reason"] == "length"
    assert (
        Shaper("mine", ByteVocabulary(), parse(prompt="a")).choice(0, "a", [100], [0.0], "stop")[
            "logprobs"
        ]
        is None
    )
