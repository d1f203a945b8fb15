"""The files that come with encdec but are no part of the package: ``configs/`` and ``gin/``.

A checkout has them at its root. A wheel installs them under ``share/encdec`` of the environment,
and the distribution's own record says where that is.
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib

from encdec.packages import DISTRIBUTION

_KNOWN = pathlib.PurePosixPath("configs", "pretrain.py")


@functools.cache
def shipped_folder() -> pathlib.Path:
    """The folder that holds ``configs`` and ``gin``."""
    checkout = pathlib.Path(__file__).resolve().parents[1]
    if (checkout / _KNOWN).is_file():
        return checkout
    try:
        recorded = importlib.metadata.distribution(DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        recorded = []
    for file in recorded:
        if file.parts[-2:] == _KNOWN.parts and "share" in file.parts:
            return pathlib.Path(str(file.locate())).resolve().parents[1]
    return checkout


def find(name: str) -> pathlib.Path:
    """The file of this name from here; one that comes with encdec if there is none.

    So ``configs/pretrain.py`` is found wherever a command is run; a file of that name in the
    current folder comes first.
    """
    here = pathlib.Path(name)
    if here.is_absolute() or here.is_file():
        return here
    there = shipped_folder() / here
    return there if there.is_file() and ".." not in here.parts else here


def names(kind: str) -> list[str]:
    """What comes with encdec of a kind: ``configs`` or ``gin``, e.g. ``configs/pretrain.py``."""
    folder = shipped_folder()
    found = [path for path in (folder / kind).rglob("*") if path.suffix in (".py", ".gin")]
    return sorted(path.relative_to(folder).as_posix() for path in found)
