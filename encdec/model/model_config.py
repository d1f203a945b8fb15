"""The model's configuration: one frozen dataclass in which every architecture choice is a field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from encdec.errors import ConfigError
from encdec.fields import Require, check_types, did_you_mean, requirements
from encdec.model.execution import EXECUTION_FIELDS, ExecutionConfig

Architecture = Literal["encoder_decoder", "decoder_only"]
StackName = Literal["encoder", "decoder"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of an encoder-decoder or a decoder-only language model, and how it is run.

    Letters used for shapes all over the project: B batch, S source length, T target length,
    L layers, M ``d_model``, H ``num_heads``, K ``num_kv_heads``, D ``head_dim``, F ``mlp_dim``,
    V ``vocab_size``.

    Raises:
        ConfigError: a value of the wrong type, out of range, or at odds with another field.
    """

    architecture: Architecture = "encoder_decoder"

    # Size
    vocab_size: int = 32_128  # rows of the embedding table; must cover the vocabulary
    encoder_layers: int = 20  # 0 for decoder_only
    decoder_layers: int = 10
    d_model: int = 1024
    num_heads: int = 6  # attention width is num_heads * head_dim, independent of d_model
    num_kv_heads: int = 3  # grouped-query attention; num_heads for multi-head attention
    head_dim: int = 64
    mlp_dim: int = 4096

    # Attention
    kv_pairing: Literal["grouped", "tiled"] = "grouped"  # head h reads kv head h // (H/K) | h % K
    qkv_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False  # RMSNorm of queries and keys before RoPE, of every head by itself
    qk_norm_over_heads: bool = False  # with qk_norm: of all heads together (OLMo 2, 2501.00656)
    attention_scale: float = 0.0  # multiplies attention logits; 0 means 1 / sqrt(head_dim)
    attention_logit_cap: float = 0.0  # cap * tanh(logits / cap); 0 switches it off
    # Local layers read this many tokens back, self included, and an encoder's as many ahead; 0: all
    attention_window: int = 0
    global_layer_every: int = 0  # with a window: every n-th layer reads all; 0: none does
    encoder_global_layers: tuple = ()  # or those of the encoder that do, counted from 0
    decoder_global_layers: tuple = ()  # and those of the decoder
    encoder_window: tuple = ()  # tokens (back, ahead) of local encoder layers; (): window - 1 each

    # Self- and cross-attention as one sublayer with one set of weights, one softmax over source and
    # target (T5Gemma 2, arXiv 2512.14856): a decoder layer has a decoder-only layer's parameters
    merged_attention: bool = False

    # Positions (RoPE, rotate-half)
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "ntk", "per_pair"] = "none"
    rope_factor: float = 1.0  # context extension factor of rope_scaling
    rope_max_length: int = 2048  # L_max of the "ntk" rule: the longest sequence without stretching
    rope_length: int = 0  # L of the "ntk" rule: the longest sequence that the model will read
    rope_divisors: tuple = ()  # "per_pair": divides the frequency of each of the D/2 pairs
    rope_magnitude: float = 1.0  # "per_pair": multiplies rotated queries and keys
    local_rope_theta: float = 0.0  # of local layers, which are never scaled; 0: as all others
    encoder_unrotated_layers: tuple = ()  # of the encoder, those without RoPE (NoPE), from 0
    decoder_unrotated_layers: tuple = ()  # and of the decoder
    encoder_positions: Literal["centred", "from_zero"] = "from_zero"
    cross_attention_rope: Literal["none", "from_zero", "continued"] = "none"

    # MLP
    mlp_gated: bool = False
    mlp_activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    mlp_bias: bool = False

    # Normalization (RMSNorm, computed in float32)
    norm_eps: float = 1e-6
    norm_cast: Literal["before_scale", "after_scale"] = "after_scale"  # when to leave float32
    norm_plus_one: bool = False  # scale by (1 + w), w initialized to 0 (Gemma), instead of w
    omit_pre_norms: bool = False  # sublayers read the residual as it is (OLMo 2; with post_norms)
    post_norms: bool = False  # a second norm on each sublayer's output (Gemma 2, T5Gemma)

    # Embedding and head
    tie_embeddings: bool = True
    share_embeddings: bool = True  # encoder and decoder share one token table; else one each
    embedding_scale: bool = False  # multiply input embeddings by sqrt(d_model)
    final_logit_cap: float = 0.0  # cap * tanh(logits / cap); 0 switches it off

    # Regularization and initialization
    attention_dropout: float = 0.0  # on attention probabilities
    mlp_dropout: float = 0.0  # on the MLP's output
    residual_dropout: float = 0.0  # on the attention sublayers' outputs and the embeddings
    init_std: float = 0.02  # every matrix is drawn from N(0, init_std); biases start at 0

    # Precision
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations and matrix products
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the master parameters

    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        check_types(self)
        _check_values(self)

    @property
    def is_encoder_decoder(self) -> bool:
        return self.architecture == "encoder_decoder"

    @property
    def attention_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def is_local(self, layer: int, stack: StackName = "decoder") -> bool:
        """Whether layer ``layer`` of a stack, counted from 0, reads the attention window alone."""
        every = self.global_layer_every
        listed = self.encoder_global_layers if stack == "encoder" else self.decoder_global_layers
        reads_all = layer in listed or every and (layer + 1) % every == 0
        return bool(self.attention_window) and not reads_all

    def is_rotated(self, layer: int, stack: StackName = "decoder") -> bool:
        """Whether self-attention of layer ``layer`` of a stack, counted from 0, has RoPE."""
        return layer not in (
            self.encoder_unrotated_layers if stack == "encoder" else self.decoder_unrotated_layers
        )

    @property
    def num_layers(self) -> int:
        return self.encoder_layers + self.decoder_layers

    @property
    def attention_logit_scale(self) -> float:
        return self.attention_scale or self.head_dim**-0.5

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with ``changes`` to fields of the model or, by their names, of its execution.

        Raises:
            ConfigError: an unknown field, with the nearest name, or a value that does not fit.
        """
        names = [field.name for field in dataclasses.fields(self)]
        how = {name: changes.pop(name) for name in EXECUTION_FIELDS if name in changes}
        for name in changes:
            if name not in names:
                hint = did_you_mean(name, [*names, *EXECUTION_FIELDS])
                raise ConfigError(f"ModelConfig has no field {name!r}{hint}")
        if how:
            execution = changes.get("execution", self.execution)
            changes["execution"] = dataclasses.replace(execution, **how)
        return dataclasses.replace(self, **changes)

    def changes_from(self, other: ModelConfig) -> dict[str, Any]:
        """What ``other.replace`` needs to become this model: fields that differ, by name."""
        mine, theirs = _flat(self), _flat(other)
        return {name: value for name, value in mine.items() if value != theirs.get(name)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with those of ``execution`` in a group of their own."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of ``to_dict``; fields that are absent take their defaults.

        Also reads what earlier versions wrote, which had the fields of ``execution`` next to those
        of the model, and among them ``kernel_parts`` = 0.

        Raises:
            ConfigError: an unknown field, or a value that does not fit.
        """
        flat = {**values, **values.get("execution", {})}
        flat.pop("execution", None)
        if flat.get("kernel_parts") == 0:
            del flat["kernel_parts"]
        return cls().replace(**flat)


