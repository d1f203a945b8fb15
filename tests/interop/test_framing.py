"""Framing of imported tokenizers against what transformers' own tokenizers add."""

from __future__ import annotations

import json
import re

import pytest

from encdec import shipped
from encdec.data.vocabulary import load_vocabulary
from encdec.errors import DataError
from encdec.export.tokenizer import tokenizer_content
from encdec.interop.framing import other_ends, read_eos_ids, read_framing, read_vocabulary

transformers = pytest.importorskip("transformers", reason="needs transformers: encdec[hf]")

BOS, EOS = "<pad>", "</s>"  # ids 0 and 1 of the bytes' tokenizer


def template(before=(), after=()):
    special = lambda names: [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    ids = {BOS: 0, EOS: 1, "a": 100}
    return {
        "type": "TemplateProcessing",
        "single": special(before) + [{"Sequence": {"id": "A", "type_id": 0}}] + special(after),
        "pair": [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"],
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in {*before, *after}
        },
    }


def save(folder, processor=None, tokenizer=None, config=None, generation=None):
    content = tokenizer_content(load_vocabulary("bytes")) | {"post_processor": processor}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    for name, values in {
        "tokenizer.json": content,
        "tokenizer_config.json": settings | (tokenizer or {}),
        "config.json": {"bos_token_id": 0, "eos_token_id": 1} | (config or {}),
        "generation_config.json": generation or {},
    }.items():
        (folder / name).write_text(json.dumps(values))


@pytest.mark.parametrize(
    "processor, tokenizer",
    [
        (None, {}),
        (template(), {}),
        (template([BOS]), {}),
        (template([BOS], [EOS]), {}),
        ({"type": "Sequence", "processors": [template([BOS, EOS])]}, {}),
        (template([BOS]), {"add_bos_token": False, "add_eos_token": True}),  # the template counts
    ],
)
@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_what_transformers_adds_is_what_prompts_get(
    processor, tokenizer, encoder_decoder, tmp_path
):
    save(tmp_path, processor, tokenizer, generation={"decoder_start_token_id": 7})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)("a")["input_ids"]
    framing = read_framing(tmp_path, 5, 1, encoder_decoder=encoder_decoder)
    start = [] if encoder_decoder or not framing.adds_start else [framing.start_id]
    ours = [*start, *framing.inputs_prefix, 100, *[1] * framing.inputs_eos]
    assert ours == theirs
    if encoder_decoder:
        assert framing.start_id == 7
    elif not framing.adds_start:
        assert framing.start_id == 5  # the model's own, and the command says so


@pytest.mark.parametrize(
    "tokenizer, start, eos",
    [
        ({"tokenizer_class": "LlamaTokenizer"}, 0, False),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, 5, False),
        ({"tokenizer_class": "GemmaTokenizerFast", "add_eos_token": True}, 0, True),
        ({"add_bos_token": True}, 0, False),
        ({}, 5, False),
    ],
)
def test_without_a_template_the_flags_and_the_class_say_it(tokenizer, start, eos, tmp_path):
    save(tmp_path, None, tokenizer)
    (tmp_path / "tokenizer.json").unlink()  # a SentencePiece model alone
    framing = read_framing(tmp_path, 5, 1, encoder_decoder=False)
    assert (framing.start_id, framing.inputs_eos) == (start, eos)


def test_endings_that_are_not_eos_are_refused(tmp_path):
    save(tmp_path, template([], ["a"]))
    with pytest.raises(DataError, match=r"ends inputs with the ids \[100\]"):
        read_framing(tmp_path, 5, 1, encoder_decoder=False)


def test_texts_end_where_the_model_ends_them(tmp_path):
    """Generation settings win over the model's; a tokenizer's EOS counts where it is among them."""
    save(tmp_path, config={"eos_token_id": 9}, generation={"eos_token_id": [8, 1]})
    assert read_eos_ids(tmp_path, (9,)) == (8, 1)
    assert read_vocabulary(tmp_path, (8, 1), 300).eos_id == 1
    assert read_vocabulary(tmp_path, (9,), 300).eos_id == 9
    assert read_eos_ids(tmp_path / "none", (9,)) == (9,)


def test_tokens_that_were_added_to_a_sentencepiece_model_count(tmp_path):
    """As in Phi-3, whose tokenizer.model has neither its EOS nor its chats' tokens."""
    model = load_vocabulary(shipped.model_directory("java2cs"))
    model.save(tmp_path)
    (tmp_path / "vocabulary.model").rename(tmp_path / "tokenizer.model")
    read, rows = read_vocabulary, model.size + 1
    assert read(tmp_path, (model.size,), rows).eos_id == model.eos_id  # all that there is
    content = tokenizer_content(model)
    end = {"id": model.size, "content": "<|end|>"}
    content["added_tokens"].append(content["added_tokens"][0] | end)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read(tmp_path, (model.size,), rows).eos_id == model.size
    assert read(tmp_path, (model.eos_id,), rows - 1).size == model.size  # as the table has
    vocabulary = read(tmp_path, (model.eos_id,), rows)
    assert vocabulary.eos_id == model.eos_id
    assert vocabulary.encode_marked("a<|end|>") == [*model.encode("a"), model.size]


def test_ends_that_are_not_taken_over_are_said(tmp_path):
    save(tmp_path, generation={"eos_token_id": [1, 8]})
    vocabulary = read_vocabulary(tmp_path, (1, 8), 300)
    said = other_ends(vocabulary, (1, 8))
    assert re.search(r"end only at .* \(1\); .*also ends them at .* \(8\)", said)
    assert other_ends(vocabulary, (1,)) == ""
