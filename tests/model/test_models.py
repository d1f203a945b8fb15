"""The models' behaviour: causality, no leaks in packed rows, equal layouts, cached decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.errors import ConfigError
from encdec.model import (
    ModelConfig,
    abstract_params,
    build_model,
    check_params,
    for_decoding,
    init_cache,
    init_params,
    logical_axes,
    parameter_count,
    preset,
    preset_names,
    scan_params,
    unroll_params,
)
from tests.model.examples import decoder_fields, drawn, packed_batch, segment

SMALL = preset("test").replace(kv_pairing="grouped")
DECODER_ONLY = dict(architecture="decoder_only", encoder_layers=0, decoder_layers=3)
VARIANTS = {
    "paper": preset("test"),
    "decoder_only": SMALL.replace(**DECODER_ONLY),
    "gemma": SMALL.replace(
        mlp_gated=True,
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        post_norms=True,
        norm_plus_one=True,
        embedding_scale=True,
        attention_logit_cap=50.0,
        final_logit_cap=30.0,
        qk_norm=True,
        tie_embeddings=False,
        cross_attention_rope="continued",
    ),
    "from_zero_cross": SMALL.replace(cross_attention_rope="from_zero", scan_layers=False),
    "ntk": SMALL.replace(rope_scaling="ntk", rope_factor=2.0, rope_max_length=4, rope_length=12),
    "merged": SMALL.replace(
        merged_attention=True, qk_norm=True, post_norms=True, cross_attention_rope="continued"
    ),
    "linear": SMALL.replace(rope_scaling="linear", rope_factor=4.0, attention_scale=0.5),
}


def apply(model, params, *args, **kwargs):
    """``model.apply`` in one compiled program, much quicker than one for each operation."""
    return jax.jit(lambda params, args: model.apply({"params": params}, *args, **kwargs))(
        params, args
    )


def make(config, seed=0, std=0.3):
    """Model, parameters with large random values (also biases), and a packed batch."""
    model = build_model(config)
    shapes = abstract_params(model)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, std, x.shape), x.dtype), shapes)
    batch = packed_batch(rng, 100, (5, 3), (4, 6), 10, 12)
    return model, params, batch if config.is_encoder_decoder else decoder_fields(batch)


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"ntk", "linear"}))
def test_causal_by_gradient_and_bidirectional_encoder(name):
    """d logit[t] / d decoder input[u] vanishes for u > t and for other segments, and only there.

    Scaled rotations only turn by other angles.
    """
    config = VARIANTS[name]
    model, params, batch = make(config)
    table = params["embedder"]["embedding"]

    def reached(side):
        """|d logits[0, t].sum() / d embedding of the token at place u|, as [T, U]."""
        width = batch[f"{side}_input_tokens"].shape[1]
        # Every place of row 0 gets an id of its own, so that the table's gradient tells places.
        tokens = np.array(batch[f"{side}_input_tokens"])
        ids = np.arange(100, 100 + width)
        tokens[0] = ids
        varied = dict(batch, **{f"{side}_input_tokens": tokens})

        def logits(rows):
            new = table.at[ids].set(rows)
            # The head must not see the changed rows: only the path through the inputs counts.
            hidden = model.apply(
                {"params": params | {"embedder": params["embedder"] | {"embedding": new}}},
                varied,
                method="hidden",
            )
            return hidden[0].sum(-1)

        return np.abs(np.asarray(jax.jit(jax.jacobian(logits))(table[ids]))).sum(-1)

    decoder = reached("decoder")
    segments = batch["decoder_segment_ids"][0]
    allowed = (segments[:, None] == segments) & np.tri(len(segments), dtype=bool)
    real = segments > 0
    assert (decoder[~allowed] == 0).all()
    assert (decoder[allowed & real[:, None]] > 0).all()
    if config.is_encoder_decoder:
        encoder = reached("encoder")
        same = segments[:, None] == batch["encoder_segment_ids"][0]
        assert (encoder[~same & real[:, None]] == 0).all()
        assert (encoder[same & real[:, None]] > 0).all()  # every source token, in both directions


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_packed_rows_equal_their_segments_alone(config):
    model, params, batch = make(config)
    packed = apply(model, params, batch)
    for number in (1, 2):
        if config.is_encoder_decoder:
            alone = segment(batch, number)
        else:
            mask = batch["decoder_segment_ids"][0] == number
            alone = {name: value[:, mask] for name, value in batch.items()}
        logits = apply(model, params, alone)
        inside = packed[:, batch["decoder_segment_ids"][0] == number]
        np.testing.assert_allclose(logits, inside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["paper", "decoder_only", "gemma", "merged"])
def test_scan_unroll_and_remat_give_the_same_gradients(name):
    config = VARIANTS[name].replace(scan_layers=True)
    model, params, batch = make(config)

    def gradients(config, params):
        model = build_model(config)

        def loss(params):
            logits = jax.nn.log_softmax(model.apply({"params": params}, batch))
            gold = jnp.take_along_axis(logits, batch["decoder_target_tokens"][..., None], -1)
            return -(gold[..., 0] * batch["decoder_loss_weights"]).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    value, wanted = gradients(config, params)
    others = [
        gradients(config.replace(remat=remat), params)
        for remat in (("dots", "attention") if name == "paper" else ())
    ]
    others.append(gradients(config.replace(remat="full", fuse_projections=True), params))
    loss, unrolled = gradients(
        config.replace(remat="full" if name == "paper" else "none", scan_layers=False),
        unroll_params(params, config),
    )
    others.append((loss, scan_params(unrolled, config)))
    # Some gradients are zero but for rounding, such as cross-attention's key biases, which add the
    # same to all logits of a query.
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(wanted))
    for other, gradient in others:
        np.testing.assert_allclose(other, value, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, rtol=1e-3, atol=2e-5 * float(np.abs(b).max()) + 1e-7 * largest
            ),
            gradient,
            wanted,
        )


@pytest.mark.parametrize(
    "config, unrolled",
    [
        (config, unrolled)
        for name, config in VARIANTS.items()
        for unrolled in (
            (False, True) if name in ("paper", "decoder_only") else (name in ("gemma", "merged"),)
        )
    ],
)
def test_cached_decoding_equals_the_full_pass(config, unrolled):
    """Rows of different lengths, decoded a few tokens at a time, against teacher forcing."""
    model, params, _ = make(config)
    rng = np.random.default_rng(1)
    lengths, width, capacity = [7, 4], 8, 9
    target = rng.integers(2, config.vocab_size, (2, capacity))
    positions = np.tile(np.arange(capacity), (2, 1))
    batch = {
        "encoder_input_tokens": rng.integers(2, config.vocab_size, (2, width)),
        "encoder_segment_ids": (np.arange(width) < np.array(lengths)[:, None]).astype(np.int32),
        "encoder_positions": np.tile(np.arange(width), (2, 1)),
        "decoder_input_tokens": target,
        "decoder_segment_ids": np.ones_like(target),
        "decoder_positions": positions,
    }
    full = apply(model, params, batch, method="hidden")
    if unrolled:
        config, params = for_decoding(config, params)
        model = build_model(config)
    source = None
    if config.is_encoder_decoder:
        source = apply(
            model,
            params,
            batch["encoder_input_tokens"],
            batch["encoder_segment_ids"],
            batch["encoder_positions"],
            method="source",
        )
    cache = init_cache(config, 2, capacity)
    step = jax.jit(
        lambda params, *args: model.apply({"params": params}, *args, method="decode_cached")
    )
    got, start = [], 0
    for count in (3, 1, 1, 3, 1):
        piece = slice(start, start + count)
        hidden, cache = step(params, target[:, piece], positions[:, piece], cache, source)
        got.append(hidden)
        start += count
    np.testing.assert_allclose(np.concatenate(got, 1), full, rtol=1e-4, atol=1e-5)


def test_tiled_and_grouped_pairing_are_permutations_of_each_other():
    """Query heads reordered as (h % K, h // K): the same function, which an importer relies on."""
    grouped = SMALL.replace(scan_layers=False, num_heads=4, num_kv_heads=2)
    model, params, batch = make(grouped)
    tiled = grouped.replace(kv_pairing="tiled")
    order = np.arange(4).reshape(2, 2).T.reshape(-1)  # tiled head h is grouped head order[h]

    def permute(path, leaf):
        names = [p.key for p in path]
        if names[-2] == "q":
            return leaf[..., order, :]
        if names[-2:] == ["o", "kernel"]:
            return leaf[order]
        return leaf

    permuted = jax.tree_util.tree_map_with_path(permute, params)
    wanted = apply(model, params, batch)
    np.testing.assert_allclose(
        apply(build_model(tiled), permuted, batch), wanted, rtol=1e-5, atol=1e-5
    )
    assert not np.allclose(apply(build_model(tiled), params, batch), wanted, atol=1e-2)


def test_dropout_is_random_and_off_when_deterministic():
    config = SMALL.replace(attention_dropout=0.5, mlp_dropout=0.5, residual_dropout=0.5)
    model, params, batch = make(config)
    run = jax.jit(
        lambda key: model.apply(
            {"params": params}, batch, deterministic=False, rngs={"dropout": jax.random.key(key)}
        )
    )
    assert np.array_equal(run(0), run(0))
    assert not np.allclose(run(0), run(1))
    np.testing.assert_array_equal(
        apply(model, params, batch), apply(build_model(SMALL), params, batch)
    )


@pytest.mark.parametrize("field", ["attention_dropout", "mlp_dropout", "residual_dropout"])
def test_the_decoder_of_an_encoder_decoder_has_dropout_of_its_own(field):
    model, params, batch = make(SMALL.replace(**{field: 0.5}))
    # Without what cross-attention adds, nothing of the encoder's randomness reaches the logits.
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if "encoder_attention']['o" in jax.tree_util.keystr(path) else x,
        params,
    )
    hidden = jax.jit(
        lambda key: model.apply(
            {"params": params},
            batch,
            deterministic=False,
            method="hidden",
            rngs={"dropout": jax.random.key(key)},
        )
    )
    assert not np.allclose(hidden(0), hidden(1))


