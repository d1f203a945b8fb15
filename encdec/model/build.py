"""From a configuration to a module, its parameters, their axes, and their layout."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from encdec.errors import ConfigError
from encdec.model.cpu_layout import cpu_model
from encdec.model.decoder_only import DecoderOnly
from encdec.model.encoder_decoder import EncoderDecoder
from encdec.model.model_config import ModelConfig

Model = EncoderDecoder | DecoderOnly
Params = dict[str, Any]
MODEL_FIELDS = ("input_tokens", "segment_ids", "positions")  # that a model reads of each side


def build_model(config: ModelConfig) -> Model:
    """The flax.linen module of ``config``; it holds no parameters."""
    if config.execution.for_cpu:
        return cpu_model(config)
    return EncoderDecoder(config) if config.is_encoder_decoder else DecoderOnly(config)


def _boxed_params(model: Model, key: jax.Array) -> Params:
    sides = ("encoder", "decoder") if model.config.is_encoder_decoder else ("decoder",)
    fields = [f"{side}_{name}" for side in sides for name in MODEL_FIELDS]
    batch = {name: jnp.zeros((1, 2), jnp.int32) for name in fields}  # no parameter depends on it
    return model.init(key, batch)["params"]


def init_params(model: Model, key: jax.Array) -> Params:
    """Random initial parameters as a plain nested dict, in ``config.param_dtype``."""
    return nn.unbox(_boxed_params(model, key))


def abstract_params(model: Model) -> Params:
    """Shapes and dtypes of the parameters, without drawing them."""
    return nn.unbox(_abstract_boxes(model))


def logical_axes(model: Model) -> Params:
    """The parameters' tree with, at each leaf, a tuple of one logical axis name per dimension."""
    return jax.tree.map(
        lambda box: tuple(box.names),
        _abstract_boxes(model),
        is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
    )


@functools.lru_cache(maxsize=16)
def _abstract_boxes(model: Model) -> Params:
    """Traced once per model, which takes seconds where layers are many and unrolled."""
    return jax.eval_shape(lambda: _boxed_params(model, jax.random.key(0)))


def parameter_count(params: Params) -> int:
    """Number of scalars in a tree of arrays or of their shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def unroll_params(params: Params, config: ModelConfig) -> Params:
    """Scanned parameters (``layers`` with a leading axis) as unrolled ones (``layers_0``, ...)."""
    result = dict(params)
    for stack, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        if count:
            layers = params[stack]["layers"]
            result[stack] = {k: v for k, v in params[stack].items() if k != "layers"} | {
                f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)
            }
    return result


def scan_params(params: Params, config: ModelConfig) -> Params:
    """Inverse of ``unroll_params``: stacks the layers of each stack along a new first axis."""
    result = dict(params)
    for stack, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        if count:
            names = [f"layers_{i}" for i in range(count)]
            layers = [params[stack][name] for name in names]
            rest = {k: v for k, v in params[stack].items() if k not in names}
            result[stack] = rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
    return result


def for_decoding(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model with the fastest one-token steps: unrolled, unfused, without remat."""
    if config.execution.scan_layers:
        params = unroll_params(params, config)
    # Fused, every step of decoding would concatenate the weights again.
    return config.replace(scan_layers=False, remat="none", fuse_projections=False), params


def check_params(params: Params, config: ModelConfig) -> None:
    """Raises ConfigError naming the missing, extra and misshapen parameters, if there are any."""
    flat = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    expected, seen = flat(abstract_params(build_model(config))), flat(params)
    problems = [
        f"missing {name} {expected[name]}" for name in sorted(expected.keys() - seen.keys())
    ]
    problems += [f"extra {name} {seen[name]}" for name in sorted(seen.keys() - expected.keys())]
    problems += [
        f"{name} has shape {seen[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & seen.keys())
        if expected[name] != seen[name]
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise ConfigError(f"parameters do not fit the model: {shown}")
