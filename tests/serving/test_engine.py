"""The running batch: a request's answer is its answer alone, whatever runs next to it."""

from __future__ import annotations

import itertools
import queue

import numpy as np
import pytest

from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import ConfigError
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.pace import PLAIN, SIZES
from encdec.inference.text_io import PromptFormat
from encdec.serving.engine import Busy, Closing
from encdec.serving.prompts import PromptReader
from encdec.serving.slots import slot_bytes
from encdec.serving.tickets import Ticket, Update
from tests.inference.examples import model
from tests.inference.test_generator import PROMPTS
from tests.serving.examples import SlowEngine, generator, make_engine, noisy_draft, until

CASES = [
    ("short", {}),
    ("a text of twenty bytes", {"temperature": 1.3, "seed": 5}),
    ("repeat repeat repeat", {"no_repeat_ngram": 1, "max_tokens": 16}),
    ("another longer one", {"temperature": 1.0, "top_k": 9, "samples": 3, "seed": 2**32 - 1}),
    ("short", {"temperature": 1.5, "top_p": 0.6, "max_tokens": 16, "seed": 1}),
    ("x", {"max_tokens": 3}),
    ("repeat repeat repeat", {"repetition_penalty": 4.0, "max_tokens": 16}),
    ("mixed", {"temperature": 0.8, "no_repeat_ngram": 2, "repetition_penalty": 1.5, "seed": 8}),
    ("y" * 39, {"max_tokens": 1}),
    ("short", {"presence_penalty": 1.5, "frequency_penalty": -0.5, "max_tokens": 16}),
    ("x", {"temperature": 1.1, "logit_bias": [(70, 4.0), (71, -100.0)], "seed": 2}),
    ("mixed", {"max_tokens": 6, "alternatives": True}),
    # The answer has begun, and the prompt's log-probabilities are asked for.
    ([70, 71, 1, 72, 73, 74], {"max_tokens": 5, "alternatives": True, "prompt_log_probs": True}),
    ("a text of twenty bytes", {"max_tokens": 0, "prompt_log_probs": True}),
]


@pytest.fixture(scope="module", params=["encoder_decoder", "decoder_only"])
def engine(request):
    engine = make_engine(request.param)
    engine.start()
    yield engine
    engine.stop()


OF_TICKETS = ("max_tokens", "alternatives", "prompt_log_probs")


def submit(engine, text, settings, *, stream=False, timeout=60.0):
    """The ticket, and where its news arrive."""
    news = queue.Queue()
    reader = PromptReader(PROMPTS, engine.config.is_encoder_decoder)
    ticket = Ticket(
        [reader.read(text, marked=False, name="the prompt")],
        GenerationSettings(**{k: v for k, v in settings.items() if k not in OF_TICKETS}),
        news.put,
        stream=stream,
        timeout_seconds=timeout,
        **{k: v for k, v in settings.items() if k in OF_TICKETS},
    )
    engine.submit(ticket)
    return ticket, news


def answers(ticket, news):
    """Tokens, log-probabilities, text and end of each answer of a finished ticket, and what came
    with them."""
    made = [([], [], "", None, [], None)] * ticket.samples
    while any(answer[3] is None for answer in made):
        update = news.get(timeout=60)
        assert isinstance(update, Update), update
        tokens, log_probs, text, _, likeliest, prompt = made[update.index]
        made[update.index] = (
            tokens + update.tokens,
            log_probs + update.log_probs,
            text + update.text,
            update.finish,
            likeliest + update.likeliest,
            prompt or update.prompt,
        )
    assert news.empty()
    return made


@pytest.mark.slow
def test_answers_are_those_alone_and_those_of_the_generator(engine):
    name = engine.config.architecture
    alone = [answers(*submit(engine, *case)) for case in CASES]
    for (text, settings), made in list(zip(CASES, alone))[:4]:  # each compiles programs there
        settings = GenerationSettings(**{"max_tokens": 16} | settings)
        wanted = generator(name).generate([text], settings)[0]
        for (tokens, log_probs, said, finish, *_), one in zip(made, wanted, strict=True):
            assert (tokens, said, finish) == (one.tokens, one.text, one.finish)
            np.testing.assert_allclose(log_probs, one.log_probs, atol=1e-4)
    # Thrice the cases at once, in another order, some of them streamed, some gone midway.
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(CASES)), 3))
    running = []
    for place, case in enumerate(order):
        stream = place % 2 == 0
        ticket, news = submit(engine, *CASES[case], stream=stream)
        if place % 5 == 4:
            engine.cancel(ticket)
        else:
            running.append((case, ticket, news))
    for case, ticket, news in running:
        together = answers(ticket, news)
        # Bit for bit, log-probabilities too.
        assert together == alone[case]
    until(lambda: engine.idle)
    assert engine._rows == [None] * 4