def _flat(config: ModelConfig) -> dict[str, Any]:
    values = config.to_dict()
    return values | values.pop("execution")


def _check_values(config: ModelConfig) -> None:
    require = requirements(config, "ModelConfig.")
    _check_numbers(config, require)
    _check_architecture(config, require)
    _check_rope(config, require)
    for stack in ("encoder", "decoder"):
        _check_numbered_layers(config, stack, require)
    _check_windows(config, require)


def _check_numbers(config: ModelConfig, require: Require) -> None:
    positive = (
        "vocab_size",
        "decoder_layers",
        "d_model",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "mlp_dim",
        "rope_max_length",
        "rope_theta",
        "norm_eps",
        "init_std",
    )
    for field in positive:
        require(getattr(config, field) > 0, field, "a positive number")
    for field in ("attention_dropout", "mlp_dropout", "residual_dropout"):
        require(0 <= getattr(config, field) < 1, field, "a rate in [0, 1)")
    for field in (
        "attention_logit_cap",
        "final_logit_cap",
        "attention_scale",
        "attention_window",
        "global_layer_every",
        "local_rope_theta",
    ):
        require(getattr(config, field) >= 0, field, "0 (off) or a positive number")


def _check_architecture(config: ModelConfig, require: Require) -> None:
    if config.is_encoder_decoder:
        require(config.encoder_layers > 0, "encoder_layers", "at least 1 in an encoder-decoder")
    else:
        require(config.encoder_layers == 0, "encoder_layers", "0 in a decoder-only model")
        require(
            config.cross_attention_rope == "none",
            "cross_attention_rope",
            "'none' in a decoder-only model, which has no cross-attention",
        )
        require(config.share_embeddings, "share_embeddings", "True in a decoder-only model")
        require(
            not config.merged_attention,
            "merged_attention",
            "False in a decoder-only model, which has no source to read",
        )
    require(
        config.num_heads % config.num_kv_heads == 0,
        "num_kv_heads",
        f"a divisor of num_heads = {config.num_heads}",
    )
    require(config.head_dim % 2 == 0, "head_dim", "an even number, because RoPE rotates pairs")
    require(
        config.post_norms or not config.omit_pre_norms,
        "omit_pre_norms",
        "False without post_norms, so that every sublayer has a norm",
    )
    require(
        config.qk_norm or not config.qk_norm_over_heads,
        "qk_norm_over_heads",
        "False without qk_norm",
    )


