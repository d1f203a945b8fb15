"""Decoder-only models as families of transformers: the first that has all of a model's features.

A family's tensors are named by the layout that ``encdec import`` reads them with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from encdec.export import equivalents
from encdec.export.equivalents import Params
from encdec.interop import huggingface_import
from encdec.interop.layout import to_theirs
from encdec.model import ModelConfig
from encdec.model.positions import rope_base

ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}
MAX_POSITIONS = 1 << 15  # stated where a length is asked for; nothing of ours depends on it
Need = tuple[str, bool, str]  # a field, whether it is as expected, what is expected


@dataclasses.dataclass(frozen=True)
class _Form:
    """The features of a family; those that are not named have their defaults.

    Attributes:
        name: its model_type, as in ``encdec.interop.families.FAMILIES``.
        architecture: the class of transformers.
        must: fields of ours that it always has, or always has set.
        may: fields of ours that it may have, or may have set.
        around: whether its norms scale by 1 + w.
    """

    name: str
    architecture: str
    must: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    around: bool = False


_WINDOWS = ("attention_window", "global_layer_every", "decoder_global_layers")
_BIASES = ("qkv_bias", "attention_out_bias")
# Fields of which a family has to know that they are set.
_FEATURES = (
    *_WINDOWS,
    *_BIASES,
    "local_rope_theta",
    "mlp_bias",
    "qk_norm",
    "qk_norm_over_heads",
    "post_norms",
    "omit_pre_norms",
    "attention_logit_cap",
    "final_logit_cap",
    "decoder_unrotated_layers",
)
_GEMMA2 = ("attention_logit_cap", "final_logit_cap", *_BIASES)
FORMS = (
    _Form("gemma", "GemmaForCausalLM", ("embedding_scale", "tie_embeddings"), _BIASES, True),
    _Form("llama", "LlamaForCausalLM", (), (*_BIASES, "mlp_bias")),
    _Form("mistral", "MistralForCausalLM", ("attention_window",)),
    _Form("qwen2", "Qwen2ForCausalLM", ("attention_window",), (*_WINDOWS, "qkv_bias")),
    _Form("qwen3", "Qwen3ForCausalLM", ("qk_norm",), (*_WINDOWS, *_BIASES)),
    _Form(
        "gemma2",
        "Gemma2ForCausalLM",
        ("post_norms", "embedding_scale"),
        (*_WINDOWS, *_GEMMA2),
        True,
    ),
    _Form(
        "gemma3_text",
        "Gemma3ForCausalLM",
        ("post_norms", "embedding_scale", "qk_norm"),
        (*_WINDOWS, *_BIASES, "final_logit_cap", "local_rope_theta"),
        True,
    ),
    _Form(
        "smollm3",
        "SmolLM3ForCausalLM",
        ("decoder_unrotated_layers",),
        (*_WINDOWS, *_BIASES, "mlp_bias"),
    ),
    _Form(
        "olmo2",
        "Olmo2ForCausalLM",
        ("omit_pre_norms", "post_norms", "qk_norm", "qk_norm_over_heads"),
        _BIASES,
    ),
    _Form(
        "olmo3",
        "Olmo3ForCausalLM",
        ("omit_pre_norms", "post_norms", "qk_norm", "qk_norm_over_heads"),
        (*_WINDOWS, *_BIASES, "local_rope_theta"),
    ),
    _Form(
        "exaone4",
        "Exaone4ForCausalLM",
        ("omit_pre_norms", "post_norms", "qk_norm"),
        (*_WINDOWS, "decoder_unrotated_layers"),
    ),
)


def choose(config: ModelConfig) -> tuple[_Form | None, list[Need]]:
    """The family of a decoder-only model, or None and what keeps it from being the nearest one."""
    found = [(form, [need for need in _needs(form, config) if not need[1]]) for form in FORMS]
    fitting = next((form for form, unmet in found if not unmet), None)
    if fitting is not None:
        return fitting, []
    # A Llama, unless another is nearer.
    nearest = min(found, key=lambda pair: (len(pair[1]), pair[0].name != "llama"))
    return None, nearest[1]


def _needs(form: _Form, config: ModelConfig) -> list[Need]:
    title = form.architecture.removesuffix("ForCausalLM")
    needs: list[Need] = [("mlp_gated", config.mlp_gated, f"True, because {title}'s MLP is gated")]
    for field in form.must:
        needs.append((field, bool(getattr(config, field)), f"set, as {title} has it"))
    for field in _FEATURES:
        if field not in (*form.must, *form.may):
            value = type(getattr(config, field))()
            needs.append((field, not getattr(config, field), f"{value!r}, as {title} has it"))
    if form.name == "exaone4":
        layers = range(config.decoder_layers)
        windows = bool(config.attention_window)
        same = all(config.is_rotated(i) == (config.is_local(i) or not windows) for i in layers)
        needs.append(("decoder_unrotated_layers", same, "the layers that read everything"))
    if form.name == "olmo3":
        scaled = config.rope_scaling != "none" or config.rope_theta != config.local_rope_theta
        apart = not config.local_rope_theta or scaled
        needs.append(("local_rope_theta", apart, "0 where it is rope_theta"))
    if form.name == "gemma":  # whatever its configuration says
        tanh = config.mlp_activation == "gelu_tanh"
        needs.append(("mlp_activation", tanh, "'gelu_tanh', as Gemma has it"))
    return needs


def common(config: ModelConfig) -> dict[str, Any]:
    """config.json's keys that families have in common, T5Gemma among them."""
    rope = rotation(config)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        # The same for transformers 4.
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "attention_bias": config.qkv_bias,
        "max_position_embeddings": MAX_POSITIONS,
    }


