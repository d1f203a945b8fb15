"""Fused attention against plain XLA: forward and gradients, packed, grouped, causal, on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from encdec.errors import ConfigError
from encdec.model import ModelConfig, build_model, preset
from encdec.model.attention import dot_product_attention, segment_mask
from encdec.model.kernels import resolve_kernel, splash_attention
from tests.model.examples import drawn, packed_batch

CONFIG = ModelConfig(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")


def operands(config, rng, length, kv_length, rows=2):
    shapes = (
        (length, config.num_heads),
        (kv_length, config.num_kv_heads),
        (kv_length, config.num_kv_heads),
    )
    arrays = [
        jnp.asarray(rng.normal(size=(rows, *shape, config.head_dim)), jnp.float32)
        for shape in shapes
    ]
    cuts = lambda n: jnp.asarray(
        np.tile(np.repeat([1, 2, 0], [n // 2, n // 4, n - n // 2 - n // 4]), (rows, 1)), jnp.int32
    )
    return arrays, (cuts(length), cuts(kv_length))


@pytest.mark.parametrize(
    "causal, length, kv_length, changes",
    [
        (True, 256, 256, {}),
        (False, 256, 256, {"kv_pairing": "tiled"}),
        (
            False,
            40,
            150,
            {"attention_logit_cap": 5.0},
        ),  # cross-attention, lengths that need padding
        (True, 150, 150, {"kv_pairing": "tiled", "num_kv_heads": 1}),
    ],
)
def test_splash_equals_xla(causal, length, kv_length, changes):
    config = CONFIG.replace(**changes)
    arrays, segments = operands(config, np.random.default_rng(0), length, kv_length)
    mask = segment_mask(*segments, causal=causal)
    real = (segments[0] > 0)[..., None, None]  # nothing reads the padding's outputs

    def value(attend):
        weights = jnp.arange(config.head_dim) * 0.1
        return jax.jit(
            jax.value_and_grad(
                lambda *x: jnp.sum(jnp.where(real, attend(*x), 0.0) ** 2 * weights),
                argnums=(0, 1, 2),
            )
        )(*arrays)

    wanted, wanted_gradients = value(lambda q, k, v: dot_product_attention(config, q, k, v, mask))
    got, gradients = value(lambda q, k, v: splash_attention(config, q, k, v, segments, causal))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    for a, b in zip(gradients, wanted_gradients):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("axes, kv_heads", [((2, 2), 2), ((2, 4), None)])
def test_splash_on_a_mesh_equals_one_device(axes, kv_heads):
    """Rows and heads split; with keys' heads whole while queries' are split, keys are repeated."""
    arrays, segments = operands(CONFIG, np.random.default_rng(1), 128, 128)
    alone = jax.jit(lambda q, k, v: splash_attention(CONFIG, q, k, v, segments, True))(*arrays)
    mesh = jax.make_mesh(
        axes,
        ("data", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: axes[0] * axes[1]],
    )
    rules = (("batch", "data"), ("heads", "tensor"), ("kv_heads", "tensor" if kv_heads else None))

    def on_mesh(q, k, v, segments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
            return splash_attention(CONFIG, q, k, v, segments, True)

    place = jax.NamedSharding(mesh, jax.P("data"))
    got = jax.jit(on_mesh)(*jax.device_put(arrays, place), jax.device_put(segments, place))
    np.testing.assert_allclose(got, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["encoder_decoder", "merged", "decoder_only"])
def test_models_with_splash_equal_models_with_xla(name):
    config = preset("test", attention_kernel="xla", attention_dropout=0.0)
    if name == "decoder_only":
        config = config.replace(architecture=name, encoder_layers=0)
    config = config.replace(merged_attention=name == "merged")
    batch = packed_batch(np.random.default_rng(0), 100, (5, 3), (4, 6), 10, 12)
    if name == "decoder_only":
        batch = {key: x for key, x in batch.items() if key.startswith("decoder_")}
    params = drawn(build_model(config))
    logits = lambda kernel: jax.jit(
        lambda p: build_model(config.replace(attention_kernel=kernel)).apply({"params": p}, batch)
    )(params)
    real = batch["decoder_segment_ids"] > 0
    np.testing.assert_allclose(logits("splash")[real], logits("xla")[real], rtol=1e-5, atol=1e-5)


def test_kernel_is_chosen_by_platform_and_refused_by_name():
    auto = CONFIG.replace(attention_kernel="auto", dtype="bfloat16")
    assert resolve_kernel(auto, segments=True, dropout=False) == "xla"  # a CPU
    assert (
        resolve_kernel(auto.replace(attention_kernel="splash"), segments=False, dropout=False)
        == "xla"
    )
    with pytest.raises(ConfigError, match="attention_dropout=0.0"):
        resolve_kernel(auto.replace(attention_kernel="splash"), segments=True, dropout=True)
    with pytest.raises(ConfigError, match="'cudnn' on cpu"):
        resolve_kernel(auto.replace(attention_kernel="cudnn"), segments=True, dropout=False)
