"""Writes a trained model in encdec's own format: only its weights, small enough to send.

It is read like an imported model, by every command that reads one, and needs nothing that encdec
does not install. int8 weights are levels with one float32 scale for each slice along the last
axis, as tensor ``NAME`` and tensor ``NAME.scale``; they are float32 again as soon as they are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib

import jax
import ml_dtypes
import numpy as np

from encdec import safetensors
from encdec.data.chat_template import copy_template
from encdec.data.vocabulary import copy_vocabulary
from encdec.export.formats import Export, Written
from encdec.export.quantise import eight_bits
from encdec.files import write_json
from encdec.model import ModelConfig, parameter_count, unroll_params
from encdec.model.parameter_names import path_name
from encdec.saved.saved_config import (
    CONFIG_FILE,
    FORMAT_VERSION,
    PARAMS_FOLDER,
    SCALE,
    name_and_origin,
)
from encdec.storage import directory_name


def check(config: ModelConfig) -> None:
    """Whatever can be trained can be written."""


def write(out: pathlib.Path, export: Export) -> Written:
    """Writes params/, the vocabulary, a chat template if there is one, and last config.json."""
    config, params = export.config, export.params
    if config.execution.scan_layers:
        params = unroll_params(params, config)
        config = config.replace(scan_layers=False)
    if export.precision == "bfloat16":
        config = config.replace(param_dtype="bfloat16", dtype="bfloat16")
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        tensors |= _stored(path_name(path), np.asarray(leaf), export.precision)
    out.mkdir(parents=True, exist_ok=True)
    files = safetensors.write_directory(out / PARAMS_FOLDER, tensors)
    copy_vocabulary(export.directory, out)
    copy_template(export.directory, out)
    data = export.content["data"]
    before = export.content.get("imported", {})
    imported = {
        "format": "encdec",
        "family": before.get("family", "encdec"),
        "name": directory_name(export.directory),
        "source": name_and_origin(export.directory, export.content),
        "step": export.step,
        "precision": export.precision,
        "max_length": before.get("max_length") or data["inputs_length"] + data["targets_length"],
        "parameters": parameter_count(params),
        "files": files,
        "fingerprint": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "lineage": dataclasses.asdict(export.lineage),
    }
    write_json(
        out / CONFIG_FILE,
        {
            "format_version": FORMAT_VERSION,
            "imported": imported,
            "model": config.to_dict(),
            "data": data,
        },
    )
    return Written(sum((out / PARAMS_FOLDER / name).stat().st_size for name in files))


def _stored(name: str, weights: np.ndarray, precision: str) -> dict[str, np.ndarray]:
    if precision == "bfloat16":
        return {name: weights.astype(ml_dtypes.bfloat16)}
    weights = weights.astype(np.float32)
    if precision == "float32" or weights.ndim < 2:
        return {name: weights}
    levels, scales = eight_bits(weights, axis=-1)
    return {name: levels, name + SCALE: scales}
