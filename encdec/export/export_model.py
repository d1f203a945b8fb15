"""A trained model in another program's format."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from encdec.errors import ConfigError
from encdec.export import formats
from encdec.export.formats import Export, Written
from encdec.inference.generator import read_prompt_format
from encdec.storage import is_free, whole_directory
from encdec.train.checkpoints import load_params_for_inference
from encdec.train.workdir import model_config_of, read_config


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written, from which checkpoint step, and the model that went in."""

    written: Written
    step: int
    export: Export


def export_model(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "hf",
    precision: str = "float32",
    step: int | None = None,
    own: bool = False,
) -> ExportReport:
    """Writes a trained model whole, or nothing.

    Args:
        checkpoint: work directory of ``train`` or ``import_model``.
        out: directory to write, new or empty.
        format: one of ``encdec.export.formats.FORMATS``.
        precision: of the weights, one of the format's.
        step: checkpoint; None: the last.
        own: our modelling file even where a public family would do (hf).

    Raises:
        ConfigError: ``out`` is in use, or the format cannot express the model.
        CheckpointError: the directory holds no trained model.
    """
    out = pathlib.Path(out)
    if not is_free(out):
        raise ConfigError(f"out={out} is not empty; give another directory")
    formats.check_precision(format, precision)
    content = read_config(checkpoint)
    formats.check(format, model_config_of(content))
    prompts, targets_length = read_prompt_format(checkpoint)
    config, params, step = load_params_for_inference(checkpoint, step)
    export = Export(config, params, prompts, precision, content, checkpoint, targets_length, own)
    with whole_directory(out) as partial:
        written = formats.write(format, partial, export)
    return ExportReport(written, step, export)
