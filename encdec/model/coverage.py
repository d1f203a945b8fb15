"""Which fields of ModelConfig each other implementation of the model computes, or refuses itself.

The plain XLA modules of ``encdec.model`` define what a model is. The others (fused attention
kernels, CPU layouts, exported graphs) know the fields that are listed here: a field that is new in
ModelConfig is, once it is set, refused by all of them, until it is entered in ``ALSO`` for one that
has learnt it, or in ``EVERYWHERE``.
"""

from __future__ import annotations

import dataclasses

from encdec.errors import ConfigError
from encdec.model.model_config import ModelConfig

EVERYWHERE = frozenset(
    """
    architecture vocab_size encoder_layers decoder_layers d_model num_heads num_kv_heads head_dim
    mlp_dim kv_pairing qkv_bias attention_out_bias qk_norm attention_scale attention_logit_cap
    attention_window global_layer_every encoder_global_layers decoder_global_layers rope_theta
    rope_scaling rope_factor rope_max_length
    rope_length rope_divisors rope_magnitude local_rope_theta encoder_positions
    cross_attention_rope mlp_gated mlp_activation mlp_bias norm_eps norm_cast norm_plus_one
    post_norms tie_embeddings share_embeddings embedding_scale final_logit_cap attention_dropout
    mlp_dropout residual_dropout init_std dtype param_dtype execution
    """.split()
)
# Further fields by implementation: splash, cudnn, cpu (layouts), or a format of encdec.export.
_OUTSIDE_KERNELS = frozenset(
    """
    merged_attention qk_norm_over_heads encoder_window encoder_unrotated_layers
    decoder_unrotated_layers omit_pre_norms
    """.split()
)
ALSO: dict[str, frozenset[str]] = {
    "splash": _OUTSIDE_KERNELS,
    "cudnn": _OUTSIDE_KERNELS,
    "cpu": _OUTSIDE_KERNELS,
    "hf": _OUTSIDE_KERNELS,
    "onnx": _OUTSIDE_KERNELS,
    "litert": _OUTSIDE_KERNELS,
    # Read back into the plain modules.
    "encdec": frozenset(field.name for field in dataclasses.fields(ModelConfig)) - EVERYWHERE,
}


def unknown_fields(config: ModelConfig, implementation: str) -> list[str]:
    """Fields that are set, to other values than their defaults, and that it does not know."""
    known = EVERYWHERE | ALSO.get(implementation, frozenset())
    return [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in known and getattr(config, field.name) != field.default
    ]


def refuse_unknown(config: ModelConfig, implementation: str, what: str) -> None:
    """ConfigError where ``what``, the implementation, does not know a field that is set."""
    if unknown := unknown_fields(config, implementation):
        field = {field.name: field for field in dataclasses.fields(config)}[unknown[0]]
        raise ConfigError(
            f"ModelConfig.{field.name} is {getattr(config, field.name)!r}, which {what} does not "
            f"support; expected {field.default!r}"
        )
