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
    from encdec.model.cpu_layout import panels_for_cpu, shards_for_cpu
    from encdec.model.execution import ExecutionConfig
    from encdec.model.model_config import ModelConfig
    from encdec.model.presets import preset, preset_names

# The module of each name that is not in ``build``.
_MODULES = {
    "ExecutionConfig": "execution",
    "ModelConfig": "model_config",
    "init_cache": "cache",
    "panels_for_cpu": "cpu_layout",
    "preset": "presets",
    "preset_names": "presets",
    "shards_for_cpu": "cpu_layout",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'build')}"), name)
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
    "panels_for_cpu",
    "parameter_count",
    "preset",
    "preset_names",
    "scan_params",
    "shards_for_cpu",
    "unroll_params",
]
