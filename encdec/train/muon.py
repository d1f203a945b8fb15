"""Muon (arXiv 2502.16982) whose iterations take all matrices of one shape at a time.

The numbers and the state are those of ``optax.contrib.muon``, which iterates on each parameter
by itself: a model of six layers has some forty small matrices, and a product of one of them keeps
no two cores busy.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, MuonState

# Of the quintic iteration, and how often it is done: Muon's own, as optax has them.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
_EPS = 1e-8
# Iterations that share one product with the matrix, where it is so many times as wide as tall that
# this takes fewer operations. One run of five would lose small singular values to rounding, with
# 5 to 20 times the errors of the plain form; those of runs of 3 and 2 are as large as its, provided
# that products are float32's own. Accelerators round what they multiply, to bfloat16 or TF32, and
# powers of a Gram matrix bear that badly: for matrices near a low rank, products of bfloat16 gave
# errors of 27 to 44 % instead of 0.3 to 0.4. Exact ones take six passes of a TPU, which makes the
# runs three times as expensive as the plain form, or more.
_RUNS, _WIDE = (3, 2), 1.5

Tree = Any
Dimensions = Callable[[Tree], Tree]  # of parameters: a MuonDimensionNumbers for each


def muon(
    schedule: optax.Schedule,
    *,
    beta: float,
    weight_decay: float,
    rms: float,
    dimensions: Dimensions,
    together: Callable[[], bool],
    exact: Callable[[], bool],
) -> optax.GradientTransformation:
    """``optax.contrib.muon`` with Nesterov momentum and updates of one size whatever the shape.

    Args:
        schedule: the learning rate.
        beta: decay of the momentum.
        weight_decay: times the learning rate.
        rms: the updates' root mean square, before the learning rate; ``consistent_rms`` there.
        dimensions: which dimensions are inputs and outputs.
        together: whether matrices of equal shapes are stacked; asked while tracing. Right where
            they are on one device.
        exact: whether float32 products are computed in float32, asked while tracing: then the
            iterations of wide matrices share products. Right on CPUs.
    """
    rules = optax.chain(
        _scale_by_muon(beta, dimensions, together, exact),
        _scale_by_shape(rms, dimensions),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    # As optax's own: nothing here is left to AdamW, but states keep their layout on disk.
    labels = lambda params: jax.tree.map(lambda _: "muon", params)
    return optax.partition({"muon": rules, "adam": optax.adamw(schedule)}, labels)


def _axes(x: jax.Array, spec: MuonDimensionNumbers) -> tuple[tuple[int, ...], ...]:
    """Dimensions that hold separate matrices, inputs, and outputs."""
    sides = [
        tuple(axis % x.ndim for axis in (side if isinstance(side, tuple) else (side,)))
        for side in (spec.reduction_axis, spec.output_axis)
    ]
    return tuple(i for i in range(x.ndim) if i not in sides[0] + sides[1]), *sides


def _sizes(x: jax.Array, spec: MuonDimensionNumbers) -> tuple[int, ...]:
    return tuple(math.prod(x.shape[i] for i in axes) for axes in _axes(x, spec))


def orthogonalised(updates: Tree, specs: Tree, *, together: bool, exact: bool) -> Tree:
    """Every matrix by five Newton-Schulz iterations, from its Frobenius norm; see ``muon``."""
    leaves, structure = jax.tree.flatten(updates)
    dimensions = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, MuonDimensionNumbers))
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    matrices = []
    for index, (x, spec) in enumerate(zip(leaves, dimensions, strict=True)):
        order = sum(_axes(x, spec), ())
        matrix = x.transpose(order).reshape(_sizes(x, spec))
        if matrix.shape[1] > matrix.shape[2]:
            matrix = matrix.swapaxes(1, 2)
        matrices.append(matrix)
        groups[(matrix.shape[1:], matrix.dtype) if together else index].append(index)
    results: list[Any] = [None] * len(leaves)
    for members in groups.values():
        stacked = jnp.concatenate([matrices[i] for i in members])
        done = _newton_schulz(stacked, exact and stacked.dtype == jnp.float32)
        ends = [0]
        for i in members:
            ends.append(ends[-1] + len(matrices[i]))
            results[i] = done[ends[-2] : ends[-1]]
    for index, (x, spec) in enumerate(zip(leaves, dimensions, strict=True)):
        axes, sizes = _axes(x, spec), _sizes(x, spec)
        result = results[index]
        if sizes[1] > sizes[2]:
            result = result.swapaxes(1, 2)
        order = sum(axes, ())
        back = sorted(range(x.ndim), key=lambda i: order[i])
        results[index] = result.reshape([x.shape[i] for i in order]).transpose(back)
    return jax.tree.unflatten(structure, results)


def _newton_schulz(x_NxIxO: jax.Array, exact: bool) -> jax.Array:
    """Of N matrices no taller than wide."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x_NxIxO), axis=(1, 2), keepdims=True))
    x = x_NxIxO / (norm + _EPS)
    wide = x.shape[2] >= _WIDE * x.shape[1]
    for count in _RUNS if exact and wide else (1,) * ITERATIONS:
        x = _iterations_by_gram(x, count)
    return x


def _iterations_by_gram(x_NxIxO: jax.Array, count: int) -> jax.Array:
    """``count`` iterations x -> p(g) x with g = x x' and p(g) = a + b g + c g g.

    All p(g) of a run and its g commute, so that g becomes p(g) g p(g), and x is multiplied once,
    by the product of them all. For matrices four times as wide as tall, runs of 3 and 2
    take 2/3 of the operations of five runs of one.
    """
    a, b, c = COEFFICIENTS
    x = x_NxIxO
    gram = jnp.einsum("nio,njo->nij", x, x)
    if count == 1:
        return a * x + (b * gram + c * gram @ gram) @ x
    unit = a * jnp.eye(gram.shape[1], dtype=x.dtype)
    factor = step = unit + b * gram + c * gram @ gram
    for _ in range(1, count):
        gram = step @ gram @ step
        step = unit + b * gram + c * gram @ gram
        factor = step @ factor
    return factor @ x


def _scale_by_muon(
    beta: float, dimensions: Dimensions, together: Callable[[], bool], exact: Callable[[], bool]
) -> optax.GradientTransformation:
    def init(params: Tree) -> MuonState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return MuonState(jnp.zeros([], jnp.int32), zeros, jnp.asarray(COEFFICIENTS))

    def update(updates: Tree, state: MuonState, params: Tree = None) -> tuple[Tree, MuonState]:
        del params
        momentum = jax.tree.map(lambda g, m: (1 - beta) * g + beta * m, updates, state.mu)
        count = optax.safe_increment(state.count)
        # Both as means over the steps so far, the momentum one step ahead.
        ahead = 1 - beta ** optax.safe_increment(count).astype(jnp.float32)
        now = 1 - beta ** count.astype(jnp.float32)
        mixed = jax.tree.map(
            lambda m, g: beta * (m / ahead) + (1 - beta) * (g / now), momentum, updates
        )
        specs = dimensions(mixed)
        updates = orthogonalised(mixed, specs, together=together(), exact=exact())
        return updates, MuonState(count, momentum, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def _scale_by_shape(rms: float, dimensions: Dimensions) -> optax.GradientTransformation:
    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        del params
        scaled = lambda x, spec: x * (rms * math.sqrt(max(_sizes(x, spec)[1:])))
        return jax.tree.map(scaled, updates, dimensions(updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