def test_bfloat16_compute_stays_near_float32():
    model, params, batch = make(SMALL, std=0.1)
    low = build_model(SMALL.replace(dtype="bfloat16"))
    logits32, logits16 = apply(model, params, batch), apply(low, params, batch)
    assert logits16.dtype == jnp.float32
    assert np.corrcoef(np.ravel(logits32), np.ravel(logits16))[0, 1] > 0.999


def test_the_papers_model_has_its_parameters_and_axes():
    model = build_model(preset("330m"))
    params = abstract_params(model)
    assert parameter_count(params) == 332_042_240
    assert parameter_count(params["encoder"]) == 191_545_344
    assert parameter_count(params["decoder"]) == 107_597_824
    assert parameter_count(params["embedder"]) == 32_899_072
    jax.tree.map(
        lambda leaf, axes: pytest.fail(f"{leaf} {axes}") if len(leaf.shape) != len(axes) else None,
        params,
        logical_axes(model),
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.parametrize("name", ["330m", "test"])
def test_initial_loss_is_the_log_of_the_vocabulary(name):
    """At its widths, with fewer layers, yet so many that the token that was read no longer stands
    out in the decoder's outputs: its embedding is the head's, too."""
    config = preset(name, dtype="float32", encoder_layers=1, decoder_layers=6)
    model = build_model(config)
    batch = packed_batch(np.random.default_rng(0), config.vocab_size, (10,), (30,), 10, 30)

    @jax.jit
    def loss(key):
        logits = model.apply({"params": init_params(model, key)}, batch)
        gold = batch["decoder_target_tokens"][..., None]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), gold, -1).mean()

    # A generator that draws these hundred million numbers sooner than JAX's default.
    assert abs(loss(jax.random.key(0, impl="rbg")) / np.log(config.vocab_size) - 1) < 0.02