def _check_rope(config: ModelConfig, require: Require) -> None:
    require(config.rope_factor >= 1, "rope_factor", "1 or more")
    require(
        config.rope_factor == 1 or config.rope_scaling != "none",
        "rope_factor",
        "1 while rope_scaling is 'none'; set rope_scaling to 'linear' or 'ntk'",
    )
    stretched = config.rope_scaling == "ntk" and config.rope_factor > 1
    require(
        not stretched or config.rope_length > 0,
        "rope_length",
        "the longest sequence that the model will read: rope_scaling 'ntk' is fixed by it",
    )
    require(
        stretched or config.rope_length == 0,
        "rope_length",
        "0 unless rope_scaling is 'ntk' with a rope_factor above 1",
    )
    per_pair = config.rope_scaling == "per_pair"
    require(
        len(config.rope_divisors) == per_pair * config.head_dim // 2,
        "rope_divisors",
        f"{config.head_dim // 2} numbers, one per rotated pair"
        if per_pair
        else "none unless rope_scaling is 'per_pair'",
    )
    require(
        all(divisor > 0 for divisor in config.rope_divisors), "rope_divisors", "positive numbers"
    )
    require(
        config.rope_magnitude == 1 or per_pair,
        "rope_magnitude",
        "1 unless rope_scaling is 'per_pair'",
    )


def _check_numbered_layers(config: ModelConfig, stack: str, require: Require) -> None:
    field, layers = f"{stack}_global_layers", getattr(config, f"{stack}_layers")
    for listed in (field, f"{stack}_unrotated_layers"):
        numbers = getattr(config, listed)
        require(
            all(type(layer) is int and 0 <= layer < layers for layer in numbers),
            listed,
            f"numbers of the {stack}'s layers, each at least 0 and below {layers}",
        )
    require(
        not (getattr(config, f"{stack}_unrotated_layers") and config.execution.scan_layers),
        f"{stack}_unrotated_layers",
        "() with scan_layers=True, which makes all layers the same; set scan_layers=False",
    )
    require(
        not (getattr(config, field) and config.global_layer_every),
        field,
        f"() with global_layer_every={config.global_layer_every}, which names them already",
    )


def _check_windows(config: ModelConfig, require: Require) -> None:
    both_ways = config.encoder_window
    require(
        not both_ways
        or config.is_encoder_decoder
        and len(both_ways) == 2
        and all(type(reach) is int and reach >= 0 for reach in both_ways),
        "encoder_window",
        "() or two numbers, tokens back and ahead, in an encoder-decoder",
    )
    if config.attention_window:
        require(
            not config.execution.scan_layers,
            "attention_window",
            "0 with scan_layers=True, which makes all layers the same; set scan_layers=False",
        )
    else:
        for field, off in (
            ("global_layer_every", 0),
            ("local_rope_theta", 0),
            ("encoder_global_layers", ()),
            ("decoder_global_layers", ()),
            ("encoder_window", ()),
        ):
            require(getattr(config, field) == off, field, f"{off} without an attention_window")
