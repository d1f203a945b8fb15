"""From a decoder-only model's directory through adaptation and training to transformers."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from encdec.adapt import adapting
from encdec.adapt.adapt_command import main as adapt_main
from encdec.adapt.adapting import TABLE_FILE, carry_out, make_plan
from encdec.adapt.parameters import Choice
from encdec.adapt.sources import AdaptationSource, open_source
from encdec.cli import main as encdec
from encdec.data.prepare import prepare
from encdec.data.records import open_records, read_card
from encdec.data.teacher_rows import open_teacher
from encdec.data.verify import verify_records
from encdec.data.vocabulary import CARD_FILE, ByteVocabulary
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.errors import CheckpointError, ConfigError, DataError, EncdecError
from encdec.export.export_command import main as export_main
from encdec.inference.generator import read_prompt_format
from encdec.interop.framing import Framing
from encdec.interop.importing import write_model
from encdec.interop.layout import unflatten
from encdec.model import build_model, preset
from encdec.model.parameter_names import path_name
from encdec.saved.lineage import Lineage, lineage
from encdec.saved.saved_config import origin, read_config
from encdec.saved.saved_params import load_params_for_inference
from encdec.train.job import check_records
from encdec.train.loop import train
from tests.adapt.test_parameters import fields, random_params
from tests.devices import one_device
from tests.train.conftest import random_pairs, small_run, write_records

# Of Gemma 2's shape: what T5Gemma is made of.
GEMMA = preset(
    "test",
    vocab_size=264,
    architecture="decoder_only",
    encoder_layers=0,
    decoder_layers=3,
    scan_layers=False,
    kv_pairing="grouped",
    qkv_bias=False,
    attention_out_bias=False,
    mlp_bias=False,
    mlp_gated=True,
    post_norms=True,
    norm_plus_one=True,
    norm_cast="after_scale",
    embedding_scale=True,
    attention_logit_cap=50.0,
    final_logit_cap=30.0,
    attention_window=128,
    global_layer_every=2,
)


def write_source(directory, config=GEMMA, vocabulary=None, seed=0, **framing):
    write_model(
        directory,
        config,
        unflatten(random_params(config, seed)),
        source={"format": "hf", "family": "gemma2", "name": "gemma"},
        vocabulary=vocabulary or ByteVocabulary(4),
        framing=Framing(2, **framing),
        max_length=128,
    )
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "model", inputs_prefix=(7,))


def test_sources_that_cannot_be_adapted_are_refused_before_anything_is_written(source, tmp_path):
    adapted = tmp_path / "adapted"
    assert adapt_main([str(source), f"--out={adapted}", "--decoder_layers=1"]) == 0
    wider = write_source(tmp_path / "wider", GEMMA.replace(d_model=48))
    other = write_source(tmp_path / "other", vocabulary=ByteVocabulary(5))
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "llama"}')
    for options, kind, message in (
        ([adapted], ConfigError, "is already an encoder-decoder"),
        ([tmp_path], CheckpointError, "not the work directory"),
        ([theirs], CheckpointError, f"Hugging Face model's .* encdec import {theirs} --out=DIR"),
        ([source, "--encoder_layers=4"], ConfigError, "asks for 4 layers, but .* has 3"),
        ([source, f"--encoder_source={wider}"], ConfigError, "d_model is 48 in the encoder's"),
        ([source, f"--encoder_source={other}"], DataError, "the vocabularies differ"),
        ([source, f"--encoder_source={adapted}"], ConfigError, "already an encoder-decoder"),
        ([source, "--step=3"], EncdecError, "has no checkpoint 3"),
        ([source, "--extra_ids=2"], ConfigError, "has 4 already"),
        ([source, "--step=0"], EncdecError, "no checkpoint 0; leave --step out"),
        (
            [source, f"--encoder_source={source}", "--encoder_step=2"],
            EncdecError,
            "no checkpoint 2; leave --encoder_step out",
        ),
        ([source, "--encoder_step=2"], ConfigError, "no effect without --encoder_source"),
        ([source, "--seed=2"], ConfigError, "--seed=2, but nothing is random here"),
        (
            [source, f"--encoder_source={wider}", "--embeddings=shared"],
            ConfigError,
            "expected --embeddings=separate",
        ),
    ):
        with pytest.raises(kind, match=message):
            adapt_main([*map(str, options), f"--out={out}"])
        assert not out.exists(), options
    for target in (source, adapted):
        with pytest.raises(ConfigError, match="is a source|is not empty"):
            adapt_main([str(source), f"--out={target}"])
    nested = write_source(adapted / "source")
    with pytest.raises(ConfigError, match="is a source, or holds one"):
        adapt_main([str(nested), f"--out={adapted}", "--overwrite"])
    assert (source / "config.json").exists()


def test_what_travels_with_the_parameters(source, tmp_path, capsys):
    (source / "chat_template.jinja").write_text("{{ messages }}")
    # Its texts begin with a sentinel, whose id becomes another.
    second = write_source(tmp_path / "second", seed=1, inputs_prefix=(260,))
    out = tmp_path / "out"
    command = ["adapt", str(source), f"--out={out}", f"--encoder_source={second}"]
    assert encdec([*command, "--encoder_layers=last:1", "--extra_ids=10"]) == 0
    shown = capsys.readouterr().out
    table = (out / TABLE_FILE).read_text()
    assert str(out / TABLE_FILE) in shown and len(shown.splitlines()) < 20
    assert f"{second}: decoder/layers_2/mlp/up/kernel" in table
    content = read_config(out)
    was = read_config(source)["data"]
    for name in ("decoder_start_id", "inputs_eos", "targets_length"):
        assert content["data"][name] == was[name]
    assert content["data"]["inputs_prefix"] == [2, 266]  # of the encoder's source
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert content["data"]["vocabulary"]["extra_ids"] == 10
    assert lineage(out, 0).training_flops is None  # nobody knows what these cost
    # The new sentinels are in front of those that were there, the last id the same as before.
    config, params, _ = load_params_for_inference(out)
    _, before, _ = load_params_for_inference(source)
    _, encoders, _ = load_params_for_inference(second)
    size = ByteVocabulary(4).size
    assert config.vocab_size == max(264, size + 6)
    for ours, theirs in ((params["embedder"], before), (params["encoder_embedder"], encoders)):
        rows, old = np.asarray(ours["embedding"]), np.asarray(theirs["embedder"]["embedding"])
        np.testing.assert_array_equal(rows[: size - 4], old[: size - 4])
        np.testing.assert_array_equal(rows[size + 2 : size + 6], old[size - 4 : size])
        assert np.abs(rows[size - 4 : size + 2]).max(1).min() > 0
    assert params["encoder"]["layers_0"]["mlp"]["up"]["kernel"].shape == (32, GEMMA.mlp_dim)


def test_two_checkpoints_of_one_run_are_two_sources(source, monkeypatch):
    """Each side from its own, with the cost of the later one, however the directory is spelled."""
    early = dataclasses.replace(open_source(source, None, "the source"), step=1)
    late = dataclasses.replace(early, directory=source / ".." / source.name, step=2)
    filled = lambda one: {name: x * 0 + one.step for name, x in random_params(GEMMA).items()}
    monkeypatch.setattr(AdaptationSource, "parameters", filled)
    seeds = {source.name: 5, "x": 6}
    line = lambda one: Lineage(10.0 * one.step, (seeds[one.directory.name],))
    monkeypatch.setattr(AdaptationSource, "lineage", line)
    for decoder, encoder in ((late, early), (early, late), (late, late)):
        plan = make_plan(decoder, encoder, Choice((0,), (1,), "self", "separate"))
        params = carry_out(plan)
        for stack, wanted in (("encoder", encoder), ("decoder", decoder)):
            assert set(np.ravel(params[stack]["layers_0"]["mlp"]["up"]["kernel"])) == {wanted.step}
        assert adapting.joined([decoder, encoder]) == Lineage(20.0, (5,))
        assert (f"{encoder.directory}, step 1: " in plan.text()) == (encoder is early)
    other = dataclasses.replace(early, directory=source.with_name("x"))
    assert adapting.joined([late, other]) == Lineage(30.0, (5, 6))
    assert adapting.joined([other, late]) == Lineage(30.0, (6, 5))


HOLD, STEPS = 2, 4
LENGTHS = {"inputs_length": 24, "targets_length": 12, "workers": 1}


def pairs_file(folder):
    """JSONL with the pairs of random rows."""
    file = folder / "pairs.jsonl"
    pairs = [pair for row in random_pairs(40, 0) for pair in row]
    lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    file.write_text("\n".join(lines))
    return str(file)


@pytest.fixture(scope="module")
@one_device()
def trained(source, tmp_path_factory):
    """An adapted model's run with all but cross-attention held at first, and its settings."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["--cross_attention=random", "--encoder_layers=1", "--decoder_layers=first:2"]
    assert adapt_main([str(source), f"--out={folder / 'adapted'}", *options]) == 0
    records = folder / "records"
    prepare(out=records, vocabulary=folder / "adapted", jsonl=[pairs_file(folder)], **LENGTHS)
    run = small_run(
        records,
        steps=STEPS,
        batch_size=8,
        init_from=str(folder / "adapted"),
        init_architecture="source",
        model_overrides={"mlp_dropout": 0.1},
        freeze={"parameters": "*,!*/encoder_attention/*", "steps": HOLD},
        optimizer={"factors": "encoder/*=0.5"},
    )
    run["model_overrides"].pop("vocab_size")  # the source says how many rows its tables have
    train(run, folder / "run")
    return folder, run


