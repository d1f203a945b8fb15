"""Texts through the generator: equal results however they are batched, and settings refused."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from encdec.cost.flops import cache_bytes
from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import ConfigError, DataError
from encdec.inference import beam, beam_steps, cache_memory, leaving, shapes
from encdec.inference import generator as generator_module
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.generator import Generator
from encdec.inference.load_generator import load
from encdec.inference.rows import PreparedInput
from encdec.inference.shapes import bucket
from encdec.inference.text_io import PromptFormat
from tests.inference.conftest import LEARNED
from tests.inference.examples import START, greedy, model

# Two input buckets, of 16 and 24 tokens, in no order.
TEXTS = ["short", "a text of twenty bytes", "x", "another longer one"]
PROMPTS = PromptFormat(ByteVocabulary(), decoder_start_id=START, max_input_tokens=40)


@functools.cache
def printing_model(name):
    """A model that says printable characters alone, and EOS."""
    config, params = model(name)
    head = np.array(params["embedder"]["head"])
    letters = np.arange(ord(" "), 127) + ByteVocabulary.offset
    head[:, np.setdiff1d(np.arange(config.vocab_size), [1, *letters])] = 0
    return config, params | {"embedder": params["embedder"] | {"head": jnp.asarray(head)}}


def make(name):
    return Generator(*printing_model(name), PROMPTS, max_tokens=12, batch_rows=4)


@pytest.fixture(scope="module", params=["encoder_decoder", "decoder_only"])
def generator(request):
    return make(request.param)


@pytest.fixture(scope="module")
def single():
    """Where the architecture makes no difference any more, one will do."""
    return make("encoder_decoder")


def same(first, second):
    assert [[a.tokens for a in made] for made in first] == [
        [a.tokens for a in made] for made in second
    ]
    for a, b in zip(first, second):
        for x, y in zip(a, b):
            np.testing.assert_allclose(x.log_probs, y.log_probs, atol=1e-4)


def test_buckets_are_few_and_hold_their_lengths():
    sizes = [bucket(n) for n in range(1, 2000)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert sorted(set(sizes))[:7] == [16, 24, 32, 48, 64, 96, 128]
    assert max(size / n for n, size in enumerate(sizes, 1) if n >= 16) <= 1.5


def test_greedy_answers_are_those_of_full_passes_whatever_the_batch(generator):
    together = generator.generate(TEXTS)
    alone = [generator.generate([text])[0] for text in TEXTS[:1]]
    same(together[:1], alone)
    config, params = printing_model(generator.config.architecture)
    for text, (answer,) in zip(TEXTS[:2], together):
        ids, _ = PROMPTS.encode(text)
        tokens, log_probs = greedy(config, params, ids, len(answer.tokens))
        assert answer.tokens == tokens
        np.testing.assert_allclose(answer.log_probs, log_probs, atol=1e-4)
        assert answer.finish == ("eos" if tokens[-1] == 1 else "length")
        assert answer.text == ByteVocabulary().decode(tokens) and not answer.truncated


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_a_stretched_rope_gives_the_same_answers_in_any_bucket(name):
    """Beyond rope_max_length, whatever the rows' width and the capacity for new tokens."""
    config, params = printing_model(name)
    config = config.replace(rope_scaling="ntk", rope_factor=4.0, rope_max_length=8, rope_length=48)
    generator = Generator(config, params, PROMPTS, max_tokens=6, batch_rows=4)
    together = generator.generate(TEXTS)
    same([generator.generate([text])[0] for text in TEXTS[:1]], together[:1])
    longer = generator.generate(TEXTS[:1], GenerationSettings(max_tokens=20))[0][0]
    assert longer.tokens[:6] == together[0][0].tokens
    ids, _ = PROMPTS.encode(TEXTS[1])
    assert together[1][0].tokens == greedy(config, params, ids, 6)[0][: len(together[1][0].tokens)]


def test_rows_and_parameters_are_split_over_a_mesh(generator, monkeypatch):
    """Four devices: two copies of the parameters, each over two."""
    name = generator.config.architecture
    spread = Generator(
        *printing_model(name),
        PROMPTS,
        max_tokens=12,
        batch_rows=4,
        devices=jax.devices()[:4],
        tensor=2,
    )
    kernel = spread._rows.params["decoder"]["layers_0"]["mlp"]["up"]["kernel"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 2}
    assert len(kernel.addressable_shards) == 4
    same(spread.generate(TEXTS), generator.generate(TEXTS))
    beams = GenerationSettings(beams=2, samples=2)
    monkeypatch.setattr(shapes, "WORTH", 0)  # rows leave
    monkeypatch.setattr(beam, "LEAST_STEPS", 2)  # and slots are freed
    layouts = []

    def noted(config, plan, params, search, *rest):
        if not isinstance(search.count.sharding, SingleDeviceSharding):
            layouts.append([leaf.sharding.spec for leaf in jax.tree.leaves(search.memory)])
        return beam_steps.advance(config, plan, params, search, *rest)

    monkeypatch.setattr(beam, "advance", noted)
    same(spread.generate(TEXTS, beams), generator.generate(TEXTS, beams))
    assert any("tensor" in spec for spec in layouts[0]), layouts[0]
    assert all(layout == layouts[0] for layout in layouts)
    with pytest.raises(ConfigError, match="6 devices cannot hold .* tensor = 2"):
        Generator(*printing_model(name), PROMPTS, devices=jax.devices()[:6], tensor=2)


