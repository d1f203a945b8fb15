"""A trained model in another program's format."""

from __future__ import annotations

import dataclasses
import os

from encdec import hub
from encdec.errors import ConfigError
from encdec.export import formats
from encdec.export.formats import Export, Written
from encdec.export.model_card import check_license, write_card
from encdec.inference.generator import read_prompt_format
from encdec.inference.text_io import check_template
from encdec.saved.lineage import lineage
from encdec.saved.saved_config import model_config_of, read_config
from encdec.saved.saved_params import load_params_for_inference
from encdec.storage import as_path, is_free, whole_directory


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written, from which checkpoint step, of which model, and where it was pushed."""

    written: Written
    step: int
    export: Export
    address: str = ""


def export_model(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "hf",
    precision: str = "float32",
    step: int | None = None,
    own: bool = False,
    license: str | None = None,
    template: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> ExportReport:
    """Writes a trained model whole, or nothing.

    Args:
        checkpoint: work directory of ``train`` or ``import_model``.
        out: directory to write, new or empty.
        format: one of ``encdec.export.formats.FORMATS``.
        precision: of the weights, one of the format's.
        step: checkpoint; None: the last.
        own: our modelling file even where a public family would do (hf).
        license: of the model, for its card: an identifier such as apache-2.0, or a file.
        template: of every input, ``{source}`` in the place of its own text, such as the task's
            that the model was trained on; not of hf, whose programs have no place for it. None:
            the one that the checkpoint has.
        push: ``ORG/NAME`` on the Hugging Face Hub that receives the directory.
        private: whether that repository is made private, if it is new.

    Raises:
        ConfigError: ``out`` is in use, or the format cannot express the model.
        CheckpointError: the directory holds no trained model.
        DataError: the Hub refuses; what was written by then is whole.
    """
    out = as_path(out)
    if not is_free(out):
        raise ConfigError(f"out={out} is not empty; give another directory")
    formats.check_precision(format, precision)
    check_license(license)
    content = read_config(checkpoint)
    formats.check(format, model_config_of(content))
    if push:
        hub.check_push(push, private)
    elif private:
        raise ConfigError("private is for a repository on the Hub; add --push=ORG/NAME")
    if template is not None:
        if format == "hf":
            raise ConfigError(
                "template is for inputs that encdec reads, but format is hf; leave it out, and "
                "apply the template in the program that loads the model"
            )
        check_template(template)
        content = content | {"data": content["data"] | {"template": template}}
    prompts, targets_length = read_prompt_format(checkpoint)
    config, params, step = load_params_for_inference(checkpoint, step)
    behind = lineage(checkpoint, step)
    export = Export(
        config, params, prompts, precision, content, checkpoint, targets_length, own, step, behind
    )
    with whole_directory(out) as partial:
        written = formats.write(format, partial, export)
        write_card(partial, export, written, format, step, license)
    address = hub.push(out, push, f"Step {step:,}, {precision}") if push else ""
    return ExportReport(written, step, export, address)
