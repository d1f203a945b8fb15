"""Families of decoder-only models on the Hub: defaults that their configurations leave out.

Values of absent keys are those of transformers' configuration classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family's defaults and fixed settings.

    Attributes:
        defaults: values of absent keys, as transformers has them.
        fields: our fields that hold for the whole family.
        out_bias: whether ``attention_bias`` adds one to the output projection too.
        norms: our norms of a layer by their names there; by default as ``layout`` says.
        fused: projections stored as one tensor: "attention", "mlp".
        interleaved: whether RoPE turns neighbouring dimensions of a head, not its halves.
    """

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    out_bias: bool = True
    norms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: tuple[str, ...] = ()
    interleaved: bool = False


# Norms after the sublayers alone.
_AFTER = {"post_norms": True, "omit_pre_norms": True, "qk_norm": True}
_AFTER_NORMS = {
    "self_attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_OLMO = _AFTER | {"qk_norm_over_heads": True, "norm_cast": "after_scale"}
_GLM_DEFAULTS = {
    "attention_bias": True,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
}
_GEMMA = {"norm_plus_one": True, "norm_cast": "after_scale", "embedding_scale": True}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256, "vocab_size": 256_000}
FAMILIES = {
    "llama": Family(),
    "mistral": Family({"sliding_window": 4096, "num_key_value_heads": 8}),
    "ministral": Family({"sliding_window": 4096, "num_key_value_heads": 8}),
    "granite": Family({"attention_multiplier": 1.0}),
    "smollm3": Family(
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
        }
    ),
    "olmo2": Family({"rms_norm_eps": 1e-5}, _OLMO, norms=_AFTER_NORMS),
    "olmo3": Family(
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        _OLMO,
        norms=_AFTER_NORMS,
    ),
    "exaone4": Family(
        {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
        _AFTER,
        norms=_AFTER_NORMS,
    ),
    "seed_oss": Family(
        {"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8}, out_bias=False
    ),
    "glm": Family(_GLM_DEFAULTS, out_bias=False, fused=("mlp",), interleaved=True),
    "glm4": Family(
        _GLM_DEFAULTS,
        {"post_norms": True},
        out_bias=False,
        norms={
            "self_attention_norm": "input_layernorm",
            "self_attention_post_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
        fused=("mlp",),
        interleaved=True,
    ),
    "phi3": Family({"rms_norm_eps": 1e-5}, fused=("attention", "mlp")),
    "qwen2": Family({"attention_bias": True}, out_bias=False),
    "qwen3": Family({"head_dim": 128}, {"qk_norm": True}),
    "gemma": Family(_GEMMA_DEFAULTS, _GEMMA | {"mlp_activation": "gelu_tanh"}),
    "gemma2": Family(
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
    "gemma3_text": Family(
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
# Keys that are ignored because they do not change the computed function, by reason.
HARMLESS = {
    "names and files": "_name_or_path architectures auto_map dtype model_type torch_dtype "
    "transformers_version transformers_versions tokenizer_class id2label label2id "
    "_attn_implementation_autoset",
    "training only": "attention_dropout embd_pdrop initializer_range resid_pdrop residual_dropout",
    "how transformers runs the model": "cache_implementation is_decoder is_encoder_decoder "
    "output_attentions output_hidden_states pretraining_tp return_dict use_cache",
    "of tokenizers": "pad_token_id unk_token_id",
    "implied by another key that is read": "_sliding_window_pattern hidden_act layer_types "
    "max_window_layers original_max_position_embeddings partial_rotary_factor "
    "rope_local_base_freq rope_scaling rope_theta sliding_window sliding_window_pattern "
    "use_sliding_window",
}
