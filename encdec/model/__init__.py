"""The models: configuration, presets, encoder-decoder, decoder-only, parameters."""

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
from encdec.model.config import ModelConfig
from encdec.model.cpu_layout import shard_for_cpu
from encdec.model.execution import ExecutionConfig
from encdec.model.presets import preset, preset_names

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
