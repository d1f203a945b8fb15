"""Multipliers of Granite, HyperCLOVA X and MiniCPM, folded into weights."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from encdec.errors import DataError
from encdec.interop.layout import check_tied
from encdec.interop.rope import required
from encdec.model import ModelConfig


def read_multipliers(
    name: str,
    fields: dict[str, Any],
    given: Callable[..., Any],
    refuse: Callable[..., DataError],
    path: pathlib.Path,
) -> dict[str, float]:
    """The multipliers of a family that has some; its attention scale and untied head go into
    ``fields``. ``logits_scaling`` divides logits, as Granite's does: HyperCLOVA X's multiplies."""
    if name == "minicpm":
        multipliers = _minicpm(fields, given, refuse, path)
    elif name in ("granite", "hyperclovax"):
        multipliers = _granite(name, fields, given, path)
    else:
        return {}
    split = any(multipliers[key] != 1 for key in ("embedding_multiplier", "logits_scaling"))
    multipliers["tied"] = float(fields["tie_embeddings"])  # theirs, whatever ours will be
    fields["tie_embeddings"] = fields["tie_embeddings"] and not split
    return multipliers


def _minicpm(
    fields: Mapping[str, Any],
    given: Callable[..., Any],
    refuse: Callable[..., DataError],
    path: pathlib.Path,
) -> dict[str, float]:
    """Of a width and a depth at which its rates were chosen (arXiv 2404.06395, section 3)."""
    number = lambda key: float(required({key: given(key)}, key, path, float))
    layers = fields["decoder_layers"]
    if given("mup_denominator", layers) != layers:
        raise refuse("mup_denominator", given("mup_denominator"), f"not its {layers} layers")
    return {
        "embedding_multiplier": number("scale_emb"),
        "residual_multiplier": number("scale_depth") / math.sqrt(layers),
        "logits_scaling": fields["d_model"] / number("dim_model_base"),
    }


def _granite(
    name: str, fields: dict[str, Any], given: Callable[..., Any], path: pathlib.Path
) -> dict[str, float]:
    if (scale := given("attention_multiplier")) is not None:
        scale = required({"attention_multiplier": scale}, "attention_multiplier", path, float)
        fields["attention_scale"] = scale
    multipliers = {
        key: float(required({key: given(key, 1.0)}, key, path, float))
        for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    }
    if name == "hyperclovax":
        multipliers["logits_scaling"] = 1 / multipliers["logits_scaling"]
    return multipliers


def multiplied(
    config: ModelConfig,
    prefix: str,
    head: str,
    tensors: Mapping[str, np.ndarray],
    multipliers: Mapping[str, float],
) -> dict[str, np.ndarray]:
    """Weights with the embedding, residual and logits multipliers folded in, float32."""
    scaled = lambda x, by: np.asarray(x, np.float32) * np.float32(by)
    changed = dict(tensors)
    table = tensors[f"{prefix}embed_tokens.weight"]
    if not config.tie_embeddings:
        if multipliers["tied"]:
            check_tied(tensors, f"{prefix}embed_tokens.weight", head)
            changed[head] = table
        if head in changed:  # else it is missing, and refused as such
            changed[head] = scaled(changed[head], 1 / multipliers["logits_scaling"])
    changed[f"{prefix}embed_tokens.weight"] = scaled(table, multipliers["embedding_multiplier"])
    # What comes last before the sum: a norm there would undo a factor of what it reads.
    last: tuple[str, ...] = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")
    if config.post_norms:
        last = ("post_norm1.weight", "post_norm2.weight")
    for name in tensors:
        if name.endswith(last):
            changed[name] = scaled(tensors[name], multipliers["residual_multiplier"])
    return changed
