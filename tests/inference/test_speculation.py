"""Speculative decoding gives what plain decoding gives, whatever is drafted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.inference.decoding import DecodingPlan, advance_compiled, blank, start_compiled
from encdec.inference.drafts import NOTHING, LookupTexts, hindsight, look_up
from encdec.inference.exported import accept_greedy, append_greedy
from encdec.inference.ready import ready_for_decoding
from encdec.inference.sampling import NO_EOS, Choosing, greedy_rows
from encdec.inference.speculation import (
    Drafting,
    accept,
    begin_drafting_compiled,
    catch_up,
    speculate_compiled,
)
from tests.export.examples import pair
from tests.inference.examples import CONFIGS, laid_out, model, padded, plan, rows

ROOM, SIZE = 24, 4
RNG = np.random.default_rng(0)
INPUTS = [RNG.integers(3, 250, n).tolist() for n in (9, 1, 14, 5, 2, 11, 3, 7)]


def in_layout(name, layout):
    config, params = model(name) if name in CONFIGS else pair(name)
    if layout == "scanned":
        return config, params
    config, params = ready_for_decoding(config, params)
    if layout == "plain":
        return config, params
    return laid_out(config, params, 3 if layout == "shards" else 0)


def finished(config, params, plan, settings, inputs=INPUTS):
    """Plain decoding's tokens, log-probabilities and counts."""
    decoding = start_compiled(config, plan, params, *padded(inputs), settings)
    return told(advance_compiled(config, plan, params, decoding, plan.capacity))


def told(decoding):
    found = decoding.tokens_RxN, decoding.log_probs_RxN, decoding.counts_R
    assert bool(decoding.finished_R.all())
    return tuple(map(np.array, found))


def speculated(config, params, plan, settings, drafting, draft=None, first=0):
    """The same by verifying steps, after ``first`` plain ones, with the answers' tally."""
    decoding = start_compiled(config, plan, params, *padded(INPUTS), settings)
    decoding = advance_compiled(config, plan, params, decoding, first)
    made, steps = 0, 0
    for count in (1, 3, plan.capacity):
        draft_config, draft_params = draft or (None, None)
        decoding, drafting, tally = speculate_compiled(
            config, plan, SIZE, draft_config, params, draft_params, decoding, drafting, count
        )
        made, steps = made + int(tally.made_K.sum()), steps + int(tally.steps)
    return told(decoding), made, steps


def same(found, wanted):
    np.testing.assert_array_equal(found[2], wanted[2])
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], atol=2e-5, rtol=1e-5)  # logits of about 10


def with_mistakes(tokens_RxN, every=5):
    """Texts that hold the answers, with a wrong token now and then: drafts that are right in
    part."""
    texts = np.array(tokens_RxN)
    texts[:, every - 1 :: every] = 3
    return Drafting(LookupTexts(jnp.array(texts), jnp.full(len(texts), texts.shape[1])))


@pytest.mark.parametrize(
    "name, layout",
    [
        ("encoder_decoder", "scanned"),
        ("encoder_decoder", "plain"),
        ("encoder_decoder", "shards"),
        ("decoder_only", "shards"),
        ("decoder_only", "panels"),
        ("windowed", "shards"),
        ("merged", "shards"),
        ("windowed pair", "plain"),
    ],
)
def test_greedy_answers_and_log_probs_are_those_of_plain_decoding(name, layout):
    config, params = in_layout(name, layout)
    limits = [ROOM, ROOM, 1, 10, ROOM, 0, 7, ROOM]  # most end in the middle of a draft
    made = plan(config, ROOM)
    wanted = finished(config, params, made, rows(8, limits))
    found, tokens, steps = speculated(
        config, params, made, rows(8, limits), with_mistakes(wanted[0])
    )
    same(found, wanted)
    assert tokens == wanted[2].sum() - 7  # the first ones come from the prefill
    assert ROOM / SIZE < steps < ROOM - 2  # drafts were right, and some were not


