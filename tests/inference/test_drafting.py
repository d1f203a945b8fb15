"""Drafts through the generator: the same answers, and only where they pay."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import ConfigError
from encdec.inference.draft_model import load_draft
from encdec.inference.drafting import DraftModel, Paces, SpeculativeDecoding
from encdec.inference.drafts import LookupTexts, look_up
from encdec.inference.exported import ExportedRows
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.generator import Generator
from encdec.inference.load_generator import load
from encdec.inference.pace import LONGEST_DRAFT, PLAIN, SIZES, Pace
from encdec.inference.ready import ready_for_decoding
from encdec.model import preset
from tests.inference.test_generator import PROMPTS, TEXTS, printing_model, same

SETTINGS = (GenerationSettings(), GenerationSettings(temperature=0.8, samples=2, seed=3))


def make(name="encoder_decoder", draft="lookup", **more):
    return Generator(
        *printing_model(name), PROMPTS, max_tokens=24, batch_rows=4, draft=draft, **more
    )


@pytest.fixture(scope="module")
def plain():
    return make(draft="off")


@pytest.fixture(scope="module")
def lookup():
    return make()


@pytest.mark.parametrize("settings", SETTINGS)
def test_looked_up_drafts_change_no_answer(plain, lookup, settings):
    same(lookup.generate(TEXTS, settings), plain.generate(TEXTS, settings))
    assert lookup.paces.of(4).steps  # some were verified


def test_stop_strings_and_streams_end_in_the_middle_of_a_draft(plain, lookup):
    """An answer is long enough to have such a string, and it is where plain decoding has it."""
    whole = plain.generate(TEXTS[:1])[0][0]
    stop = GenerationSettings(stop=[whole.text[6:8]])
    same(lookup.generate(TEXTS, stop), plain.generate(TEXTS, stop))
    assert lookup.generate(TEXTS[:1], stop)[0][0].finish == "stop"
    for settings in (GenerationSettings(), stop):
        text = plain.generate(TEXTS[:1], settings)[0][0].text
        assert "".join(lookup.stream(TEXTS[0], settings)) == text


def test_a_draft_model_and_a_mesh_change_no_answer(plain):
    config, params = ready_for_decoding(*printing_model("decoder_only"))
    drafted = make(draft=DraftModel(config, params, 2), devices=jax.devices()[:4], tensor=2)
    same(drafted.generate(TEXTS), plain.generate(TEXTS))


class Scripted:
    """Steps that take the seconds given, by size, of a model that says what it is told to."""

    def __init__(self, answer, source, seconds, monkeypatch):
        self.answer, self.seconds, self.now = np.array(answer), seconds, 0.0
        self.source, self.sizes = source, []
        monkeypatch.setattr("encdec.inference.drafting.time.perf_counter", lambda: self.now)

    def answers(self, pace):
        texts = LookupTexts(
            np.array([self.source], np.int32), np.array([len(self.source)], np.int32)
        )
        advance = SpeculativeDecoding(pace, self.plain, self.verify, texts).advance
        state = _State(self.answer[None] * 0, np.array([0]))
        state = self._with(state, 1)
        while state.counts_R[0] < len(self.answer):
            state = advance(state, 16)
        return self.sizes

    def _with(self, state, count):
        count = min(int(state.counts_R[0]) + count, len(self.answer))
        tokens = np.where(np.arange(len(self.answer)) < count, self.answer, 0)
        return _State(tokens[None], np.array([count]))

    def plain(self, state, steps):
        self.sizes.append(PLAIN)
        left = len(self.answer) - int(state.counts_R[0])
        self.now += min(steps, left) * self.seconds[PLAIN]
        return self._with(state, steps)

    def verify(self, state, size, steps):
        self.sizes.append(size)
        made, done = np.zeros(size, int), 0
        texts = LookupTexts(
            np.array([self.source], np.int32), np.array([len(self.source)], np.int32)
        )
        while done < steps and state.counts_R[0] < len(self.answer):
            eos = np.array([1])
            drafts = look_up(texts, state.tokens_RxN, state.counts_R, eos, size - 1, np)[0]
            count = int(state.counts_R[0])
            real = self.answer[count : count + size - 1]
            right = np.logical_and.accumulate(drafts[: len(real)] == real).sum()
            made += np.arange(size) < right + 1
            state, done = self._with(state, int(right) + 1), done + 1
            self.now += self.seconds[size]
        return state, done, made


@dataclasses.dataclass
class _State:
    tokens_RxN: np.ndarray
    counts_R: np.ndarray
    settings: object = dataclasses.field(
        default_factory=lambda: type("Settings", (), {"eos_R": np.array([1])})
    )


CHEAP = {PLAIN: 1.0} | {size: 1.2 for size in SIZES}
EXPENSIVE = {PLAIN: 1.0} | {size: 1.0 * size for size in SIZES}
TEXT = np.random.default_rng(0).integers(3, 9000, 300).tolist()
OTHER = np.random.default_rng(1).integers(3, 9000, 300).tolist()


@pytest.mark.parametrize(
    "answer, seconds, eager, mostly",
    [
        (TEXT, CHEAP, False, SIZES[-1]),  # hindsight sees that the answer is the source
        (TEXT, CHEAP, True, SIZES[-1]),
        (OTHER, CHEAP, False, PLAIN),
        (OTHER, CHEAP, True, PLAIN),
    ],
)
def test_drafts_are_as_long_as_they_are_right(answer, seconds, eager, mostly, monkeypatch):
    sizes = Scripted(answer, TEXT, seconds, monkeypatch).answers(Pace(1, eager))
    assert sizes[0] == (SIZES[0] if eager else PLAIN)
    assert max(set(sizes[4:]), key=sizes[4:].count) == mostly
    if mostly == PLAIN:
        assert len(sizes) - sizes.count(PLAIN) <= eager


@pytest.mark.parametrize("compiled", [False, True])
def test_many_rows_are_drafted_for_as_long_as_drafts_are_right(compiled, monkeypatch):
    """Whatever is guessed of their cost, which would rule out every size."""
    seconds = {PLAIN: 1.0} | {size: 1 + 0.1 * (size - 1) for size in SIZES}
    mostly_right = np.where(np.arange(300) % 12 == 5, OTHER, TEXT).tolist()
    for answer, right in ((mostly_right, True), (OTHER, False), (TEXT[:40] + OTHER[40:], False)):
        pace = Pace(16, True)
        if compiled:
            pace.note_compiled()
        script = Scripted(answer, TEXT, seconds, monkeypatch)
        sizes = script.answers(pace)
        if right:
            assert sizes[6:].count(PLAIN) <= 3 and script.now < 0.6 * len(answer)
            assert sizes.count(PLAIN) <= 4  # to time them: less and less often
        else:
            assert set(sizes[-9:]) == {PLAIN} and script.now < 1.15 * len(answer)


def test_drafts_that_were_dear_once_are_tried_again(monkeypatch):
    """As after a compilation for a new shape, which nobody told the pace of."""
    pace = Pace(16, True)
    pace.note_compiled()
    for size in (PLAIN, *SIZES):
        pace.note_seconds(size, 1.0 if size == PLAIN else 50.0)
    pace.note_shares(np.ones(LONGEST_DRAFT + 1))
    assert pace.size() == PLAIN
    sizes = Scripted(TEXT, TEXT, CHEAP, monkeypatch).answers(pace)
    assert sizes[0] == PLAIN and set(sizes[-5:]) <= set(SIZES)
    assert set(Scripted(OTHER, TEXT, EXPENSIVE, monkeypatch).answers(pace)[-9:]) == {PLAIN}


def test_a_plain_step_that_was_slow_once_is_timed_again(monkeypatch):
    """As while other work keeps the machine busy: drafts that do not pay are soon left."""
    pace = Pace(16, True)
    pace.note_compiled()
    pace.note_seconds(PLAIN, 10.0)
    seconds = {PLAIN: 1.0} | {size: 1.2 * size for size in SIZES}
    taken = []
    for _ in range(8):
        script = Scripted(TEXT, TEXT, seconds, monkeypatch)
        sizes = script.answers(pace)
        taken.append(script.now)
        if len(taken) == 1:
            assert PLAIN not in sizes[:2]
    assert sum(taken[4:]) < 1.03 * 4 * len(TEXT)


def test_the_end_of_an_answer_tells_no_time(monkeypatch):
    """A call for 16 steps that makes 3 takes as long as the call does; one for 3 counts."""
    for steps, counts in ((16, False), (3, True)):
        pace = Pace(1, False)
        pace.note_compiled()
        script = Scripted(TEXT[:4], TEXT, CHEAP, monkeypatch)
        texts = LookupTexts(np.array([TEXT], np.int32), np.array([len(TEXT)], np.int32))
        answering = SpeculativeDecoding(pace, script.plain, script.verify, texts)
        answering.advance(_State(np.zeros((1, 4), int), np.array([1])), steps)
        assert answering.steps == 3 and pace.knows(PLAIN) == counts


def test_steps_that_cost_what_they_give_are_not_taken(monkeypatch):
    """Whatever was guessed of their cost: it is measured."""
    pace = Pace(1, True)
    for _ in range(2):  # of the first times, each program's is its compiling
        sizes = Scripted(TEXT, TEXT, EXPENSIVE, monkeypatch).answers(pace)
    assert set(sizes[-3:]) == {PLAIN}


def test_shares_of_longer_drafts_follow_from_those_of_shorter_ones():
    pace = Pace(1, True)
    pace.note_made(np.array([8, 4, 2, 1]))
    np.testing.assert_allclose(pace.shares, 0.5 ** np.arange(LONGEST_DRAFT + 1))
    assert pace.tokens(2) == 1.5


def test_a_size_that_was_never_timed_costs_as_the_others_say():
    """With many rows the guess would rule out every size for good."""
    pace = Pace(16, True)
    pace.note_shares(np.ones(LONGEST_DRAFT + 1))
    for size, seconds in ((PLAIN, 1.0), (SIZES[0], 1.3)):
        for _ in range(2):  # the first time is compiling's
            pace.note_seconds(size, seconds)
    pace.note_seconds(PLAIN, 1.0)
    assert pace._cost(SIZES[1]) == pytest.approx(1 + 0.3 * (SIZES[1] - 1))
    assert pace.size() == SIZES[-1]


def test_a_machine_that_becomes_slower_or_faster_says_nothing_of_drafts():
    """Steps cost as much as they give, whatever the machine's speed at the moment."""
    pace, rng, drafted = Pace(16, True), np.random.default_rng(0), 0
    pace.note_compiled()
    for call in range(2000):
        size = pace.size()
        speed = 1.0 + 9.0 * (call // 150 % 2)  # other work comes and goes
        cost = 1 + 0.6 * (size - 1)
        pace.note_seconds(size, speed * cost * rng.uniform(0.9, 1.1))
        if size == PLAIN:
            if pace.looks():
                pace.note_hindsight(0.5 ** np.arange(LONGEST_DRAFT + 1))
        else:
            pace.note_made(1000 * 0.5 ** np.arange(size))
            drafted += 1
    assert drafted < 100


def test_auto_drafts_in_exports_of_large_models_whose_steps_are_exact():
    def drafts(name, exact, draft="auto", rows=1):
        model = SimpleNamespace(config=preset(name), rows_at_once=0, verifies=True, exact=exact)
        return ExportedRows(model, draft).paces.of(rows) is not None

    assert drafts("330m", exact=True) and not drafts("330m", exact=True, rows=16)
    assert not drafts("330m", exact=False) and not drafts("micro-8m", exact=True)
    assert drafts("330m", exact=False, draft="lookup")


def test_auto_drafts_for_few_rows_where_it_pays():
    assert Paces("auto", True).of(1) and Paces("auto", True).of(1).size() == PLAIN
    assert Paces("auto", True).of(16) is None and Paces("auto", False).of(1) is None
    assert Paces("off", True).of(1) is None and Paces("lookup", False).of(64).size() > PLAIN


def test_a_draft_models_directory(encoder_decoder_run, decoder_only_run):
    """A trained model drafts for another one; one of another vocabulary is refused."""
    wanted = load(encoder_decoder_run, draft="off")
    drafted = load(encoder_decoder_run, draft=str(decoder_only_run))
    texts = ["one fish", "a hare"]
    same(drafted.generate(texts), wanted.generate(texts))
    assert drafted.paces.of(2).steps
    with pytest.raises(ConfigError, match="has another vocabulary than the model .259 ids against"):
        load_draft(str(decoder_only_run), ByteVocabulary(extra_ids=7))