def test_stop_strings_end_an_answer_and_free_its_slot(engine):
    free = generator(engine.config.architecture).generate(
        ["short"], GenerationSettings(max_tokens=12)
    )[0][0]
    stop = free.text[4:6]
    for stream in (False, True):
        ticket, news = submit(engine, "short", {"stop": [stop]}, stream=stream)
        tokens, _, text, finish, *_ = answers(ticket, news)[0]
        assert finish == "stop" and text == free.text[: free.text.find(stop)]
        assert tokens == free.tokens[: len(tokens)] and len(tokens) < len(free.tokens)


@pytest.mark.parametrize("engine", ["encoder_decoder"], indirect=True)
@pytest.mark.parametrize("source", ["lookup", "a model"])
def test_drafts_change_no_answer_among_many(engine, source, monkeypatch):
    """Every kind of request, thrice at once, each with drafts of its own; but for rounding. Some
    end, or are gone, before a draft model has read them, or when it is far behind."""
    alone = [answers(*submit(engine, *case)) for case in CASES]
    drafting = make_engine(
        "encoder_decoder", draft=noisy_draft() if source == "a model" else source
    )
    sizes = itertools.cycle([SIZES[0], SIZES[0], PLAIN])  # whatever they cost
    monkeypatch.setattr(drafting._answering.pace, "size", lambda _: next(sizes))
    drafting.start()
    try:
        order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(CASES)), 3))
        running = [(case, *submit(drafting, *CASES[case], stream=case % 2 == 0)) for case in order]
        for _, ticket, _ in running[5::7]:
            drafting.cancel(ticket)
        for case, ticket, news in [one for one in running if not one[1].ended]:
            together = answers(ticket, news)
            for one, wanted in zip(together, alone[case], strict=True):
                assert (one[0], one[2], one[3]) == (wanted[0], wanted[2], wanted[3])
                np.testing.assert_allclose(one[1], wanted[1], atol=1e-5, rtol=1e-5)
                assert [[i for i, _ in place] for place in one[4]] == [
                    [i for i, _ in place] for place in wanted[4]
                ]
    finally:
        drafting.stop()
    pace = drafting._answering.pace
    assert pace.accepted  # of the begun answers, if of no other
    if source == "a model":
        assert 0.2 < pace.accepted / pace.drafted < 0.9  # right and wrong ones
    told = drafting.metrics.text().decode()
    assert f"encdec_drafted_tokens_total {float(pace.drafted)}" in told
    assert f"encdec_accepted_tokens_total {float(pace.accepted)}" in told


def test_limits_of_the_queue_and_the_end():
    engine = make_engine(kind=SlowEngine, slots=2, max_queue=3)
    engine.start()
    tickets = [submit(engine, "short", {"max_tokens": 16, "no_repeat_ngram": 1})]
    until(lambda: engine.active == 1)
    tickets.append(submit(engine, "x", {"temperature": 1.0, "samples": 3}))
    with pytest.raises(Busy) as busy:  # all of its answers or none
        submit(engine, "x", {"temperature": 1.0, "samples": 3})
    assert busy.value.retry_seconds >= 1
    engine.close()
    with pytest.raises(Closing):
        submit(engine, "x", {})
    for ticket, news in tickets:
        assert len(answers(ticket, news)) == ticket.samples
    until(lambda: not engine._thread.is_alive())


def test_overdue_and_unfinished_requests_are_told():
    engine = make_engine(kind=SlowEngine, slots=1)
    engine.start()
    endless = {"max_tokens": 16, "no_repeat_ngram": 1}
    _, first = submit(engine, "short", endless, stream=True)
    assert isinstance(first.get(timeout=20), Update)
    _, waiting = submit(engine, "short", endless, timeout=0.05)
    assert waiting.get(timeout=20) == "timeout"
    while isinstance(news := first.get(timeout=20), Update) and not news.finish:
        pass
    _, running = submit(engine, "short", endless)
    until(lambda: engine.active)
    engine.stop()
    assert running.get(timeout=20) == "shutdown" and running.empty()


def test_a_failing_model_is_told_and_takes_no_more(monkeypatch):
    engine = make_engine(slots=1)
    engine.start()
    monkeypatch.setattr(engine, "_advance", lambda: 1 / 0)
    _, news = submit(engine, "short", {})
    assert news.get(timeout=20) == "error"
    until(lambda: engine.broken)
    assert "ZeroDivisionError" in engine.broken
    with pytest.raises(Closing):
        submit(engine, "short", {})


def test_programs_are_few_and_slots_have_a_price():
    engine = make_engine("decoder_only", slots=1)
    assert engine.widths() == [16, 24, 32, 40]
    whole = sum(x.nbytes for pair in engine._decoding.memory.cache for x in pair)
    assert slot_bytes(engine.config, engine.plan) == whole
    config, params = model("decoder_only")
    with pytest.raises(ConfigError, match="the vocabulary has 300 ids"):
        type(engine)(config, params, PromptFormat(ByteVocabulary(41)), max_tokens=4)
