"""Config files, and fields set on the command line: ``--config=FILE.py --config.FIELD=VALUE``.

A config file is Python with a ``get_config`` that returns an ml_collections ``ConfigDict``: of a
run, a ladder or the paper's comparison.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from encdec import shipped
from encdec.errors import ConfigError
from encdec.fields import did_you_mean
from encdec.flags import Parser
from encdec.storage import local_path

_NUMBER = re.compile(r"-[0-9.]")


@functools.cache
def _override(flag: str) -> re.Pattern[str]:
    """``--FLAG.FIELD``, and its value if that does not follow a space."""
    return re.compile(rf"--?(no)?{flag}\.([^=]*)(=.*)?", re.DOTALL)


def split_overrides(argv: Sequence[str], flag: str = "config") -> tuple[list[str], list[str]]:
    """Parts ``--FLAG.FIELD=VALUE`` (or with a space) from all other arguments."""
    overrides, rest, waits = [], [], False
    for argument in argv:
        match = _override(flag).fullmatch(argument)
        if match:
            overrides.append(argument)
            waits = match[3] is None
        elif waits and (not argument.startswith("-") or _NUMBER.match(argument)):
            overrides[-1] += "=" + argument
            waits = False
        else:
            rest.append(argument)
            waits = False
    return overrides, rest


def with_overrides(
    config: ml_collections.ConfigDict,
    overrides: Sequence[str],
    unknown_field: Callable[[str, Sequence[str]], ConfigError],
    flag: str = "config",
) -> ml_collections.ConfigDict:
    """The config with fields set as ``split_overrides`` found them.

    Args:
        config: holds every field that may be set.
        overrides: ``--FLAG.FIELD=VALUE`` each.
        unknown_field: the error for a name and the names there are.
        flag: the flag that names the file.

    Raises:
        ConfigError: an unknown field, or a value that is not of the field's type.
    """
    names = field_names(config)
    for override in overrides:
        found = _override(flag).fullmatch(override)
        assert found is not None  # as split_overrides chose it
        name = found[2]
        if name not in names:
            raise unknown_field(name, names)
        if any(other.startswith(name + ".") for other in names):
            raise ConfigError(
                f"{flag}.{name} is a group of fields; set one of them, for example "
                f"--{flag}.{next(n for n in names if n.startswith(name + '.'))}=..."
            )
    # A registry of its own: the process's own absl flags are not this config's business.
    values, command = flags.FlagValues(), ["encdec", *overrides]
    try:
        config_flags.DEFINE_config_dict(flag, config, flag_values=values, sys_argv=command)
        left = values(command)
    except flags.Error as error:
        raise ConfigError(_readable(str(error))) from None
    except ValueError as error:
        # ml_collections parses dotted names as Python: no part may start with a digit.
        raise ConfigError(
            f"{' '.join(overrides)}: {error}; change such a field in a config file of your own"
        ) from None
    if left[1:]:
        raise ConfigError(f"unexpected arguments {left[1:]}; expected --{flag}.FIELD=VALUE")
    return values[flag].value


def field_names(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all fields, groups included."""
    names = []
    for name in config:
        names.append(prefix + name)
        if isinstance(config[name], ml_collections.ConfigDict):
            names += field_names(config[name], f"{prefix}{name}.")
    return names


# How Python and absl refuse a text, and what is said instead.
_KINDS = {
    "invalid literal for int()": "expected a whole number, as in 1000",
    "could not convert string to float": "expected a number, as in 0.5 or 1e-3",
    "Non-boolean argument": "expected True or False",
}


def _readable(message: str) -> str:
    """absl's complaint in this project's words: which field, the value, the type expected."""
    match = re.match(r"flag --(?:no)?(\w+\.\S*?)=(.*?): (.*)", message, re.DOTALL)
    if not match:
        return message
    reason = match[3].strip()
    expected = next((kind for start, kind in _KINDS.items() if start in reason), reason)
    return f"{match[1]} is {match[2]!r}; {expected}"


def read_config_file(source: str) -> ml_collections.ConfigDict:
    """What ``get_config`` of ``FILE.py[:ARGUMENT]`` returns; shipped files are found by name.

    Raises:
        ConfigError: no such file or argument, or a file that gives no ConfigDict.
    """
    name, _, argument = source.partition(":")
    path = shipped.find(name)
    if not path.is_file():
        hint = did_you_mean(name, shipped.names("configs"))
        raise ConfigError(
            f"config file {name} does not exist; expected for example "
            f"--config=configs/pretrain.py:330m{hint}"
        )
    spec = importlib.util.spec_from_file_location(f"encdec_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {name} is not a Python file; expected FILE.py[:ARGUMENT]")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"config file {name}: {error}") from None
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config file {name} has no get_config(); it must return a ConfigDict")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except ValueError as error:
        raise ConfigError(f"config file {source}: {error}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"get_config() in {name} returned {type(config).__name__}; expected an "
            "ml_collections.ConfigDict"
        )
    return config


def add_config_flag(parser: Parser) -> None:
    """The option ``--config`` of commands that read a run's configuration."""
    parser.add(
        "--config",
        "config file and its argument, e.g. configs/pretrain.py:330m",
        local_path,
        required=True,
        metavar="FILE.py[:ARGUMENT]",
    )
