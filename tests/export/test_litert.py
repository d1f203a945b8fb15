"""LiteRT graphs against our own model: logits, answers, quantised weights, one command each."""

from __future__ import annotations

import json
import pathlib
import zipfile

import numpy as np
import pytest

from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import CheckpointError, ConfigError
from encdec.evaluation.evaluate_command import main as evaluate_main
from encdec.export import formats, quality
from encdec.export.export_command import main
from encdec.export.quantise import four_bits, in_blocks, nibbles
from encdec.inference.exported import ExportedRows, load_exported_generator
from encdec.inference.generate_command import main as generate_main
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.generator import Generator, TextGenerator
from encdec.interop.framing import Framing
from encdec.interop.importing import write_model
from encdec.model import unroll_params
from tests.export.examples import PROMPTS, pair
from tests.inference.examples import START
from tests.train.conftest import write_records

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert: the extra litert of setup.py")

from encdec.inference.litert_runtime import LitertMemory, LitertModel

TEXTS = ["a hare", "and a tortoise", "two"]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Exports a model once, and opens it."""
    done = {}
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    spec = PROMPTS.vocabulary.save(vocabulary)
    content = {
        "format_version": 1,
        "data": {
            "vocabulary": spec.to_dict(),
            "decoder_start_id": START,
            "inputs_eos": True,
            "inputs_length": 64,
            "targets_length": 12,
        },
    }

    def make(name, precision="float32"):
        if (name, precision) not in done:
            out = tmp_path_factory.mktemp("litert")
            export = formats.Export(*pair(name), PROMPTS, precision, content, vocabulary)
            size = formats.write("litert", out, export).bytes
            done[name, precision] = LitertModel(out, threads=1), size
        return done[name, precision]

    return make


def pairs(count=3):
    rng = np.random.default_rng(4)
    return [
        (rng.integers(3, 259, 5 + 4 * i), rng.integers(3, 259, 4 + 2 * i)) for i in range(count)
    ]


@pytest.mark.parametrize(
    "name",
    [
        "paper",
        "unrolled",
        "windowed pair",
        "from zero",
        "merged, continued",
        "of later families",
        "t5gemma2",
        "stretched",
        "stretched by pairs",
    ],
)
def test_float32_graphs_compute_our_logits(name, export):
    found = quality.measure(export(name)[0], *pair(name), pairs(), START)
    assert found.largest_difference < 1e-4 and found.agreement == 1
    assert abs(found.loss - found.reference_loss) < 1e-4


@pytest.mark.parametrize("name", ["paper", "merged, continued", "of later families", "t5gemma2"])
@pytest.mark.parametrize("precision, most", [("float32", 1e-4), ("int8", 1e-3)])
def test_steps_of_several_tokens_are_those_of_one(name, precision, most, export):
    """What was not kept leaves nothing behind; rows of one input may be at unlike places."""
    model = export(name, precision)[0]
    rng = np.random.default_rng(1)
    source, target = rng.integers(3, 259, (1, 9)), rng.integers(3, 259, 19)

    def begin():
        return model.prefill(source, np.array([9]), START, len(target))

    logits, memory = begin()
    plain = np.concatenate([logits, *(memory.step(target[i : i + 1]) for i in range(len(target)))])
    several, memory = begin()
    memory.repeat(2)
    several, places = [several[0]], np.zeros(2, int)
    for size, kept in ((4, (4, 2)), (8, (3, 8)), (1, (1, 1)), (8, (8, 7))):
        fed = rng.integers(3, 259, (2, size))
        for row, (place, count) in enumerate(zip(places, kept)):
            fed[row, :count] = target[place : place + count]
        if size == 1:
            found = memory.step(fed[:, 0])[:, None]
        else:
            found = memory.verify(fed)
            memory.keep(np.array(kept))
        for row, (place, count) in enumerate(zip(places, kept)):
            expected = plain[place + 1 : place + 1 + count]
            np.testing.assert_allclose(found[row, :count], expected, atol=most)
            assert (found[row, :count].argmax(-1) == expected.argmax(-1)).all()
        several += list(found[0, : kept[0]])
        places += kept
    np.testing.assert_allclose(several, plain[: len(several)], atol=most)
    assert np.ptp(plain) > 1 and list(places) == [16, 18]


def test_answers_are_ours(export):
    """Greedy by the graph's own choice, and several drawn samples that share the source, plainly
    and with drafts."""
    ours = Generator(*pair("paper"), PROMPTS, max_tokens=8)
    model = export("paper")[0]
    theirs, drafted = (
        TextGenerator(ExportedRows(model, draft), PROMPTS, max_tokens=8, batch_rows=16)
        for draft in ("off", "lookup")
    )
    sampled = GenerationSettings(temperature=0.7, top_k=20, samples=2, seed=3)
    for settings in (GenerationSettings(), sampled):
        plain = theirs.generate(TEXTS, settings)
        for a, b in zip(ours.generate(TEXTS, settings), plain):
            assert [one.tokens for one in a] == [one.tokens for one in b]
            np.testing.assert_allclose(a[0].log_probs, b[0].log_probs, atol=1e-4)
        for a, b in zip(plain, drafted.generate(TEXTS, settings)):
            assert [one.tokens for one in a] == [one.tokens for one in b]
            np.testing.assert_allclose(a[0].log_probs, b[0].log_probs, atol=1e-5)
    assert any(pace.steps for pace in drafted.paces.all)
    assert not theirs.paces.all
    with pytest.raises(ConfigError, match="no beam search"):
        theirs.generate(TEXTS, GenerationSettings(beams=2))
    text = theirs.generate(["a hare"])[0][0].text
    assert text == "".join(theirs.stream("a hare")) == "".join(drafted.stream("a hare"))


def test_exports_whose_steps_take_one_token_are_still_read(tmp_path, caplog):
    """An export as earlier versions wrote them, with the answers that they gave."""
    with zipfile.ZipFile(pathlib.Path(__file__).with_name("one_token_litert.zip")) as archive:
        archive.extractall(tmp_path)
    with caplog.at_level("INFO", "encdec"):
        plain = load_exported_generator(tmp_path)
    assert "decodes without drafts; run encdec export again" in caplog.text
    for text, tokens in json.loads((tmp_path / "answers.json").read_text()).items():
        assert plain.generate([text])[0][0].tokens == tokens
    with pytest.raises(ConfigError, match="one token per step.*run encdec export again"):
        load_exported_generator(tmp_path, draft="lookup")


def test_a_full_cache_is_refused(export):
    model = export("paper")[0]
    memory = LitertMemory(model, model.encode(np.array([5, 6, 7])), 1)
    with pytest.raises(ConfigError, match="11 tokens in one step"):
        memory.verify(np.full((1, 11), 4))
    memory.step(np.array([START]))
    with pytest.raises(ConfigError, match="cache holds 1 tokens"):
        memory.step(np.array([4]))


def test_an_answer_is_not_continued_with_anothers_cache(export):
    """Both are in the interpreter, as when two streams take turns."""
    model = export("paper")[0]
    first, second = (
        model.prefill(np.array([ids]), np.array([2]), START, 4)[1] for ids in ([5, 6], [9, 10])
    )
    second.step(np.array([4]))
    with pytest.raises(ConfigError, match="has begun another answer meanwhile"):
        first.step(np.array([4]))


def test_four_bits_are_the_nearest_levels_of_the_best_scale():
    weights = np.random.default_rng(0).normal(size=(5, 96)).astype(np.float32)
    blocks = in_blocks(weights, 32)
    levels, scales = four_bits(blocks)
    assert levels.min() >= -7 and levels.max() <= 7 and scales.shape == (5, 3, 1)
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
    error = lambda scales: np.square(
        np.clip(np.rint(blocks / scales), -7, 7) * scales - blocks
    ).sum(-1)
    found = np.square(levels * scales - blocks).sum(-1)
    np.testing.assert_allclose(found, error(scales), rtol=1e-6)
    widest = np.abs(blocks).max(-1, keepdims=True) / 7
    assert (found <= 1.02 * error(widest)).all() and found.sum() < 0.9 * error(widest).sum()
    packed = nibbles(levels)
    low, high = packed.astype(np.int8) << 4 >> 4, packed.astype(np.int8) >> 4
    np.testing.assert_array_equal(np.stack([low, high], -1).reshape(levels.shape), levels)


def test_quantised_graphs_are_the_quantised_model(export):
    sizes = {}
    for precision, most in (("float32", 1e-4), ("int8", 0.01), ("int4", 0.1)):
        model, sizes[precision] = export("paper", precision)
        found = quality.measure(model, *pair("paper"), pairs(), START)
        assert abs(found.loss / found.reference_loss - 1) < most, (precision, found)
    assert sizes["int4"] < sizes["int8"] < sizes["float32"]


def test_from_checkpoint_to_answer(tmp_path, capsys):
    """One command each: export with its quality on records, then generate."""
    records = write_records(tmp_path / "records", [[("one fish", "red"), ("two", "blue")]] * 2)
    config, params = pair("paper")
    write_model(
        tmp_path / "run",
        config.replace(scan_layers=False),
        unroll_params(params, config),
        source={
            "format": "hf",
            "family": "t5",
            "name": "theirs",
            "lineage": {"training_flops": 2.0, "seeds": [3, 4]},
        },
        vocabulary=ByteVocabulary(),
        framing=Framing(START),
        max_length=64,
    )
    out = tmp_path / "int8"
    arguments = [f"--checkpoint={tmp_path / 'run'}", "--format=litert", f"--out={out}"]
    assert main([*arguments, "--precision=int8", f"--check={records}", "--check_pairs=3"]) == 0
    assert "13 target tokens: loss" in capsys.readouterr().out  # 4 + 5 + 4 with EOS
    assert generate_main([f"--checkpoint={out}", "--json", "--max_tokens=6", "two"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert 1 <= answer["tokens"] <= 6
    task = tmp_path / "tasks" / "validation" / "xsum.jsonl"
    task.parent.mkdir(parents=True)
    task.write_text('{"source": "two", "target": "blue"}\n' * 2)
    scored = tmp_path / "scored"
    assert (
        evaluate_main(
            [
                f"--checkpoint={out}",
                "--tasks=xsum",
                f"--out={scored}",
                f"--data_dir={tmp_path / 'tasks'}",
                "--resamples=10",
            ]
        )
        == 0
    )
    report = json.loads((scored / "report.json").read_text())
    assert report["model"]["name"] == out.name
    assert (
        report["model"]["origin"] == "exported as litert, int8, from run, imported from theirs (t5)"
    )
    expected = {"seed": 3, "seeds": [3, 4], "training_flops": 2.0}
    assert report["model"] | expected == report["model"]
    (out / "decoder.tflite").unlink()
    with pytest.raises(CheckpointError, match="decoder.tflite is missing"):
        LitertModel(out)


def test_what_the_graphs_cannot_express_is_refused_by_field(tmp_path):
    with pytest.raises(ConfigError, match="architecture is 'decoder_only'"):
        formats.write("litert", tmp_path / "x", formats.Export(*pair("llama"), PROMPTS))
