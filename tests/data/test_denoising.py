"""Span corruption and UL2: documents rebuilt exactly, T5's form, rates, named errors."""

from __future__ import annotations

import collections
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.cli import main as encdec
from encdec.data.batches import Batches
from encdec.data.denoising import (
    SETTINGS,
    T5GEMMA2_DENOISERS,
    UL2_DENOISERS,
    Denoiser,
    MixtureOfDenoisers,
    SpanCorruption,
    mode_id,
)
from encdec.data.objectives import CausalLM, Form
from encdec.data.prepare import prepare
from encdec.data.records import decode_row, open_records, read_card
from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import ConfigError
from tests.data.conftest import write_jsonl

VOCABULARY = ByteVocabulary(extra_ids=200)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
OBJECTIVES = {
    "t5": (SpanCorruption(), False),
    "t5, long spans": (SpanCorruption(density=0.5, mean_span=9), False),
    "ul2": (MixtureOfDenoisers(UL2_DENOISERS), True),
    "t5gemma2": (MixtureOfDenoisers(T5GEMMA2_DENOISERS), True),
    "no modes": (MixtureOfDenoisers(UL2_DENOISERS, mode_tokens=False), False),
}


def rebuild(source, target, vocabulary, mode_tokens: bool = False) -> list[int]:
    """The window that gave a source and a target, without EOS and mode token."""
    source, target = list(map(int, source)), list(map(int, target))
    kept = source[int(mode_tokens) : -1]
    noise = target[:-1]
    if not noise or noise[0] < vocabulary.base_size:
        return kept + noise
    spans: dict[int, list[int]] = {}
    for token in noise:
        if token >= vocabulary.base_size:
            span = spans.setdefault(token, [])
        else:
            span.append(token)
    window: list[int] = []
    for token in kept:
        window += spans[token] if token >= vocabulary.base_size else [token]
    return window


def _encode(objective, documents, lengths=(64, 32), first=0, seed=0, vocabulary=VOCABULARY):
    form = Form(vocabulary, *lengths, seed)
    objective.check(form)
    return objective.encode(documents, first, form)


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=40, deadline=None)
@given(
    st.lists(texts, max_size=4),
    st.integers(0, 2**40),
    st.tuples(st.integers(6, 80), st.integers(5, 50)),
)
def test_inputs_and_targets_rebuild_every_document_exactly(name, documents, seed, lengths):
    objective, modes = OBJECTIVES[name]
    encoded = _encode(objective, [(text,) for text in documents], lengths, seed=seed)
    rebuilt = []
    for source, target in zip(encoded.sources, encoded.targets):
        assert len(source) <= lengths[0] and len(target) <= lengths[1]
        assert source[-1] == target[-1] == VOCABULARY.eos_id
        rebuilt += rebuild(source, target, VOCABULARY, modes)
    ids = [VOCABULARY.encode(text) for text in documents]
    assert rebuilt == [token for part in ids if len(part) > 1 for token in part]
    assert encoded.dropped["tail_of_one_token"] == sum(len(part) == 1 for part in ids)
    assert encoded.dropped["empty_text"] == sum(not part for part in ids)
    plain = [t for target in encoded.targets for t in target if 2 < t < VOCABULARY.base_size]
    assert encoded.target_bytes == len(plain)


def test_sources_and_targets_have_t5s_form():
    encoded = _encode(SpanCorruption(), [("abcdefghij" * 40,)], (128, 64))
    for source, target in zip(encoded.sources, encoded.targets):
        sentinels = [token for token in source if token >= VOCABULARY.base_size]
        assert sentinels == [VOCABULARY.extra_id(i) for i in range(len(sentinels))]
        assert [token for token in target if token >= VOCABULARY.base_size] == sentinels
        # A kept span first, a corrupted one last, as T5's mask begins and ends.
        assert source[0] < VOCABULARY.base_size and target[0] == sentinels[0]
        assert source[-2] == sentinels[-1]
    source, target = encoded.sources[0], encoded.targets[0]
    spans = sum(token >= VOCABULARY.base_size for token in source)
    noise = len(target) - 1 - spans
    assert abs(noise / (noise + len(source) - 1 - spans) - 0.15) < 0.01
    assert abs(noise / spans - 3) < 0.3
    # The longest window that fits: T5's, to the token.
    assert 126 <= len(source) <= 128


def test_window_length_is_that_of_t5():
    """t5's random_spans_helper gives 568 tokens and 114 target tokens for 512, 15 %, 3."""
    encoded = _encode(SpanCorruption(), [("x" * 2000,)], (512, 114))
    source, target = encoded.sources[0], encoded.targets[0]
    assert len(rebuild(source, target, VOCABULARY)) == 568
    assert (len(source), len(target)) == (512, 114)


