"""What gin binds: objectives and mixtures by name. Only preparation imports this.

Settings of ``encdec prepare`` itself are bound by ``prepare_command``, out of ``PrepareSettings``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import gin
from encdec.data import denoising  # noqa: F401 (enters its objectives)
from encdec.data.objectives import OBJECTIVES, Objective
from encdec.data.prepare_settings import PrepareSettings
from encdec.data.text_tasks import TextTask
from encdec.errors import ConfigError
from encdec.fields import did_you_mean
from encdec.shipped import shipped_folder


def parse_gin(files: Sequence[str], bindings: Sequence[str]) -> None:
    """Bind exactly what gin files and bindings say; ConfigError where they are wrong."""
    gin.clear_config()
    _bindables()
    if files and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for `import` lines that name the user's own modules
    # `include` lines, and the files that come with encdec, are named from where they are kept.
    _search_shipped_files()
    logged = logging.root.manager.disable
    logging.disable(logging.ERROR)  # gin logs each folder that does not have a file
    try:
        gin.parse_config_files_and_bindings(list(files), list(bindings))
    except (ValueError, OSError, SyntaxError, ImportError) as error:
        raise ConfigError(f"gin: {error}{_remedy(str(error))}") from error
    finally:
        logging.disable(logged)


@functools.cache
def _search_shipped_files() -> None:
    gin.add_config_file_search_path(str(shipped_folder()))


def _remedy(complaint: str) -> str:
    """What to write instead of what gin complains of; "" where its words say it."""
    if found := re.search(
        r"Configurable '(\w+)' doesn't have a parameter named '(\w+)'", complaint
    ):
        makers: dict[str, Any] = {**_BINDABLE, "mixture": mixture, "prepare": PrepareSettings}
        if found[1] in makers:
            names = list(inspect.signature(makers[found[1]]).parameters)
            return f"; it has {', '.join(names)}{did_you_mean(found[2], names)}"
    if found := re.search(r"No configurable matching '([\w./]+)'", complaint):
        names = [*_BINDABLE, "mixture", "prepare"]
        return f"; expected one of {', '.join(names)}{did_you_mean(found[1], names)}"
    if "malformed node or string" in complaint or "Failed to parse token" in complaint:
        return "; a value is written as in Python, and a text in quotes"
    return ""


def refuse_unused(bindings: Sequence[str]) -> None:
    """ConfigError for a binding of something that this preparation does not use.

    Bindings in files are for several commands; one that is typed is meant for this one.
    """
    used = set(re.findall(r"^([\w./]+)\.\w+ =", gin.operative_config_str(), re.MULTILINE))
    used |= {name.rpartition(".")[2] for name in used}
    for binding in bindings:
        bound = re.match(r"\s*([\w./]+)\.(\w+)\s*=", binding)
        if bound and bound[1] not in used:
            raise ConfigError(
                f"--gin_bindings={binding!r} binds {bound[1]}, which is not used here; used are "
                f"{', '.join(sorted(name for name in used if '.' not in name))}"
            )


@gin.configurable
def mixture(
    rates: Sequence[float] | None = None, temperature: float = 1.0, maximum: int | None = None
) -> dict[str, Any]:
    """How a mixture's tasks are mixed, as gin binds it: ``mixing.mixing_rates``."""
    return {"rates": rates, "temperature": temperature, "maximum": maximum}


def _bindable(name: str, make: Callable[..., Objective]) -> Callable[..., Objective]:
    """An objective's maker whose parameters gin binds; of a class, gin would make another class."""

    def bound(**settings: Any) -> Objective:
        return make(**settings)

    bound.__signature__ = inspect.signature(make)  # type: ignore[attr-defined]  # read by gin
    return gin.external_configurable(bound, name, module="objectives")


_BINDABLE: dict[str, Callable[..., Objective]] = {}


def _bindables() -> dict[str, Callable[..., Objective]]:
    """The makers of all objectives, those of the user's own modules too."""
    for name, make in OBJECTIVES.items():
        if name not in _BINDABLE:
            _BINDABLE[name] = _bindable(name, make)
    return _BINDABLE


def choose_objective(given: str | Objective | None, task: TextTask) -> Objective:
    """The objective named, else the task's own, with what gin binds of it."""
    if isinstance(given, Objective):
        return given
    if given is None:
        return _with_bindings(task.objective)
    if given not in OBJECTIVES:
        hint = did_you_mean(given, OBJECTIVES)
        raise ConfigError(
            f"unknown objective {given!r}; expected one of {', '.join(OBJECTIVES)}{hint}"
        )
    return _bindables()[given]()


def _with_bindings(own: Objective) -> Objective:
    # By which name gin binds the settings of a task's own objective; of others they stay its own.
    name = next((name for name, make in OBJECTIVES.items() if make is type(own)), None)
    if name is None:
        return own
    kept = {
        field.name: getattr(own, field.name)
        for field in dataclasses.fields(cast(Any, own))
        if not _is_bound(f"{name}.{field.name}")
    }
    return _bindables()[name](**kept)


def _is_bound(parameter: str) -> bool:
    try:
        gin.query_parameter(parameter)
    except ValueError:
        return False
    return True
