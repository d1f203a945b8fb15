"""Converts a trained model to the layout and dtypes in which this machine generates fastest."""

from __future__ import annotations

import pathlib

import jax

from encdec.inference.huge_pages import arrays_onto_huge_pages
from encdec.machine import available_cores, return_freed_memory
from encdec.model import ModelConfig, Params, for_decoding, panels_for_cpu, shards_for_cpu
from encdec.model.coverage import unknown_fields

# Weights of the MLP's kernels from which panels make steps faster (of one, four and sixteen rows).
# An encoder-decoder reads its source as fast with them; a decoder-only model reads its inputs by
# them, too, which takes 1.1 to 1.3 times as long.
PANELS_FROM = 2**17
PANELS_FROM_DECODER_ONLY = 3 * 2**16
# From which steps wait for memory. Panels then gain a decoder-only model nothing more, and cores
# read shards of a kernel in parallel; all is on huge pages; an encoder may compute in bfloat16.
LARGE_KERNEL = 2**20
# Queries at once on a CPU: of 32 to 512, the fastest at 2,048 keys in both types.
ATTENTION_BLOCK = 128
MOST_SHARDS = 8  # more concurrent readers than that gain nothing


def ready_for_decoding(
    config: ModelConfig, params: Params, dtype: str | None = None, lay_out: bool = True
) -> tuple[ModelConfig, Params]:
    """The model in the layout and type in which one-token steps are fastest.

    Args:
        config: the model.
        params: its parameters.
        dtype: of the computation; by default float32 on CPUs, whose one-row bfloat16 products
            read memory at a small fraction of its speed, and the model's own elsewhere. A large
            model that was trained in bfloat16 still encodes in it, where the CPU has it.
        lay_out: whether kernels may be laid out for this machine, or are kept as trained.
    """
    on_cpu, trained = jax.default_backend() == "cpu", config.dtype
    cpu_layout = on_cpu and not unknown_fields(config, "cpu")
    as_trained = dtype is None and trained == "bfloat16"
    dtype = dtype or decoding_dtype(config)
    config, params = for_decoding(config.replace(dtype=dtype), params)
    laid_out = lay_out and cpu_layout and dtype == "float32" and on_one_device(params)
    large = laid_out and waits_for_memory(config)
    if cpu_layout:
        config = config.replace(attention_block=ATTENTION_BLOCK, attention_kernel="xla")
    if laid_out and not config.execution.laid_out:
        config, params = _laid_out(config, params)
    cast = jax.jit(_cast_kernels, static_argnums=1)
    if dtype != config.param_dtype:
        params = cast(params, dtype)
    if large and as_trained and config.is_encoder_decoder and cpu_has_bfloat16():
        config = config.replace(encoder_dtype="bfloat16")
        params = params | {"encoder": cast(params["encoder"], "bfloat16")}
    if large:
        arrays_onto_huge_pages(jax.block_until_ready(params))
        return_freed_memory()  # of the conversion
    return config, params


def waits_for_memory(config: ModelConfig) -> bool:
    """Whether a step on a CPU takes as long as reading the kernels does."""
    return config.d_model * config.mlp_dim >= LARGE_KERNEL


def decoding_dtype(config: ModelConfig) -> str:
    """In which this machine computes where nothing else is asked for."""
    return "float32" if jax.default_backend() == "cpu" else config.dtype


def _laid_out(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The model in panels or shards, where they are faster."""
    if waits_for_memory(config) and not config.is_encoder_decoder:
        return shards_for_cpu(config, params, min(available_cores(), MOST_SHARDS))
    smallest = PANELS_FROM if config.is_encoder_decoder else PANELS_FROM_DECODER_ONLY
    in_panels = config.d_model * config.mlp_dim >= smallest
    return panels_for_cpu(config, params) if in_panels else (config, params)


def _cast_kernels(params: Params, dtype: str) -> Params:
    """Norms multiply in float32; everything else is cast where it is used, so casting it
    beforehand changes nothing but the bytes read."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path[-1].key == "scale" else leaf.astype(dtype), params
    )


def on_one_device(params: Params) -> bool:
    """Whether every parameter is on a single device, whole."""
    leaves = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    return all(len(x.sharding.device_set) == 1 for x in leaves)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers; where it does not, they are slower."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
