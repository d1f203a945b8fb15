"""Requests checked before anything is queued, and answers in OpenAI's shapes."""

from __future__ import annotations

import json

import pytest

from encdec.data.chat_template import TEMPLATE_FILE, chat_template_of
from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import ConfigError
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.text_io import PromptFormat
from encdec.serving.chat import ChatTemplate, find_template
from encdec.serving.prompts import PromptReader
from encdec.serving.protocol import Limits, parse_chat, parse_completion
from encdec.serving.request_body import ApiError

PROMPTS = PromptFormat(ByteVocabulary(), max_input_tokens=20)
READER = PromptReader(PROMPTS, is_encoder_decoder=True)
LIMITS = Limits(max_tokens=50, default_max_tokens=30, max_answers=6)


def parse(reader=READER, **fields):
    return parse_completion(json.dumps(fields).encode(), model="mine", reader=reader, limits=LIMITS)


def inputs(completion):
    return [prompt.ids for prompt in completion.prompts]


def test_defaults_are_openais_and_the_models():
    made = parse(prompt="abc")
    assert inputs(made) == [PROMPTS.encode("abc")[0]]
    assert (made.settings.temperature, made.settings.top_p, made.samples) == (1.0, 1.0, 1)
    assert made.max_tokens == 30
    assert (made.stream, made.log_probs, made.include_usage) == (False, None, False)
    assert parse(prompt="abc").settings.seed != made.settings.seed  # drawn again
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
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={"5": -100, "6": 1.5},
    )
    settings = made.settings
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.5, 0.9, 7)
    assert (made.samples, settings.seed, settings.stop) == (3, 4, ("x", "yz"))
    assert (settings.repetition_penalty, settings.no_repeat_ngram) == (1.2, 3)
    assert (settings.presence_penalty, settings.frequency_penalty) == (-1, 0.5)
    assert settings.logit_bias == ((5, -100), (6, 1.5))
    kept = json.loads(json.dumps(settings.to_dict()))
    assert kept == settings.to_dict() and GenerationSettings(**kept) == settings
    assert "logit_bias" not in parse(prompt="a").settings.to_dict()
    assert made.max_tokens == 9 and made.stream and made.log_probs == 0 and made.include_usage
    assert len(made.prompts) == 2
    assert parse(prompt="a", stop="x").settings.stop == ("x",)


def test_tokens_are_prompts_too():
    ids = PROMPTS.encode("abc")[0]
    assert inputs(parse(prompt=ids[:-1])) == inputs(parse(prompt=ids)) == [ids]  # EOS or not
    assert inputs(parse(prompt=[ids, ids[:-1]])) == [ids, ids]
    assert inputs(parse(prompt="x" * 30, truncate=True))[0][-1] == 1


def test_what_asks_for_the_likeliest_token_is_greedy_and_nothing_is_refused_for_it():
    for fields in (
        {"temperature": 0, "top_p": 0.5, "top_k": 3, "n": 2},
        {"temperature": 0.001},
        {"temperature": 1.5, "top_p": 0},
    ):
        made = parse(prompt="a", **fields)
        settings = made.settings
        assert (settings.temperature, settings.top_p, settings.top_k) == (0, 1, 0)
        assert made.samples == fields.get("n", 1)
    assert parse(prompt="a", temperature=0.02, top_p=0.5).settings.temperature == 0.02
    # Any integer is a seed; ours have 32 bits.
    assert parse(prompt="a", seed=-1).settings.seed == 2**32 - 1
    assert parse(prompt="a", seed=2**40 + 7).settings.seed == 7
    # Answers are shorter, and then end as "length".
    assert parse(prompt="a", max_tokens=100_000).max_tokens == 50
    assert parse(prompt="a", max_tokens=0).max_tokens == 0
    made = parse(prompt="a", n=2, best_of=5)
    assert (made.keep, made.samples) == (2, 5)
    assert parse(prompt="a", stream=True, stream_options={"include_obfuscation": False})