def test_presets_build_and_peers_match():
    for name in preset_names():
        config = preset(name)
        base = name.removesuffix("-dec-flops").removesuffix("-dec")
        assert config.is_encoder_decoder == (base == name)
        if name.endswith("-dec"):
            sizes = [parameter_count(abstract_params(build_model(preset(n)))) for n in (name, base)]
            assert abs(sizes[0] / sizes[1] - 1) < 0.01, name
        if "-tpu" in name:
            assert config.head_dim == 128
            assert all(
                getattr(config, f) % 128 == 0 for f in ("vocab_size", "d_model", "mlp_dim")
            ), name
    assert preset("330m-third").encoder_layers == 10 and preset("330m-third").decoder_layers == 20
    assert preset("330m-half").encoder_layers == preset("330m-half").decoder_layers == 15


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"d_modle": 8}, "did you mean 'd_model'"),
        ({"d_model": "8"}, "d_model is '8' (str); expected int"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3; expected a divisor of num_heads = 4"),
        ({"mlp_activation": "gelu_tan"}, "did you mean 'gelu_tanh'"),
        ({"mlp_dropout": 1.0}, "mlp_dropout is 1.0; expected a rate in [0, 1)"),
        ({"encoder_layers": 0}, "encoder_layers is 0; expected at least 1"),
        ({"head_dim": 7}, "head_dim is 7; expected an even number"),
        ({"rope_factor": 2.0}, "set rope_scaling"),
        ({"scan_layers": 1}, "scan_layers is 1 (int); expected bool"),
    ],
)
def test_bad_configurations_name_the_field_and_the_mend(changes, message):
    with pytest.raises(
        ConfigError, match=message.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")
    ):
        SMALL.replace(**changes)
    with pytest.raises(ConfigError, match="did you mean '330m-tpu'"):
        preset("330m-tpo")


def test_config_survives_a_round_trip_and_params_are_checked():
    config = VARIANTS["gemma"]
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig().replace(**config.changes_from(ModelConfig())) == config
    params = drawn(build_model(SMALL))
    check_params(params, SMALL)
    del params["encoder"]["final_norm"]
    params["decoder"]["surplus"] = jnp.zeros(3)
    with pytest.raises(ConfigError) as caught:
        check_params(params, SMALL.replace(vocab_size=300))
    text = str(caught.value)
    assert "missing encoder/final_norm/scale (32,)" in text
    assert "extra decoder/surplus (3,)" in text
    assert "embedder/embedding has shape (256, 32), expected (300, 32)" in text


def test_configs_of_earlier_versions_are_read():
    """They had the fields of execution next to the model's, and one that inference now chooses."""
    config = VARIANTS["gemma"].replace(scan_layers=False, remat="dots")
    values = config.to_dict()
    old = values | values.pop("execution") | {"kernel_parts": 0}
    del old["cpu_shards"], old["accumulate_in_float32"]
    assert ModelConfig.from_dict(old) == config
    with pytest.raises(ConfigError, match="no field 'kernel_parts'"):  # parameters in that layout
        ModelConfig.from_dict(old | {"kernel_parts": 2})
