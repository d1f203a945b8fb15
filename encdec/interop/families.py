"""Families of decoder-only models on the Hub: defaults that their configurations leave out.

Values of absent keys are those of transformers' configuration classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# As in Llama; other families ignore what Llama reads.
_ATTENTION, _MLP = "attention_bias", "mlp_bias"
_UNBIASED = (False, False, False)
_ATTENTION_ALONE = (_ATTENTION, _ATTENTION, False)


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family's defaults and fixed settings.

    Attributes:
        defaults: values of absent keys, as transformers has them; and which of ``SPECIAL`` it has.
        fields: our fields that hold for the whole family.
        biases: which key says whether there are biases of queries, keys and values, of the output
            projection, and of the MLP; or whether there are, where no key is read.
        norms: our norms of a layer by their names there; by default as ``layout`` says.
        fused: projections stored as one tensor: "attention", "mlp".
        interleaved: whether RoPE turns neighbouring dimensions of a head, not its halves.
        aliases: names of its own for keys, by those of Llama.
        renamed: parts of its tensors' names, and what Llama's have there.
        never: keys that have to be absent or off.
    """

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: tuple[str | bool, str | bool, str | bool] = (_ATTENTION, _ATTENTION, _MLP)
    norms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: tuple[str, ...] = ()
    interleaved: bool = False
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    never: tuple[str, ...] = ()


