"""Prompts, stop strings and streams of text."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from encdec.data.vocabulary import ByteVocabulary, SentencePieceVocabulary
from encdec.errors import DataError
from encdec.inference.generator import generation_of
from encdec.inference.text_io import PromptFormat, TextStream, find_stop, tokens_to_stop

BYTES = ByteVocabulary()
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> SentencePieceVocabulary:
    """A small vocabulary with byte fallback; this file is all it knows, and is plain ASCII."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("vocabulary") / "small"
    text = pathlib.Path(__file__).read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(prefix),
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return SentencePieceVocabulary(prefix.with_suffix(".model").read_bytes())


def streamed(vocabulary, ids, stop=()):
    stream, parts = TextStream(vocabulary, stop), []
    for count in range(1, len(ids) + 1):
        parts.append(stream.push(ids[:count], last=count == len(ids)))
    return parts


@pytest.mark.parametrize(
    "text",
    [
        "a stream of text",
        "gr\u00f6\u00dfer, \u5927\u304d\u3044 \U0001f680!",
        "  two  spaces",
        "tab\tx",
    ],
)
def test_streams_join_to_the_text_and_show_no_half_character(text, pieces):
    for vocabulary in (BYTES, pieces):
        ids = vocabulary.encode(text)
        parts = streamed(vocabulary, ids)
        assert "".join(parts) == vocabulary.decode(ids)
        assert not any(REPLACEMENT in part for part in parts)
        assert len([part for part in parts if part]) > 3  # it does stream


def test_bytes_that_never_become_a_character_show_at_the_end(pieces):
    ids = [*pieces.encode("text"), *pieces.encode("\U0001f680")[-4:-1]]
    parts = streamed(pieces, ids)
    assert "".join(parts) == pieces.decode(ids) and REPLACEMENT in parts[-1]


@pytest.mark.parametrize(
    "text, stop, wanted",
    [
        ("one. two", [". "], "one"),
        ("a\nb\n\nc", ["\n\n"], "a\nb"),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("no stop here #", ["##"], "no stop here #"),  # what was held back comes at the end
        ("xyz", ["z", "yz"], "x"),
        ("stop", ["stop"], ""),
    ],
)
def test_streams_end_before_stop_strings_and_never_show_their_beginning(text, stop, wanted):
    ids = BYTES.encode(text)
    parts = streamed(BYTES, ids, stop)
    assert "".join(parts) == wanted
    for count in range(1, len(ids) + 1):
        assert wanted.startswith("".join(parts[:count]))
    place = find_stop(text, stop)
    assert text[:place] == wanted
    count = tokens_to_stop(BYTES, ids, stop)
    if place is None:
        assert count is None
    else:
        ends = [text.find(s) + len(s) for s in stop if s in text]
        assert count == min(ends)  # bytes are tokens here


def test_of_several_stop_strings_the_one_that_is_complete_first_ends_the_text():
    """However many tokens there are when the text is looked at."""
    ids, stop = BYTES.encode("xabcd"), ["abcd", "b"]
    assert "".join(streamed(BYTES, ids, stop)) == "xa"
    assert TextStream(BYTES, stop).push(ids) == "xa"
    assert generation_of(BYTES, ids, [0.0] * len(ids), stop).text == "xa"


def test_prompts_end_with_eos_if_the_records_did(pieces):
    ids = pieces.encode("a prompt")
    assert PromptFormat(pieces).encode("a prompt") == ([*ids, pieces.eos_id], False)
    assert PromptFormat(pieces, inputs_eos=False).encode("a prompt") == (ids, False)


def test_long_prompts_are_refused_or_lose_their_end_never_their_eos():
    prompts = PromptFormat(BYTES, max_input_tokens=6)
    assert prompts.encode("abcde") == ([*BYTES.encode("abcde"), 1], False)
    with pytest.raises(
        DataError, match=r"input 3 has 7 tokens, but the model accepts 6.*_long=cut"
    ):
        prompts.encode("abcdef", name="input 3")
    assert prompts.encode("abcdef", truncate=True) == ([*BYTES.encode("abcde"), 1], True)
    tiny = PromptFormat(BYTES, max_input_tokens=2, inputs_prefix=(8, 9))
    assert tiny.encode("abc", truncate=True) == ([8, 9, 1], True)  # there is no place for a text
    # Nor do they lose what a template has behind them, whether it is there already or not.
    framing = PromptFormat(BYTES, max_input_tokens=6, template="({source})")
    for text in ("abcdef", "(abcdef)"):
        assert framing.encode(text, truncate=True) == ([*BYTES.encode("(abc)"), 1], True)
    assert framing.encode("abc", truncate=True) == ([*BYTES.encode("(abc)"), 1], False)
    tight = dataclasses.replace(framing, template="(<{source}>)")
    assert tight.encode("abc", truncate=True) == ([*BYTES.encode("(<a>)"), 1], True)
    too_tight = dataclasses.replace(framing, template="(<({source}>)")
    assert too_tight.encode("abc", truncate=True) == ([*BYTES.encode("(<(ab"), 1], True)
    without = PromptFormat(BYTES, inputs_eos=False, max_input_tokens=6)
    assert without.encode("abcdef") == (BYTES.encode("abcdef"), False)


def test_what_the_vocabulary_cannot_write_is_named(tmp_path):
    import sentencepiece

    prefix = tmp_path / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pathlib.Path(__file__).read_text().splitlines()),
        model_prefix=str(prefix),
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    vocabulary = SentencePieceVocabulary(prefix.with_suffix(".model").read_bytes())
    strict = PromptFormat(vocabulary, keep_unknown=False)
    with pytest.raises(DataError, match="input 2 has '\u00fc' at place 4, .*--keep_unknown"):
        strict.encode("big \u00fcber", name="input 2")
    ids, _ = PromptFormat(vocabulary).encode("big \u00fcber")
    assert vocabulary.unk_id in ids
    assert strict.encode("big")[0] == PromptFormat(vocabulary).encode("big")[0]
    for ids, message in (
        ([], "has no tokens"),
        ([3, vocabulary.size], "has the token 2"),
        ([-1], "the token -1, but the vocabulary has ids from 0"),
    ):
        with pytest.raises(DataError, match=message):
            strict.fit(ids)


def test_prompts_that_hold_no_text_are_refused(pieces):
    for vocabulary in (BYTES, pieces):
        for text in ("", " \n\t"):
            with pytest.raises(DataError, match="the input is empty; give a text"):
                PromptFormat(vocabulary).encode(text)
        with pytest.raises(DataError, match="lone surrogate"):
            PromptFormat(vocabulary).encode("half \ud83d")
