"""Tokens as pieces of the text: they join to it, whatever it is and however it is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings, strategies

from encdec.data.vocabulary import ByteVocabulary, Vocabulary, load_vocabulary
from encdec.inference.text_io import TextStream, find_stop
from encdec.serving.answers import PieceCutter, Shaper, best, echoed
from encdec.serving.prompts import Prompt
from encdec.serving.tickets import TokenLogProbs, Update
from tests.serving.test_protocol import USER, chat, parse

BYTES = ByteVocabulary(extra_ids=2)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory) -> list[Vocabulary]:
    """Bytes; SentencePiece and Hugging Face's pieces with bytes for what they have not."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("vocabularies")
    text = folder / "text.txt"
    text.write_text("\n".join(["the cat sat on the mat", "a hat, a bat and a cat"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "small"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    found = [BYTES, load_vocabulary(folder / "small.model")]
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        return found
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁the", "▁c", "a", "t"]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": None,
                "post_processor": None,
                "decoder": {"type": "Sequence", "decoders": decoders},
                "model": {
                    "type": "BPE",
                    "unk_token": "<unk>",
                    "byte_fallback": True,
                    "vocab": {piece: place for place, piece in enumerate(pieces)},
                    "merges": [],
                },
            }
        )
    )
    return [*found, load_vocabulary(folder / "tokenizer.json")]


@given(data=strategies.data())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_text_whole_and_streamed(vocabularies, data):
    vocabulary = data.draw(strategies.sampled_from(vocabularies))
    texts = strategies.sampled_from(["the cat", " a", "€", "🙂", "\n", "é!", "  "])
    ids: list[int] = []
    for text in data.draw(strategies.lists(texts, max_size=5)):
        part = vocabulary.encode(text)
        ids += part[: data.draw(strategies.integers(0, len(part)))]  # also half a character
    ids += data.draw(strategies.lists(strategies.integers(2, vocabulary.size - 1), max_size=4))
    ids += [vocabulary.eos_id] * data.draw(strategies.booleans())
    stop = data.draw(strategies.sampled_from([(), ("t",), ("cat", "at")]))
    text = vocabulary.decode(ids)
    if (place := find_stop(text, stop)) is not None:
        text = text[:place]
    log_probs = [-float(i) for i in range(len(ids))]
    whole = PieceCutter(vocabulary).push(text, ids, log_probs, last=True)
    assert "".join(piece.text for piece in whole) == text
    assert [piece.log_prob for piece in whole] == log_probs
    begins = [piece.begin for piece in whole]
    assert begins == sorted(begins) and all(0 <= begin <= len(text) for begin in begins)
    # Bit by bit, as a stream delivers them.
    stream, cutter, made, seen = TextStream(vocabulary, stop), PieceCutter(vocabulary), [], 0
    cuts = sorted(data.draw(strategies.sets(strategies.integers(0, len(ids)), max_size=4)))
    for cut in [*cuts, len(ids)]:
        last = cut == len(ids)
        piece = stream.push(ids[:cut], last=last)
        made += cutter.push(piece, ids[seen:cut], log_probs[seen:cut], last=last)
        seen = cut
        if stream.stopped:
            made += cutter.push("", [], [], last=True)
            break
    assert "".join(piece.text for piece in made) == text
    if not stop:  # where it stops, the stream tells of no tokens beyond
        assert made == whole


def test_characters_of_several_tokens_are_there_with_their_last_one():
    ids = BYTES.encode("h€!")
    pieces = PieceCutter(BYTES).push("h€!", [*ids, 1], [-1.0] * 6, last=True)
    assert [piece.text for piece in pieces] == ["h", "", "", "€", "!", ""]
    assert [piece.begin for piece in pieces] == [0, 1, 1, 1, 2, 3]
    assert b"".join(piece.data for piece in pieces) == "h€!".encode()