def test_modes_are_mixed_at_their_rates():
    text = ("words of a long text " * 4000,)
    for name, wanted in (("ul2", [2 / 7, 1 / 7, 4 / 7]), ("t5gemma2", [1 / 8, 4 / 8, 3 / 8])):
        encoded = _encode(MixtureOfDenoisers(SETTINGS[name]), [text], (48, 48))
        found = collections.Counter(int(source[0]) for source in encoded.sources)
        total = sum(found.values())
        shares = [found[mode_id(VOCABULARY, mode)] / total for mode in "RSX"]
        np.testing.assert_allclose(shares, wanted, atol=4 * 0.5 / np.sqrt(total))
    assert [mode_id(VOCABULARY, mode) for mode in "RSX"] == [259, 260, 261]


def test_prefix_denoiser_keeps_its_mean_share():
    objective = MixtureOfDenoisers((Denoiser("S", None, 0.25),))
    encoded = _encode(objective, [("x" * 60_000,)], (66, 65))
    shares = [
        (len(target) - 1) / (len(source) + len(target) - 3)
        for source, target in zip(encoded.sources, encoded.targets)
    ]
    assert abs(np.mean(shares) - 0.25) < 0.02 and max(shares) <= 0.52


def test_result_depends_on_seed_and_document_number_only():
    documents = [(f"document {number} " * 30,) for number in range(6)]
    objective = MixtureOfDenoisers()

    def targets(first, part, seed):
        encoded = _encode(objective, part, (64, 32), first, seed)
        return [target.tolist() for target in encoded.targets]

    whole = targets(0, documents, 1)
    assert whole == targets(0, documents[:2], 1) + targets(2, documents[2:], 1)
    assert whole != targets(0, documents, 2)


