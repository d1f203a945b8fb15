"""Parameters, FLOPs and bytes of a model, from its configuration alone; no arrays are made.

A FLOP is one multiplication or one addition. Counted are the matrix products: with weights, of
queries with keys, of probabilities with values. Biases, norms, activations, softmax, rotations
and the embedding look-up are left out: together they are below a percent at these sizes, and
leaving them out is what published MFU figures do. Rows are counted whole: ``inputs`` and
``targets`` are row lengths, whether their tokens are one example, several packed, or padding.

With S source and T target tokens, N_e and N_d the matmul weights of encoder and decoder, N_x the
cross-attention's key and value weights (paid per source token), a the attention width, L_e and L_d
layers, an encoder-decoder's forward pass takes

    2 [S (N_e + N_x) + T (N_d - N_x + M V)] + 4 a (L_e S^2 + L_d S T + L_d T^2 / 2)

and a decoder-only model's, over n = S + T tokens of which T pay for the head,

    2 [n N_d + T M V] + 4 a L_d n^2 / 2.

With ``merged_attention``, cross-attention has no weights of its own: the same formula, in which
N_d - N_x counts the weights of a decoder-only layer and N_x the keys' and values' among them, which
source tokens pay for too.

Training is three forward passes: backward is one product for the input's gradient and one for
the weight's. MFU does not count what rematerialization computes again, which is not a model FLOP.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from encdec.errors import ConfigError
from encdec.model.model_config import ModelConfig

CausalCount = Literal["half", "full"]

BYTES_PER_VALUE = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Number of parameters by part.

    Attributes:
        embedding: token embedding, which is the head too when tied.
        encoder: encoder blocks and their final norm.
        decoder: decoder blocks and their final norm, cross-attention included.
        head: vocabulary head; 0 when tied.
        cross_attention: of the decoder's, those of cross-attention sublayers (with their norms);
            0 where cross-attention is merged with self-attention.
        norms: of the encoder's and decoder's, norm scales.
        biases: of the encoder's and decoder's, biases.
    """

    embedding: int
    encoder: int
    decoder: int
    head: int
    cross_attention: int
    norms: int
    biases: int

    @property
    def total(self) -> int:
        return self.embedding + self.encoder + self.decoder + self.head

    @property
    def non_embedding(self) -> int:
        return self.encoder + self.decoder


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs of one pass by part; the parts add up to ``total``.

    Attributes:
        encoder: products with encoder weights.
        cross_kv: products that make cross-attention's keys and values from the encoder's output.
        decoder: products with the decoder's other weights.
        head: vocabulary head.
        encoder_attention: queries with keys and probabilities with values, in the encoder.
        cross_attention: the same in cross-attention.
        decoder_attention: the same in the decoder's causal self-attention.
    """

    encoder: float = 0.0
    cross_kv: float = 0.0
    decoder: float = 0.0
    head: float = 0.0
    encoder_attention: float = 0.0
    cross_attention: float = 0.0
    decoder_attention: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    def __add__(self, other: FlopCount) -> FlopCount:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return FlopCount(*(a + b for a, b in pairs))

    def __mul__(self, factor: float) -> FlopCount:
        return FlopCount(*(factor * value for value in dataclasses.astuple(self)))

    __rmul__ = __mul__


@dataclasses.dataclass(frozen=True)
class GenerationFlops:
    """FLOPs of generating one row.

    Attributes:
        first_token: reading the source and producing the first token.
        later_tokens: producing all the others.
        tokens: how many tokens are produced in all.
    """

    first_token: FlopCount
    later_tokens: FlopCount
    tokens: int

    @property
    def total(self) -> float:
        return self.first_token.total + self.later_tokens.total

    @property
    def per_later_token(self) -> float:
        """Mean FLOPs of a token after the first; 0 when there is none."""
        return self.later_tokens.total / (self.tokens - 1) if self.tokens > 1 else 0.0


def _attention_weights(config: ModelConfig) -> tuple[int, int]:
    """Weights of one attention sublayer: (queries and output, keys and values)."""
    return 2 * config.d_model * config.attention_width, 2 * config.d_model * config.kv_width


def mlp_weights(config: ModelConfig) -> int:
    """Weights of one layer's MLP, biases left out."""
    return (3 if config.mlp_gated else 2) * config.d_model * config.mlp_dim


def _layer_weights(config: ModelConfig) -> int:
    """Matmul weights of one block without cross-attention."""
    return sum(_attention_weights(config)) + mlp_weights(config)


