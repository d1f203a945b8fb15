"""Building blocks whose shortcuts must not show: rotation by a product, gradients' dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from encdec.model import ModelConfig
from encdec.model.layers import Mlp, Projection, RMSNorm, product, rows_of
from encdec.model.positions import apply_rope, encoder_rope_positions, rope_table


def test_centred_positions_are_of_each_segment():
    """A model without rotated cross-attention cannot tell: RoPE reads differences alone."""
    lengths = (3, 4, 1)  # and two of padding, which is a segment, too
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    places = np.concatenate([np.arange(n) for n in (*lengths, 2)])[None]
    config = ModelConfig(encoder_positions="centred")
    found = encoder_rope_positions(config, jnp.asarray(places), jnp.asarray(segments))
    expected = np.concatenate([np.arange(n) - (n - 1) // 2 for n in (*lengths, 2)])
    np.testing.assert_array_equal(found[0, : sum(lengths)], expected[: sum(lengths)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rope_by_product_gives_the_same_numbers(dtype):
    rng = np.random.default_rng(0)
    config = ModelConfig(head_dim=32)
    positions = jnp.asarray(rng.integers(0, 3000, (2, 7)), jnp.int32)
    x, weights = (jnp.asarray(rng.normal(size=(2, 7, 3, 32)), dtype) for _ in range(2))
    table = rope_table(config, positions)

    def value(x, by_product):
        rotated = apply_rope(x, table, by_product=by_product)
        return jnp.sum(rotated.astype(jnp.float32) * weights.astype(jnp.float32)), rotated

    (_, wanted), wanted_gradient = jax.value_and_grad(value, has_aux=True)(x, False)
    (_, rotated), gradient = jax.value_and_grad(value, has_aux=True)(x, True)
    assert rotated.dtype == gradient.dtype == dtype
    exact = dict(rtol=1e-6, atol=1e-6) if dtype == "float32" else dict(rtol=8e-3, atol=8e-3)
    np.testing.assert_array_equal(rotated, wanted)
    np.testing.assert_allclose(
        gradient.astype(np.float32), wanted_gradient.astype(np.float32), **exact
    )
    # A rotation keeps lengths, and its gradient is the rotation back.
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated.astype(jnp.float32), axis=-1),
        jnp.linalg.norm(x.astype(jnp.float32), axis=-1),
        rtol=1e-2,
    )
    back = jax.vjp(lambda x: apply_rope(x, table, by_product=True), x)[1](rotated)[0]
    np.testing.assert_allclose(back.astype(np.float32), x.astype(np.float32), atol=3e-2)


def test_a_products_gradient_has_its_kernels_dtype_unrounded():
    """Of a bfloat16 product with a float32 kernel: 1 + 2^-10, which bfloat16 cannot hold."""
    x = jnp.array([[1.0], [2.0**-10]], jnp.bfloat16)
    gradient = lambda kernel: jax.grad(
        lambda k: product("bm,mf->bf", x, k).astype(jnp.float32).sum()
    )(kernel)
    wide = gradient(jnp.ones((1, 1), jnp.float32))
    assert wide.dtype == jnp.float32 and wide[0, 0] == 1 + 2.0**-10
    narrow = gradient(jnp.ones((1, 1), jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16 and narrow[0, 0] == 1


@pytest.mark.parametrize(
    "equation, shapes",
    [
        ("btm,mhd->bthd", ((2, 3, 4), (4, 5, 6))),
        ("bthd,hdm->btm", ((2, 3, 5, 6), (5, 6, 4))),
        ("btm,mkgd->btkgd", ((2, 3, 4), (4, 2, 3, 5))),
        ("btm,cmf->cbtf", ((2, 3, 4), (2, 4, 5))),
    ],
)
def test_mixed_products_equal_einsum(equation, shapes):
    rng = np.random.default_rng(1)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    half = x.astype(jnp.bfloat16)
    value = lambda f: jax.value_and_grad(
        lambda x, k: jnp.sum(jnp.sin(f(x, k).astype(jnp.float32))), argnums=(0, 1)
    )
    wanted, (dx, dk) = value(lambda x, k: jnp.einsum(equation, x, k))(
        half.astype(jnp.float32), kernel.astype(jnp.bfloat16).astype(jnp.float32)
    )
    got, (mixed_dx, mixed_dk) = value(lambda x, k: product(equation, x, k))(half, kernel)
    scale = float(jnp.abs(wanted)) + 1
    np.testing.assert_allclose(got, wanted, atol=0.05 * scale)
    np.testing.assert_allclose(mixed_dx.astype(np.float32), dx, atol=0.15)
    np.testing.assert_allclose(mixed_dk, dk, atol=0.15)


def test_norms_add_one_to_stored_bfloat16_scales_unrounded():
    """As Gemma's do: 1.0035 is 1 in bfloat16."""
    scale = jnp.array([0.0035, 0.37, -0.2, 3.003], jnp.bfloat16)
    config = ModelConfig(norm_plus_one=True, param_dtype="bfloat16", dtype="float32")
    x = np.array([1.0, -2.0, 3.0, 0.5])
    found = RMSNorm(config).apply({"params": {"scale": scale}}, jnp.asarray(x, jnp.float32))
    wanted = x / np.sqrt((x * x).mean() + 1e-6) * (1 + np.asarray(scale, np.float64))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_biases_and_scales_are_added_up_unrounded(fused):
    """Of bfloat16 activations at thousands of tokens, whose sums in bfloat16 stop growing."""
    config = ModelConfig(
        d_model=8, mlp_dim=8, mlp_gated=True, mlp_bias=True, norm_cast="before_scale"
    ).replace(fuse_projections=fused)
    modules = (
        RMSNorm(config),
        Projection(config, "btm,mf->btf", (8, 8), ("embed", "mlp"), 1),
        Mlp(config),
    )
    x = jnp.ones((8, 1000, 8), jnp.bfloat16)
    for module in modules:
        drawn = nn.unbox(module.init(jax.random.key(0), x[:, :1]))["params"]
        # Equal numbers everywhere, so that every token adds the same.
        level = lambda path, leaf: leaf if path[-1].key == "scale" else jnp.full_like(leaf, 0.5)
        params = jax.tree_util.tree_map_with_path(level, drawn)

        def total(params, x, module=module):
            return (module.apply({"params": params}, x) * 1.0078125).sum(dtype="f4")

        many, one = (jax.jit(jax.grad(total))(params, part) for part in (x, x[:1, :1]))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(many), jax.tree.leaves(one)):
            if path[-1].key != "kernel":
                np.testing.assert_allclose(a, 8000 * b, rtol=1e-5, err_msg=str(path))


def test_a_common_tokens_gradient_is_added_up_unrounded():
    """1,000 bfloat16 ones end at 256 if each sum is rounded to bfloat16."""
    table = jnp.zeros((3, 2), jnp.bfloat16)
    tokens = jnp.ones((1000,), jnp.int32)
    gradient = jax.grad(lambda t: rows_of(t, tokens).astype(jnp.float32).sum())(table)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, [[0, 0], [1000, 1000], [0, 0]])
