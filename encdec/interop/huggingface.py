"""Hugging Face causal language models as our decoder-only model: configuration and tensors.

Families: Llama 2 and 3, SmolLM2 (``llama``), Mistral, Phi-3 and 3.5 (``phi3``), Qwen 2 and 2.5
(``qwen2``), Qwen 3, Gemma 1, 2 and 3 (text). A setting that our model has no field for is refused
by name. Read from ``config.json`` alone, as written by transformers 4 and 5.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from encdec.errors import DataError
from encdec.interop.layout import Entry, attention_entries, mlp_entries, to_ours
from encdec.model import ExecutionConfig, ModelConfig

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a family does where its config.json says nothing.

    Attributes:
        defaults: values of absent keys, as transformers has them.
        fields: our fields that hold for the whole family.
        out_bias: whether ``attention_bias`` adds one to the output projection too.
    """

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    out_bias: bool = True


_GEMMA = {"norm_plus_one": True, "norm_cast": "after_scale", "embedding_scale": True}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256, "vocab_size": 256_000}
FAMILIES = {
    "llama": _Family(),
    "mistral": _Family({"sliding_window": 4096, "num_key_value_heads": 8}),
    "phi3": _Family({"rms_norm_eps": 1e-5}),
    "qwen2": _Family({"attention_bias": True}, out_bias=False),
    "qwen3": _Family({"head_dim": 128}, {"qk_norm": True}),
    "gemma": _Family(_GEMMA_DEFAULTS, _GEMMA | {"mlp_activation": "gelu_tanh"}),
    "gemma2": _Family(
        _GEMMA_DEFAULTS
        | {
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        _GEMMA | {"post_norms": True},
    ),
    "gemma3_text": _Family(
        _GEMMA_DEFAULTS
        | {
            "vocab_size": 262_208,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": 256,
            "sliding_window_pattern": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        _GEMMA | {"post_norms": True, "qk_norm": True},
    ),
}
# Without these there is no model; Gemma's have defaults for some.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Imported:
    """What a Hugging Face config.json describes.

    Attributes:
        family: its model_type.
        model: our configuration, layers unrolled.
        max_length: the longest sequence that the imported model is right for.
        start_id: what stands before the first token: BOS, else EOS.
        eos_ids: ids that end a text.
    """

    family: str
    model: ModelConfig
    max_length: int
    start_id: int
    eos_ids: tuple[int, ...]


def read_config(directory: pathlib.Path) -> Imported:
    """Translates a model's config.json.

    Raises:
        DataError: no such file, a family or a setting that our model cannot express.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise DataError(
            f"{directory} has no config.json; give the directory of a Hugging Face "
            "causal language model (config.json and *.safetensors)"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(
            f"{path} holds a JSON {type(values).__name__}, wanted an object; give a "
            "Hugging Face model's directory"
        )
    if values.get("model_type") == "gemma3":  # the text model within one that also sees images
        values = required(values, "text_config", path, dict) | {"model_type": "gemma3_text"}
    name = values.get("model_type")
    if name not in FAMILIES:
        raise DataError(f"{path} has model_type {name!r}; can be imported: {', '.join(FAMILIES)}")
    return _translate(name, values, path)


def required(values: Mapping[str, Any], key: str, where: object, kind: type = int) -> Any:
    """The value of a key that a configuration cannot do without.

    Args:
        values: the configuration.
        key: its name.
        where: the file, and the part of it.
        kind: of the value; numbers (int, float) have to be positive.

    Raises:
        DataError: the key is absent or null, or its value is of another kind.
    """
    value = values.get(key)
    if value is None:
        raise DataError(
            f"{where} has no {key}; download the file again, or add what the model was made with"
        )
    kinds = {int: int, float: (int, float)}.get(kind, kind)
    if (
        not isinstance(value, kinds)
        or kind in (int, float)
        and not (not isinstance(value, bool) and value > 0)
    ):
        wanted = {
            int: "a positive whole number",
            float: "a positive number",
            dict: "an object",
            list: "a list",
        }[kind]
        raise DataError(f"{where} has {key} {value!r}, wanted {wanted}; download the file again")
    return value


def _translate(name: str, values: dict[str, Any], path: pathlib.Path) -> Imported:
    family = FAMILIES[name]
    given = lambda key, default=None: (  # absent and null mean the family's default
        values[key] if values.get(key) is not None else family.defaults.get(key, default)
    )
    refuse = lambda key, value, why: DataError(
        f"{path} has {key} {value!r}, {why}; this model cannot be imported"
    )
    sizes = {key: required({key: given(key)}, key, path) for key in _SIZES}
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    head_dim = required({"head_dim": given("head_dim", width // heads)}, "head_dim", path)
    activation = given("hidden_activation", given("hidden_act", "silu"))
    if name.startswith("gemma2") or name.startswith("gemma3"):
        activation = given("hidden_activation", "gelu_pytorch_tanh")
    if activation not in ACTIVATIONS:
        raise refuse("hidden_act", activation, f"not one of {', '.join(ACTIVATIONS)}")
    if values.get("use_bidirectional_attention"):
        raise refuse("use_bidirectional_attention", True, "and we have causal attention alone")
    bias = bool(given("attention_bias", False))
    rope, max_length = _rope(values, given, head_dim, refuse, path)
    fields: dict[str, Any] = {
        "architecture": "decoder_only",
        "vocab_size": sizes["vocab_size"],
        "encoder_layers": 0,
        "decoder_layers": sizes["num_hidden_layers"],
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": required(
            {"num_key_value_heads": given("num_key_value_heads", heads)},
            "num_key_value_heads",
            path,
        ),
        "head_dim": head_dim,
        "mlp_dim": sizes["intermediate_size"],
        "kv_pairing": "grouped",
        "qkv_bias": bias,
        "attention_out_bias": bias and family.out_bias,
        "mlp_gated": True,
        "mlp_activation": ACTIVATIONS[activation],
        "mlp_bias": bool(given("mlp_bias", False)),
        "norm_eps": float(given("rms_norm_eps", 1e-6)),
        "norm_cast": "before_scale",
        "tie_embeddings": bool(given("tie_word_embeddings", False)),
        "attention_logit_cap": _cap(values, family, "attn_logit_softcapping"),
        "final_logit_cap": _cap(values, family, "final_logit_softcapping"),
        "execution": ExecutionConfig(scan_layers=False),
    }
    if scalar := given("query_pre_attn_scalar"):
        fields["attention_scale"] = float(scalar) ** -0.5
    fields |= rope | _window(name, values, family, given, refuse, rope) | dict(family.fields)
    eos = given("eos_token_id", ())
    eos = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    start = given("bos_token_id", eos[0] if eos else 0)
    return Imported(name, ModelConfig(**fields), max_length, int(start), tuple(map(int, eos)))


def _cap(values: Mapping[str, Any], family: _Family, key: str) -> float:
    """A soft cap; unlike elsewhere, an explicit null switches it off."""
    return float(values.get(key, family.defaults.get(key)) or 0.0)


def _window(
    name: str,
    values: Mapping[str, Any],
    family: _Family,
    given: Callable[..., Any],
    refuse: Callable[..., DataError],
    rope: Mapping[str, Any],
) -> dict[str, Any]:
    """Our fields for sliding-window layers."""
    window = values.get("sliding_window", family.defaults.get("sliding_window"))
    if not window or (name.startswith("qwen") and not values.get("use_sliding_window")):
        return {}
    layers = values["num_hidden_layers"]
    types = values.get("layer_types")
    if types:
        local = [kind == "sliding_attention" for kind in types]
    elif every := given("sliding_window_pattern"):
        local = [(layer + 1) % every != 0 for layer in range(layers)]
    elif name.startswith("qwen"):
        local = [layer >= values.get("max_window_layers", 28) for layer in range(layers)]
    else:
        local = [True] * layers
    if not any(local):
        return {}
    every = next((layer + 1 for layer, is_local in enumerate(local) if not is_local), 0)
    if local != [not every or (layer + 1) % every != 0 for layer in range(layers)]:
        raise refuse(
            "layer_types", types or local, "but global layers have to come at equal distances"
        )
    fields: dict[str, Any] = {"attention_window": int(window), "global_layer_every": every}
    scaled = rope.get("rope_scaling", "none") != "none"
    base = given("rope_local_base_freq")
    parameters = values.get("rope_parameters") or {}
    if "sliding_attention" in parameters:
        if parameters["sliding_attention"].get("rope_type", "default") != "default":
            raise refuse(
                "rope_parameters",
                parameters["sliding_attention"],
                "but local layers cannot be scaled",
            )
        base = parameters["sliding_attention"].get("rope_theta", base)
    elif scaled and base is None:
        raise refuse(
            "rope_scaling",
            values.get("rope_scaling") or parameters,
            "together with sliding_window, whose layers we never scale",
        )
    if base is not None:
        fields["local_rope_theta"] = float(base)
    return fields


def _rope(
    values: Mapping[str, Any],
    given: Callable[..., Any],
    head_dim: int,
    refuse: Callable[..., DataError],
    path: pathlib.Path,
) -> tuple[dict[str, Any], int]:
    """Our rotation fields, and the longest sequence they are right for."""
    parameters = dict(values.get("rope_parameters") or {})
    parameters = dict(parameters.get("full_attention", parameters))
    scaling = parameters or dict(values.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta") or given("rope_theta", 10_000.0))
    longest = int(given("max_position_embeddings", 8192))
    partial = float(scaling.get("partial_rotary_factor") or given("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise refuse("partial_rotary_factor", partial, "but we rotate whole heads")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    where = f"{path}, rope scaling {kind!r},"
    fields: dict[str, Any] = {"rope_theta": theta}
    if kind == "default":
        return fields, longest
    if kind == "linear":
        return fields | {
            "rope_scaling": "linear",
            "rope_factor": float(required(scaling, "factor", where, float)),
        }, longest
    if kind == "llama3":
        divisors = _llama3_divisors(
            theta,
            head_dim,
            {
                key: required(scaling, key, where, float)
                for key in (
                    "factor",
                    "low_freq_factor",
                    "high_freq_factor",
                    "original_max_position_embeddings",
                )
            },
        )
        return fields | {"rope_scaling": "per_pair", "rope_divisors": divisors}, longest
    if kind in ("longrope", "su"):
        original = int(
            scaling.get("original_max_position_embeddings")
            or given("original_max_position_embeddings", longest)
        )
        factor = longest / original
        magnitude = scaling.get("attention_factor")
        if magnitude is None:
            magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        # Beyond the original length other divisors would hold for the whole sequence.
        return fields | {
            "rope_scaling": "per_pair",
            "rope_magnitude": float(magnitude),
            "rope_divisors": tuple(map(float, required(scaling, "short_factor", where, list))),
        }, original
    raise refuse("rope_scaling", kind, "not one of default, linear, llama3, longrope")


def _llama3_divisors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> tuple[float, ...]:
    """Llama 3.1's rule: long waves are stretched by the factor, short ones kept, in between
    interpolated (as in ``_compute_llama3_parameters`` of transformers)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    # Turns within the length of the original training.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return tuple((1 / ((1 - kept) / scaling["factor"] + kept)).tolist())


def convert(config: ModelConfig, family: str, tensors: Tensors) -> dict[str, Any]:
    """Our parameter tree (unrolled) as views of the tensors, in their dtype.

    Raises:
        DataError: tensors are missing, superfluous or misshapen.
    """
    found = [name for name in tensors if name.endswith("embed_tokens.weight")]
    if len(found) != 1:
        raise DataError(
            f"the checkpoint has {len(found)} tensors called *embed_tokens.weight; "
            "wanted the weights of one causal language model"
        )
    prefix = found[0].removesuffix("embed_tokens.weight")
    # Beside the stack: "lm_head" where that is "model.", within whatever lies around both.
    head = prefix.removesuffix("model.") + "lm_head.weight"
    head = head if head in tensors else "lm_head.weight"
    ignored = [
        name
        for name in tensors
        if name.endswith("rotary_emb.inv_freq")
        or config.tie_embeddings
        and name == head
        or not name.startswith(prefix)
        and "lm_head" not in name
        and prefix != "model."
    ]
    if family == "phi3":
        tensors = _split_fused(config, prefix, tensors)
    return to_ours(layout(config, family, prefix, head), config, tensors, ignored)


def layout(config: ModelConfig, family: str, prefix: str, head: str) -> list[Entry]:
    """What our parameters are called there; parts of a fused tensor as ``_split_fused`` does."""
    fused = family == "phi3"
    attention = (*(_QKV if fused else ("q_proj", "k_proj", "v_proj")), "o_proj")
    mlp = dict(zip(("gate", "up"), _GATE_UP if fused else ("gate_proj", "up_proj")))
    norms = {"self_attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms |= {
            "self_attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    entries = [
        Entry(f"{prefix}embed_tokens.weight", "embedder/embedding"),
        Entry(f"{prefix}norm.weight", "decoder/final_norm/scale"),
    ]
    if not config.tie_embeddings:
        entries.append(Entry(head, "embedder/head", "matrix"))
    for layer in range(config.decoder_layers):
        theirs, ours = f"{prefix}layers.{layer}", f"decoder/layers_{layer}"
        entries += attention_entries(
            config, f"{theirs}.self_attn", f"{ours}/self_attention", attention
        )
        entries += mlp_entries(config, f"{theirs}.mlp", f"{ours}/mlp", mlp | {"down": "down_proj"})
        entries += [
            Entry(f"{theirs}.{name}.weight", f"{ours}/{our_name}/scale")
            for our_name, name in norms.items()
        ]
        if config.qk_norm:
            entries += [
                Entry(
                    f"{theirs}.self_attn.{x}_norm.weight", f"{ours}/self_attention/{x}_norm/scale"
                )
                for x in "qk"
            ]
    return entries


_QKV = ("qkv_proj[q]", "qkv_proj[k]", "qkv_proj[v]")
_GATE_UP = ("gate_up_proj[gate]", "gate_up_proj[up]")


def _split_fused(config: ModelConfig, prefix: str, tensors: Tensors) -> dict[str, np.ndarray]:
    """Phi-3's fused projections as views of their parts, each under a name of its own."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = {
        "self_attn.qkv_proj": (_QKV, (queries, queries + keys)),
        "mlp.gate_up_proj": (_GATE_UP, (config.mlp_dim,)),
    }
    split = dict(tensors)
    for layer in range(config.decoder_layers):
        for name, (names, places) in parts.items():
            whole = split.pop(f"{prefix}layers.{layer}.{name}.weight", None)
            if whole is not None:
                folder = f"{prefix}layers.{layer}.{name.split('.')[0]}"
                split |= {
                    f"{folder}.{part}.weight": x
                    for part, x in zip(names, np.split(whole, places), strict=True)
                }
    return split