def layer_types(config: ModelConfig, stack: Literal["encoder", "decoder"]) -> list[str]:
    """Their names of layers with and without a window."""
    layers = range(config.encoder_layers if stack == "encoder" else config.decoder_layers)
    names = {True: "sliding_attention", False: "full_attention"}
    return [names[config.is_local(layer, stack)] for layer in layers]


def rotation(config: ModelConfig) -> dict[str, Any]:
    """Their rotation; divisors pair by pair are LongRoPE's factors, the same at every length."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rope_base(config)}
    if config.rope_scaling == "linear":
        rope |= {"rope_type": "linear", "factor": config.rope_factor}
    elif config.rope_scaling == "per_pair":
        divisors = list(config.rope_divisors)
        rope |= {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "factor": 1.0,
            "attention_factor": config.rope_magnitude,
            "original_max_position_embeddings": MAX_POSITIONS,
        }
    return rope


def convert(
    form: _Form, config: ModelConfig, params: Params
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """A decoder-only model's config.json and tensors.

    Args:
        form: from ``choose``.
        config: the model, on the host as ``equivalents.on_host`` gives it.
        params: its parameters.
    """
    gemma = form.around
    if form.name == "qwen2":
        config, params = equivalents.query_biases(config, params)
    else:
        config, params = equivalents.equal_biases(config, params)
    config, params = equivalents.norms_around(config, params, plus_one=gemma)
    config, params = equivalents.scaled_embedding(config, params, scaled=gemma)
    scalar = 0
    if form.name in ("gemma2", "gemma3_text"):
        config, params, scalar = equivalents.whole_query_scalar(config, params)
    else:
        config, params = equivalents.plain_attention_scale(config, params)
    activation = ACTIVATIONS[config.mlp_activation]
    values = common(config) | {
        "model_type": form.name,
        "architectures": [form.architecture],
        "num_hidden_layers": config.decoder_layers,
        "mlp_bias": config.mlp_bias,
        "hidden_act": activation,
        "tie_word_embeddings": config.tie_embeddings,
        "sliding_window": config.attention_window or None,
    }
    if gemma:
        values["hidden_activation"] = activation
    if scalar:
        values |= {
            "query_pre_attn_scalar": scalar,
            "attn_logit_softcapping": config.attention_logit_cap or None,
            "final_logit_softcapping": config.final_logit_cap or None,
        }
    if config.attention_logit_cap:
        # transformers 4 would choose an attention that leaves the cap out.
        values["_attn_implementation"] = "eager"
    if form.name != "llama" and form.name != "gemma":
        values |= _windows(form, config, values["rope_parameters"])
    if form.name == "smollm3":
        layers = range(config.decoder_layers)
        values["no_rope_layers"] = [int(config.is_rotated(layer)) for layer in layers]
    layout = huggingface_import.layout(config, form.name, "model.", "lm_head.weight")
    return values, to_theirs(layout, params)


def _windows(form: _Form, config: ModelConfig, rope: dict[str, Any]) -> dict[str, Any]:
    """Keys of layers with and without a window, under the names that families have for them."""
    window = config.attention_window
    values: dict[str, Any] = {"layer_types": layer_types(config, "decoder")}
    if form.name in ("qwen2", "qwen3", "smollm3"):
        values["use_sliding_window"] = bool(window)
        values["max_window_layers"] = 0
    if form.name in ("gemma2", "gemma3_text", "olmo3"):
        values["sliding_window"] = window or MAX_POSITIONS  # asked for even where no layer has one
    if form.name in ("gemma3_text", "olmo3"):
        theta = config.local_rope_theta
        near = {"rope_type": "default", "rope_theta": theta} if theta else rope
        values["rope_parameters"] = {"full_attention": rope, "sliding_attention": near}
        if form.name == "gemma3_text":
            values["rope_local_base_freq"] = theta or rope["rope_theta"]
    if form.name == "mistral":
        del values["layer_types"]
    return values
