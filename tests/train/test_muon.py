"""Muon against optax's own, whose numbers and state it keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Sides

from encdec.train.muon import COEFFICIENTS, ITERATIONS, muon, orthogonalised
from encdec.train.optimizer import make_optimizer
from encdec.train.run_config import parse_config
from tests.train.conftest import small_run

SPECS = {
    "up": Sides((0,), (1,)),
    "down": Sides((1,), (0,)),
    "query": Sides((1,), (2, 3)),  # stacked layers
    "out": Sides((0, 1), (2,)),
    "more": Sides((0,), (1,)),
}
SHAPES = {"up": (8, 24), "down": (24, 8), "query": (3, 8, 2, 4), "out": (2, 4, 8), "more": (8, 24)}


@pytest.mark.parametrize("together", [True, False])
def test_updates_and_state_are_those_of_optax(together):
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key: {
        name: jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    params, schedule = draw(keys[0]), optax.constant_schedule(0.1)
    ours = muon(
        schedule,
        beta=0.9,
        weight_decay=0.01,
        rms=0.2,
        dimensions=lambda tree: SPECS,
        together=lambda: together,
        exact=lambda: together,
    )
    theirs = optax.contrib.muon(
        schedule,
        beta=0.9,
        weight_decay=0.01,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda tree: SPECS,
    )
    states = [ours.init(params), theirs.init(params)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for key in keys[1:]:
        updates = []
        for i, rule in enumerate((ours, theirs)):
            found, states[i] = rule.update(draw(key), states[i], params)
            updates.append(found)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *states)


def test_matrices_become_orthogonal():
    rule = muon(
        optax.constant_schedule(1.0),
        beta=0.0,
        weight_decay=0.0,
        rms=1.0,
        dimensions=lambda tree: {"up": SPECS["up"]},
        together=lambda: True,
        exact=lambda: True,
    )
    params = {"up": jax.random.normal(jax.random.key(1), (8, 24))}
    updates, _ = rule.update(params, rule.init(params), params)
    values = jnp.linalg.svd(updates["up"] / 24**0.5, compute_uv=False)
    assert 0.6 < values.min() < values.max() < 1.3


def evaluated(jaxpr, arguments, dot):
    """The results of a traced function, each of its products by ``dot``."""
    values = dict(zip((*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars), (*jaxpr.consts, *arguments)))
    read = lambda x: x.val if isinstance(x, jax.extend.core.Literal) else values[x]
    for equation in jaxpr.jaxpr.eqns:
        operands, name = [read(x) for x in equation.invars], equation.primitive.name
        if "jaxpr" in equation.params:
            results = evaluated(equation.params["jaxpr"], operands, dot)
        else:
            operands = dot(operands) if name == "dot_general" else operands
            results = equation.primitive.bind(*operands, **equation.params)
        several = equation.primitive.multiple_results
        values |= zip(equation.outvars, results if several else [results])
    return [read(x) for x in jaxpr.jaxpr.outvars]


def test_where_products_are_rounded_the_plain_iterations_lose_less():
    """Against float64, with float32 products and with those of accelerators, emulated."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(32, 4)) @ rng.normal(size=(4, 128))  # of low rank, in noise
    matrix += 1e-2 * rng.normal(size=matrix.shape)
    x = matrix / np.linalg.norm(matrix)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = COEFFICIENTS[0] * x + (COEFFICIENTS[1] * gram + COEFFICIENTS[2] * gram @ gram) @ x

    def error(exact, dot, dtype=np.float32):
        function = lambda x: orthogonalised(x, Sides((0,), (1,)), together=True, exact=exact)
        traced = jax.make_jaxpr(function)(matrix.astype(dtype))
        [found] = evaluated(traced, [matrix.astype(dtype)], dot)
        return np.linalg.norm(found - x) / np.linalg.norm(x)

    same = lambda operands: operands
    rounded = lambda operands: [jax.lax.reduce_precision(a, 8, 7) for a in operands]  # bfloat16
    assert max(error(True, same), error(False, same)) < 5e-5
    assert error(False, rounded) < 0.01 and error(True, rounded) > 0.1
    # What is kept in bfloat16 has no exact products anywhere.
    assert error(True, same, jnp.bfloat16) == error(False, same, jnp.bfloat16)


@pytest.mark.parametrize("platform, products", [("cpu", 18), ("tpu", 15), ("gpu", 15), ("", 18)])
def test_iterations_share_products_on_cpus_alone(platform, products):
    """Wherever it is traced: a run on a pod is compiled on machines without one."""
    shapes = {"up": {"kernel": jax.ShapeDtypeStruct((8, 24), jnp.float32)}}
    run = parse_config(small_run("records", optimizer={"name": "muon"}))
    rule = make_optimizer(run, {"up": {"kernel": ("embed", "mlp")}}, shapes)
    device = jax.sharding.AbstractDevice("any", None, platform)
    mesh = jax.sharding.AbstractMesh((4,), ("data",), abstract_device=device if platform else None)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = str(jax.make_jaxpr(rule.update)(shapes, jax.eval_shape(rule.init, shapes), shapes))
    assert traced.count(" dot_general[") == products
