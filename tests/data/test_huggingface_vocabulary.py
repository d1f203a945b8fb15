"""tokenizer.json vocabularies, and the warning about vocabularies that lose characters."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.data.prepare import prepare
from encdec.data.records import decode_row, open_records
from encdec.data.vocabulary import load_vocabulary
from encdec.data.vocabulary_losses import count_losses
from encdec.errors import ConfigError, DataError
from tests.data.conftest import TRAINING_TEXT, write_jsonl

tokenizers = pytest.importorskip("tokenizers", reason="Hugging Face vocabularies need the extra hf")

CODE = "if (a < b) {\n\treturn ~c;  // \u00e9\n}\n"


@pytest.fixture(scope="module")
def json_path(tmp_path_factory):
    """A small byte-level BPE, as GPT-2's and Llama 3's are."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT] * 4, trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back_and_bytes_are_counted(json_path, text):
    vocabulary = load_vocabulary(json_path)
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert vocabulary.byte_lengths[ids].sum() == len(text.encode())


def test_special_tokens_are_never_spelled_by_text(json_path):
    vocabulary = load_vocabulary(f"{json_path}+4")
    assert vocabulary.eos_id == 1 and vocabulary.size == vocabulary.base_size + 4
    ids = vocabulary.encode("a<|endoftext|>b<pad>")
    assert not {0, 1} & set(ids) and vocabulary.decode(ids) == "a<|endoftext|>b<pad>"
    (batch,) = vocabulary.encode_batch(["x"], add_eos=True)
    assert batch.dtype == np.int32 and batch[-1] == 1
    assert vocabulary.decode([*ids, vocabulary.extra_id(0)]).endswith("<extra_id_0>")


def test_records_carry_their_tokenizer(json_path, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"source": CODE, "target": "t{}"}] * 3)
    out = tmp_path / "out"
    card = prepare(out=out, vocabulary=f"{json_path}+2", jsonl=[str(path)], workers=1)
    assert card.vocabulary.kind == "huggingface" and card.vocabulary.file == "tokenizer.json"
    records = open_records(out)
    sources, _ = decode_row(records.read([0])[0], card.token_dtype)
    assert records.vocabulary().decode(sources[0]) == CODE
    (out / "tokenizer.json").write_text(json_path.read_text().replace('"id": 0', '"id":  0'))
    with pytest.raises(DataError, match=r"fingerprint"):
        records.vocabulary()


def test_eos_comes_from_the_configuration_beside_it(json_path, tmp_path):
    content = json.loads(json_path.read_text())
    content["added_tokens"][1]["content"] = "<stop>"
    content["model"]["vocab"]["<stop>"] = content["model"]["vocab"].pop("<|endoftext|>")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"none of the EOS tokens.*tokenizer_config.json"):
        load_vocabulary(path)
    for eos in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert load_vocabulary(path).eos_id == 1


def test_broken_files_and_a_missing_package_are_named(json_path, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    for content in ("", "{}", "[1]"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"tokenizer.json is not a valid tokenizer.json"):
            load_vocabulary(path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'tokenizers>=0.21,<1'"):
        load_vocabulary(json_path)


@pytest.mark.corpora
def test_real_vocabularies(corpora):
    folder = corpora / "tokenizers"
    llama = load_vocabulary(folder / "mu_vision_tokenizer.json")
    assert (llama.eos_id, llama.size) == (2, 32_011)
    mistral = load_vocabulary(folder / "mistral_v1_32000.model")
    for vocabulary in (llama, mistral):
        assert not count_losses(vocabulary, [CODE], [])
    ids = llama.encode(CODE)
    assert llama.decode(ids) == CODE
    # The dummy prefix is one byte that no text has.
    assert llama.byte_lengths[ids].sum() == len(CODE.encode()) + 1
    t5 = count_losses(load_vocabulary(folder / "t5_spiece_32100.model"), ["a{}<~^\\\n b,"], [])
    assert t5.characters == dict.fromkeys("{}<~^\\\n", 1)
