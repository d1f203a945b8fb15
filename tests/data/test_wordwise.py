"""Word by word or whole, SentencePiece's ids are the same; where they would not be, whole."""

from __future__ import annotations

import gzip
import itertools
import json
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.data import vocabulary as vocabulary_module
from encdec.data import wordwise
from encdec.data.vocabulary import load_vocabulary
from encdec.data.wordwise import word_encoder
from tests.data.conftest import TRAINING_TEXT

PIECES = [
    "the",
    " ",
    "  ",
    "\u2581",
    "\n",
    "\t",
    "\r\n",
    "(x)",
    "7",
    "42",
    "don't",
    "a.b",
    "\u201d",
    "\u65e5\u672c",
    "\U0001f600",
    "\u0301",
    "\0",
    "</s>",
    "<0x0A>",
    "self",
    "=",
    "\xa0",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=25).map("".join)


def _models(folder):
    """Models by how they were trained, each with whether word by word is exact."""

    def train(name, **options):
        path = folder / f"{name}.model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((TRAINING_TEXT * 20).split("\n")),
            model_prefix=str(path)[:-6],
            minloglevel=2,
            hard_vocab_limit=False,
            **{
                "vocab_size": 420,
                "model_type": "bpe",
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                **options,
            },
        )
        return path.read_bytes()

    return {
        "dummy prefix": (train("prefix"), True),
        "joined scripts": (
            train("joined", split_by_unicode_script=False, split_by_number=False),
            True,
        ),
        "unigram": (train("unigram", model_type="unigram"), False),
        "no bytes": (train("unknown", byte_fallback=False, vocab_size=90), False),
        "normalized": (train("nfkc", normalization_rule_name="nmt_nfkc"), False),
        "squeezed": (train("squeezed", remove_extra_whitespaces=True), False),
        "over spaces": (train("spaces", split_by_whitespace=False), False),
        "user pieces": (train("user", user_defined_symbols=["<mode>"]), False),
        "suffix": (train("suffix", treat_whitespace_as_suffix=True), False),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory, model_path):
    return {
        **_models(tmp_path_factory.mktemp("models")),
        "ours": (open(model_path, "rb").read(), True),
    }


NAMES = [
    "ours",
    "dummy prefix",
    "joined scripts",
    "unigram",
    "no bytes",
    "normalized",
    "squeezed",
    "over spaces",
    "user pieces",
    "suffix",
]


@pytest.mark.parametrize("name", NAMES)
def test_only_models_it_is_exact_for_are_taken(models, name):
    model, exact = models[name]
    assert (word_encoder(model) is not None) == exact


@pytest.mark.parametrize("name", ["ours", "dummy prefix", "joined scripts"])
@settings(max_examples=150, deadline=None)
@given(st.lists(texts, max_size=4))
def test_ids_are_sentencepieces(models, name, batch):
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(models[name][0])
    encoder = word_encoder(models[name][0])
    for text in batch * 2:
        assert encoder.encode(text).tolist() == processor.encode(text)


def test_long_batches_go_by_words_and_short_ones_do_not(model_path, monkeypatch):
    monkeypatch.setattr(vocabulary_module, "WORDWISE_CHARACTERS", 10_000)
    vocabulary = load_vocabulary(model_path)
    short = [TRAINING_TEXT[:100], ""]
    before = vocabulary.encode_batch(short, add_eos=True)
    assert "_words" not in vars(vocabulary)
    texts = [*short, TRAINING_TEXT * 60]
    batch = vocabulary.encode_batch(texts, add_eos=True)
    assert len(vocabulary._words) > 10
    for ids, plain in zip(batch, vocabulary.encode_by_library(texts)):
        assert ids.dtype == np.int32
        assert ids.tolist() == [*plain.tolist(), vocabulary.eos_id]
    again = vocabulary.encode_batch(short, add_eos=True)
    assert [ids.tolist() for ids in again] == [ids.tolist() for ids in before]


def test_memory_is_bounded_and_forgetting_changes_nothing(model_path, monkeypatch):
    monkeypatch.setattr(wordwise, "KEPT_WORDS", 50)
    model = open(model_path, "rb").read()
    encoder, plain = word_encoder(model), load_vocabulary(model_path)
    words = [f"name{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300)]
    for start in range(0, 300, 7):
        text = " ".join(["self", *words[start : start + 20]]) + " " + "x" * 200
        assert encoder.encode(text).tolist() == plain.encode(text)
        assert len(encoder) <= 50 and len(encoder._older) <= 50
        assert not any(len(word) > wordwise.KEPT_CHARACTERS for word in encoder)
    # A word in use outlives both generations.
    assert "self" in encoder or "self" in encoder._older


def test_without_protobuf_texts_go_whole(model_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    vocabulary = load_vocabulary(model_path)
    (ids,) = vocabulary.encode_batch([TRAINING_TEXT * 300])
    assert vocabulary._words is None
    assert ids.tolist() == vocabulary.encode_by_library([TRAINING_TEXT * 300])[0].tolist()


@pytest.mark.corpora
def test_real_text_by_mistrals_vocabulary(corpora):
    vocabulary = load_vocabulary(corpora / "tokenizers" / "mistral_v1_32000.model")
    assert vocabulary._words is not None
    assert load_vocabulary(corpora / "tokenizers" / "t5_spiece_32100.model")._words is None
    files = [*corpora.glob("t2t/*/*.jsonl.gz"), *corpora.glob("pretrain/*.jsonl.gz")]
    assert len(files) > 15
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in itertools.islice(lines, 60)]
        keys = ("source", "target", "text")
        texts = [row[key][:20_000] for row in rows for key in keys if key in row]
        for ids, plain in zip(
            map(vocabulary._words.encode, texts), vocabulary.encode_by_library(texts)
        ):
            np.testing.assert_array_equal(ids, plain)
