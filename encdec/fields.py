"""Configurations as frozen dataclasses: built from plain values, with errors that name the field.

Runs, models, ladders and papers have one form: a frozen dataclass states each field's type,
default and meaning; ``build`` makes it of a nested mapping, as config files, JSON and command lines
give it.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

from encdec.errors import ConfigError

_MAPPINGS = (collections.abc.Mapping, dict)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that is spelled most like ``name``; None if none is."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``; did you mean 'x'?``, to end a message about a name that does not exist; or nothing."""
    near = nearest(name, names)
    return f"; did you mean {near!r}?" if near else ""


def nearest_field(name: str, names: Iterable[str]) -> str | None:
    """``nearest`` among dotted names: ``lerning_rate`` is ``optimizer.learning_rate``."""
    names = list(names)
    leaf_of = lambda dotted: dotted.rsplit(".", 1)[-1]
    # Whole paths do not show how near the last parts are.
    if leaf := nearest(leaf_of(name), map(leaf_of, names), cutoff=0.75):
        return nearest(name, [n for n in names if leaf_of(n) == leaf], cutoff=0.0)
    return nearest(name, names, cutoff=0.5)


def unknown_field(name: str, names: Iterable[str], what: str) -> ConfigError:
    """The error for a field that ``what`` ("the ladder", say) does not have."""
    names = list(names)
    near = nearest_field(name, names)
    hint = f"; did you mean {near!r}?" if near else f"; expected one of {', '.join(names)}"
    return ConfigError(f"{what} has no field {name!r}{hint}")


def names_of(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of a config dataclass's fields, groups included."""
    names = []
    for name, hint in field_types(kind).items():
        names.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            names += names_of(hint, f"{prefix}{name}.")
    return names


@functools.cache
def field_types(kind: Any) -> dict[str, Any]:
    """The type hints of a config dataclass by field."""
    return get_type_hints(kind)


def check_types(config: Any) -> None:
    """Checks the values of a config dataclass by their types, for its ``__post_init__``.

    Whole numbers become floats, and lists (as JSON has them) tuples.

    Raises:
        ConfigError: a value of another type.
    """
    kind: Any = type(config)
    for name, hint in field_types(kind).items():
        before = getattr(config, name)
        after = typed(before, hint, f"{kind.__name__}.{name}")
        if after is not before:
            object.__setattr__(config, name, after)


def build(kind: Any, values: Mapping[str, Any], *, label: str, what: str, prefix: str = "") -> Any:
    """A config dataclass of plain values.

    Args:
        kind: a frozen dataclass whose fields are numbers, strings, booleans, Literals, tuples,
            mappings, or such dataclasses.
        values: by field name; absent fields take their defaults.
        label: how messages address a field: "config" gives "config.batch_size is ...".
        what: how they speak of the whole: "the run's configuration".
        prefix: of the fields' names, where ``kind`` is a group of another.

    Raises:
        ConfigError: an unknown field, naming the nearest; a missing one; a value of another type.
    """
    hints = field_types(kind)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise unknown_field(prefix + name, names_of(kind, prefix), what)
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise _ill_typed(f"{label}.{prefix}{name}", value, "a group of fields")
            inner = f"{prefix}{name}."
            arguments[name] = build(hint, value, label=label, what=what, prefix=inner)
        else:
            arguments[name] = typed(value, hint, f"{label}.{prefix}{name}")
    for field in dataclasses.fields(kind):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.name not in arguments and not optional:
            raise ConfigError(f"{what} lacks the field {prefix + field.name!r}")
    return kind(**arguments)


def typed(value: Any, hint: Any, name: str) -> Any:
    """The value as the type hint has it: whole numbers as floats, lists as tuples.

    Raises:
        ConfigError: it is of another type, or none of a Literal's choices.
    """
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"{name} is {value!r}; expected one of {', '.join(map(repr, arguments))}"
                f"{did_you_mean(str(value), arguments)}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _ill_typed(name, value, "a sequence")
        return tuple(typed(item, arguments[0], name) if arguments else item for item in value)
    if origin in _MAPPINGS:
        if not isinstance(value, Mapping):
            raise _ill_typed(name, value, "a group of fields")
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint is not typing.Any and type(value) is not hint:
        raise _ill_typed(name, value, hint.__name__)
    if hint is float and not math.isfinite(value):
        raise _ill_typed(name, value, "a finite number")
    return value


def value_of(config: Any, name: str) -> Any:
    """The value of a dotted field; a group may be a mapping."""
    for part in name.split("."):
        config = config[part] if isinstance(config, Mapping) else getattr(config, part)
    return config


def listed(text: str, name: str) -> tuple[str, ...]:
    """The parts of a text with commas, "A,B"; "" has none.

    Raises:
        ConfigError: an empty part, as in ``","``; ``name`` is what is said to have it.
    """
    parts = tuple(part.strip() for part in text.split(",")) if text else ()
    if not all(parts):
        raise ConfigError(
            f"{name} is {text!r}, which has an empty part; expected names separated by commas"
        )
    return parts


class Require(Protocol):
    """Refuses a field of a config unless a condition holds; see ``requirements``."""

    def __call__(self, condition: bool, name: str, expected: str, value: Any = ...) -> None: ...


def requirements(config: Any, prefix: str) -> Require:
    """``require(condition, name, expected)`` for a config's ``__post_init__``.

    Unless the condition holds it raises ConfigError: ``PREFIX + NAME is VALUE; expected EXPECTED``.
    The value is that of the dotted field, or ``value`` where only a part of it is wrong.
    """

    def require(condition: bool, name: str, expected: str, value: Any = ...) -> None:
        if not condition:
            seen = value_of(config, name) if value is ... else value
            raise ConfigError(f"{prefix}{name} is {seen!r}; expected {expected}")

    return require


def merged(full: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``full`` with the values of ``given``, group by group."""
    result = dict(full)
    for name, value in given.items():
        grouped = isinstance(value, Mapping) and isinstance(full.get(name), Mapping)
        result[name] = merged(full[name], value) if grouped else value
    return result


def flattened(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """The values of nested mappings by path, its parts joined by ``separator``."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            inner = flattened(value, separator)
            found |= {f"{name}{separator}{path}": leaf for path, leaf in inner.items()}
        else:
            found[name] = value
    return found


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values that differ between two nested mappings."""
    names = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differing_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(prefix + key)
    return names


def _ill_typed(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")
