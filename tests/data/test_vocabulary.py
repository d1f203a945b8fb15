"""Vocabularies: round trips, agreement with seqio's ids, fingerprints, named errors."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from encdec.data.vocab_command import main
from encdec.data.vocabulary import ByteVocabulary, copy_vocabulary, load_vocabulary
from encdec.data.vocabulary_training import _chunks, _sample, train_vocabulary
from encdec.errors import ConfigError, DataError
from tests.data.conftest import TRAINING_TEXT

CODE = "def f(x):\n\tif  x:\n        return {'a': [1, 2]}  # \u00e9\u65e5\U0001f600\r\n\n\n"


def test_training_reads_all_text_around_the_reserved_character(tmp_path):
    texts = [f"hello world x\u2585y foo bar {number}" for number in range(90)]
    vocabulary = train_vocabulary(texts, tmp_path / "a.model", size=300)
    assert len(vocabulary.encode("hello world")) < 5
    assert vocabulary.decode(vocabulary.encode(texts[0])) == texts[0]


def test_bytes_agree_with_the_documented_ids():
    vocabulary = load_vocabulary("bytes", extra_ids=5)
    assert vocabulary.encode("A\u00e9") == [65 + 3, 0xC3 + 3, 0xA9 + 3]
    assert (vocabulary.eos_id, vocabulary.pad_id, vocabulary.size) == (1, 0, 264)
    assert vocabulary.decode([68, 1, 69]) == "A"
    assert vocabulary.decode([263, 68, 259]) == "<extra_id_0>A<extra_id_4>"
    assert vocabulary.byte_lengths.tolist() == [0] * 3 + [1] * 256 + [0] * 5


@given(st.text())
def test_bytes_give_every_text_back(text):
    vocabulary = ByteVocabulary()
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert vocabulary.byte_lengths[ids].sum() == len(text.encode())


@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_trained_vocabulary_gives_every_text_back(model_path, text):
    vocabulary = load_vocabulary(model_path)
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert vocabulary.byte_lengths[ids].sum() == len(text.encode())


def test_trained_vocabulary_learns_white_space_and_needs_no_dummy_prefix(model_path):
    vocabulary = load_vocabulary(model_path)
    assert vocabulary.decode(vocabulary.encode(CODE)) == CODE
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_path)).encode_as_pieces("a")
    assert not pieces[0].startswith("\u2581")
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id) == (0, 1, None)
    assert len(vocabulary.encode("        ")) == 1


def test_extra_ids_lie_at_the_end_and_text_never_spells_one(model_path):
    plain, extended = load_vocabulary(model_path), load_vocabulary(f"{model_path}+3")
    assert extended.size == plain.size + 3
    assert extended.extra_id(0) == extended.size - 1
    assert extended.encode("<extra_id_0>") == plain.encode("<extra_id_0>")
    ids = [extended.extra_id(2), *plain.encode("x"), extended.extra_id(0)]
    assert extended.decode(ids) == "<extra_id_2>x<extra_id_0>"
    with pytest.raises(DataError, match=r"--extra_ids=4"):
        extended.extra_id(3)


@pytest.mark.parametrize("kind", ["bytes", "model"])
def test_more_extra_ids_than_a_table_should_have_are_refused(kind, model_path):
    source = "bytes" if kind == "bytes" else model_path
    most = load_vocabulary(f"{source}+65536")
    assert most.size == load_vocabulary(source).size + 65536
    for make in (
        lambda: load_vocabulary(f"{source}+65537"),
        lambda: load_vocabulary(source, extra_ids=100_000_000),
        lambda: most.with_extra_ids(65537),
        lambda: load_vocabulary(source, extra_ids=-1),
    ):
        with pytest.raises(ConfigError, match="expected 0 to 65,536: each is a row"):
            make()


def test_fingerprint_covers_kind_model_and_extra_ids(model_path):
    model = open(model_path, "rb").read()
    expected = hashlib.sha256(b"sentencepiece\n7\n" + model).hexdigest()
    assert load_vocabulary(model_path, extra_ids=7).fingerprint == expected
    assert load_vocabulary(model_path).fingerprint != expected


def test_saved_vocabulary_is_loaded_from_its_directory_alone(model_path, tmp_path):
    vocabulary = load_vocabulary(model_path, extra_ids=2)
    vocabulary.save(tmp_path / "a")
    copy_vocabulary(tmp_path / "a", tmp_path / "b")
    again = load_vocabulary(tmp_path / "b")
    assert again.spec() == vocabulary.spec()
    assert again.encode(CODE) == vocabulary.encode(CODE)


def test_swapped_model_file_is_refused(model_path, tmp_path):
    load_vocabulary(model_path).save(tmp_path)
    other = train_vocabulary([TRAINING_TEXT * 10], tmp_path / "other.model", size=310)
    (tmp_path / "vocabulary.model").write_bytes(other._model_bytes())
    with pytest.raises(DataError, match=r"fingerprint"):
        load_vocabulary(tmp_path)


def test_missing_broken_and_unknown_vocabularies_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.model not found.*encdec vocab"):
        load_vocabulary(tmp_path / "nowhere.model")
    for content in (b"", b"not a model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=r"bad.model"):
            load_vocabulary(tmp_path / "bad.model")
    with pytest.raises(DataError, match=r"no vocabulary in"):
        load_vocabulary(tmp_path)
    (tmp_path / "vocabulary.json").write_text(json.dumps({"kind": "runes"}))
    with pytest.raises(DataError, match=r"does not describe a vocabulary"):
        load_vocabulary(tmp_path)
    with pytest.raises(DataError, match=r"outside the vocabulary"):
        ByteVocabulary().decode([300])


def test_training_is_deterministic(tmp_path):
    texts = [TRAINING_TEXT * 40, CODE * 20]
    models = [tmp_path / "a.model", tmp_path / "b.model"]
    for path in models:
        train_vocabulary(texts, path, size=320, sample_bytes=8000, seed=3)
    assert models[0].read_bytes() == models[1].read_bytes()


def test_vocab_command(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text(TRAINING_TEXT * 10)
    model = tmp_path / "out" / "a.model"
    main(["--text", str(text), "--size=310", f"--out={model}"])
    assert "310 ids" in capsys.readouterr().out
    assert load_vocabulary(model).size == 310
    before = model.read_bytes()
    with pytest.raises(DataError, match=r"--overwrite"):
        main(["--text", str(text), "--size=320", f"--out={model}"])
    assert model.read_bytes() == before
    with pytest.raises(DataError, match=r"--size=.* or less"):
        main(["--text", str(text), "--size=5000", f"--out={tmp_path / 'b.model'}"])
    with pytest.raises(ConfigError, match=r"size is 20"):
        main(["--text", str(text), "--size=20", f"--out={tmp_path / 'b.model'}"])
    with pytest.raises(ConfigError, match=r"--task, --jsonl or --text"):
        main([f"--out={tmp_path / 'b.model'}"])
    assert not (tmp_path / "b.model").exists()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9000), max_size=3))
def test_chunks_hold_all_text_and_fit_the_trainer(texts):
    chunks = list(_chunks(texts))
    assert "".join(chunks) == "".join(texts)
    assert all(0 < len(chunk.encode()) <= 4000 for chunk in chunks)


def test_sample_is_even_and_keeps_order():
    chunks = [f"{number:05d}" for number in range(2000)]
    sample = _sample(chunks, 500, seed=1)
    assert len(set(sample)) == 500 and sample == sorted(sample)
    assert abs(np.mean([int(chunk) for chunk in sample]) - 1000) < 100
    assert _sample(chunks, 500, seed=1) == sample != _sample(chunks, 500, seed=2)
