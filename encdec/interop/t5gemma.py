"""T5Gemma (transformers' ``T5GemmaForConditionalGeneration``): configuration and tensors.

Both directions share one layout. Its blocks norm every sublayer before and after, its MLP is
gated, its token embeddings are multiplied by sqrt(width), and its RMSNorm scales by 1 + w.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from encdec.errors import DataError
from encdec.interop.huggingface_import import ACTIVATIONS, Imported, ids_of, local_layers
from encdec.interop.layout import (
    Entry,
    attention_entries,
    check_tied,
    layernorm_entries,
    mlp_entries,
    to_ours,
)
from encdec.interop.rope import required
from encdec.model import ExecutionConfig, ModelConfig

MODEL_TYPE = "t5gemma"
# Values of absent keys, as transformers has them.
_DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "rope_theta": 10_000.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
# Settings that both stacks must share, because ModelConfig has one field for both.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_activation",
    "rms_norm_eps",
    "attention_bias",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
)


def layout(config: ModelConfig) -> list[Entry]:
    """Their names of our parameters."""
    entries = [Entry("model.decoder.embed_tokens.weight", "embedder/embedding")]
    if not config.share_embeddings:
        entries.append(Entry("model.encoder.embed_tokens.weight", "encoder_embedder/embedding"))
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.out_proj.weight", "embedder/head", "matrix"))
    for stack, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        entries.append(Entry(f"model.{stack}.norm.weight", f"{stack}/final_norm/scale"))
        for layer in range(count):
            theirs, ours = f"model.{stack}.layers.{layer}", f"{stack}/layers_{layer}"
            norms = {"self_attn": "self_attention", "feedforward": "mlp"}
            entries += attention_entries(config, f"{theirs}.self_attn", f"{ours}/self_attention")
            if stack == "decoder":
                norms["cross_attn"] = "cross_attention"
                entries += attention_entries(
                    config, f"{theirs}.cross_attn", f"{ours}/encoder_attention"
                )
            entries += mlp_entries(config, f"{theirs}.mlp", f"{ours}/mlp")
            entries += layernorm_entries(theirs, ours, norms)
    return entries


def read_config(directory: pathlib.Path) -> Imported:
    """Translates a T5Gemma's config.json.

    An encoder's window reaches as many tokens back and ahead, a decoder's one less, as
    transformers 5 has them.

    Raises:
        DataError: a setting is not supported.
    """
    path = directory / "config.json"
    values = json.loads(path.read_text())
    stacks = {}
    for name in ("encoder", "decoder"):
        if not isinstance(values.get(name), dict):
            raise DataError(
                f"{path} has no {name}; expected a T5Gemma encoder-decoder's config.json"
            )
        stacks[name] = _DEFAULTS | {
            k: v
            for k, v in values[name].items()
            if v is not None or k.endswith("softcapping") or k == "sliding_window"
        }
    encoder, decoder = stacks["encoder"], stacks["decoder"]
    refuse = lambda key, value, why: DataError(
        f"{path} has {key} {value!r}, {why}; this model cannot be imported"
    )
    for key in _SHARED:
        if encoder[key] != decoder[key]:
            raise refuse(
                f"encoder.{key}",
                encoder[key],
                f"but decoder.{key} {decoder[key]!r}: encdec has one value for both stacks",
            )
    if decoder["hidden_activation"] not in ACTIVATIONS:
        raise refuse(
            "hidden_activation",
            decoder["hidden_activation"],
            f"not one of {', '.join(ACTIVATIONS)}",
        )
    for name, stack in stacks.items():
        for key in _COUNTS:
            required(stack, key, f"{path}, {name},")
    rope = _rope(encoder, refuse, f"{path}, encoder,")
    if rope != _rope(decoder, refuse, f"{path}, decoder,"):
        raise refuse("rope_parameters", encoder.get("rope_parameters"), "but the decoder's differ")
    bias = bool(decoder["attention_bias"])
    model = ModelConfig(
        vocab_size=decoder["vocab_size"],
        encoder_layers=encoder["num_hidden_layers"],
        decoder_layers=decoder["num_hidden_layers"],
        d_model=decoder["hidden_size"],
        num_heads=decoder["num_attention_heads"],
        num_kv_heads=decoder["num_key_value_heads"],
        head_dim=decoder["head_dim"],
        mlp_dim=decoder["intermediate_size"],
        qkv_bias=bias,
        attention_out_bias=bias,
        attention_scale=float(decoder["query_pre_attn_scalar"]) ** -0.5,
        attention_logit_cap=float(decoder["attn_logit_softcapping"] or 0.0),
        final_logit_cap=float(decoder["final_logit_softcapping"] or 0.0),
        mlp_gated=True,
        mlp_activation=ACTIVATIONS[decoder["hidden_activation"]],
        norm_eps=float(decoder["rms_norm_eps"]),
        norm_cast="after_scale",
        norm_plus_one=True,
        post_norms=True,
        embedding_scale=True,
        share_embeddings=False,
        tie_embeddings=bool(values.get("tie_word_embeddings", True)),
        execution=ExecutionConfig(scan_layers=False),
        **rope,
        **_windows(stacks, refuse),
    )
    longest = min(int(stack["max_position_embeddings"]) for stack in stacks.values())
    eos = ids_of(values.get("eos_token_id", decoder["eos_token_id"]))
    return Imported(MODEL_TYPE, model, longest, int(decoder["bos_token_id"]), eos)


def _windows(
    stacks: Mapping[str, Mapping[str, Any]], refuse: Callable[..., DataError]
) -> dict[str, Any]:
    """Our fields for layers with a sliding window."""
    reads_all, windows = {}, {}
    for name, stack in stacks.items():
        layers = range(stack["num_hidden_layers"])
        kinds = stack.get("layer_types")
        local = [layer % 2 == 0 for layer in layers]
        if kinds:
            local = local_layers(kinds, len(layers), refuse, f"{name}.")
        if not stack["sliding_window"]:
            local = [False for _ in layers]
        reads_all[name] = tuple(layer for layer in layers if not local[layer])
        if any(local):
            windows[name] = int(stack["sliding_window"])
    if not windows:
        return {}
    if len(set(windows.values())) > 1:
        raise refuse(
            "encoder.sliding_window",
            windows["encoder"],
            f"but decoder.sliding_window {windows['decoder']}: encdec has one value for both",
        )
    window = next(iter(windows.values()))
    return {
        "attention_window": window,
        "encoder_window": (window, window),
        "encoder_global_layers": reads_all["encoder"],
        "decoder_global_layers": reads_all["decoder"],
    }


def _rope(stack: Mapping[str, Any], refuse: Callable[..., DataError], where: str) -> dict[str, Any]:
    scaling = dict(stack.get("rope_parameters") or stack.get("rope_scaling") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    known = ("rope_type", "type", "rope_theta", "factor")
    if odd := [key for key, x in scaling.items() if key not in known and x not in (None, 1)]:
        why = f"with {odd[0]}, expected {', '.join(known)} alone"
        raise refuse("rope_parameters", scaling, why)
    fields: dict[str, Any] = {"rope_theta": float(scaling.get("rope_theta", stack["rope_theta"]))}
    if kind == "linear":
        return fields | {
            "rope_scaling": "linear",
            "rope_factor": float(required(scaling, "factor", where, float)),
        }
    if kind != "default":
        raise refuse("rope_parameters", scaling, "not one of default, linear")
    return fields


def convert(
    config: ModelConfig, tensors: Mapping[str, np.ndarray]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Our configuration and its unrolled parameters, as views of the tensors.

    One table serves both stacks where theirs are equal.

    Raises:
        DataError: tensors are missing, unexpected or of the wrong shape.
    """
    names = [f"model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
    ignored = ["lm_head.out_proj.weight"] if config.tie_embeddings else []
    check_tied(tensors, names[1], *ignored)
    tables: list[Any] = [tensors.get(name) for name in names]
    if tables[0] is not None and np.array_equal(*tables):
        config = config.replace(share_embeddings=True)
        ignored.append(names[0])
    return config, to_ours(layout(config), config, tensors, ignored)