def test_alternatives_are_named_by_what_they_would_add():
    eos, lead = BYTES.eos_id, 0xE2 + BYTES.offset
    (first, second) = PieceCutter(BYTES).push(
        "ab",
        BYTES.encode("ab"),
        [-0.5, -3.0],
        [[(BYTES.encode("a")[0], -0.5), (eos, -1.0)], [(lead, -0.1), (eos, -2.0)]],
        last=True,
    )
    assert first.alternatives == {"a": -0.5, "</s>": -1.0}
    # The one chosen is always among them.
    assert second.alternatives == {"bytes:\\xe2": -0.1, "</s>": -2.0, "b": -3.0}


def test_a_chats_alternatives_are_as_many_as_were_asked_for():
    """A drawn token that is not among the likeliest does not add to them."""
    completion = chat([USER], logprobs=True, top_logprobs=1)
    a, b = BYTES.encode("ab")
    update = Update(0, "b", [b], [-3.0], "length", [[(a, -0.5), (b, -3.0)]])
    [kept] = Shaper("mine", BYTES, completion).choice(update)["logprobs"]["content"]
    assert kept["token"] == "b" and kept["logprob"] == -3.0
    assert [one["token"] for one in kept["top_logprobs"]] == ["a"]


def test_an_echo_shows_the_prompt_and_where_the_answer_begins():
    own = [*BYTES.encode("ab"), 1, *BYTES.encode("cd")]
    prompt = Prompt(own[:3], own[3:], own, own[3:])
    known = TokenLogProbs(own[3:], [-1.0, -2.0], [[(own[3], -1.0)], [(own[3], -0.5)]])
    pieces = echoed(BYTES, prompt, known)
    assert [piece.text for piece in pieces] == ["a", "b", "</s>", "c", "d"]
    assert [piece.begin for piece in pieces] == [0, 1, 2, 6, 7]
    assert [piece.log_prob for piece in pieces] == [None, None, 0.0, -1.0, -2.0]
    assert pieces[4].alternatives == {"c": -0.5, "d": -2.0}
    completion = parse(prompt=own, echo=True, logprobs=1, max_tokens=1)
    shaper = Shaper("mine", BYTES, completion)
    update = Update(0, "e", BYTES.encode("e"), [-3.0], "length", [[(5, -3.5)]], known)
    choice = shaper.choice(update)
    kept = choice["logprobs"]
    assert choice["text"] == "ab</s>cde" == "".join(kept["tokens"])
    assert kept["text_offset"] == [0, 1, 2, 6, 7, 8]
    assert kept["top_logprobs"][:3] == [None, None, {"</s>": 0.0}]
    assert shaper.body([choice], 1)["usage"]["prompt_tokens"] == 5
    # EOS inside the input has no probability, and so is not its own alternative either.
    within = [1, *own]
    first = echoed(BYTES, Prompt(within[:4], within[4:], within, within[4:]), known)[0]
    assert (first.text, first.log_prob, first.alternatives) == ("</s>", None, {})


def test_choices_tell_why_they_end_and_streams_only_what_is_settled():
    shaper = Shaper("mine", BYTES, parse(prompt="abc", logprobs=0, stream=True))
    ids = BYTES.encode("h€")
    first = shaper.choice(Update(0, "h", ids[:2], [-0.1, -0.2], None))
    assert first["logprobs"]["tokens"] == ["h"] and first["finish_reason"] is None
    assert first["logprobs"]["top_logprobs"] is None
    assert shaper.choice(Update(0, "", ids[2:3], [-0.3], None)) is None
    last = shaper.choice(Update(0, "€", ids[3:], [-0.4], "length"))
    assert last["logprobs"]["tokens"] == ["", "", "€"] and last["finish_reason"] == "length"
    assert last["logprobs"]["text_offset"] == [1, 1, 1]
    plain = Shaper("mine", BYTES, parse(prompt="a"))
    choice = plain.choice(Update(0, "a", [100], [0.0], "stop"))
    assert choice["logprobs"] is None and choice["finish_reason"] == "stop"
    body = plain.body([choice], 3)
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_the_best_have_the_highest_mean_log_probability():
    made = [
        Update(i, str(i), [5] * n, [value] * n, "eos")
        for i, (n, value) in enumerate([(2, -1.0), (9, -0.5), (1, -0.7)])
    ]
    assert [update.index for update in best(made, 2)] == [1, 2]
    assert best(made, 3) == made