def test_eos_in_a_prompt_divides_input_and_answer():
    encode, decoder_only = ByteVocabulary().encode, PromptReader(PROMPTS, False)
    ids = [*encode("ab"), 1, *encode("cde")]
    (prompt,) = parse(prompt=ids).prompts
    assert (prompt.ids, prompt.begun) == ([*encode("ab"), 1], encode("cde"))
    assert prompt.own == ids and prompt.context == encode("cde")
    # The last one: an input may hold others, as examples before the question.
    (prompt,) = parse(prompt=[70, 1, 71, 1, 72]).prompts
    assert (prompt.ids, prompt.begun) == ([70, 1, 71, 1], [72])
    (prompt,) = parse(prompt=[1, 72]).prompts
    assert (prompt.ids, prompt.begun) == ([1], [72])
    (prompt,) = parse(decoder_only, prompt=ids).prompts
    assert (prompt.ids, prompt.begun, prompt.context) == (ids, [], encode("cde"))
    # In texts the name of EOS is a text like any other, save where the prompt is echoed.
    assert 1 not in parse(prompt="ab</s>cde").prompts[0].own
    assert parse(prompt="ab</s>cde", echo=True).prompts[0].own == ids
    assert parse(prompt="ab", echo=True, logprobs=1, reader=decoder_only).prompts[0].own == ids[:2]
    # What stands in front of every input is read, and is none of the prompt's own.
    front = PromptReader(PromptFormat(ByteVocabulary(), inputs_prefix=(9,)), True)
    (prompt,) = parse(front, prompt=ids).prompts
    assert (prompt.ids, prompt.own, prompt.before) == ([9, *ids[:3]], ids, 1)
    front = PromptReader(front.format, False)
    for tokens, read in ((ids, [9, *ids]), (ids[:2], [9, *ids[:2], 1])):
        (prompt,) = parse(front, prompt=tokens).prompts
        assert (prompt.ids, prompt.own, prompt.before) == (read, tokens, 1)
    # The two have limits of their own, and a template is around the input alone.
    (prompt,) = parse(prompt="x" * 15 + "</s>" + "y" * 15, echo=True).prompts
    assert (prompt.ids, prompt.begun) == ([*encode("x" * 15), 1], encode("y" * 15))
    framing = PromptReader(PromptFormat(ByteVocabulary(), template="({source})"), True)
    (prompt,) = parse(framing, prompt="ab</s>cde", echo=True).prompts
    assert (prompt.ids, prompt.begun) == ([*encode("(ab)"), 1], encode("cde"))
    # What one answer has begun takes no tokens from another.
    assert parse(prompt=[[70, 1, *[71] * 45], [70]], max_tokens=20).max_tokens == 20


def test_a_decoder_only_models_answer_continues_the_prompts_last_text():
    free = PromptReader(PromptFormat(ByteVocabulary(), inputs_eos=False), False)
    encode = ByteVocabulary().encode
    for echo in (False, True):
        (prompt,) = parse(free, prompt="ab", echo=echo).prompts
        assert prompt.ids == prompt.own == prompt.context == encode("ab")
        (prompt,) = parse(free, prompt=[70, 1, 71], echo=echo).prompts  # EOS ends a text
        assert (prompt.own, prompt.context) == ([70, 1, 71], [71])
    assert chat([USER], reader=free).prompts[0].context == []  # a message is one of its own


