"""Writes an imported model as a work directory: parameters, configuration, vocabulary."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from encdec import safetensors
from encdec.buckets import is_address
from encdec.data.chat_template import TEMPLATE_FILE
from encdec.data.vocabulary import KINDS, SPEC_FILE, Vocabulary
from encdec.errors import ConfigError, DataError
from encdec.files import write_json
from encdec.interop.framing import Framing
from encdec.model import ModelConfig, check_params, parameter_count
from encdec.model.parameter_names import path_name
from encdec.saved.saved_config import CONFIG_FILE, FORMAT_VERSION, PARAMS_FOLDER
from encdec.storage import entries, is_free, remove_directory, whole_directory

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write_model(
    out: pathlib.Path,
    config: ModelConfig,
    params: dict[str, Any],
    *,
    source: dict[str, Any],
    vocabulary: Vocabulary | None,
    framing: Framing,
    max_length: int,
    param_dtype: str | None = None,
    overwrite: bool = False,
    texts: Mapping[str, str] | None = None,
) -> ModelConfig:
    """Writes a model that ``generate``, ``distill`` and ``describe`` read like a trained one.

    Args:
        out: the directory; ``config.json`` is written last.
        config: the model.
        params: its unrolled parameters; memory-mapped views are never held in memory as a whole.
        source: the model's origin, kept in config.json.
        vocabulary: of the model; None if it cannot be read.
        framing: special tokens around its texts.
        max_length: longest sequence for which the model is exact.
        param_dtype: of the stored parameters; by default bfloat16 if all of them are,
            float32 otherwise, so that no precision is lost.
        overwrite: replace what is in ``out``.
        texts: what else is written next to the configuration, by file name.

    Returns:
        The configuration as stored.

    Raises:
        ConfigError: parameters do not fit the configuration, or ``out`` is in use.
        DataError: the vocabulary has more ids than the model.
    """
    check_out(out, overwrite)
    check_params(params, config)
    if vocabulary and vocabulary.size > config.vocab_size:
        raise DataError(
            f"the vocabulary has {vocabulary.size:,} ids, the model only "
            f"{config.vocab_size:,}; give the model's own with --vocabulary=FILE"
        )
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    if param_dtype is None:
        low = all(leaf.dtype == _DTYPES["bfloat16"] for leaf in leaves.values())
        param_dtype = "bfloat16" if low else "float32"
    config = config.replace(param_dtype=param_dtype, dtype=param_dtype)
    if overwrite:
        remove_directory(out)
    tensors: dict[str, Any] = {
        name: _Cast(leaf, _DTYPES[param_dtype]) for name, leaf in leaves.items()
    }
    with whole_directory(out) as partial:
        files = safetensors.write_directory(partial / PARAMS_FOLDER, tensors)
        content = {
            "format_version": FORMAT_VERSION,
            "imported": source
            | {
                "max_length": max_length,
                "parameters": parameter_count(params),
                "files": files,
                "fingerprint": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
            },
            "model": config.to_dict(),
            "data": {
                "vocabulary": vocabulary.save(partial).to_dict() if vocabulary else None,
                **framing.to_dict(max_length),
            },
        }
        for name, text in (texts or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        write_json(partial / CONFIG_FILE, content)
    return config


def check_out(out: pathlib.Path, overwrite: bool) -> None:
    """Raises ConfigError unless ``write_model`` may write there."""
    if is_free(out):
        return
    if not overwrite:
        raise ConfigError(f"--out={out} is not empty; give another directory, or --overwrite")
    if not _is_imported(out):
        raise ConfigError(
            f"--out={out} holds no imported model, so --overwrite does not replace it; give "
            "another directory"
        )


def _is_imported(directory: pathlib.Path) -> bool:
    """Whether ``write_model`` wrote this, finished or not: nothing else is ever removed."""
    try:
        return "imported" in json.loads((directory / CONFIG_FILE).read_text())
    except (OSError, ValueError, TypeError):
        ours = {PARAMS_FOLDER, SPEC_FILE, TEMPLATE_FILE, *(kind.file for kind in KINDS.values())}
        return entries(directory) <= ours


class _Cast:
    """A tensor that is converted to its dtype only when it is written."""

    def __init__(self, tensor: np.ndarray, dtype: np.dtype):
        self._tensor, self.dtype, self.shape = tensor, dtype, tensor.shape
        self.nbytes = tensor.size * dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.ascontiguousarray(self._tensor, self.dtype)


def free_bytes(path: pathlib.Path) -> int:
    """Free bytes on the file system that ``path`` will be on, or will be sent from."""
    if is_address(path):
        path = pathlib.Path(tempfile.gettempdir())
    while not path.exists():
        path = path.parent
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize
