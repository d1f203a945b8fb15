"""The models: configuration, presets, encoder-decoder, decoder-only, parameters.

Names are imported when they are first used: configurations and presets are plain Python, and a
command that only reads a configuration should not wait for jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encdec.model.build import (
        Model,
        Params,
        abstract_params,
        build_model,
        check_params,
        for_decoding,
        init_params,
        logical_axes,
        parameter_count,
        scan_params,
        unroll_params,
    )
    from encdec.model.cache import init_cache
    from encdec.model.cpu_layout import shard_for_cpu
    from encdec.model.execution import ExecutionConfig
    from encdec.model.model_config import ModelConfig
    from encdec.model.presets import preset, preset_names

_MODULES = {
    "build": (
        "Model",
        "Params",
        "abstract_params",
        "build_model",
        "check_params",
        "for_decoding",
        "init_params",
        "logical_axes",
        "parameter_count",
        "scan_params",
        "unroll_params",
    ),
    "cache": ("init_cache",),
    "model_config": ("ModelConfig",),
    "cpu_layout": ("shard_for_cpu",),
    "execution": ("ExecutionConfig",),
    "presets": ("preset", "preset_names"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "ExecutionConfig",
    "Model",
    "ModelConfig",
    "Params",
    "abstract_params",
    "build_model",
    "check_params",
    "for_decoding",
    "init_cache",
    "init_params",
    "logical_axes",
    "parameter_count",
    "preset",
    "preset_names",
    "scan_params",
    "shard_for_cpu",
    "unroll_params",
]
