"""What adapted models compute next to their sources, in every family that is imported."""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from encdec.adapt.layer_choice import chosen_layers
from encdec.adapt.parameters import (
    Choice,
    adapted_config,
    origins,
    summary_text,
    table_text,
    values,
)
from encdec.errors import ConfigError
from encdec.interop.huggingface_import import read_config
from encdec.interop.layout import unflatten
from encdec.model import abstract_params, build_model, encoder_decoder, preset
from encdec.model.parameter_names import path_name
from tests.interop.test_huggingface_import import MODELS, SIZE, transformers

LENGTH = 12


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(build_model(config)))
    return {path_name(p): rng.normal(0, 0.2, x.shape).astype(np.float32) for p, x in leaves}


def adapt(config, flat, choice):
    adapted = adapted_config(config, config, choice)
    table = origins(adapted, choice)
    found = values(table, {"encoder": flat, "decoder": flat}, adapted, choice.seed)
    return adapted, unflatten(found), table


def fields(config, tokens):
    places = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    one = {"input_tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": places}
    sides = ("encoder", "decoder") if config.is_encoder_decoder else ("decoder",)
    return {f"{side}_{name}": value for side in sides for name, value in one.items()}


@functools.cache
def imported(name):
    """Our configuration of a family's small model."""
    kind, settings = MODELS[name]
    written = getattr(transformers, f"{kind}Config")(**(SIZE | settings)).to_dict()
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(written))
        return read_config(pathlib.Path(folder)).model.replace(dtype="float32")


def distinct_families():
    """One family of each kind of computation: other numbers are no other kind."""
    found = {}
    for name in MODELS:
        fields = imported(name).to_dict()
        kind = {k: bool(v) if isinstance(v, float | int | tuple) else v for k, v in fields.items()}
        found.setdefault(json.dumps(kind), name)
    return list(found.values())


