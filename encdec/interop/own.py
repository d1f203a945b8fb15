"""Our own Hugging Face format (the modelling file that exports ship): configuration and tensors.

Both directions share one layout.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from encdec.errors import DataError
from encdec.interop.huggingface_import import ACTIVATIONS, Imported, ids_of
from encdec.interop.layout import (
    Entry,
    attention_entries,
    check_tied,
    mlp_entries,
    qk_norm_entries,
    to_ours,
)
from encdec.interop.rope import required
from encdec.model import ExecutionConfig, ModelConfig

MODEL_TYPE = "encdec"
# Fields of config.json that are ours as they are.
FIELDS = (
    "vocab_size",
    "encoder_layers",
    "decoder_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
    "qkv_bias",
    "attention_out_bias",
    "mlp_bias",
    "mlp_gated",
    "norm_eps",
    "norm_plus_one",
    "norm_cast",
    "post_norms",
    "qk_norm",
    "attention_logit_cap",
    "final_logit_cap",
    "embedding_scale",
)
# Fields that earlier versions did not write, with what holds for their models.
LATER_FIELDS: dict[str, Any] = {
    "merged_attention": False,
    "attention_window": 0,
    "local_rope_theta": 0.0,
    "encoder_global_layers": (),
    "decoder_global_layers": (),
    "encoder_window": (),
    "encoder_unrotated_layers": (),
    "decoder_unrotated_layers": (),
    "qk_norm_over_heads": False,
    "omit_pre_norms": False,
}
_LENGTH = 1 << 15  # nothing in the format depends on a length


def layout(config: ModelConfig, *, one_table: bool) -> list[Entry]:
    """Their names of our parameters; ``one_table``: one embedding table for both stacks."""
    entries = [Entry("decoder.embed_tokens.weight", "embedder/embedding")]
    if not one_table:
        table = "embedder" if config.share_embeddings else "encoder_embedder"
        entries.append(Entry("encoder.embed_tokens.weight", f"{table}/embedding"))
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", "embedder/head", "matrix"))
    sublayers = {"self_attn": "self_attention", "cross_attn": "cross_attention", "mlp": "mlp"}
    if config.merged_attention:
        del sublayers["cross_attn"]
    for stack, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        entries.append(Entry(f"{stack}.norm.weight", f"{stack}/final_norm/scale"))
        for layer in range(count):
            theirs, ours = f"{stack}.layers.{layer}", f"{stack}/layers_{layer}"
            for name, our_name in sublayers.items():
                if name == "cross_attn" and stack == "encoder":
                    continue
                place = {"cross_attn": "encoder_attention"}.get(name, our_name)
                if name == "mlp":
                    entries += mlp_entries(config, f"{theirs}.mlp", f"{ours}/mlp")
                else:
                    entries += attention_entries(config, f"{theirs}.{name}", f"{ours}/{place}")
                    if config.qk_norm:
                        entries += qk_norm_entries(f"{theirs}.{name}", f"{ours}/{place}")
                for when, suffix in (("pre", "norm"), ("post", "post_norm")):
                    if not config.omit_pre_norms if when == "pre" else config.post_norms:
                        entries.append(
                            Entry(
                                f"{theirs}.{when}_{name}_norm.weight",
                                f"{ours}/{our_name}_{suffix}/scale",
                            )
                        )
    return entries


def read_config(directory: pathlib.Path) -> Imported:
    """Translates the config.json that ``encdec export --format=hf`` wrote.

    Raises:
        DataError: a field is missing, or an activation is not supported.
    """
    path = directory / "config.json"
    values = json.loads(path.read_text())
    wanted = (*FIELDS, "attention_scale", "rope_frequencies", "rope_magnitude", "mlp_activation")
    if missing := [name for name in wanted if name not in values]:
        raise DataError(
            f"{path} has no {missing[0]}; export the model again with encdec export --format=hf"
        )
    if values["mlp_activation"] not in ACTIVATIONS:
        raise DataError(
            f"{path} has mlp_activation {values['mlp_activation']!r}, not one of "
            f"{', '.join(ACTIVATIONS)}; this model cannot be imported"
        )
    head_dim, scale = required(values, "head_dim", path), float(values["attention_scale"])
    model = ModelConfig(
        **{name: values[name] for name in FIELDS},
        **{name: values.get(name, absent) for name, absent in LATER_FIELDS.items()},
        **_rope(np.array(values["rope_frequencies"], np.float64), values["rope_magnitude"]),
        mlp_activation=ACTIVATIONS[values["mlp_activation"]],
        attention_scale=0.0 if np.isclose(scale, head_dim**-0.5, rtol=1e-6) else scale,
        tie_embeddings=bool(values.get("tie_word_embeddings", True)),
        share_embeddings=False,
        execution=ExecutionConfig(scan_layers=False),
    )
    start, eos = int(values.get("decoder_start_token_id") or 0), ids_of(values.get("eos_token_id"))
    return Imported(MODEL_TYPE, model, _LENGTH, start, eos)


def _rope(frequencies: np.ndarray, magnitude: float) -> dict[str, Any]:
    """Our fields for radians per position of each pair: base and factor, or divisors one by one."""
    pairs = len(frequencies)
    theta = float(frequencies[0] / frequencies[1]) ** pairs if pairs > 1 else 10_000.0
    theta = float(f"{theta:.5g}")  # a round base was rounded to float32 frequencies
    plain = theta ** (-np.arange(pairs) / pairs)
    factor = float(f"{1 / frequencies[0]:.5g}")
    if magnitude == 1 and np.allclose(plain / factor, frequencies, rtol=1e-5, atol=0):
        if factor == 1:
            return {"rope_theta": theta}
        if factor > 1:
            return {"rope_theta": theta, "rope_scaling": "linear", "rope_factor": factor}
    plain = 10_000.0 ** (-np.arange(pairs) / pairs)
    return {
        "rope_scaling": "per_pair",
        "rope_magnitude": float(magnitude),
        "rope_divisors": tuple((plain / frequencies).tolist()),
    }


def convert(
    config: ModelConfig, tensors: Mapping[str, np.ndarray]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Our configuration and its unrolled parameters, as views of the tensors.

    Both stacks share one table where it is stored once, or as two equal copies.

    Raises:
        DataError: tensors are missing, unexpected or of the wrong shape.
    """
    tables: list[Any] = [
        tensors.get(f"{stack}.embed_tokens.weight") for stack in ("encoder", "decoder")
    ]
    one_table = tables[0] is None
    same = tables[1] is not None and (one_table or np.array_equal(*tables))
    config = config.replace(share_embeddings=bool(same))
    ignored = ["lm_head.weight"] if config.tie_embeddings else []
    check_tied(tensors, "decoder.embed_tokens.weight", *ignored)
    if same and not one_table:
        ignored.append("encoder.embed_tokens.weight")
    return config, to_ours(layout(config, one_table=bool(same)), config, tensors, ignored)