def test_shapes_are_few(single):
    """Every number of inputs and every length falls into one of a few compiled programs."""
    shapes = set()
    for rows in range(1, 17):
        for length in range(1, 513):
            inputs = [
                PreparedInput(i, i, [5] * (length if i == 0 else 1), False) for i in range(rows)
            ]
            shapes.add(single._rows._arrays(inputs)[0].shape)
    assert len(shapes) == 8 * 11  # rows are 1, 2, 3, 4, 6, 8, 12, 16


def test_samples_depend_on_seed_and_number_alone(single):
    settings = GenerationSettings(temperature=1.5, top_k=200, samples=3, max_tokens=10)
    texts = ["short", "x", "short"]
    together = single.generate(texts, settings)
    assert [len(made) for made in together] == [3, 3, 3]
    # The same text twice, but another number.
    assert len({tuple(a.tokens) for made in together for a in made}) == 9
    same(single.generate(texts[1:], settings, first_number=1), together[1:])
    other = single.generate(texts[:1], dataclasses.replace(settings, seed=1))
    assert other[0] != together[0]


def test_stop_strings_end_answers(generator):
    free = generator.generate(TEXTS[:1])[0][0]
    text = free.text
    stop = text[3:5]
    assert text.find(stop) > 0 and len(text) > 6
    cut = generator.generate(TEXTS[:1], GenerationSettings(stop=["never there", stop]))[0][0]
    assert cut.finish == "stop" and cut.text == text[: text.find(stop)]
    assert cut.tokens == free.tokens[: len(cut.tokens)]
    assert ByteVocabulary().decode(cut.tokens).endswith(stop)
    np.testing.assert_allclose(cut.log_probs, free.log_probs[: len(cut.tokens)], atol=1e-5)


def test_finished_rows_leave_and_change_no_answer(monkeypatch):
    """Greedy and drawn, rows that end by EOS, by a stop string and by the limit."""
    generator = make("decoder_only")
    texts = [*TEXTS, *TEXTS[::-1], "abc", "zz"]
    settings = GenerationSettings(temperature=1.5, samples=2, max_tokens=30, stop=["e", "o", "a"])
    monkeypatch.setattr(generator_module, "STEPS_BETWEEN_LOOKS", 2)
    generator.batch_rows = 16
    whole = generator.generate(texts, settings)
    sizes = []
    taken = leaving._taken
    monkeypatch.setattr(shapes, "WORTH", 0)
    monkeypatch.setattr(leaving, "_taken", lambda *args: sizes.append(len(args[2])) or taken(*args))
    same(generator.generate(texts, settings), whole)
    assert sizes and max(sizes) < 16
    ends = {one.finish for made in whole for one in made}
    assert len(ends) > 1, ends


@pytest.mark.parametrize("steps", [1, 5])
def test_streams_join_to_what_generate_gives(generator, steps):
    settings = GenerationSettings(max_tokens=12)
    parts = list(generator.stream(TEXTS[0], settings, steps=steps))
    wanted = generator.generate([TEXTS[0]], settings)[0][0].text
    assert "".join(parts) == wanted and len(parts) > 1
    stop = dataclasses.replace(settings, stop=[wanted[4:6]])
    assert (
        "".join(generator.stream(TEXTS[0], stop, steps=steps)) == wanted[: wanted.find(wanted[4:6])]
    )


def test_beams_return_the_best_in_order(single):
    settings = GenerationSettings(beams=3, samples=2, max_tokens=6, length_penalty=0.0)
    for made in single.generate(["short", "x"], settings):
        first, second = made
        assert (
            first.normalized_log_prob >= second.normalized_log_prob
            and first.tokens != second.tokens
        )
        np.testing.assert_allclose(sum(first.log_probs), first.normalized_log_prob, rtol=1e-4)


def test_penalties_reach_the_answers(single):
    # Greedy random models soon go round in circles.
    answers = single.generate(TEXTS, GenerationSettings(no_repeat_ngram=1, max_tokens=16))
    for (answer,) in answers:
        assert len(set(answer.tokens)) == len(answer.tokens)
    free = single.generate(TEXTS, GenerationSettings(max_tokens=16))
    assert any(len(set(a.tokens)) < len(a.tokens) for (a,) in free)


def test_progress_and_nothing_to_do(single):
    seen = []
    single.generate(TEXTS + TEXTS[:1], on_batch=lambda *numbers: seen.append(numbers))
    assert [inputs for inputs, _ in seen] == [4, 1]
    assert single.generate([]) == []


