"""ONNX graphs in onnxruntime against our own model: logits, answers, quantised weights."""

from __future__ import annotations

import json

import numpy as np
import pytest

from encdec.data.chat_template import TEMPLATE_FILE
from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import ConfigError, DataError
from encdec.export import formats, quality
from encdec.export.export_command import main
from encdec.inference.generate_command import main as generate_main
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.generator import Generator, TextGenerator
from encdec.interop.framing import Framing
from encdec.interop.importing import write_model
from encdec.model import unroll_params
from tests.export.examples import PROMPTS, pair
from tests.inference.examples import START
from tests.train.conftest import write_records

pytest.importorskip("onnx", reason="needs onnx: the extra onnx of setup.py")
pytest.importorskip("onnxruntime", reason="needs onnxruntime: the extra onnx of setup.py")

from encdec.export.quantise import eight_bits, in_blocks
from encdec.inference import onnx_runtime
from encdec.inference.exported import ExportedRows
from encdec.inference.onnx_runtime import OnnxModel

TEXTS = ["a hare", "and a tortoise", "two"]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A work directory's vocabulary, and what its config.json says of the data."""
    folder = tmp_path_factory.mktemp("vocabulary")
    spec = PROMPTS.vocabulary.save(folder)
    return folder, {
        "format_version": 1,
        "data": {
            "vocabulary": spec.to_dict(),
            "decoder_start_id": START,
            "inputs_eos": True,
            "inputs_length": 64,
            "targets_length": 12,
        },
    }


def export(name, content, out, precision="float32"):
    folder, values = content
    formats.write("onnx", out, formats.Export(*pair(name), PROMPTS, precision, values, folder))
    return OnnxModel(out, threads=1)


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
        "windowed",
        "windowed pair",
        "from zero",
        "merged, continued",
        "of later families",
        "t5gemma2",
        "stretched",
        "stretched by pairs",
    ],
)
def test_float32_graphs_compute_our_logits(name, content, tmp_path):
    model = export(name, content, tmp_path / "onnx")
    found = quality.measure(model, *pair(name), pairs(), START)
    assert found.largest_difference < 1e-4 and found.agreement == 1
    assert abs(found.loss - found.reference_loss) < 1e-4


@pytest.mark.parametrize("name", ["paper", "windowed", "merged, continued"])
def test_answers_are_ours(name, content, tmp_path, monkeypatch):
    """Rows of unlike lengths, with the growing cache, and several samples of each; with drafts
    too, whose rejected tokens leave the cache at once."""
    monkeypatch.setattr(onnx_runtime, "MOST_WASTED", 2)
    model = export(name, content, tmp_path / "onnx")
    ours = Generator(*pair(name), PROMPTS, max_tokens=8)
    theirs, drafted = (
        TextGenerator(ExportedRows(model, draft), PROMPTS, max_tokens=8, batch_rows=16)
        for draft in ("off", "lookup")
    )
    sampled = GenerationSettings(temperature=0.7, top_k=20, samples=2, seed=3)
    for settings in (GenerationSettings(), sampled)[: 1 + (name == "paper")]:
        for a, b in zip(ours.generate(TEXTS, settings), theirs.generate(TEXTS, settings)):
            assert [one.tokens for one in a] == [one.tokens for one in b]
            np.testing.assert_allclose(a[0].log_probs, b[0].log_probs, atol=1e-4)
        for a, b in zip(theirs.generate(TEXTS, settings), drafted.generate(TEXTS, settings)):
            assert [one.tokens for one in a] == [one.tokens for one in b]
            np.testing.assert_allclose(a[0].log_probs, b[0].log_probs, atol=1e-5)
    assert any(pace.steps for pace in drafted.paces.all)
    with pytest.raises(ConfigError, match="--draft=x is a draft model, which an export cannot use"):
        ExportedRows(model, "x")
    with pytest.raises(ConfigError, match="no beam search"):
        theirs.generate(TEXTS, GenerationSettings(beams=2))
    text = theirs.generate(["a hare"])[0][0].text
    assert text == "".join(theirs.stream("a hare"))


def test_quantised_weights_are_near(rng=np.random.default_rng(0)):
    kernel = rng.normal(size=(70, 5)).astype(np.float32)
    levels, scales = eight_bits(kernel, axis=0)
    assert np.abs(levels * scales - kernel).max() <= scales.max() / 2 + 1e-6
    blocks = in_blocks(kernel.T, 32)
    assert blocks.shape == (5, 3, 32) and not blocks[:, 2, 6:].any()
    levels, scales = eight_bits(blocks, axis=-1)
    assert (np.abs(levels * scales - blocks) <= scales / 2 + 1e-6).all()


@pytest.mark.parametrize("name", ["paper", "llama"])
def test_quantised_graphs_are_the_quantised_model(name, content, tmp_path):
    """Sizes shrink as bits do, and losses move less than random weights would by chance."""
    sizes = {}
    for precision, most in (("float32", 1e-4), ("int8", 0.01), ("int4", 0.1)):
        model = export(name, content, tmp_path / precision, precision)
        found = quality.measure(model, *pair(name), pairs(), START)
        assert abs(found.loss / found.reference_loss - 1) < most, found
        sizes[precision] = sum(
            path.stat().st_size for path in (tmp_path / precision).glob("*.data")
        )
    assert sizes["int4"] <= sizes["int8"] < sizes["float32"] / 2


def test_from_checkpoint_to_answer(tmp_path, capsys):
    """One command each: export with its quality on records, then generate."""
    records = write_records(tmp_path / "records", [[("one fish", "red"), ("two", "blue")]] * 2)
    config, params = pair("paper")
    write_model(
        tmp_path / "run",
        config.replace(scan_layers=False),
        unroll_params(params, config),
        source={"format": "hf", "family": "t5", "name": "theirs"},
        vocabulary=ByteVocabulary(),
        framing=Framing(START),
        max_length=64,
        texts={TEMPLATE_FILE: "{{ messages }}"},
    )
    out = tmp_path / "int8"
    arguments = [f"--checkpoint={tmp_path / 'run'}", "--format=onnx", f"--out={out}"]
    assert main([*arguments, "--precision=int8", f"--check={records}", "--check_pairs=3"]) == 0
    assert "13 target tokens: loss" in capsys.readouterr().out  # 4 + 5 + 4 with EOS
    assert (out / TEMPLATE_FILE).read_text() == "{{ messages }}"
    assert generate_main([f"--checkpoint={out}", "--json", "--max_tokens=6", "two"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert 1 <= answer["tokens"] <= 6
    with pytest.raises(ConfigError, match="is not empty"):
        main(arguments)
    with pytest.raises(ConfigError, match="leave step out"):
        generate_main([f"--checkpoint={out}", "--step=3", "x"])
    with pytest.raises(ConfigError, match="does not go with"):
        main([*arguments[:2], f"--out={tmp_path / 'x'}", "--precision=bfloat16"])
    with pytest.raises(DataError):
        main([*arguments[:2], f"--out={tmp_path / 'x'}", f"--check={tmp_path / 'nothing'}"])
    assert not (tmp_path / "x").exists()