def test_passes_repeat_the_documents_with_new_noise(tmp_path):
    rows = [{"text": f"document {number} " * 20} for number in range(30)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    options = dict(
        vocabulary=VOCABULARY,
        text=[path],
        objective=SpanCorruption(),
        inputs_length=64,
        targets_length=32,
        packing="none",
        workers=1,
        block_bytes=2000,
    )

    def examples(name, **more):
        card = prepare(out=tmp_path / name, **options, **more)
        records = open_records(tmp_path / name)
        read = [decode_row(row, card.token_dtype) for row in records.read(range(card.rows))]
        return card, [(sources[0], targets[0]) for sources, targets in read]

    def text(pairs):
        return VOCABULARY.decode([token for pair in pairs for token in rebuild(*pair, VOCABULARY)])

    card, once = examples("once")
    twice_card, twice = examples("twice", passes=2)
    again, _ = examples("again", passes=2)
    assert twice_card.documents == 2 * card.documents and twice_card.origin["passes"] == 2
    assert twice_card.fingerprint == again.fingerprint != card.fingerprint
    first, second = twice[: len(once)], twice[len(once) :]
    assert text(first) == text(second) == text(once) == "".join(row["text"] for row in rows)
    same = lambda one, other: np.mean([np.array_equal(a[0], b[0]) for a, b in zip(one, other)])
    # The few tokens of a last window can be corrupted in few ways only.
    assert same(first, once) == 1 and same(second, first) < 0.4
    assert prepare(out=tmp_path / "some", passes=3, max_examples=4, **options).documents == 12
    with pytest.raises(ConfigError, match="CausalLM has no noise"):
        prepare(
            out=tmp_path / "no",
            passes=2,
            **{**options, "objective": CausalLM(), "inputs_length": 0},
        )


def test_too_few_sentinels_or_tokens_are_refused_with_the_number_wanted(tmp_path):
    with pytest.raises(ConfigError, match=r"needs 57 sentinels.* 20 extra ids.*--extra_ids=57"):
        SpanCorruption().check(Form(ByteVocabulary(extra_ids=20), 1024, 256))
    SpanCorruption().check(Form(ByteVocabulary(extra_ids=57), 1024, 256))
    with pytest.raises(ConfigError, match=r"too few for span corruption"):
        SpanCorruption().check(Form(VOCABULARY, 2, 2))
    with pytest.raises(ConfigError, match=r"sentinels and mode tokens"):
        MixtureOfDenoisers().check(Form(ByteVocabulary(), 512, 512))
    for wrong in (("Q", 3, 0.1), ("R", 0.5, 0.1), ("R", 3, 1.0), ("R", 3, 0.1, 0)):
        with pytest.raises(ConfigError):
            Denoiser(*wrong)
    path = write_jsonl(tmp_path / "a.jsonl", [{"source": "a", "target": "b"}])
    with pytest.raises(ConfigError, match=r"SpanCorruption reads documents of text, but jsonl"):
        prepare(
            out=tmp_path / "out",
            vocabulary="bytes+100",
            jsonl=[str(path)],
            objective=SpanCorruption(),
        )
    assert not (tmp_path / "out").exists()


def test_causal_lm_trains_a_decoder_only_model_on_every_token(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {i}\n" for i in range(200)))
    options = dict(vocabulary="bytes", text=[str(text)], objective=CausalLM(), targets_length=96)
    options["packing"] = "greedy"
    with pytest.raises(ConfigError, match=r"has no sources; give --inputs_length=0"):
        prepare(out=tmp_path / "out", **options)
    card = prepare(out=tmp_path / "out", inputs_length=0, **options)
    records = open_records(tmp_path / "out")
    assert card.source_tokens == 0 and card.target_tokens == len(text.read_text()) + 1
    assert card.non_padding_share > 0.97
    batches = Batches(records, global_batch=len(records), shuffle=False, layout="decoder_only")
    batch = batches[0]
    assert batch["decoder_target_tokens"].shape == (len(records), 96)
    real = batch["decoder_segment_ids"] > 0
    assert (batch["decoder_loss_weights"] == real).all()
    ids = batch["decoder_target_tokens"][real]
    assert records.vocabulary().decode(ids) == text.read_text()
    with pytest.raises(ConfigError, match=r"CausalLM without sources"):
        Batches(records, global_batch=2)


def test_objectives_read_the_same_documents(tmp_path):
    """What each keeps of the text is all of it, so that runs see the same."""
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {i} of it\n" for i in range(300)))
    options = dict(vocabulary="bytes+200", text=[str(text)], targets_length=64)
    for name, objective in (("t5", SpanCorruption()), ("ul2", MixtureOfDenoisers())):
        prepare(out=tmp_path / name, inputs_length=64, objective=objective, **options)
    plain = prepare(out=tmp_path / "causal", inputs_length=0, objective=CausalLM(), **options)
    tokens = plain.target_tokens - 1
    for name in ("t5", "ul2"):
        batch = Batches(open_records(tmp_path / name), global_batch=500, repeat=False)[0]
        sides = [batch["encoder_input_tokens"], batch["decoder_target_tokens"]]
        assert sum(((side > 2) & (side < 259)).sum() for side in sides) == tokens


GIN = pathlib.Path(__file__).resolve().parents[2] / "gin"


@pytest.mark.parametrize("name", sorted(path.stem for path in (GIN / "objectives").glob("*.gin")))
def test_every_objective_in_gin_prepares(tmp_path, name):
    text = tmp_path / "a.txt"
    text.write_text("some words of text\n" * 800)
    out = tmp_path / "out"
    arguments = [f"--gin_file={GIN / 'objectives' / name}.gin", "--vocabulary=bytes"]
    assert encdec(["prepare", *arguments, f"--out={out}", "--text", str(text)]) == 0
    card = read_card(out)
    assert card.objective["name"].lower() in {
        "prefixlm",
        "spancorruption",
        "mixtureofdenoisers",
        "causallm",
    }
    if name == "ul2_t5gemma2":
        assert [d["rate"] for d in card.objective["denoisers"]] == [1, 1, 1, 1, 4]
    assert "objective" in (out / "operative_config.gin").read_text() or name == "prefix_lm"


def test_objective_flag_and_own_denoisers(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("some words of text\n" * 100)
    command = ["prepare", "--text", str(text), "--vocabulary=bytes+80", f"--out={tmp_path / 'o'}"]
    command += ["--inputs_length=64", "--targets_length=64"]
    assert encdec([*command, "--objective=span_coruption"]) == ConfigError.exit_code
    assert "did you mean 'span_corruption'" in capsys.readouterr().err
    own = "ul2.denoisers = [('X', 4, 0.3, 2), ('S', None, 0.5, 1)]"
    assert encdec([*command, "--objective=ul2", f"--gin_bindings={own}"]) == 0
    assert len(read_card(tmp_path / "o").objective["denoisers"]) == 2
    wrong = "ul2.denoisers = 'ul3'"
    assert encdec([*command, "--objective=ul2", f"--gin_bindings={wrong}"]) != 0
    assert "ul2, t5gemma2" in capsys.readouterr().err