@pytest.mark.parametrize("run", ["encoder_decoder_run", "decoder_only_run"])
def test_a_trained_model_says_what_it_learned(run, request):
    """From a work directory alone: the prompts are those of the records it was trained on."""
    generator = load(request.getfixturevalue(run))
    answers = generator.generate([source for source, _ in LEARNED])
    assert [(made[0].text, made[0].finish) for made in answers] == [
        (target, "eos") for _, target in LEARNED
    ]
    assert min(p for made in answers for p in made[0].log_probs) > -0.2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_tokens": 0}, "max_tokens is 0; expected 1 to 32768"),
        ({"max_tokens": 100_000}, "max_tokens is 100000; expected 1 to 32768"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; expected a whole number"),
        ({"temperature": -1.0}, r"temperature is -1.0; expected 0 \(greedy\)"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; expected above 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": 0.9}, "top_p is 0.9, which has no effect .* set temperature above 0"),
        ({"top_k": 5}, "top_k is 5, which has no effect"),
        ({"samples": 2}, "samples is 2, which has no effect"),
        ({"samples": 0}, "samples is 0; expected 1 or more"),
        ({"seed": 3}, "seed is 3, which has no effect in greedy"),
        ({"beams": 2, "seed": 3}, "seed is 3, which beam search"),
        ({"length_penalty": 0.0}, "length_penalty is 0.0, which has no effect .* set beams"),
        ({"seed": -1}, "seed is -1"),
        ({"beams": 2, "temperature": 1.0}, "temperature is 1.0, which beam search"),
        ({"beams": 2, "stop": ["x"]}, "stop is .*, which beam search"),
        ({"beams": 2, "samples": 3}, "samples is 3, but beam search .* set beams to 3"),
        ({"beams": 2, "length_penalty": float("inf")}, "length_penalty is inf"),
        ({"stop": ""}, "expected strings that are not empty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_settings_that_cannot_be_name_themselves(settings, message):
    with pytest.raises(ConfigError, match=message):
        GenerationSettings(**settings)


def test_a_single_stop_string_is_one():
    assert GenerationSettings(stop="END").stop == ("END",)


@pytest.mark.parametrize("settings", [{"samples": 3}, {"beams": 3}])
def test_batches_that_do_not_fit_into_memory_are_refused(single, settings, monkeypatch):
    temperature = 0.5 * ("samples" in settings)
    settings = GenerationSettings(max_tokens=16, temperature=temperature, **settings)
    needed = cache_bytes(single.config, 16, 1 + 3 * 16)
    monkeypatch.setattr(cache_memory, "memory_bytes", lambda: needed)
    assert len(single.generate(["short"], settings)) == 1
    monkeypatch.setattr(cache_memory, "memory_bytes", lambda: needed - 1)
    with pytest.raises(ConfigError, match="3 answers of up to 16 each, take .* lower max_tokens"):
        single.generate(["short"], settings)


def test_bad_inputs_are_refused_before_anything_is_done(single):
    for texts, message in (
        (["fine", "  "], "input 1 is empty"),
        (["x" * 40], "the input has 41 tokens, but the model accepts 40"),
    ):
        with pytest.raises(DataError, match=message):
            single.generate(texts)
        with pytest.raises(DataError, match=message.replace("input 1", "the input")):
            single.stream(texts[-1])
    for call, message in (
        (lambda: single.generate("one text"), "texts is the text 'one text'; expected a list"),
        (lambda: single.stream("x", steps=0), "steps is 0; expected 1 or more"),
        (
            lambda: single.generate(["x"], GenerationSettings(logit_bias=[(259, 5.0)])),
            "logit_bias has the token 259, but the vocabulary has ids from 0 to 258",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(ValueError, match="longer"):
        single.generate_from_tokens([[5], [6]], numbers=[3])
    with pytest.raises(ConfigError, match="samples is 2 and beams is 1"):
        single.stream("x", GenerationSettings(temperature=1.0, samples=2))
    shorter = Generator(
        *printing_model("encoder_decoder"), dataclasses.replace(PROMPTS, max_input_tokens=9)
    )
    cut, same_start = (
        made
        for (made,) in shorter.generate(
            ["x" * 20, "x" * 8], GenerationSettings(max_tokens=12), truncate=True
        )
    )
    assert cut.truncated and not same_start.truncated and cut.tokens == same_start.tokens
    for ids, message in (
        ([], "input 1 has no tokens"),
        # In the model's table, but without a text, which an answer's may depend on.
        ([3, 259], "input 1 has the token 259, but the vocabulary has ids from 0 to 258"),
        ([-1], "input 1 has the token -1"),
    ):
        with pytest.raises(DataError, match=message):
            single.generate_from_tokens([[5], ids])
    config, params = model("decoder_only")
    with pytest.raises(
        ConfigError, match="the vocabulary has 300 ids, but the model's table only 264"
    ):
        Generator(config, params, PromptFormat(ByteVocabulary(extra_ids=41)))
