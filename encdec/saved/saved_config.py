"""A model's directory: its configuration file, and the names of what is next to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from encdec.errors import CheckpointError
from encdec.model import ModelConfig
from encdec.storage import as_path, directory_name

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
CHECKPOINTS_FOLDER = "checkpoints"
SOURCE_FIELD = "started_from"  # in the config: the checkpoint that the first parameters came from
PARAMS_FOLDER = "params"  # of an imported model, in place of checkpoints
SCALE = ".scale"  # ends the names of the tensors that int8 ones are multiplied by


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """A work directory's ``config.json``.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is another project's.
    """
    path = as_path(workdir) / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(
            f"{workdir} has no {CONFIG_FILE}, so it is not the work directory of a training run; "
            "give the directory that `encdec train --workdir=` wrote"
        )
    try:
        content = json.loads(path.read_text())
        if "model_type" in content and "format_version" not in content:
            raise CheckpointError(
                f"{workdir} is a Hugging Face model's directory; read it into a work directory "
                f"first: encdec import {workdir} --out=DIR"
            )
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it from a copy") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version}; this encdec reads "
            f"{FORMAT_VERSION}: use the version that wrote it"
        )
    return content


def model_config_of(content: Mapping[str, Any]) -> ModelConfig:
    """The model's configuration from the content of ``config.json``."""
    return ModelConfig.from_dict(content["model"])


def origin(content: Mapping[str, Any]) -> str:
    """What a model was made from, in words; "" for a run from random parameters.

    Args:
        content: of its ``config.json``.
    """
    export, imported, run = (content.get(key) or {} for key in ("export", "imported", "run"))
    if export or imported.get("format") == "encdec":
        made = export or imported
        form = f"exported as {made.get('format')}, {made.get('precision')}"
        # Exports of earlier versions do not tell.
        return ", from ".join(filter(None, (form, made.get("source"))))
    if sources := imported.get("sources"):
        return f"adapted from {' and '.join(dict.fromkeys(x['name'] for x in sources.values()))}"
    if imported:
        return f"imported from {imported['name']} ({imported['family']})"
    if averaged := content.get("averaged"):
        steps = ", ".join(f"{step:,}" for step in averaged["steps"])
        return f"mean of steps {steps} of {directory_name(averaged['workdir'])}"
    if source := run.get("init_from"):
        return (
            f"trained from {content.get(SOURCE_FIELD, {}).get('source') or directory_name(source)}"
        )
    return ""


def name_and_origin(workdir: epath.PathLike, content: Mapping[str, Any]) -> str:
    """A model as what is made from it names it: its directory's name, and its own origin."""
    return ", ".join(filter(None, (directory_name(workdir), origin(content))))
