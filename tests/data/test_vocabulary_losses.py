"""What vocabularies lose of the text that is prepared."""

from __future__ import annotations

import collections
import io
import json

import pytest
import sentencepiece
import tokenizers

from encdec.cli import main as encdec
from encdec.data import vocabulary_losses
from encdec.data.prepare import prepare
from encdec.data.records import open_records
from encdec.data.vocabulary import load_vocabulary
from encdec.data.vocabulary_losses import Losses, count_losses
from encdec.errors import DataError
from tests.data.conftest import write_jsonl

WORDS = "plain words of one alphabet, no braces (at all). Some Capitals. 0123456789 "


def sentencepiece_model(path, **options):
    model = io.BytesIO()
    given = dict(vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 50), model_writer=model, minloglevel=2, **given | options
    )
    path.write_bytes(model.getvalue())
    return str(path)


def tokenizer_json(path, model, normalizer=None, decoder=None):
    made = tokenizers.Tokenizer(model)
    made.normalizer, made.decoder = normalizer, decoder or tokenizers.decoders.Fuse()
    made.save(str(path))
    return str(path)


LETTERS = {c: i for i, c in enumerate(["</s>", "<unk>", *sorted(set(WORDS + "e\u0301"))])}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """Each loses one kind of thing."""
    folder = tmp_path_factory.mktemp("lossy")
    bpe = tokenizers.models.BPE(LETTERS, [], unk_token="<unk>")
    silent = tokenizers.models.BPE(LETTERS, [])
    unigram = tokenizers.models.Unigram([(c, -1.0) for c in LETTERS], unk_id=1)
    nfd = tokenizers.normalizers
    kept = dict(
        normalization_rule_name="identity", byte_fallback=True, vocab_size=330, model_type="bpe"
    )
    made = {
        "alphabet": sentencepiece_model(folder / "a.model", normalization_rule_name="identity"),
        "case": sentencepiece_model(folder / "b.model", normalization_rule_name="nmt_nfkc_cf"),
        "spaces": sentencepiece_model(folder / "c.model", **kept, remove_extra_whitespaces=True),
        "nothing": sentencepiece_model(
            folder / "d.model", **kept, remove_extra_whitespaces=False, add_dummy_prefix=False
        ),
        "alphabet, json": tokenizer_json(folder / "e.json", bpe),
        "alphabet, silently": tokenizer_json(folder / "f.json", silent),
        "alphabet, unigram": tokenizer_json(folder / "g.json", unigram),
        "accents": tokenizer_json(
            folder / "h.json", bpe, nfd.Sequence([nfd.NFD(), nfd.StripAccents()])
        ),
    }
    return {name: load_vocabulary(path) for name, path in made.items()}


def counted(vocabulary, *texts):
    return count_losses(vocabulary, texts, vocabulary.encode_batch(texts))


@pytest.mark.parametrize("name", ["alphabet", "alphabet, json", "alphabet, unigram"])
def test_unknown_ids_and_their_characters_are_counted(vocabularies, name):
    lost = counted(vocabularies[name], "plain words", "words {} äöä", "слово и слово")
    assert lost.unknown_ids >= 4
    assert lost.characters == dict(collections.Counter("{}äöäсловоислово"))
    assert (lost.texts, lost.decoded, lost.changed) == (3, 3, 2)
    assert [before for before, _ in lost.examples] == ["words {} äöä", "слово и слово"]


def test_letters_that_vanish_without_an_unknown_id_are_counted(vocabularies):
    lost = counted(vocabularies["alphabet, silently"], "words Ж", "plain")
    assert lost.unknown_ids == 0 and lost.characters == {"Ж": 1}
    assert lost.examples == [("words Ж", "words ")]


def test_case_accents_compatibility_and_white_space_are_told_apart(vocabularies):
    lost = counted(vocabularies["case"], "Some \ufb01ne Capitals")
    assert lost.characters == {"S": 1, "C": 1, "\ufb01": 1} and lost.changed == 1
    lost = counted(vocabularies["accents"], "cafe\u0301 plain")
    assert lost.characters == {"\u0301": 1} and lost.unknown_ids == 0
    lost = counted(vocabularies["spaces"], "two  words", " words", "two words")
    assert not lost.characters and lost.changed == 2
    assert "'two  words' becomes 'two words'" in lost.describe()


