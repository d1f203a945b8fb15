"""Modules of the user's own that a command imports, for what they register."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from encdec.errors import ConfigError


def import_modules(names: Sequence[str]) -> None:
    """Imports modules by their dotted names, from the current folder too.

    Raises:
        ConfigError: one that is not found, or cannot be imported.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"--module={name} cannot be imported ({error}); give the dotted name of a module "
                "that is installed or in the current folder"
            ) from error