@pytest.mark.parametrize("name", distinct_families())
def test_a_silent_cross_attention_and_a_causal_encoder_give_the_source(name, monkeypatch):
    source = imported(name)
    flat = random_params(source)
    every = tuple(range(source.decoder_layers))
    adapted, params, _ = adapt(source, flat, Choice(every, every, "zero"))
    tokens = np.random.default_rng(1).integers(1, source.vocab_size, (2, LENGTH))
    two_sided = encoder_decoder.packed_self_attention
    one_sided = lambda *arguments, **settings: two_sided(*arguments, **settings | {"causal": True})

    def both(ours, theirs):
        model, batch = build_model(source), fields(source, tokens)
        logits = model.apply({"params": theirs}, batch)
        hidden = model.apply({"params": theirs}, batch, method="hidden")
        batch = fields(adapted, tokens)
        places = [batch[f"encoder_{x}"] for x in ("input_tokens", "segment_ids", "positions")]
        found = build_model(adapted).apply({"params": ours}, batch)
        with monkeypatch.context() as patched:
            patched.setattr(encoder_decoder, "packed_self_attention", one_sided)
            causal = build_model(adapted).apply({"params": ours}, *places, method="encode")
        return logits, hidden, found, causal

    logits, hidden, found, causal = jax.jit(both)(params, unflatten(flat))
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(found, logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(causal, hidden, atol=1e-4, rtol=0)


DECODER = preset(
    "test",
    vocab_size=264,
    architecture="decoder_only",
    encoder_layers=0,
    decoder_layers=6,
    scan_layers=False,
    post_norms=True,
    norm_plus_one=True,
    qk_norm=True,
    tie_embeddings=False,
    attention_window=3,
    global_layer_every=3,
)


def test_every_parameter_is_the_one_that_the_table_names():
    flat = random_params(DECODER)
    choice = Choice((0, 2, 5), (1, 4), "self", "separate")
    config, params, table = adapt(DECODER, flat, choice)
    assert (config.encoder_layers, config.decoder_layers) == (3, 2)
    # Layers 2 and 5 of the source read all.
    assert (config.encoder_global_layers, config.decoder_global_layers) == ((1, 2), ())
    found = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    assert found.keys() == {one.name for one in table}
    for name, theirs in {
        "encoder/layers_1/self_attention/q/kernel": "decoder/layers_2/self_attention/q/kernel",
        "decoder/layers_1/self_attention/o/bias": "decoder/layers_4/self_attention/o/bias",
        "decoder/layers_1/encoder_attention/o/bias": "decoder/layers_4/self_attention/o/bias",
        "decoder/layers_0/encoder_attention/k_norm/scale": (
            "decoder/layers_1/self_attention/k_norm/scale"
        ),
        "decoder/layers_0/cross_attention_norm/scale": "decoder/layers_1/self_attention_norm/scale",
        "decoder/layers_0/cross_attention_post_norm/scale": (
            "decoder/layers_1/self_attention_post_norm/scale"
        ),
        "encoder/final_norm/scale": "decoder/final_norm/scale",
        "encoder_embedder/embedding": "embedder/embedding",
        "embedder/head": "embedder/head",
    }.items():
        np.testing.assert_array_equal(found[name], flat[theirs], err_msg=name)
        assert next(one for one in table if one.name == name).source == theirs
    assert {one.how for one in table} == {"copied"}
    # With one table for both sides there is nothing of an encoder's own.
    shared = adapt(DECODER, flat, Choice((0,), (1,)))[2]
    assert [one.name for one in shared if one.how == "shared"] == ["embedder/embedding"]


def test_the_summary_says_which_layers_went_where():
    source = DECODER.replace(decoder_layers=12)
    choice = Choice((0, 1, 2, *range(5, 12)), (11,), "zero", "separate")
    table = origins(adapted_config(source, source, choice), choice)
    lines = summary_text(table, {"encoder": "runs/a", "decoder": "runs/b"}).splitlines()
    found = [" ".join(line.split()) for line in lines]
    assert "decoder cross_attention 0 32 constant -1" in found  # the norm's scale, to be silent
    [one] = [line for line in found if line.startswith("encoder mlp")]
    assert one.startswith("encoder mlp 0-9") and one.endswith("runs/a: decoder mlp 0-2, 5-11")
    assert any(line.endswith("runs/b: decoder mlp 11") for line in found)
    places = {"encoder": "runs/a", "decoder": "runs/b"}
    assert len(lines) < 16 and lines[-1] == table_text(table, places).splitlines()[-1]


def test_merged_attention_needs_no_parameters_and_without_a_source_is_the_source():
    flat = random_params(DECODER)
    every = tuple(range(DECODER.decoder_layers))
    config, params, table = adapt(DECODER, flat, Choice((0,), every, "merged"))
    theirs = {one.source: one.name for one in table if one.name.startswith("decoder/")}
    assert theirs == {name: name for name in flat if name.startswith("decoder/")}
    tokens = np.random.default_rng(1).integers(1, DECODER.vocab_size, (2, LENGTH))
    batch = fields(config, tokens)
    batch["encoder_segment_ids"] = np.zeros_like(tokens)  # nothing but padding

    def both(ours, params):
        found = build_model(config).apply({"params": ours}, batch)
        return found, build_model(DECODER).apply({"params": params}, fields(DECODER, tokens))

    found, wanted = jax.jit(both)(params, unflatten(flat))
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def test_fresh_cross_attention_is_drawn_by_the_seed():
    flat = random_params(DECODER)
    cross = "decoder/layers_1/encoder_attention/"
    drawn = {}
    for how, seed in (("random", 0), ("random", 0), ("random", 1)):
        _, params, table = adapt(DECODER, flat, Choice((0,), (1, 2), how, seed=seed))
        found = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
        drawn.setdefault((how, seed), []).append(found)
        kinds = {one.how for one in table if one.name.startswith(cross)}
        assert kinds == {"drawn", "constant"}
    first, again = drawn["random", 0]
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    other = drawn["random", 1][0]
    assert not np.array_equal(first[cross + "q/kernel"], other[cross + "q/kernel"])
    assert abs(first[cross + "q/kernel"].std() / DECODER.init_std - 1) < 0.2


@pytest.mark.parametrize("post_norms", [True, False])
def test_zero_starts_from_self_attention_read_behind_the_encoders_norm(post_norms):
    source = DECODER.replace(post_norms=post_norms, norm_plus_one=post_norms)
    flat = random_params(source)
    _, params, table = adapt(source, flat, Choice((0,), (1, 2), "zero"))
    found = {path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}
    here, there = "decoder/layers_1/encoder_attention/", "decoder/layers_2/self_attention/"
    one = 1.0 if post_norms else 0.0
    inputs = np.random.default_rng(3).normal(0, 1, (5, source.d_model))
    inputs /= np.sqrt(np.mean(inputs**2, axis=-1, keepdims=True))
    own = inputs * (flat["decoder/layers_2/self_attention_norm/scale"] + one)
    encoded = inputs * (found["encoder/final_norm/scale"] + one)
    for name in ("k/kernel", "v/kernel"):
        wanted = np.einsum("xm,mhd->xhd", own, flat[there + name])
        np.testing.assert_allclose(
            np.einsum("xm,mhd->xhd", encoded, found[here + name]), wanted, atol=1e-4
        )
        assert next(one for one in table if one.name == here + name).how == "scaled"
    np.testing.assert_array_equal(found[here + "q/kernel"], flat[there + "q/kernel"])
    # A norm behind the projection would blow up what grows from zero: its scale is zero instead.
    assert found[here + "o/kernel"].any() == post_norms
    assert found[here + "o/bias"].any() == post_norms
    if post_norms:
        assert (found["decoder/layers_1/cross_attention_post_norm/scale"] == -1).all()


@pytest.mark.parametrize(
    "choice, wanted",
    [
        ("all", (0, 1, 2, 3, 4, 5, 6)),
        ("4", (0, 2, 4, 6)),
        ("even:3", (0, 3, 6)),
        ("even:1", (0,)),
        ("first:2", (0, 1)),
        ("last:2", (5, 6)),
        ("0,2,4-6", (0, 2, 4, 5, 6)),
        ("list:3", (3,)),
    ],
)
def test_rules_of_selection(choice, wanted):
    assert chosen_layers(choice, 7, "--encoder_layers", "runs/a") == wanted


@pytest.mark.parametrize(
    "choice, message",
    [
        ("8", "--encoder_layers asks for 8 layers, but runs/a has 7"),
        ("last:0", "expected 1 to 7"),
        ("2,7", "names layer 7, but runs/a has layers 0 to 6"),
        ("2,1", "ascending order"),
        ("0,3-2", "ascending order"),
        ("0-2,2", "ascending order"),
        ("0-99999999999999", "names layer 99999999999999, but runs/a has layers 0 to 6"),
        ("middle:3", "expected all, N"),
        ("", "expected all, N"),
    ],
)
def test_layers_that_are_not_there_are_refused(choice, message):
    with pytest.raises(ConfigError, match=message):
        chosen_layers(choice, 7, "--encoder_layers", "runs/a")
