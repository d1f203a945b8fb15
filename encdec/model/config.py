"""The model's configuration: one frozen dataclass in which every architecture choice is a field."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal, get_args, get_type_hints

from encdec.errors import ConfigError

Architecture = Literal["encoder_decoder", "decoder_only"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of an encoder-decoder or a decoder-only language model.

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
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE
    attention_scale: float = 0.0  # multiplies the scores; 0 means 1 / sqrt(head_dim)
    attention_logit_cap: float = 0.0  # cap * tanh(scores / cap); 0 switches it off
    # Which implementation computes attention; auto: splash on TPU, cuDNN on NVIDIA, else XLA
    attention_kernel: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    attention_window: int = 0  # local layers read this many tokens back, self included; 0: all
    global_layer_every: int = 0  # with a window: every n-th layer reads all; 0: none does

    # Positions (RoPE, rotate-half)
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "ntk", "per_pair"] = "none"
    rope_factor: float = 1.0  # context extension factor of rope_scaling
    rope_max_length: int = 2048  # L_max of the "ntk" rule: the longest sequence without stretching
    rope_length: int = 0  # L of the "ntk" rule: the longest sequence that the model will read
    rope_divisors: tuple = ()  # "per_pair": divides the frequency of each of the D/2 pairs
    rope_magnitude: float = 1.0  # "per_pair": multiplies rotated queries and keys
    local_rope_theta: float = 0.0  # of local layers, which are never scaled; 0: as all others
    encoder_positions: Literal["centred", "from_zero"] = "from_zero"
    cross_attention_rope: Literal["none", "from_zero", "continued"] = "none"

    # MLP
    mlp_gated: bool = False
    mlp_activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    mlp_bias: bool = False

    # Normalisation (RMSNorm, computed in float32)
    norm_eps: float = 1e-6
    norm_cast: Literal["before_scale", "after_scale"] = "after_scale"  # when to leave float32
    norm_plus_one: bool = False  # scale by (1 + w), w initialised to 0 (Gemma), instead of w
    post_norms: bool = False  # a second norm on each sublayer's output (Gemma 2, T5Gemma)

    # Embedding and head
    tie_embeddings: bool = True
    share_embeddings: bool = True  # encoder and decoder read one token table; else one each
    embedding_scale: bool = False  # multiply input embeddings by sqrt(d_model)
    final_logit_cap: float = 0.0  # cap * tanh(logits / cap); 0 switches it off

    # Regularisation and initialisation
    attention_dropout: float = 0.0  # on attention probabilities
    mlp_dropout: float = 0.0  # on the MLP's output
    residual_dropout: float = 0.0  # on the attention sublayers' outputs and the embeddings
    init_std: float = 0.02  # every matrix is drawn from N(0, init_std); biases start at 0

    # Execution: changes speed and memory, never the function computed (up to rounding)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations and matrix products
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the master parameters
    scan_layers: bool = True  # compile one layer and loop, or unroll all
    # What the backward pass computes again: nothing, what is cheap, the MLP too, or everything
    remat: Literal["none", "dots", "attention", "full"] = "none"
    # One product for queries, keys and values, and one for gate and up
    fuse_projections: bool = False
    # Of the encoder, in inference; products then add up in float32. "": dtype
    encoder_dtype: Literal["", "bfloat16"] = ""
    # In plain XLA without dropout: queries whose scores are held at once; 0: all of them
    attention_block: int = 0
    # Decoder kernels as [parts, out / parts, in], parts that cores read at once, and keys and
    # values heads first, as one-row products read them; 0: as trained
    kernel_parts: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
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

    def is_local(self, layer: int) -> bool:
        """Whether decoder layer ``layer``, counted from 0, reads the attention window alone."""
        every = self.global_layer_every
        return bool(self.attention_window) and not (every and (layer + 1) % every == 0)

    @property
    def num_layers(self) -> int:
        return self.encoder_layers + self.decoder_layers

    @property
    def float32_sums(self) -> bool:
        """Whether products of bfloat16 numbers are asked for in float32 and rounded after."""
        return self.encoder_dtype == self.dtype == "bfloat16"

    @property
    def scores_scale(self) -> float:
        return self.attention_scale or self.head_dim**-0.5

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with ``changes``; an unknown field raises ConfigError with the nearest name."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"ModelConfig has no field {name!r}{hint}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Inverse of ``to_dict``; fields that are absent take their defaults."""
        return cls().replace(**values)


_HINTS: dict[str, Any] = {}


def _check_types(config: ModelConfig) -> None:
    if not _HINTS:
        _HINTS.update(get_type_hints(ModelConfig))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), _HINTS[field.name]
        choices = get_args(hint)
        if choices:
            if value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint_text = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"ModelConfig.{field.name} is {value!r}; wanted one of "
                    f"{', '.join(map(repr, choices))}{hint_text}"
                )
        elif hint is float and type(value) is int:
            object.__setattr__(config, field.name, float(value))
        elif hint is tuple and type(value) is list:  # as JSON gives it
            object.__setattr__(config, field.name, tuple(map(float, value)))
        elif type(value) is not hint:
            raise ConfigError(
                f"ModelConfig.{field.name} is {value!r} ({type(value).__name__}); "
                f"wanted {hint.__name__}"
            )


def _check_values(config: ModelConfig) -> None:
    def require(condition: bool, field: str, wanted: str) -> None:
        if not condition:
            raise ConfigError(f"ModelConfig.{field} is {getattr(config, field)!r}; wanted {wanted}")

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
    require(config.attention_block >= 0, "attention_block", "0 (all queries at once) or a number")
    require(config.kernel_parts >= 0, "kernel_parts", "0 (as trained) or a number of parts")
    require(
        not (config.kernel_parts and config.scan_layers),
        "kernel_parts",
        "0 with scan_layers=True; for_decoding sets both",
    )
    for field in (
        "attention_logit_cap",
        "final_logit_cap",
        "attention_scale",
        "attention_window",
        "global_layer_every",
        "local_rope_theta",
    ):
        require(getattr(config, field) >= 0, field, "0 (off) or a positive number")
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
        config.num_heads % config.num_kv_heads == 0,
        "num_kv_heads",
        f"a divisor of num_heads = {config.num_heads}",
    )
    require(config.head_dim % 2 == 0, "head_dim", "an even number, because RoPE rotates pairs")
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
        f"{config.head_dim // 2} numbers, one a rotated pair"
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
    if config.attention_window:
        require(not config.is_encoder_decoder, "attention_window", "0 in an encoder-decoder")
        require(
            not config.scan_layers,
            "attention_window",
            "0 with scan_layers=True, which runs every layer alike; set scan_layers=False",
        )
    else:
        for field in ("global_layer_every", "local_rope_theta"):
            require(getattr(config, field) == 0, field, "0 without an attention_window")