def test_what_keeps_everything_loses_nothing(vocabularies):
    texts = (" two  words\n\t{}", "слово 😀 \ufb01 e\u0301", "")
    lost = counted(vocabularies["nothing"], *texts)
    assert not lost and lost.describe() == "nothing (2 of 2 texts decoded and compared)"
    assert not counted(load_vocabulary("bytes"), *texts)
    assert counted(vocabularies["nothing"], "a\u2581b").characters == {"\u2581": 1}
    assert Losses().describe() == "not counted"


def test_of_much_text_a_sample_is_decoded_and_all_characters_counted(vocabularies, monkeypatch):
    monkeypatch.setattr(vocabulary_losses, "DECODED_CHARACTERS", 1000)
    monkeypatch.setattr(vocabulary_losses, "PIECE_CHARACTERS", 100)
    texts = ["plain words  of one alphabet " * 200] * 10
    lost = counted(vocabularies["nothing"], *texts)
    assert not lost and 5 <= lost.decoded <= 12 < lost.texts
    # Pieces are cut within words: no white space at an edge that the text has not there.
    trimmed = counted(vocabularies["spaces"], *[text.replace("  ", " ").strip() for text in texts])
    assert trimmed.decoded and not trimmed
    texts[7] = texts[7][:3000] + "Ж" + texts[7][3000:]
    lost = counted(vocabularies["alphabet"], *[text.replace("  ", " ").strip() for text in texts])
    assert lost.characters == {"Ж": 1} and lost.unknown_ids == 1 and lost.changed == 0
    assert "Ж" in lost.examples[0][0]


def test_sums_keep_the_first_examples_and_the_card_the_commonest_characters(monkeypatch):
    one = Losses(1, {"a": 2}, 3, 2, 1, [["x", "y"]])
    two = one + Losses(2, {"a": 1, "b": 9, "c": 1}, 4, 4, 3, [["u", "v"]] * 3)
    assert two == Losses(3, {"a": 3, "b": 9, "c": 1}, 7, 6, 4, [["x", "y"], ["u", "v"], ["u", "v"]])
    monkeypatch.setattr(vocabulary_losses, "CARD_CHARACTERS", 1)
    card = two.to_card()
    assert card["characters"] == {"b": 9, "others": 4}
    assert "13 characters are not restored (b)" in Losses(**json.loads(json.dumps(card))).describe()


def test_card_report_verify_and_refusal_name_it(vocabularies, tmp_path, capsys):
    rows = [{"source": f"word {i}", "target": "слово"} for i in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    vocabularies["alphabet"].save(tmp_path / "vocabulary")
    command = ["prepare", f"--jsonl={path}", f"--vocabulary={tmp_path / 'vocabulary'}"]
    assert encdec([*command, f"--out={tmp_path / 'out'}", "--workers=1"]) == 0
    printed = capsys.readouterr()
    assert "warning: this vocabulary is not lossless: 30 unknown ids" in printed.err
    assert "'слово' becomes" in printed.err and "lost by the vocabulary: 30 unk" in printed.out
    card = open_records(tmp_path / "out").card
    assert card.lost["unknown_ids"] == 30 and card.lost["characters"]["о"] == 60
    assert encdec(["data", "verify", str(tmp_path / "out"), "--full"]) == 0
    said = capsys.readouterr().out
    assert "lost by the vocabulary: 30 unknown ids" in said
    assert "unknown ids in the rows that were read: 30" in said
    refused = tmp_path / "refused"
    assert encdec([*command, f"--out={refused}", "--lossless"]) == DataError.exit_code
    assert "is not lossless on this text: 30 unknown ids" in capsys.readouterr().err
    assert not refused.exists()


def test_blocks_add_up_whatever_their_size(vocabularies, tmp_path):
    rows = [{"source": f"Word {i % 7} é", "target": "plain  words"} for i in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    given = dict(jsonl=[str(path)], vocabulary=vocabularies["case"], workers=1)
    cards = [
        prepare(out=tmp_path / f"out{size}", block_bytes=size, **given) for size in (100, 10**6)
    ]
    assert cards[0].lost == cards[1].lost and cards[0].lost["characters"] == {"W": 60, "é": 60}
    # Another vocabulary's losses are no fault of the rows.
    assert cards[0].lost["changed"] == 120