@pytest.mark.parametrize(
    "fields, status, param, message",
    [
        ({}, 400, "prompt", "has no prompt"),
        ({"prompt": ""}, 400, "prompt", "the prompt is empty; give a text"),
        ({"prompt": ["fine", " "]}, 400, "prompt", "prompt 1 is empty"),
        ({"prompt": []}, 400, "prompt", "an empty array"),
        ({"prompt": [[]]}, 400, "prompt", "the prompt has no tokens"),
        ({"prompt": {"a": 1}}, 400, "prompt", "prompt is an object"),
        ({"prompt": ["a", 5]}, 400, "prompt", "prompt 1 is a number"),
        (
            {"prompt": [5, 259]},
            400,
            "prompt",
            "the token 259, but the vocabulary has ids from 0 to",
        ),
        ({"prompt": [-3]}, 400, "prompt", "the token -3"),
        (
            {"prompt": "x" * 20},
            400,
            "prompt",
            "has 21 tokens, but the model accepts 20; shorten it, or "
            "cut its end with truncate = true",
        ),
        ({"prompt": "half \ud83d"}, 400, "prompt", "lone surrogate"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "is -1; expected 0 or more"),
        ({"prompt": [70, 1] + [71] * 50, "max_tokens": 1}, 400, "prompt", "50 tokens follow EOS"),
        ({"prompt": "a", "seed": 1.5}, 400, "seed", "expected a whole number"),
        ({"prompt": "a", "logprobs": 6}, 400, "logprobs", "logprobs is 6; expected 0 to 5"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, 400, "prompt", "put EOS between input and"),
        ({"prompt": "a", "best_of": 2, "n": 3}, 400, "best_of", "expected at least n, which is 3"),
        ({"prompt": "a", "best_of": 2, "stream": True}, 400, "best_of", "a stream cannot select"),
        ({"prompt": "a", "best_of": 7}, 400, "best_of", "best_of = 7"),
        ({"prompt": "a", "frequency_penalty": 3}, 400, "frequency_penalty", "from -2 to 2"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "expected token ids"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, 400, "logit_bias", "expected -100 to 100"),
        ({"prompt": "a", "logit_bias": {"259": 1}}, 400, "logit_bias", "has ids from 0 to 258"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix", "this server does not support suffix"),
        (
            {"prompt": "a", "stream": True, "stream_options": {"include_usge": True}},
            400,
            "stream_options.include_usge",
            "known: include_usage",
        ),
        (
            {"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}},
            400,
            "stream_options.include_usage",
            "expected true or false",
        ),
        ({"prompt": "a", "max_tokens": "9"}, 400, "max_tokens", "expected a number"),
        ({"prompt": "a", "max_tokens": 2.5}, 400, "max_tokens", "expected a whole number"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature", "temperature is -1; expected 0"),
        ({"prompt": "a", "temperature": float("nan")}, 400, "temperature", "temperature is nan"),
        ({"prompt": "a", "temperature": True}, 400, "temperature", "expected a number"),
        ({"prompt": "a", "top_p": 1.5}, 400, "top_p", "top_p is 1.5; expected above 0"),
        ({"prompt": "a", "top_k": 10**12}, 400, "top_k", "top_k is 1000000000000; expected 0"),
        ({"prompt": "a", "no_repeat_ngram": -1}, 400, "no_repeat_ngram", "is -1"),
        ({"prompt": "a", "n": 0}, 400, "n", "n is 0; expected 1 or more"),
        (
            {"prompt": "a", "n": 7},
            400,
            "n",
            "asks for 7 answers (1 prompts, n = 7); expected at most 6",
        ),
        ({"prompt": ["a", "b"], "n": 4}, 400, "n", "asks for 8 answers"),
        ({"prompt": "a", "stop": 5}, 400, "stop", "expected a string or an array"),
        ({"prompt": "a", "stop": [""]}, 400, "stop", "strings that are not empty"),
        ({"prompt": "a", "stream": "yes"}, 400, "stream", "expected true or false"),
        ({"prompt": "a", "stream_options": {}}, 200, None, ""),
        (
            {"prompt": "a", "stream_options": {"include_usage": True}},
            400,
            "stream_options",
            "stream =",
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
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[1]", "an array"),
        (b"3", "a number"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "the body has 'prompt' twice"),
    ],
)
def test_bodies_that_are_no_request(body, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse_completion(body, model="mine", reader=READER, limits=LIMITS)
    assert caught.value.status == 400


def chat(messages, template=None, reader=READER, **fields):
    body = json.dumps({"messages": messages} | fields).encode()
    return parse_chat(
        body, model="mine", reader=reader, limits=LIMITS, template=ChatTemplate(template)
    )


USER = {"role": "user", "content": "abc"}


def test_chats_become_prompts_by_their_template():
    assert inputs(chat([USER])) == inputs(parse(prompt="abc"))
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    assert inputs(chat([{"role": "user", "content": parts, "type": "text"}])) == inputs(
        parse(prompt="abc")
    )
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    made = chat([{"role": "system", "content": "x"}, USER], template, max_completion_tokens=3)
    encode = ByteVocabulary().encode
    (prompt,) = made.prompts
    assert prompt.own == [*encode("s:x"), 1, *encode("u:abc"), 1, *encode("a:")]
    assert (prompt.begun, made.max_tokens, made.log_probs) == (encode("a:"), 3, None)
    assert chat([USER], logprobs=True).log_probs == 0
    assert chat([USER], logprobs=True, top_logprobs=4).log_probs == 4
    assert chat([USER], tools=[], response_format={"type": "text"}, store=False)
    system = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert inputs(chat([{"role": "developer", "content": "x"}], system)) == [[*encode("x"), 1]]
    template = "{% for m in messages %}{{ m.name }}:{{ m.content }}{% endfor %}"
    assert inputs(chat([USER | {"name": "me"}], template)) == [[*encode("me:abc"), 1]]


class WithoutQuestions(ByteVocabulary):
    unk_id = ByteVocabulary.offset + ord("?")

    @property
    def special_tokens(self):
        return {"</s>": 1, "<ask>": self.unk_id}


def test_what_the_vocabulary_cannot_write_is_refused_in_chats_and_echoed_prompts_too():
    strict = PromptReader(PromptFormat(WithoutQuestions(), keep_unknown=False), True)
    asking = {"role": "user", "content": "why?"}
    for ask in (
        lambda: parse(strict, prompt="why?"),
        lambda: parse(strict, prompt="a</s>why?", echo=True),
        lambda: chat([asking], reader=strict),
        lambda: chat([asking], "{{ messages[0].content }}", strict),
    ):
        with pytest.raises(ApiError, match="has '\\?' at place .* leave it out"):
            ask()
    # Its name in a template is not such a text.
    (prompt,) = chat([USER], "<ask>{{ messages[0].content }}", strict).prompts
    assert prompt.own == [WithoutQuestions.unk_id, *ByteVocabulary().encode("abc")]


class MarkedBytes(ByteVocabulary):
    @property
    def special_tokens(self):
        return {"<pad>": 0, "</s>": 1, "<unk>": 2}


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_a_template_does_not_double_what_is_in_front_of_every_input(is_encoder_decoder):
    """As GLM's, which begins with its start token and its prefix, or with a part of them."""
    prefix = (0, 2) if is_encoder_decoder else (2,)  # a decoder-only model's start token is apart
    reader = PromptReader(PromptFormat(MarkedBytes(), inputs_prefix=prefix), is_encoder_decoder)
    for begin in ("{{ bos_token }}<unk>", "{{ bos_token }}", "<unk>", ""):
        (prompt,) = chat([USER], begin + "{{ messages[0].content }}", reader).prompts
        assert prompt.ids == [*prefix, *ByteVocabulary().encode("abc"), 1]


def test_an_import_brings_its_template_along(tmp_path):
    assert chat_template_of(tmp_path) is None and find_template(tmp_path).source is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert chat_template_of(tmp_path) == "one"
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert chat_template_of(tmp_path) == "two"
    (tmp_path / TEMPLATE_FILE).write_text("{{ messages[0].content }}")
    assert chat_template_of(tmp_path) == find_template(tmp_path).source
    config.write_text("{% nothing")
    for path, message in ((config, "is not valid Jinja"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            find_template(tmp_path, str(path))


@pytest.mark.parametrize(
    "messages, fields, param, message",
    [
        ([], {}, "messages", "expected an array of at least one"),
        ([USER, USER], {}, "messages", "has no chat template"),
        ([{"role": "king", "content": "a"}], {}, "messages", "role is 'king'"),
        ([{"role": "user", "content": None}], {}, "messages", "content is None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "messages", "not text"),
        ([USER | {"tool_calls": [1]}], {}, "messages", "'tool_calls'"),
        ([USER | {"name": 3}], {}, "messages", "name is 3; expected a text"),
        ([{"role": "user", "content": "\ud83d"}], {}, "messages", "lone surrogate"),
        ([USER], {"tools": [{}]}, "tools", "this server does not support tools"),
        ([USER], {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ([USER], {"prompt": "a"}, "prompt", "unknown field"),
    ],
)
def test_chats_that_are_none_are_told_why(messages, fields, param, message):
    with pytest.raises(ApiError) as caught:
        chat(messages, **fields)
    assert caught.value.param == param and message in caught.value.message
    with pytest.raises(ApiError, match="no dice"):
        chat([USER], "{{ raise_exception('no dice') }}")
