"""What comes with encdec: ``configs/``, ``gin/``, and small trained models.

``configs/`` and ``gin/`` are no part of the package. A checkout has them at its root. A wheel
installs them under ``share/encdec`` of the environment, and the distribution's own record says
where that is.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pathlib

from encdec.flags import Parser
from encdec.packages import DISTRIBUTION
from encdec.storage import any_path

_KNOWN = pathlib.PurePosixPath("configs", "pretrain.py")
_MODELS = pathlib.Path(__file__).resolve().parent / "shipped_models"


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


def models() -> list[str]:
    """The names of the trained models that come with encdec, e.g. ``java2cs``."""
    return sorted(path.parent.name for path in _MODELS.glob("*/config.json"))


def model_directory(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The directory of a shipped model of this name; anything else as it is.

    A file or directory of that name in the current folder comes first.
    """
    if os.fspath(name) in models() and not os.path.exists(name):
        return str(_MODELS / name)
    return name


def checkpoint(text: str) -> str:
    """``argparse`` type of a model to use: a directory, an address, or a shipped model's name."""
    return os.fspath(model_directory(any_path(text)))


def add_checkpoint_flag(parser: Parser) -> None:
    """The option ``--checkpoint`` of commands that use a trained or imported model."""
    parser.add(
        "--checkpoint",
        "work directory of `encdec train` or `encdec import`",
        checkpoint,
        required=True,
        metavar="DIR",
    )
