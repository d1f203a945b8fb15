"""Tokenizer files that we write, as transformers reads them: the same ids, framing included."""

from __future__ import annotations

import json
import pathlib

import pytest

from encdec.data.vocabulary import Vocabulary, load_vocabulary
from encdec.data.vocabulary_training import train_vocabulary
from encdec.export import tokenizer
from encdec.export.special_ids import padding_id
from encdec.inference.text_io import PromptFormat

transformers = pytest.importorskip("transformers", reason="needs transformers: the extra hf")

TEXTS = (
    "def add(a, b):\n    return a + b",
    "  Two  spaces, \u00e9 \u00fc \u6f22\u5b57 ",
    "x",
    "don't 12345",
    "spelled </s> <unk> <pad> <extra_id_0>",
)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory) -> dict[str, Vocabulary]:
    folder = tmp_path_factory.mktemp("vocabularies")
    texts = [path.read_text() for path in sorted(pathlib.Path(__file__).parent.glob("*.py"))]
    made = {"bytes": load_vocabulary("bytes", extra_ids=3)}
    for kind in ("bpe", "unigram"):
        train_vocabulary(texts, folder / f"{kind}.model", size=400, model_type=kind)
        made[kind] = load_vocabulary(folder / f"{kind}.model", extra_ids=3)
    # A byte-level one whose id 0 is text, as of Qwen and Llama 3, with a template of its own.
    content = tokenizer.tokenizer_content(load_vocabulary("bytes"))
    for name, token in list(content["model"]["vocab"].items()):
        content["model"]["vocab"][name] = (token - 3) % 259
    content["added_tokens"] = [
        one | {"id": (one["id"] - 3) % 259} for one in content["added_tokens"]
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    made["tokenizer.json"] = load_vocabulary(folder / "tokenizer.json", extra_ids=3)
    return made


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("inputs_eos, prefix", [(True, ()), (False, ()), (True, (7, 9))])
@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram", "tokenizer.json"])
def test_inputs_and_labels_are_framed_as_here(
    kind, inputs_eos, prefix, architecture, vocabularies, tmp_path
):
    vocabulary = vocabularies[kind]
    eos, decoder_only = vocabulary.eos_id, architecture == "decoder_only"
    start = 5 if decoder_only else 0
    prompts = PromptFormat(vocabulary, start, inputs_eos, inputs_prefix=prefix)
    pad = padding_id(vocabulary, vocabulary.size + 1, start, is_encoder_decoder=not decoder_only)
    tokenizer.write(tmp_path, prompts, architecture, pad)
    plain = transformers.AutoTokenizer.from_pretrained(tmp_path)
    framed = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    for text in TEXTS:
        wanted = [start] * decoder_only + prompts.encode(text)[0]
        target = [*vocabulary.encode(text), eos]
        assert plain(text)["input_ids"] == wanted, text
        both = framed(text, text_target=text)
        assert both["input_ids"] == wanted and both["labels"] == target, text
        assert framed(text_target=[text])["input_ids"] == [target]
        assert framed(text)["input_ids"] == wanted
        if decoder_only:  # a whole training text
            assert plain(text, text)["input_ids"] == wanted + target
        # Inputs that end with EOS have the frame of labels, unless something stands in front.
        if not decoder_only and inputs_eos and not prefix:
            assert plain(text_target=text)["input_ids"] == target
        assert plain.decode(vocabulary.encode(text)) == vocabulary.decode(vocabulary.encode(text))
        assert plain.decode(target, skip_special_tokens=True) == vocabulary.decode(target)
    assert plain.model_max_length == prompts.max_input_tokens + decoder_only
    long = plain("word " * 600, truncation=True)["input_ids"]
    assert long == [start] * decoder_only + prompts.encode("word " * 600, truncate=True)[0]
    assert plain.pad_token_id == pad


def test_incomplete_characters_of_bytes_decode_to_nothing(vocabularies, tmp_path):
    tokenizer.write(tmp_path, PromptFormat(vocabularies["bytes"]), "encoder_decoder", pad_id=2)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = vocabularies["bytes"].encode("a\u00e9\u6f22b")
    for cut in (ids[:3], ids[:5], ids[2:], ids):
        assert theirs.decode(cut) == vocabularies["bytes"].decode(cut)


@pytest.mark.corpora
def test_a_published_vocabulary_gives_the_same_ids(corpora, tmp_path):
    models = sorted(corpora.rglob("*.model"))
    if not models:
        pytest.skip("no SentencePiece model among the corpora")
    prompts = PromptFormat(load_vocabulary(models[0], extra_ids=10))
    tokenizer.write(tmp_path, prompts, "encoder_decoder", pad_id=2)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == prompts.encode(text)[0]
