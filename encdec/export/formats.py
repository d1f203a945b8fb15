"""The formats that models are exported to: one table, and one way into each.

To add a format, write a module with ``check(config)``, which raises ConfigError for what the format
cannot express, and ``write(out, export) -> Written``, and enter it in ``FORMATS``.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from encdec.data.chat_template import copy_template
from encdec.data.vocabulary import copy_vocabulary
from encdec.errors import ConfigError
from encdec.files import write_json
from encdec.inference.text_io import PromptFormat
from encdec.model import ModelConfig
from encdec.model.coverage import refuse_unknown
from encdec.saved.lineage import Lineage
from encdec.saved.saved_config import CONFIG_FILE, name_and_origin


@dataclasses.dataclass(frozen=True)
class Export:
    """What is to be written.

    Attributes:
        config: the model.
        params: its parameters, scanned or not.
        prompts: its vocabulary and how its inputs begin and end.
        precision: of the weights, one of the format's.
        content: of the work directory's config.json, which ``encdec generate`` reads.
        directory: of the vocabulary, as the work directory has it.
        targets_length: of the training targets, ``generate``'s default for new tokens.
        own: our own modelling file even where a public family would do (hf).
        step: of the checkpoint; 0 of an imported model.
        lineage: what that checkpoint was trained with.
    """

    config: ModelConfig
    params: Any
    prompts: PromptFormat
    precision: str = "float32"
    content: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    directory: str | os.PathLike[str] = ""
    targets_length: int = 128
    own: bool = False
    step: int = 0
    lineage: Lineage = dataclasses.field(default_factory=lambda: Lineage(None, None))

    def finish(
        self, out: pathlib.Path, format: str, config: ModelConfig, graphs_bytes: int
    ) -> Written:
        """Adds what ``encdec generate`` and ``serve`` read of a graph's directory, config.json
        last."""
        copy_vocabulary(self.directory, out)
        copy_template(self.directory, out)
        content = {name: self.content[name] for name in ("format_version", "data")} | {
            "model": config.to_dict(),
            "export": {
                "format": format,
                "precision": self.precision,
                "bytes": graphs_bytes,
                "source": name_and_origin(self.directory, self.content),
                "step": self.step,
                "lineage": dataclasses.asdict(self.lineage),
            },
        }
        write_json(out / CONFIG_FILE, content)
        return Written(graphs_bytes)


@dataclasses.dataclass(frozen=True)
class Written:
    """Bytes of weights and graphs; of Hugging Face's, the family, and why not a nearer one."""

    bytes: int
    family: str = ""
    reasons: tuple[str, ...] = ()


class Exporter(Protocol):
    """What the module of a format has."""

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError where the model has what the format does not express."""

    def write(self, out: pathlib.Path, export: Export) -> Written:
        """Writes to an empty or new directory, config.json last."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A format: its name for people, its module, and the precisions of weights that it has.

    ``runs``: whether ``encdec generate`` and ``--check`` run what is written.
    """

    title: str
    module: str
    precisions: tuple[str, ...]
    about: str
    runs: bool = True


FORMATS = {
    "hf": Format(
        "Hugging Face",
        "encdec.export.huggingface_export",
        ("float32", "bfloat16"),
        "a Hugging Face directory",
        runs=False,
    ),
    "onnx": Format(
        "ONNX", "encdec.export.onnx_export", ("float32", "int8", "int4"), "graphs for onnxruntime"
    ),
    "litert": Format(
        "LiteRT",
        "encdec.export.litert_export",
        ("float32", "int8", "int4"),
        "graphs for LiteRT, the fastest on a CPU",
    ),
    "encdec": Format(
        "encdec",
        "encdec.export.own_format",
        ("float32", "bfloat16", "int8"),
        "only the weights, for every command here; needs no other program",
        runs=False,
    ),
}


def check_precision(name: str, precision: str) -> None:
    """Raises ConfigError where a format does not have weights of that precision."""
    allowed = FORMATS[name].precisions
    if precision not in allowed:
        raise ConfigError(
            f"--precision={precision} does not go with --format={name}; expected "
            f"{' or '.join(allowed)}"
        )


def check(name: str, config: ModelConfig) -> None:
    """Raises ConfigError where a format cannot express the model, new fields included."""
    refuse_unknown(config, name, f"the export to {FORMATS[name].title}")
    _exporter(name).check(config)


def write(name: str, out: pathlib.Path, export: Export) -> Written:
    """Writes a model in a format.

    Raises:
        ConfigError: a field or precision that the format does not have, or a package is missing.
    """
    check_precision(name, export.precision)
    check(name, export.config)
    return _exporter(name).write(out, export)


def _exporter(name: str) -> Exporter:
    return cast(Exporter, importlib.import_module(FORMATS[name].module))
