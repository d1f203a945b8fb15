"""Muon against optax's own, whose numbers and state it keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Sides

from encdec.train.muon import muon

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
    )
    params = {"up": jax.random.normal(jax.random.key(1), (8, 24))}
    updates, _ = rule.update(params, rule.init(params), params)
    values = jnp.linalg.svd(updates["up"] / 24**0.5, compute_uv=False)
    assert 0.6 < values.min() < values.max() < 1.3