def flat(workdir, step=None):
    _, params, _ = load_params_for_inference(workdir, step)
    return {path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}


def test_the_sources_start_and_prefix_are_in_front_of_every_input(trained):
    """In records, in the run, and in the texts that its model and its exports read."""
    folder, _ = trained
    card = read_card(folder / "records")
    assert (card.decoder_start_id, card.inputs_prefix) == (2, (2, 7))
    assert not verify_records(folder / "records", sample_rows=None).faults
    prompts, _ = read_prompt_format(folder / "run")
    assert prompts.encode("ab")[0] == [2, 7, *ByteVocabulary().encode("ab"), 1]
    assert read_config(folder / "run")["data"]["inputs_prefix"] == [2, 7]


def test_what_a_run_is_made_from_is_told_whatever_its_preset(trained, tmp_path):
    """Its own directory's name, and all that is before it, also where that is no longer there."""
    folder, _ = trained
    content = read_config(folder / "run")
    assert origin(content) == "trained from adapted, adapted from gemma"
    command = [f"--checkpoint={folder / 'run'}", "--format=encdec", f"--out={tmp_path / 'small'}"]
    assert export_main(command) == 0
    card = (tmp_path / "small" / "README.md").read_text()
    assert "\n# run\n" in card and "\nTrained from adapted, adapted from gemma.\n" in card
    assert origin(read_config(tmp_path / "small")) == (
        "exported as encdec, float32, from run, trained from adapted, adapted from gemma"
    )
    assert content["run"]["model"] not in card


