"""Schedules by value; which parameters decay; what Muon does to stacked and 3-D kernels."""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from encdec.model import abstract_params, build_model, logical_axes, preset, unroll_params
from encdec.train.optimizer import decayed, make_optimizer, make_schedule, muon_dimensions
from encdec.train.run_config import parse_config
from encdec.train.run_fields import OptimizerConfig
from tests.train.conftest import small_run

OPTIMIZERS = typing.get_args(typing.get_type_hints(OptimizerConfig)["name"])  # a new one, too


def schedule(name, steps=100, warmup=10, **more):
    run = parse_config(
        small_run(
            steps=steps,
            optimizer={"learning_rate": 2.0},
            schedule={"name": name, "warmup_steps": warmup, **more},
        )
    )
    return make_schedule(run)


@pytest.mark.parametrize("name", ["cosine", "linear", "rsqrt", "wsd", "constant"])
def test_warmup_is_linear_and_learns_from_the_first_step(name):
    rates = [float(schedule(name)(step)) for step in range(11)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(rates[10], 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    "name, values",
    [
        ("cosine", {55: 1.1, 100: 0.2}),
        ("linear", {55: 1.1, 100: 0.2}),
        ("rsqrt", {40: 1.0}),
        ("wsd", {79: 2.0, 80: 2.0, 90: 1.1, 100: 0.2}),
        ("constant", {99: 2.0}),
    ],
)
def test_decays(name, values):
    fraction = {"final_fraction": 0.1} if name in ("cosine", "linear", "wsd") else {}
    got = schedule(name, **fraction)
    for step, rate in values.items():
        np.testing.assert_allclose(float(got(step)), rate, rtol=1e-5)


def test_without_warmup_the_peak_comes_first():
    assert float(schedule("cosine", warmup=0)(0)) == 2.0


def optimizer_for(name, model, **changes):
    run = parse_config(
        small_run(
            optimizer={"name": name, "clip_norm": 0.0, **changes},
            schedule={"name": "constant", "warmup_steps": 0},
        )
    )
    return make_optimizer(run, logical_axes(model), abstract_params(model))


def ones(model):
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract_params(model))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name):
    model = build_model(preset("test", qk_norm=True, tie_embeddings=False))
    params = ones(model)
    optimizer = optimizer_for(name, model, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        matrix = path[-1].key in ("kernel", "embedding", "head")
        wanted = -0.5 * 1e-2 if matrix else 0.0  # decay times learning rate times the weight 1
        np.testing.assert_allclose(update, wanted, rtol=1e-5, err_msg=str(path))
    assert sum(jax.tree.leaves(decayed(logical_axes(model)))) < len(jax.tree.leaves(params))


def test_muon_takes_the_layers_matrices_with_their_true_sides():
    dims = muon_dimensions(logical_axes(build_model(preset("test"))))
    spec = optax.contrib.MuonDimensionNumbers
    decoder = dims["decoder"]["layers"]
    assert decoder["self_attention"]["q"]["kernel"] == spec((1,), (2, 3))  # [L, M, H, D]
    assert decoder["encoder_attention"]["o"]["kernel"] == spec((1, 2), (3,))  # [L, H, D, M]
    assert decoder["mlp"]["up"]["kernel"] == spec((1,), (2,))
    assert decoder["mlp"]["down"]["kernel"] == spec((1,), (2,))
    assert dims["embedder"]["embedding"] is None
    assert decoder["mlp"]["up"]["bias"] is None and decoder["mlp_norm"]["scale"] is None


def test_muon_updates_scanned_and_unrolled_layers_alike():
    config = preset("test")
    scanned, unrolled = build_model(config), build_model(config.replace(scan_layers=False))
    gradients = jax.tree.map(
        lambda x, key: jax.random.normal(key, x.shape),
        abstract_params(scanned),
        _keys(abstract_params(scanned)),
    )

    def update(model, gradients):
        params = ones(model)
        optimizer = optimizer_for("muon", model)
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    together = unroll_params(update(scanned, gradients), config)
    apart = update(unrolled, unroll_params(gradients, config))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6), together, apart
    )
    # The attention kernel's update, as the [M, H*D] matrix it is, has all directions of equal size.
    q = -apart["decoder"]["layers_0"]["self_attention"]["q"]["kernel"].reshape(32, 32)
    values = np.linalg.svd(np.asarray(q) - 1e-2 * 0.1, compute_uv=False)  # without the decay
    assert values.max() / values.min() < 5


def _keys(tree):
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(jax.random.split(jax.random.key(0), len(leaves))))


def test_adafactor_keeps_far_less_than_adamw():
    model = build_model(preset("330m"))
    params = abstract_params(model)
    size = lambda name: sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(optimizer_for(name, model).init, params))
    )
    assert size("adafactor") < 0.05 * size("adamw")
    assert size("muon") < 0.6 * size("adamw")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_clipped_by_their_global_norm_before_the_rule(name):
    """Ten small gradients, then a large one: the rule remembers the first at their own scale.

    What it is given in place of the second is the second at a norm of 1; clipping after the rule,
    each array by itself, or not at all, gives other updates.
    """
    axes = {"a": {"kernel": ("embed", "mlp")}, "b": {"bias": ("mlp",)}}
    params = {"a": {"kernel": jnp.ones((6, 8))}, "b": {"bias": jnp.ones(8)}}
    first, second = (
        jax.tree.map(lambda x, k: jax.random.normal(jax.random.key(k), x.shape), params, keys)
        for keys in ({"a": {"kernel": 0}, "b": {"bias": 1}}, {"a": {"kernel": 2}, "b": {"bias": 3}})
    )
    scaled = lambda tree, norm: jax.tree.map(lambda x: x * norm / optax.global_norm(tree), tree)
    small, large, unit = scaled(first, 0.99), scaled(second, 100.0), scaled(second, 1.0)

    def last_update(clip_norm, last):
        run = parse_config(
            small_run(
                optimizer={"name": name, "clip_norm": clip_norm, "learning_rate": 2.0},
                schedule={"name": "constant", "warmup_steps": 0},
            )
        )
        optimizer = make_optimizer(run, axes, params)
        state = optimizer.init(params)
        for gradient in (*[small] * 10, last):
            updates, state = optimizer.update(gradient, state, params)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates)])

    clipped = last_update(1.0, large)
    np.testing.assert_allclose(clipped, last_update(0.0, unit), rtol=1e-4, atol=1e-6)
    assert np.abs(clipped - last_update(0.0, large)).max() > 0.05