def test_drawn_answers_with_every_setting_are_those_of_plain_decoding():
    """Penalties, blocked n-grams, biases, EOS and alternatives, each in some of the rows."""
    config, params = in_layout("encoder_decoder", "plain")
    made = plan(
        config,
        ROOM,
        sampled=True,
        truncated=True,
        penalised=True,
        ngrams=True,
        biases=1,
        alternatives=3,
    )
    settings = rows(
        8,
        ROOM,
        temperature=[0, 1, 1, 0, 0.7, 0, 1, 0],
        top_k=[0, 0, 5, 0, 0, 0, 0, 0],
        top_p=[1, 1, 1, 1, 0.8, 1, 1, 1],
        repetition_penalty=[1, 1, 1, 1.5, 1, 1, 1.2, 1],
        presence_penalty=[0, 0, 0, 0, 0, 0.5, 0, 0],
        frequency_penalty=[0, 0, 0, 0, 0, 0.5, 0.1, 0],
        no_repeat_ngram=[0, 0, 2, 0, 0, 0, 0, 2],
        alternatives=[0, 1, 0, 1, 0, 0, 0, 0],
    ).replace(
        bias_ids_RxB=np.full((8, 1), 7, np.int32), biases_RxB=np.full((8, 1), 0.5, np.float32)
    )
    wanted = finished(config, params, made, settings)
    eos = np.where(np.arange(8) % 3, wanted[0][:, 13], NO_EOS).astype(np.int32)
    settings = settings.replace(eos_R=eos)  # most rows end in the middle of a draft
    wanted = finished(config, params, made, settings)
    found, tokens, steps = speculated(config, params, made, settings, with_mistakes(wanted[0]))
    same(found, wanted)
    assert tokens == wanted[2].sum() - 8 and steps < 0.8 * ROOM


def test_a_draft_model_of_either_kind_changes_nothing():
    """The model itself is always right, also where tokens are drawn; another one hardly ever."""
    config, params = in_layout("encoder_decoder", "plain")
    settings = rows(8, 17, temperature=[0, 1] * 4)
    made = plan(config, 17, sampled=True)
    wanted = finished(config, params, made, settings)
    for name in ("encoder_decoder", "decoder_only"):
        draft = in_layout(name, "plain")
        drafting = begin_drafting_compiled(*draft, *padded(INPUTS), start_id=2, capacity=17)
        # It catches up with nine plain steps, more than it is fed at once.
        found, _, steps = speculated(config, params, made, settings, drafting, draft, first=9)
        same(found, wanted)
        assert steps == 2 if name == "encoder_decoder" else steps > 3
    # Nothing is fed for rows that are finished.
    decoding = start_compiled(config, made, params, *padded(INPUTS), settings)
    decoding = advance_compiled(config, made, params, decoding, 9)
    finished_R = jnp.arange(8) % 2 == 0
    drafting = begin_drafting_compiled(*draft, *padded(INPUTS), start_id=2, capacity=17)
    drafting = catch_up(*draft, drafting, decoding.replace(finished_R=finished_R))
    np.testing.assert_array_equal(drafting.fed_R, np.where(finished_R, 0, decoding.counts_R - 1))


def reference(source, answer, eos, length):
    """``look_up`` of one row, place by place."""
    best, worth = None, None
    for where, text in (("source", [*source, eos]), ("answer", answer)):
        for place in range(len(text)):
            n = 0
            while n < 4:
                ends = place - 1 - n < 0, len(answer) - 1 - n < 0
                if any(ends):
                    n += all(ends)  # both begin here
                    break
                if text[place - 1 - n] != answer[-1 - n]:
                    break
                n += 1
            if where == "source":
                rank = (n, 1, -abs(place - len(answer)))
            else:
                rank = (n, 0, place)
            if n and (worth is None or rank > worth):
                best, worth = (where, text, place), rank
    if best is None:
        return [NOTHING] * length
    where, text, place = best
    copied = text[place:] if where == "source" else (text[place:] * length)
    return (copied + [NOTHING] * length)[:length]


def test_drafts_are_what_followed_the_longest_match():
    """On the device and on the host, for sources that are empty or shorter than what is looked
    up."""
    rng = np.random.default_rng(1)
    texts, answers = rng.integers(3, 7, (300, 12)), rng.integers(3, 7, (300, 10))
    lengths, counts = rng.integers(0, 13, 300), rng.integers(1, 11, 300)
    answers[::5, :4] = texts[::5, :4]  # answers that begin like their sources
    arrays = [x.astype(np.int32) for x in (texts, lengths, answers, counts, np.full(300, 1))]
    host = look_up(LookupTexts(*arrays[:2]), *arrays[2:], 5, np)
    device = jax.jit(look_up, static_argnums=4)(LookupTexts(*arrays[:2]), *arrays[2:], 5)
    np.testing.assert_array_equal(host, device)
    for row in range(300):
        source, answer = texts[row, : lengths[row]], answers[row, : counts[row]]
        wanted = reference(source.tolist(), answer.tolist(), 1, 5)
        assert host[row].tolist() == wanted, (source, answer)


