"""The training state: everything the next step depends on, except its batch."""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from encdec.model import Model, init_params


class TrainState(flax.struct.PyTreeNode):
    """Step, parameters, optimizer state; the randomness of a step follows from seed and step.

    Attributes:
        step: int32 scalar, optimizer steps done.
        params: master parameters, float32.
        opt_state: of the optax optimizer.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def create_state(model: Model, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    params = init_params(model, jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The random key of one step: a pure function of seed and step, so that a resumed run draws
    what an undisturbed one would have drawn."""
    return jax.random.fold_in(jax.random.key(seed), step)