# Norms after the sublayers alone.
_AFTER = {"post_norms": True, "omit_pre_norms": True, "qk_norm": True}
_AFTER_NORMS = {
    "self_attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_OLMO = _AFTER | {"qk_norm_over_heads": True, "norm_cast": "after_scale"}
_GLM_BIASES = (_ATTENTION, False, False)
_GLM_DEFAULTS = {
    "attention_bias": True,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
}
# Keys that mean something in those families alone that name them among their defaults.
SPECIAL = (
    "sliding_window",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window_pattern",
    "rope_local_base_freq",
)
_QWEN2 = {"sliding_window": 4096, "max_window_layers": 28}
_QWEN2_BIASES = (True, False, False)
_QWEN2_VL = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80}
_GEMMA = {"norm_plus_one": True, "norm_cast": "after_scale", "embedding_scale": True}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256, "vocab_size": 256_000}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window_pattern": 2,
}
_CWM_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
FAMILIES = {
    "llama": Family(),
    "mistral": Family({"sliding_window": 4096, "num_key_value_heads": 8}, biases=_UNBIASED),
    "ministral": Family({"sliding_window": 4096, "num_key_value_heads": 8}, biases=_UNBIASED),
    "ministral3": Family(
        {
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "sliding_window": None,
            "max_position_embeddings": 262_144,
            "rope_scaling": _MINISTRAL3_ROPE,
        },
        biases=_UNBIASED,
    ),
    "granite": Family({"attention_multiplier": 1.0}),
    "minicpm": Family({"tie_word_embeddings": True}, never=("sparse_config", "num_experts")),
    "hyperclovax": Family(
        {"use_post_norm": True},
        norms={
            "self_attention_norm": "input_layernorm",
            "self_attention_post_norm": "post_norm1",
            "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_norm2",
        },
    ),
    "exaone": Family(
        {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 5e5},
        aliases={
            "num_hidden_layers": "num_layers",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        renamed={
            "transformer.wte.": "model.embed_tokens.",
            "transformer.ln_f.": "model.norm.",
            "transformer.h.": "model.layers.",
            ".ln_1.": ".input_layernorm.",
            ".ln_2.": ".post_attention_layernorm.",
            ".attn.attention.": ".self_attn.",
            ".self_attn.out_proj.": ".self_attn.o_proj.",
            ".mlp.c_fc_0.": ".mlp.gate_proj.",
            ".mlp.c_fc_1.": ".mlp.up_proj.",
            ".mlp.c_proj.": ".mlp.down_proj.",
        },
    ),
    "cwm": Family(
        {
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "sliding_window": 8192,
            "rope_theta": 1e6,
            "rope_scaling": _CWM_ROPE,
        },
        biases=(False, False, _MLP),
    ),
    "ernie4_5": Family(
        {
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "num_key_value_heads": 2,
            "rope_theta": 5e5,
            "tie_word_embeddings": True,
        },
        interleaved=True,
        biases=("use_bias", "use_bias", "use_bias"),
    ),
    "helium": Family(
        {"rms_norm_eps": 1e-8, "head_dim": 128, "num_key_value_heads": 20, "rope_theta": 1e5},
        {"norm_cast": "after_scale"},
        biases=(_ATTENTION, False, _MLP),
        interleaved=True,
    ),
    "internlm3": Family(
        {"rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 2},
        biases=(_ATTENTION, _MLP, _MLP),
        aliases={_ATTENTION: "qkv_bias", _MLP: "bias"},
    ),
    "iquestcoder": Family(
        {"rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 8},
        never=("clip_qkv", "use_sliding_window"),
    ),
    "smollm3": Family(
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "sliding_window": None,
            "no_rope_layer_interval": 4,
        }
    ),
    "olmo2": Family({"rms_norm_eps": 1e-5}, _OLMO, biases=_ATTENTION_ALONE, norms=_AFTER_NORMS),
    "olmo3": Family(
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        _OLMO,
        biases=_ATTENTION_ALONE,
        norms=_AFTER_NORMS,
    ),
    "exaone4": Family(
        {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
        _AFTER,
        biases=_UNBIASED,
        norms=_AFTER_NORMS,
    ),
    "seed_oss": Family(
        {"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8},
        biases=(_ATTENTION, "attention_out_bias", _MLP),
    ),
    "glm": Family(_GLM_DEFAULTS, biases=_GLM_BIASES, fused=("mlp",), interleaved=True),
    "glm4": Family(
        _GLM_DEFAULTS,
        {"post_norms": True},
        biases=_GLM_BIASES,
        norms={
            "self_attention_norm": "input_layernorm",
            "self_attention_post_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
        fused=("mlp",),
        interleaved=True,
    ),
    "phi3": Family(
        {"rms_norm_eps": 1e-5, "sliding_window": None, "partial_rotary_factor": 1.0},
        biases=_UNBIASED,
        fused=("attention", "mlp"),
    ),
    "qwen2": Family(_QWEN2, biases=_QWEN2_BIASES),
    "qwen2_vl_text": Family(_QWEN2 | _QWEN2_VL, biases=_QWEN2_BIASES),
    "qwen2_5_vl_text": Family(_QWEN2 | _QWEN2_VL, biases=_QWEN2_BIASES),
    "qwen3": Family(
        {"head_dim": 128, "sliding_window": 4096}, {"qk_norm": True}, biases=_ATTENTION_ALONE
    ),
    "qwen3_vl_text": Family(
        {"head_dim": 128, "rope_theta": 5e5}, {"qk_norm": True}, biases=_ATTENTION_ALONE
    ),
    "gemma": Family(
        _GEMMA_DEFAULTS | {"hidden_act": "gelu_pytorch_tanh"}, _GEMMA, biases=_ATTENTION_ALONE
    ),
    "gemma2": Family(_GEMMA2_DEFAULTS, _GEMMA | {"post_norms": True}, biases=_ATTENTION_ALONE),
    "vaultgemma": Family(
        _GEMMA2_DEFAULTS | {"num_key_value_heads": 4},
        _GEMMA,
        biases=_ATTENTION_ALONE,
        norms={"self_attention_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"},
    ),
    "gemma3_text": Family(
        _GEMMA_DEFAULTS
        | {
            "vocab_size": 262_208,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": 256,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        _GEMMA | {"post_norms": True, "qk_norm": True},
        biases=_ATTENTION_ALONE,
    ),
}
# Keys that are ignored because they do not change the computed function, by reason.
HARMLESS = {
    "names and files": "_name_or_path architectures auto_map dtype model_type torch_dtype "
    "transformers_version transformers_versions tokenizer_class id2label label2id "
    "_attn_implementation _attn_implementation_autoset",
    "training only": "attention_dropout embd_pdrop initializer_range resid_pdrop residual_dropout",
    "how transformers runs the model": "cache_implementation is_decoder is_encoder_decoder "
    "output_attentions output_hidden_states pretraining_tp return_dict use_cache",
    "of tokenizers": "pad_token_id unk_token_id",
    "of images": "image_token_id video_token_id vision_config vision_end_token_id "
    "vision_start_token_id vision_token_id",
    "implied by another key that is read": "_sliding_window_pattern hidden_act layer_types "
    "max_window_layers original_max_position_embeddings rope_local_base_freq rope_scaling "
    "rope_theta sliding_window_pattern use_sliding_window",
}