def test_hindsight_counts_what_drafts_would_have_given():
    source, answer = [5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 3, 9, 10, 11, 12, 1]
    sources = LookupTexts(np.array([source + [0, 0]], np.int32), np.array([8], np.int32))
    answers = np.array([answer + [0] * 3], np.int32)
    found = hindsight(sources, answers, np.array([9]), np.array([1]), 3)
    rights = []
    for place in range(1, 9):
        draft = reference(source, answer[:place], 1, 3)
        rights.append([a == b for a, b in zip(draft, answer[place:])])
    for j in range(1, 4):
        known = [r for r in rights if len(r) >= j]
        assert found[j] == min(found[j - 1], np.mean([all(r[:j]) for r in known]))
    assert found[0] == 1 and 0 < found[3] < found[1] < 1
    assert hindsight(sources, answers, np.array([1]), np.array([1]), 3) is None


def test_drawn_tokens_follow_the_models_distribution_whatever_is_drafted():
    """Chi-square of 20,000 rows, for the drafted place and the one after it."""
    count, size = 20_000, 6
    logits = np.array([[0.3, 1.2, -0.5, 0.0, 0.9, -2.0], [1.0, 0.0, 0.5, -1.0, 0.2, 0.1]])
    settings = rows(count, 2, temperature=1.0)
    made = DecodingPlan(Choosing(size, sampled=True), 2, 0)
    tiled = np.tile(np.float32(logits), (count, 1, 1))
    for draft in (1, 5):  # the likeliest and the least likely
        drafts = np.full((count, 1), draft, np.int32)
        decoding = jax.jit(accept, static_argnums=0)(
            made, blank(made, None, settings), drafts, tiled
        )
        tokens, counts = np.asarray(decoding.tokens_RxN), np.asarray(decoding.counts_R)
        np.testing.assert_array_equal(counts == 2, tokens[:, 0] == draft)
        for place, seen in enumerate((tokens[:, 0], tokens[counts == 2, 1])):
            wanted = np.exp(logits[place]) / np.exp(logits[place]).sum() * len(seen)
            if wanted.min() < 5:
                continue  # too few for the test
            statistic = ((np.bincount(seen, minlength=size) - wanted) ** 2 / wanted).sum()
            assert statistic < 20.5  # 5 degrees of freedom, p = 0.001


def test_exports_accept_a_draft_as_one_token_at_a_time_would_be_chosen():
    """On NumPy arrays: EOS and the limit inside a draft, finished rows, every count accepted."""
    random, count, size, eos = np.random.default_rng(3), 200, 5, 0
    plan = DecodingPlan(Choosing(4), 9, 2)
    settings = greedy_rows(count, 0).replace(
        limit_R=random.integers(0, 12, count), eos_R=np.full(count, eos)
    )
    decoding = jax.tree.map(np.array, blank(plan, None, settings.replace(keys_R=None)))
    for _ in range(3):
        chosen_RxK = random.integers(0, 4, (count, size), np.int32)
        log_probs_RxK = random.normal(size=(count, size)).astype(np.float32)
        drafts_RxD = np.where(random.random((count, size - 1)) < 0.8, chosen_RxK[:, :-1], NOTHING)
        wanted, going_R = decoding, ~decoding.finished_R
        for place in range(size):
            before_R = wanted.finished_R
            wanted = append_greedy(
                wanted.replace(finished_R=~going_R), chosen_RxK[:, place], log_probs_RxK[:, place]
            )
            wanted = wanted.replace(finished_R=np.where(going_R, wanted.finished_R, before_R))
            if place < size - 1:
                going_R = (
                    going_R & ~wanted.finished_R & (chosen_RxK[:, place] == drafts_RxD[:, place])
                )
        choices = chosen_RxK, lambda most, all=log_probs_RxK: all[:, :most]
        found = accept_greedy(decoding, drafts_RxD, choices)
        for name in ("last_R", "tokens_RxN", "log_probs_RxN", "counts_R", "finished_R"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), name)
        decoding = found
    assert 0 < decoding.finished_R.sum() < count and set(decoding.counts_R) >= {0, 1, 5, 9}
