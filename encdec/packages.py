"""How to install the packages of an optional part.

The name ``encdec`` on the public package index belongs to another project, so no message may ever
say ``pip install encdec[...]``. The hint names this checkout, or else the packages themselves.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pathlib
import re

from encdec.errors import ConfigError

DISTRIBUTION = "encdec-slm"  # setup.py reads it here; the package that is imported is encdec
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w-]+)['"]""")


def install_hint(extra: str, constraints: bool = True) -> str:
    """A command that installs what the extra ``extra`` of setup.py asks for.

    From a checkout: of this very directory, with its constraints. From a wheel: the packages by
    name, with their bounds, as the wheel's own metadata lists them.
    """
    checkout = pathlib.Path(__file__).resolve().parents[1]
    if (checkout / "setup.py").exists():
        pins = f" -c {checkout}/constraints.txt" if constraints else ""
        return f'pip install -e "{checkout}[{extra}]"{pins}'
    packages = " ".join(f"'{package}'" for package in packages_of(extra))
    return f"pip install {packages}"


def packages_of(extra: str) -> list[str]:
    """The requirements of an extra, from the installed distribution's metadata."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for requirement in requirements:
        package, _, marker = requirement.partition(";")
        if (match := _EXTRA.search(marker)) and match[1] == extra:
            found.append(package.strip())
    return found


def require(package: str, extra: str, what: str) -> None:
    """Checks that an importable package is there, without importing it.

    Raises:
        ConfigError: it is not; ``what`` is the subject of the sentence, e.g. "--format=onnx".
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{what} needs {package}, which is not installed: {install_hint(extra)}")
