"""Groups of parameters by name: frozen ones, and separate learning rates.

Patterns are of names with unrolled layers, ``decoder/layers_3/encoder_attention/q/kernel``, and
``*`` matches slashes too. They are read one after the other and the last that matches decides; a
leading ``!`` takes back: ``*,!*/encoder_attention/*`` is all but cross-attention.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import optax

from encdec.errors import ConfigError
from encdec.fields import listed, nearest
from encdec.model.parameter_names import unrolled_names
from encdec.train.run_config import RunConfig

Tree = Any
Value = TypeVar("Value")


def matched(patterns: Sequence[tuple[str, Value]], name: str, default: Value) -> Value:
    """The value of the last pattern that matches ``name``."""
    for pattern, value in reversed(patterns):
        if fnmatch.fnmatchcase(name, pattern):
            return value
    return default


def frozen_patterns(text: str) -> list[tuple[str, bool]]:
    """``config.freeze.parameters`` as patterns with whether what they match is frozen.

    Raises:
        ConfigError: an empty part.
    """
    parts = listed(text, "config.freeze.parameters")
    return [(part.removeprefix("!"), not part.startswith("!")) for part in parts]


def factor_patterns(text: str) -> list[tuple[str, float]]:
    """``config.optimizer.factors`` as patterns with their factors.

    Raises:
        ConfigError: a part that is empty, or not PATTERN=FACTOR with a positive factor.
    """
    patterns = []
    for part in listed(text, "config.optimizer.factors"):
        pattern, equals, number = part.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = 0.0
        if not equals or not pattern.strip() or not 0 < factor < float("inf"):
            raise ConfigError(
                f"config.optimizer.factors has {part!r}; expected PATTERN=FACTOR with a positive "
                "factor, as in 'encoder/*=0.5'. To freeze a group, use config.freeze.parameters"
            )
        patterns.append((pattern.strip(), factor))
    return patterns


def check_patterns(patterns: Sequence[str], names: Sequence[str], field: str) -> None:
    """Raises ConfigError naming a pattern that matches no parameter, and the nearest that would."""
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            continue
        near = _nearest_pattern(pattern, names)
        hint = f"; did you mean {near!r}?" if near else f"; a name is, for example, {names[0]!r}"
        raise ConfigError(f"config.{field} has {pattern!r}, which matches no parameter{hint}")


def _nearest_pattern(pattern: str, names: Sequence[str]) -> str | None:
    """The pattern with each part that no name has replaced by the part spelled most like it."""
    parts = {part for name in names for part in name.split("/")}
    found = []
    for piece in pattern.split("/"):
        if any(fnmatch.fnmatchcase(part, piece) for part in parts):
            found.append(piece)
            continue
        near = nearest(piece.strip("*"), parts)
        if near is None:
            return nearest(pattern.replace("*", ""), names, cutoff=0.4)
        found.append("*" * piece.startswith("*") + near + "*" * piece.endswith("*"))
    near = "/".join(found)
    if any(fnmatch.fnmatchcase(name, near) for name in names):
        return near
    return nearest(pattern.replace("*", ""), names, cutoff=0.4)


def frozen_tree(run: RunConfig, abstract_params: Tree) -> Tree:
    """True at each parameter that ``config.freeze`` holds at first.

    Raises:
        ConfigError: a pattern without a match; all or none of the parameters are meant; or layers
            of one stack differ where they are one stacked array.
    """
    patterns, field = frozen_patterns(run.freeze.parameters), "freeze.parameters"
    names = unrolled_names(abstract_params)
    every = [name for parts in names.values() for name in parts]
    check_patterns([pattern for pattern, _ in patterns], every, field)
    by_part = {name: matched(patterns, name, False) for name in every}
    if len(set(by_part.values())) == 1:
        which = "every parameter" if by_part[every[0]] else "no parameter"
        raise ConfigError(
            f"config.{field} is {run.freeze.parameters!r}, which freezes {which}; expected some, "
            "as in '*,!*/encoder_attention/*'"
        )

    def one(leaf: str) -> bool:
        found = {by_part[name] for name in names[leaf]}
        if len(found) > 1:
            raise ConfigError(
                f"config.{field} is {run.freeze.parameters!r}, which freezes some layers of {leaf} "
                "and not others, but all are one array; set "
                "--config.model_overrides.scan_layers=False"
            )
        return found.pop()

    return _by_leaf(one, abstract_params)


def factor_tree(run: RunConfig, abstract_params: Tree) -> Tree:
    """What each parameter's learning rate is multiplied by: float32, broadcast to its shape.

    Raises:
        ConfigError: a pattern that matches no parameter.
    """
    patterns = factor_patterns(run.optimizer.factors)
    names = unrolled_names(abstract_params)
    every = [name for parts in names.values() for name in parts]
    check_patterns([pattern for pattern, _ in patterns], every, "optimizer.factors")

    def one(leaf: str) -> np.ndarray:
        factors = np.array([matched(patterns, name, 1.0) for name in names[leaf]], np.float32)
        return factors if len(factors) > 1 else factors[0]

    def shaped(factors: np.ndarray, leaf: Any) -> np.ndarray:
        return np.reshape(factors, factors.shape + (1,) * (len(leaf.shape) - factors.ndim))

    return jax.tree.map(shaped, _by_leaf(one, abstract_params), abstract_params)


def _by_leaf(function: Callable[[str], Any], abstract_params: Tree) -> Tree:
    from_names = iter([function(leaf) for leaf in unrolled_names(abstract_params)])
    return jax.tree.map(lambda _: next(from_names), abstract_params)


def with_factors(factors: Tree) -> optax.GradientTransformation:
    """Multiplies updates, decay included, so that a factor is one of the learning rate."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda x, f: x * f, updates, factors))


def frozen_at_first(
    clip: optax.GradientTransformation,
    rule: Callable[[int], optax.GradientTransformation],
    frozen: Tree,
    steps: int,
) -> optax.GradientTransformation:
    """An optimizer that freezes some parameters for ``steps`` steps, or for the whole run if 0.

    Held parameters have a gradient of zero before clipping, and neither their moments nor their
    counts move: they begin as new when they are let go, at the learning rate of that step.

    Args:
        clip: of the gradients of everything that learns.
        rule: the update rule that begins at a step of the run.
        frozen: True at each parameter that is held.
        steps: for how long.
    """
    labels = jax.tree.map(lambda held: "held" if held else "free", frozen)
    if not steps:
        held, still = optax.set_to_zero(), optax.set_to_zero()
    else:
        later = lambda step: step >= steps
        held = optax.conditionally_mask(rule(steps), later)
        still = optax.conditionally_mask(optax.identity(), later)
    return optax.chain(
        optax.partition({"held": still, "free": optax.identity()}, labels),
        clip,
        optax.partition({"held": held, "free": rule(0)}, labels),
    )
