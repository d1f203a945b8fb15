"""Our own export: the weights alone, in three precisions, and the model that comes with encdec."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from encdec import safetensors, shipped
from encdec.errors import CheckpointError, ConfigError
from encdec.export.export_model import export_model
from encdec.inference.generate_command import main as generate_main
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.load_generator import load
from encdec.inference.text_io import PromptFormat
from encdec.model import unroll_params
from encdec.saved.lineage import lineage
from encdec.saved.saved_config import PARAMS_FOLDER, origin, read_config
from encdec.saved.saved_params import load_params_for_inference
from tests.inference.conftest import LEARNED

QUESTIONS = [source for source, _ in LEARNED]


def answers(directory, **settings):
    made = load(directory).generate(QUESTIONS, GenerationSettings(max_tokens=8, **settings))
    return [row[0].text for row in made]


def leaves(params):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_what_is_written_answers_as_the_run_does(precision, encoder_decoder_run, tmp_path):
    out = tmp_path / precision
    report = export_model(encoder_decoder_run, out, format="encdec", precision=precision)
    config, params, step = load_params_for_inference(encoder_decoder_run)
    _, read, read_step = load_params_for_inference(out)
    assert (report.step, read_step) == (step, 0)
    size = report.written.bytes / sum(leaf.size for leaf in leaves(params))
    assert size < {"float32": 4.2, "bfloat16": 2.2, "int8": 1.5}[precision]
    for x, y in zip(leaves(unroll_params(params, config)), leaves(read), strict=True):
        allowed = 0.0
        if precision == "bfloat16":
            allowed = np.abs(x).max() * 2.0**-8
        elif precision == "int8" and x.ndim > 1:
            allowed = np.abs(x).max(axis=-1, keepdims=True) / 127 * 0.501
        assert (np.abs(x - np.asarray(y, np.float32)) <= allowed).all()
    assert answers(out) == [target for _, target in LEARNED]
    assert lineage(out, 0) == lineage(encoder_decoder_run, step)


def test_it_is_written_again_and_damage_is_named(encoder_decoder_run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    export_model(encoder_decoder_run, first, format="encdec", precision="int8")
    export_model(first, second, format="encdec", precision="float32")
    again = [load_params_for_inference(path)[1] for path in (first, second)]
    for x, y in zip(*map(leaves, again), strict=True):
        np.testing.assert_array_equal(x, y)
    content, run = read_config(second), encoder_decoder_run.name
    assert content["imported"]["name"] == "first"
    first_is = f"exported as encdec, int8, from {run}"
    assert origin(content) == f"exported as encdec, float32, from first, {first_is}"
    tensors = dict(safetensors.open_directory(first / PARAMS_FOLDER))
    lost = next(name for name in tensors if name.endswith(".scale") and name[:-6] in tensors)
    kept = {name: np.array(x) for name, x in tensors.items() if name != lost}
    shutil.rmtree(first / PARAMS_FOLDER)
    safetensors.write_directory(first / PARAMS_FOLDER, kept)
    with pytest.raises(CheckpointError, match=rf"{lost[:-6]} in .* is int8 with no scale"):
        load_params_for_inference(first)


def test_a_template_goes_around_a_text_once(encoder_decoder_run, tmp_path, capsys):
    out = tmp_path / "framed"
    export_model(encoder_decoder_run, out, format="encdec", template="{source} fish")
    assert answers(out)[0] == "red."  # "one fish" has the form already
    assert not generate_main([f"--checkpoint={out}", "--max_tokens=8", "one"])
    assert capsys.readouterr().out.strip() == "red."
    assert "{source} fish" in (out / "README.md").read_text()
    again = tmp_path / "again"
    export_model(out, again, format="encdec")
    assert read_config(again)["data"]["template"] == "{source} fish"
    for format, template, message in (
        ("hf", "{source}", "format is hf"),
        ("encdec", "no place", "0 times"),
        ("encdec", "{source} {source}", "2 times"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_model(encoder_decoder_run, tmp_path / "bad", format=format, template=template)
    assert not (tmp_path / "bad").exists()


def test_a_text_that_has_one_side_of_the_form_only_is_framed():
    form = PromptFormat(None, template="A {source} B")
    assert form.framed("x") == "A x B" == form.framed("A x B")
    assert form.framed("A x") == "A A x B"
    assert form.framed("A  B") == "A  B"
    assert form.framed("A B") == "A A B B"  # the sides overlap: there is no place for a text


def test_the_model_that_comes_along_translates_java_to_c_sharp(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.models() == ["java2cs"]
    assert not generate_main(["--checkpoint=java2cs", "public String getName() { return name; }"])
    assert (
        capsys.readouterr().out.split() == "public virtual string GetName(){return name;}".split()
    )
    # A directory of the same name comes first.
    (tmp_path / "java2cs").mkdir()
    assert shipped.model_directory("java2cs") == "java2cs"
    assert shipped.model_directory("java2sc") == "java2sc"


def test_the_shipped_model_has_a_whole_card():
    directory = shipped.model_directory("java2cs")
    card = (shipped.pathlib.Path(directory) / "README.md").read_text()
    for part in ("C-UDA", "CodeXGLUE", "## Scores", "## Limits", "license"):
        assert part in card
    config = json.loads((shipped.pathlib.Path(directory) / "config.json").read_text())
    assert f"{config['imported']['parameters']:,} parameters" in card