@pytest.mark.usefixtures("one_device")
def test_a_source_teaches_texts_as_it_reads_them(source, trained, tmp_path):
    """Its own start and prefix once, whatever the records have in front of their sources."""
    folder, _ = trained
    kept = {}
    for name, prefix in (("whole", (2, 7)), ("bare", ()), ("other", (5, 6, 7, 8))):
        records = tmp_path / name
        prepare(
            out=records,
            vocabulary=folder / "adapted",
            jsonl=[pairs_file(tmp_path)],
            inputs_prefix=prefix,
            packing="none",
            max_examples=8,
            **LENGTHS,
        )
        store_teacher_logits(
            teacher=source, records=records, out=tmp_path / "stored", method="full", overwrite=True
        )
        taught = open_teacher(tmp_path / "stored", open_records(records))
        kept[name] = taught.fields(np.arange(8))["teacher_log_probs"]
        np.testing.assert_allclose(kept[name], kept["whole"], atol=1e-5)
    bare = open_records(tmp_path / "bare")
    with pytest.raises(DataError, match=r"read other records than .*bare: records fingerprint"):
        open_teacher(tmp_path / "stored", bare)
    # The prefix may be all that differs, and records of before there was one have no such field.
    stated = json.loads((tmp_path / "bare" / CARD_FILE).read_text())
    del stated["inputs_prefix"]
    (tmp_path / "bare" / CARD_FILE).write_text(json.dumps(stated))
    assert read_card(tmp_path / "bare") == bare.card
    assert not verify_records(tmp_path / "bare").faults
    with pytest.raises(DataError, match=r"inputs_prefix is \[\] in the held-out records"):
        check_records(GEMMA, read_card(tmp_path / "whole"), bare.card)