def _attention_extras(config: ModelConfig) -> tuple[int, int]:
    """(norm scales, biases) of one attention sublayer, its pre-norm and post-norm included."""
    heads = config.num_heads + config.num_kv_heads if config.qk_norm_over_heads else 2
    norms = config.d_model * (1 - config.omit_pre_norms + config.post_norms)
    norms += heads * config.head_dim * config.qk_norm
    biases = (config.attention_width + 2 * config.kv_width) * config.qkv_bias
    return norms, biases + config.d_model * config.attention_out_bias


def _mlp_extras(config: ModelConfig) -> tuple[int, int]:
    """(norm scales, biases) of one MLP sublayer, its pre-norm and post-norm included."""
    norms = config.d_model * (1 - config.omit_pre_norms + config.post_norms)
    return norms, ((1 + config.mlp_gated) * config.mlp_dim + config.d_model) * config.mlp_bias


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters by part; equal to what ``init_params`` makes."""
    attention_norms, attention_biases = _attention_extras(config)
    mlp_norms, mlp_biases = _mlp_extras(config)
    attention = sum(_attention_weights(config)) + attention_norms + attention_biases
    layer = attention + mlp_weights(config) + mlp_norms + mlp_biases
    apart = config.is_encoder_decoder and not config.merged_attention
    cross_layers = config.decoder_layers if apart else 0
    stacks = 1 + config.is_encoder_decoder
    vocabulary = config.vocab_size * config.d_model
    attentions, layers = config.num_layers + cross_layers, config.num_layers
    return ParameterCount(
        embedding=vocabulary if config.share_embeddings else 2 * vocabulary,
        encoder=(config.encoder_layers * layer + config.d_model) * config.is_encoder_decoder,
        decoder=config.decoder_layers * layer + cross_layers * attention + config.d_model,
        head=0 if config.tie_embeddings else vocabulary,
        cross_attention=cross_layers * attention,
        norms=attentions * attention_norms + layers * mlp_norms + stacks * config.d_model,
        biases=attentions * attention_biases + layers * mlp_biases,
    )


def _encode(config: ModelConfig, inputs: int) -> FlopCount:
    """The encoder over one source, without cross-attention's keys and values."""
    return FlopCount(
        encoder=2.0 * inputs * config.encoder_layers * _layer_weights(config),
        encoder_attention=4.0 * config.attention_width * config.encoder_layers * inputs**2,
    )


def _make_cross_kv(config: ModelConfig, inputs: int) -> FlopCount:
    return FlopCount(cross_kv=2.0 * inputs * config.decoder_layers * _attention_weights(config)[1])


def _decode(
    config: ModelConfig, tokens: float, pairs: float, head: float, inputs: int
) -> FlopCount:
    """The decoder over ``tokens`` which read ``pairs`` (query, key) pairs among themselves.

    Args:
        config: either architecture.
        tokens: how many pass through the stack.
        pairs: pairs of self-attention, summed over the tokens.
        head: how many of the tokens pay for the vocabulary head.
        inputs: length of the encoded source; without effect in a decoder-only model.
    """
    layers, width = config.decoder_layers, config.attention_width
    weights, cross_pairs = layers * _layer_weights(config), 0.0
    if config.is_encoder_decoder:
        if not config.merged_attention:
            weights += layers * _attention_weights(config)[0]
        cross_pairs = tokens * inputs
    return FlopCount(
        decoder=2.0 * tokens * weights,
        head=2.0 * head * config.d_model * config.vocab_size,
        cross_attention=4.0 * width * layers * cross_pairs,
        decoder_attention=4.0 * width * layers * pairs,
    )


def _check_lengths(config: ModelConfig, inputs: int, targets: int) -> None:
    if inputs < 0 or targets < 1 or (config.is_encoder_decoder and inputs < 1):
        raise ConfigError(
            f"inputs is {inputs} and targets is {targets}; expected at least 1 token of each "
            "(a decoder-only model may have 0 inputs)"
        )


