"""Parameters held by name for the first steps, and learning rates of groups."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from encdec.errors import ConfigError
from encdec.model import abstract_params, build_model, logical_axes, preset
from encdec.model.parameter_names import path_name
from encdec.train.groups import factor_tree, frozen_tree
from encdec.train.optimizer import make_optimizer
from encdec.train.run_config import parse_config
from tests.train.conftest import small_run

MODEL = build_model(preset("test", vocab_size=264))
SHAPES = abstract_params(MODEL)
FROZEN = "*,!*/encoder_attention/*"
HOLD, STEPS = 2, 4


def run_with(**changes):
    return parse_config(small_run(**changes))


def random_trees(count):
    rng = np.random.default_rng(0)
    draw = lambda: jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), SHAPES)
    return [draw() for _ in range(count)]


def stepper(run, params):
    """A function of gradients: the updates of each step with the optimizer's state before it, and
    the state at the end."""
    optimizer = make_optimizer(run, logical_axes(MODEL), params)
    update = jax.jit(optimizer.update)

    def steps(gradients):
        state, found = optimizer.init(params), []
        for gradient in gradients:
            before = jax.device_get(state)
            updates, state = update(gradient, state, params)
            found.append((jax.device_get(updates), before))
        return found, jax.device_get(state)

    return steps


def updates_of(run, params, gradients):
    return stepper(run, params)(gradients)


def flat(tree):
    return {path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def part(tree, held):
    """The parameters that are held, or those that are not, as a tree of their own."""
    chosen = {k: v for k, v in flat(tree).items() if ("encoder_attention" not in k) == held}
    return chosen


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_held_parameters_begin_as_new_when_they_are_let_go(name):
    params, *gradients = random_trees(1 + STEPS)
    common = dict(
        optimizer={"name": name, "clip_norm": 0.0},
        schedule={"warmup_steps": 3},
        model_overrides={},
        steps=STEPS + 2,
    )
    held, last = updates_of(
        run_with(freeze={"parameters": FROZEN, "steps": HOLD}, **common), params, gradients
    )
    unheld = stepper(run_with(**common), params)
    plain, _ = unheld(gradients)
    # What learns from the start does as if nothing were held.
    for (a, _), (b, _) in zip(held, plain, strict=True):
        for key, value in part(a, held=False).items():
            np.testing.assert_allclose(value, flat(b)[key], rtol=1e-3, atol=1e-7, err_msg=key)
    # All but the counter of the wait itself.
    state = lambda states: [
        x
        for p, x in jax.tree_util.tree_leaves_with_path(states)
        if "'held'" in (name := jax.tree_util.keystr(p)) and not name.endswith(".step")
    ]
    assert len(state(last)) > 10
    for step, (updates, before) in enumerate(held):
        zero = all(not value.any() for value in part(updates, held=True).values())
        assert zero == (step < HOLD)
        untouched = jax.tree.all(jax.tree.map(np.array_equal, state(before), state(held[0][1])))
        assert untouched == (step <= HOLD)
    # And then as an optimizer that is given these gradients first, at the rate of that step.
    fresh, _ = unheld(gradients[HOLD:])
    ratio = 3.0  # the warmup's third step to its first
    for key, value in part(held[HOLD][0], held=True).items():
        wanted = flat(fresh[0][0])[key] * ratio
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-7, err_msg=key)


def test_what_is_held_for_good_has_no_optimizer_and_does_not_count_in_the_norm():
    params, *gradients = random_trees(3)
    run = run_with(freeze={"parameters": FROZEN}, optimizer={"clip_norm": 1.0})
    huge = jax.tree_util.tree_map_with_path(
        lambda p, x: x if "encoder_attention" in path_name(p) else x * 1e6, gradients[0]
    )
    held = stepper(run, params)
    (first, _), (second, _) = (held([gradient])[0][0] for gradient in (gradients[0], huge))
    for key, value in flat(first).items():
        np.testing.assert_array_equal(value, flat(second)[key])
        assert value.any() == ("encoder_attention" in key)
    sizes = [x.size for x in jax.tree.leaves(held([])[1])]
    free = sum(x.size for x in part(params, held=False).values())
    assert 2 * free <= sum(sizes) < 2 * free + 10


def test_factors_multiply_updates_of_layers_that_are_stacked_too():
    params, gradient = random_trees(2)
    common = dict(schedule={"name": "constant", "warmup_steps": 0})
    factors = "encoder/*=0.5,*/layers_1/*=3, *norm*=7"
    (found, _), *_ = updates_of(
        run_with(optimizer={"factors": factors}, **common), params, [gradient]
    )[0]
    (plain, _), *_ = updates_of(run_with(**common), params, [gradient])[0]
    for key, value in flat(found).items():
        wanted = flat(plain)[key].copy()
        if "norm" in key:
            wanted *= 7
        elif key.startswith("encoder/"):
            wanted[0], wanted[1] = wanted[0] * 0.5, wanted[1] * 3
        np.testing.assert_allclose(value, wanted, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"freeze": {"parameters": "*,!*/encoder_atention/*"}}, r"did you mean '\*/encoder_att"),
        ({"freeze": {"parameters": "decoder/*,*layer_0*"}}, r"'\*layer_0\*', which matches no"),
        ({"freeze": {"parameters": "*"}}, "freezes every parameter"),
        ({"freeze": {"parameters": "encoder/*,!*"}}, "freezes no parameter"),
        ({"freeze": {"parameters": "*/layers_0/*"}}, "scan_layers=False"),
        ({"optimizer": {"factors": "encodr/*=2"}}, r"did you mean 'encoder/\*'"),
        ({"optimizer": {"factors": ","}}, "config.optimizer.factors is ',', which has an empty"),
        ({"freeze": {"parameters": "encoder/*,,"}}, "config.freeze.parameters is .* an empty part"),
        ({"optimizer": {"factors": "encoder/*"}}, "expected PATTERN=FACTOR"),
        ({"optimizer": {"factors": "encoder/*=0"}}, "config.freeze.parameters"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(changes, message):
    run = run_with(**changes)
    with pytest.raises(ConfigError, match=message):
        frozen_tree(run, SHAPES) if "freeze" in changes else factor_tree(run, SHAPES)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"freeze": {"steps": 2}}, "0 without config.freeze.parameters set"),
        ({"freeze": {"parameters": "encoder/*", "steps": 20}}, "less than config.steps = 20"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        run_with(**changes)
