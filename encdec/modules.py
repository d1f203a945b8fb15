"""The user's own modules, which a command imports for what they register."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from encdec.errors import ConfigError
from encdec.fields import did_you_mean
from encdec.flags import Parser
from encdec.logs import logger

_LOG = logger(__name__)


def add_module_flag(parser: Parser) -> None:
    """The option ``--module``, for ``import_modules``."""
    parser.add(
        "--module",
        "Python module to import first, which registers tasks, mixtures, metrics or "
        "objectives of your own (docs/own-data.md); may be repeated",
        default=[],
        metavar="NAME",
    )


def import_modules(names: Sequence[str], flag: str = "--module") -> None:
    """Imports modules by their dotted names, from the current folder too.

    ``flag`` is what messages say has the name.

    Raises:
        ConfigError: one that is not found, or cannot be imported.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            module = importlib.import_module(name)
            _LOG.debug("%s=%s is %s", flag, name, getattr(module, "__file__", module))
        except ImportError as error:
            raise ConfigError(
                f"{flag}={name} cannot be imported ({error}); give the dotted name of a module "
                "that is installed or in the current folder"
            ) from error


def named_function(flag: str, target: str) -> Callable[..., object]:
    """The function ``MODULE:FUNCTION`` of a module of the user's own.

    Raises:
        ConfigError: no such module or function.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise ConfigError(f"{flag}={target}; expected MODULE:FUNCTION")
    import_modules([module], flag)
    found = getattr(sys.modules[module], name, None)
    if not callable(found):
        hint = did_you_mean(name, [one for one in vars(sys.modules[module]) if one[0] != "_"])
        raise ConfigError(f"{flag}={target}: {module} has no function {name!r}{hint}")
    return found