@pytest.mark.usefixtures("one_device")
def test_a_run_that_is_cut_around_the_switch_ends_in_the_same_bits(trained, tmp_path):
    folder, run = trained
    first = flat(folder / "adapted")
    for stop in (HOLD - 1, HOLD, HOLD + 1, None):
        train(run, tmp_path / "run", stop_at=stop)
        now = flat(tmp_path / "run")
        for name, value in now.items():
            moved = not np.array_equal(value, first[name].astype(value.dtype))
            if stop and stop <= HOLD:
                assert moved == ("encoder_attention" in name), (stop, name)
    whole = flat(folder / "run")
    assert whole.keys() == now.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(now[name], value, err_msg=name)


def agrees_with_transformers(run, directory):
    """What transformers computes from an export of the run is what we compute."""
    torch = pytest.importorskip("torch", reason="needs torch: the extra hf of setup.py")
    transformers = pytest.importorskip("transformers", reason="needs transformers: the extra hf")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory, dtype="float32")
    config, params, _ = load_params_for_inference(run)
    tokens = np.random.default_rng(0).integers(3, 259, (2, 9))
    ours = jax.jit(lambda p, b: build_model(config).apply({"params": p}, b))(
        params, fields(config, tokens)
    )
    with torch.no_grad():
        theirs = model.eval()(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            decoder_input_ids=torch.tensor(tokens),
        ).logits
    assert np.ptp(ours) > 1
    np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-4, rtol=0)


def test_a_trained_adaptation_is_a_t5gemma_of_transformers(trained, tmp_path):
    folder, _ = trained
    command = [f"--checkpoint={folder / 'run'}", "--format=hf", f"--out={tmp_path / 'hf'}"]
    assert export_main(command) == 0
    stated = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert stated["model_type"] == "t5gemma"
    assert stated["encoder"]["layer_types"] == ["sliding_attention"]
    kinds = ["sliding_attention", "full_attention"]
    assert stated["decoder"]["layer_types"] == kinds
    agrees_with_transformers(folder / "run", tmp_path / "hf")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = read_prompt_format(folder / "run")[0].encode("a b")[0]
    assert tokenizer("a b").input_ids == ids and tokenizer.pad_token_id not in ids


@pytest.mark.usefixtures("one_device")
def test_a_gemma_3_with_merged_attention_becomes_a_t5gemma_2_of_transformers(tmp_path):
    """Adapted, trained for three steps, exported."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: the extra hf")
    if not hasattr(transformers, "T5Gemma2Config"):
        pytest.skip("needs a transformers that has T5Gemma 2")
    gemma3 = GEMMA.replace(
        decoder_layers=2,
        attention_logit_cap=0.0,
        final_logit_cap=0.0,
        qk_norm=True,
        attention_scale=0.25,
        local_rope_theta=100.0,
        rope_scaling="linear",
        rope_factor=8.0,
    )
    adapted, run = tmp_path / "adapted", tmp_path / "run"
    source = write_source(tmp_path / "source", gemma3)
    options = ["--cross_attention=merged", "--embeddings=shared", "--encoder_layers=last:1"]
    assert adapt_main([str(source), f"--out={adapted}", *options]) == 0
    records = write_records(
        tmp_path / "records", random_pairs(24, 0), ByteVocabulary(4), start_id=2
    )
    settings = small_run(
        records, steps=3, batch_size=8, init_from=str(adapted), init_architecture="source"
    )
    settings["model_overrides"].pop("vocab_size")
    train(settings, run)
    before, after = flat(adapted), flat(run)
    assert not [name for name in after if "encoder_attention" in name]
    assert all(not np.array_equal(before[name], after[name]) for name in after)
    arguments = [f"--checkpoint={run}", "--format=hf", f"--out={tmp_path / 'hf'}"]
    assert export_main(arguments) == 0
    stated = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert stated["model_type"] == "t5gemma2"
    agrees_with_transformers(run, tmp_path / "hf")