def forward_flops(
    config: ModelConfig,
    inputs: int,
    targets: int,
    *,
    batch_size: int = 1,
    causal: CausalCount = "half",
    head_tokens: int | None = None,
) -> FlopCount:
    """FLOPs of one forward pass under teacher forcing.

    Args:
        config: either architecture; a decoder-only model reads rows of ``inputs + targets``.
        inputs: source tokens per row, S.
        targets: target tokens per row, T.
        batch_size: rows.
        causal: "half" counts T^2/2 pairs in causal self-attention, which is what is needed;
            "full" counts T^2, which is what a kernel that masks computes.
        head_tokens: positions a row that pay for the head; default ``targets``, in both
            architectures, because training gathers the loss-bearing positions first.

    Raises:
        ConfigError: a length is invalid.
    """
    _check_lengths(config, inputs, targets)
    tokens = targets if config.is_encoder_decoder else inputs + targets
    pairs = tokens**2 * (0.5 if causal == "half" else 1.0)
    head = targets if head_tokens is None else head_tokens
    count = _decode(config, tokens, pairs, head, inputs)
    if config.is_encoder_decoder:
        count += _encode(config, inputs) + _make_cross_kv(config, inputs)
    return batch_size * count


def training_flops(
    config: ModelConfig,
    inputs: int,
    targets: int,
    *,
    batch_size: int = 1,
    causal: CausalCount = "half",
    head_tokens: int | None = None,
) -> float:
    """FLOPs of one training step's forward and backward pass: three forward passes.

    The arguments are those of ``forward_flops``.
    """
    forward = forward_flops(
        config, inputs, targets, batch_size=batch_size, causal=causal, head_tokens=head_tokens
    )
    return 3.0 * forward.total


def generation_flops(
    config: ModelConfig, inputs: int, targets: int, *, cached: bool = True
) -> GenerationFlops:
    """FLOPs of generating ``targets`` tokens from ``inputs`` source tokens, one row.

    A decoder-only model first reads the source behind the start token (S + 1 tokens). Cached,
    each later token passes through the decoder alone. Uncached, every token runs the decoder
    again over all that came before it, and an encoder-decoder makes cross-attention's keys and
    values again; the encoder runs once in either case, and the head only for the new token.

    Raises:
        ConfigError: a length is invalid.
    """
    _check_lengths(config, inputs, targets)
    prompt = 1 if config.is_encoder_decoder else inputs + 1
    first = _decode(config, prompt, prompt**2 / 2 if prompt > 1 else 1, 1, inputs)
    if config.is_encoder_decoder:
        first += _encode(config, inputs) + _make_cross_kv(config, inputs)
    later = FlopCount()
    if cached:
        # The i-th later token reads prompt + i tokens, its own included.
        count = targets - 1
        pairs = count * prompt + count * (count + 1) / 2
        later = _decode(config, count, pairs, count, inputs)
    else:
        for length in range(prompt + 1, prompt + targets):
            later += _decode(config, length, length**2 / 2, 1, inputs)
            if config.is_encoder_decoder:
                later += _make_cross_kv(config, inputs)
    return GenerationFlops(first, later, targets)


def _bytes_per_value(dtype: str) -> float:
    if dtype not in BYTES_PER_VALUE:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(BYTES_PER_VALUE)}")
    return BYTES_PER_VALUE[dtype]


def weight_bytes(config: ModelConfig, dtype: str | None = None) -> int:
    """Bytes of all parameters stored as ``dtype`` (default ``config.param_dtype``).

    Integers are counted without their scales.
    """
    return int(count_parameters(config).total * _bytes_per_value(dtype or config.param_dtype))


def cache_bytes(
    config: ModelConfig, inputs: int, targets: int, *, batch_size: int = 1, dtype: str | None = None
) -> int:
    """Bytes of keys and values kept while ``targets`` tokens are generated.

    An encoder-decoder keeps the targets' own and, made once from the source, cross-attention's;
    a decoder-only model keeps source and targets in every layer. ``dtype`` defaults to the
    compute dtype.
    """
    _check_lengths(config, inputs, targets)
    # Source tokens are kept once a decoder layer in either architecture.
    values = 2 * config.decoder_layers * config.kv_width * (inputs + targets)
    return int(batch_size * values * _bytes_per_value(dtype or config.dtype))


def model_flops_utilisation(flops: float, seconds: float, peak_flops: float) -> float:
    """MFU: model FLOPs done a second, as a share of the peak (PaLM, arXiv 2204.02311, app. B).

    Args:
        flops: model FLOPs of the work, e.g. ``training_flops`` of the global batch.
        seconds: wall time it took.
        peak_flops: FLOP/s of all devices together (``encdec.cost.chips.peak_flops``).
    """
    return flops / (seconds * peak_flops)
