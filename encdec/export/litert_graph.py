"""The encoder-decoder as two LiteRT (TFLite) graphs: an encoder, and a one-token decoder step.

Written operator by operator, so that XNNPACK gets what it runs fastest at batch 1 on a CPU: one
product for queries, keys and values; norm scales and the scores' scale folded into the weights
behind them; rotation as a product with a constant; sums as products with ones; keys laid out
[S, D] and values [D, S], the layout that XNNPACK packs in half the time of any other tried (it
packs the right side of a product of two activations at every call). Weights are int8 by output
channel or int4 by block, and activations are quantized at run time, inside the operator. Source
length and cache capacity are dynamic: the reader resizes inputs.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from encdec.export.equivalents import Params
from encdec.export.litert_file import ANY, LitertGraph, Operator, Type, block_scales, channel_scales
from encdec.export.quantise import BLOCK, eight_bits, four_bits, in_blocks, nibbles
from encdec.model import ModelConfig
from encdec.model.positions import rope_frequencies

Precision = Literal["float32", "int8", "int4"]


class _Layers:
    """The model's layers in a graph; names follow the parameters' paths."""

    def __init__(self, config: ModelConfig, precision: Precision):
        # Only the MLPs are stored in four bits; all other weights in eight.
        self.config, self.mlp_precision = config, precision
        self.precision = "int8" if precision == "int4" else precision
        self.g = LitertGraph()
        self._half_turn: int | None = None

    def linear(
        self,
        x: int,
        kernel: np.ndarray,
        bias: np.ndarray | None,
        name: str,
        *,
        precision: Precision | None = None,
    ) -> int:
        """``x @ kernel + bias``, the kernel [in, out] stored as [out, in] in the graph's
        precision."""
        g, precision = self.g, precision or self.precision
        weights = np.ascontiguousarray(kernel.T, np.float32)
        if precision == "float32":
            stored = g.constant(weights, name=name)
        elif precision == "int8":
            levels, scales = eight_bits(weights, axis=1)
            stored = g.constant(levels, name=name, quantization=channel_scales(scales[:, 0]))
        else:
            # XNNPACK supports whole blocks only; other weights have a scale for each output.
            block = BLOCK if weights.shape[1] % BLOCK == 0 else weights.shape[1]
            levels, scales = four_bits(in_blocks(weights, block))
            if block == BLOCK:
                found = block_scales(g.constant(scales[..., 0].astype(np.float16)), block)
            else:
                found = channel_scales(scales[:, 0, 0])
            stored = g.constant(
                nibbles(levels.reshape(weights.shape)),
                name=name,
                kind=Type.INT4,
                shape=weights.shape,
                quantization=found,
            )
        return g.fully_connected(
            x, stored, None if bias is None else g.constant(bias.astype(np.float32))
        )

    def unscaled_norm(self, x: int) -> int:
        """``x / rms(x)``; the scale is folded into the weights that read it."""
        g, width = self.g, self.g.shape(x)[-1]
        # The mean is a product with a constant row whose bias is epsilon.
        row = g.constant(np.full((1, width), 1 / width, np.float32))
        mean = g.fully_connected(
            g.mul(x, x), row, g.constant(np.array([self.config.norm_eps], np.float32))
        )
        return g.mul(x, g.unary(Operator.RSQRT, mean))

    def norm(self, x: int, params: Params) -> int:
        return self.g.mul(self.unscaled_norm(x), self.g.constant(self.scale(params)))

    def scale(self, params: Params) -> np.ndarray:
        scale = params["scale"].astype(np.float32)
        return scale + 1 if self.config.norm_plus_one else scale

    def embed(self, tokens: int, table: np.ndarray) -> int:
        """Rows [1, T, M] of tokens [1, T]."""
        g, config = self.g, self.config
        factor = np.float32(config.d_model**0.5 if config.embedding_scale else 1.0)
        if self.precision == "float32":
            return g.gather(g.constant(table * factor, name="embedding"), tokens)
        levels, scales = eight_bits(table, axis=1)
        rows = g.gather(g.constant(levels, name="embedding"), tokens, "int8")
        return g.mul(g.cast(rows, "int8", "float32"), g.gather(g.constant(scales * factor), tokens))

    def rope(self, positions: int) -> tuple[int, int]:
        """Cosines and sines [1, 1, T, D] of positions [T]."""
        g, config = self.g, self.config
        half = np.asarray(rope_frequencies(config), np.float32)
        places = g.reshape(g.cast(positions, "int32", "float32"), [1, 1, g.shape(positions)[0], 1])
        angles = g.mul(places, g.constant(np.concatenate([half, half])))
        tables = [g.unary(Operator.COS, angles), g.unary(Operator.SIN, angles)]
        if config.rope_magnitude != 1:
            tables = [g.mul(table, g.float(config.rope_magnitude)) for table in tables]
        return tuple(tables)

    def rotate(self, x: int, table: tuple[int, int]) -> int:
        """Heads [1, heads, T, D], rotated: ``x * cos + turned(x) * sin``."""
        g, dim = self.g, self.config.head_dim
        if self._half_turn is None:
            turn = np.zeros((dim, dim), np.float32)  # [out, in]
            half = np.arange(dim // 2)
            turn[half, half + dim // 2], turn[half + dim // 2, half] = -1, 1
            self._half_turn = g.constant(turn, name="half_turn")
        turned = g.fully_connected(x, self._half_turn)
        return g.add(g.mul(x, table[0]), g.mul(turned, table[1]))

    def qkv(
        self, x: int, params: Params, before: np.ndarray, names: str, path: str
    ) -> list[tuple[int, int]]:
        """Several projections of an unscaled norm's output as one product, [1, heads, T, D].

        Returns:
            The product, and the number of heads of each projection in it.
        """
        g, config = self.g, self.config
        kernels, biases = [], []
        for name in names:
            kernel = params[name]["kernel"].reshape(config.d_model, -1) * before[:, None]
            bias = params[name]["bias"].reshape(-1) if "bias" in params[name] else None
            if name == "q" and not config.qk_norm:
                kernel = kernel * np.float32(config.scores_scale)
                bias = None if bias is None else bias * np.float32(config.scores_scale)
            kernels.append(kernel)
            biases.append(bias)
        bias = None if biases[0] is None else np.concatenate(biases)
        both = self.linear(x, np.concatenate(kernels, axis=1), bias, f"{path}/{names}")
        length, heads = g.shape(x)[1], g.shape(both)[-1] // config.head_dim
        if length == 1:
            return g.reshape(both, [1, heads, 1, config.head_dim])
        return g.transpose(g.reshape(both, [1, length, heads, config.head_dim]), 0, 2, 1, 3)

    def normed_heads(self, x: int, params: Params, scale: float = 1.0) -> int:
        """Query or key heads, normed where the model does so; ``scale`` goes with it."""
        if not self.config.qk_norm:
            return x
        return self.g.mul(
            self.unscaled_norm(x), self.g.constant(self.scale(params) * np.float32(scale))
        )

    def capped(self, x: int, cap: float) -> int:
        g = self.g
        if not cap:
            return x
        return g.mul(g.unary(Operator.TANH, g.mul(x, g.float(1 / cap))), g.float(cap))

    def out(self, heads: int, params: Params, path: str) -> int:
        """Attention's output from heads [1, H, T, D]."""
        g, config = self.g, self.config
        length = g.shape(heads)[2]
        if length != 1:
            heads = g.transpose(heads, 0, 2, 1, 3)
        rows = g.reshape(heads, [1, length, config.attention_width])
        kernel = params["o"]["kernel"].reshape(config.attention_width, config.d_model)
        return self.linear(rows, kernel, params["o"].get("bias"), f"{path}/o")

    def mlp(self, x: int, params: Params, before: np.ndarray, path: str) -> int:
        g, config = self.g, self.config
        into = lambda name: self.linear(
            x,
            params[name]["kernel"] * before[:, None],
            params[name].get("bias"),
            f"{path}/{name}",
            precision=self.mlp_precision,
        )
        hidden = self.activate(into("gate" if config.mlp_gated else "up"))
        if config.mlp_gated:
            hidden = g.mul(hidden, into("up"))
        return self.linear(
            hidden,
            params["down"]["kernel"],
            params["down"].get("bias"),
            f"{path}/down",
            precision=self.mlp_precision,
        )

    def self_attention_heads(
        self, x: int, layer: Params, rope: tuple[int, int], path: str
    ) -> tuple[int, int, int]:
        """Rotated queries [1, H, N, D] and keys [1, K, N, D], and values [1, K, N, D]."""
        g, config, attention = self.g, self.config, layer["self_attention"]
        H, K = config.num_heads, config.num_kv_heads
        heads = self.qkv(
            self.unscaled_norm(x),
            attention,
            self.scale(layer["self_attention_norm"]),
            "qkv",
            f"{path}/self_attention",
        )
        v = g.slice(heads, 1, H + K, K)
        if config.qk_norm:
            q = self.normed_heads(g.slice(heads, 1, 0, H), attention["q_norm"], config.scores_scale)
            k = self.normed_heads(g.slice(heads, 1, H, K), attention["k_norm"])
            return self.rotate(q, rope), self.rotate(k, rope), v
        both = self.rotate(g.slice(heads, 1, 0, H + K), rope)
        return g.slice(both, 1, 0, H), g.slice(both, 1, H, K), v

    def activate(self, x: int) -> int:
        g, kind = self.g, self.config.mlp_activation
        if kind == "silu":
            return g.mul(x, g.unary(Operator.LOGISTIC, x))
        if kind == "relu":
            return g.unary(Operator.RELU, x)
        return g.gelu(x, kind == "gelu_tanh")

    def residual(self, x: int, y: int, layer: Params, name: str) -> int:
        if self.config.post_norms:
            y = self.norm(y, layer[f"{name}_post_norm"])
        return self.g.add(x, y)


def encoder_graph(config: ModelConfig, params: Params, precision: Precision) -> LitertGraph:
    """tokens [1, S] and positions [S] int32 to every decoder layer's cross-attention memory.

    Outputs ``key_i`` [1, K, S, D] and ``value_i`` [1, K, D, S] float32. Positions are 0, 1, ...:
    rotated scores depend on differences alone, so centred positions make no difference.
    """
    # The encoder is bound by arithmetic, which int4 does not speed up.
    layers = _Layers(config, "int8" if precision == "int4" else precision)
    g, H, K, D = layers.g, config.num_heads, config.num_kv_heads, config.head_dim
    tokens = g.input("tokens", [1, ANY], "int32")
    rope = layers.rope(g.input("positions", [ANY], "int32"))
    table = params["embedder" if config.share_embeddings else "encoder_embedder"]["embedding"]
    x = layers.embed(tokens, table)
    for index in range(config.encoder_layers):
        layer, path = params["encoder"][f"layers_{index}"], f"encoder/layers_{index}"
        q, k, v = layers.self_attention_heads(x, layer, rope, path)
        # All queries that read one key head are rows of one product.
        q = g.reshape(q, [1, K, ANY, D])
        scores = layers.capped(g.matmul(q, k, transpose_y=True), config.attention_logit_cap)
        y = g.reshape(g.matmul(g.softmax(scores), v), [1, H, ANY, D])
        y = layers.out(y, layer["self_attention"], f"{path}/self_attention")
        x = layers.residual(x, y, layer, "self_attention")
        y = layers.mlp(
            layers.unscaled_norm(x), layer["mlp"], layers.scale(layer["mlp_norm"]), f"{path}/mlp"
        )
        x = layers.residual(x, y, layer, "mlp")
    x = layers.unscaled_norm(x)
    before = layers.scale(params["encoder"]["final_norm"])
    for index in range(config.decoder_layers):
        attention = params["decoder"][f"layers_{index}"]["encoder_attention"]
        heads = layers.qkv(x, attention, before, "kv", f"decoder/layers_{index}/encoder_attention")
        k, v = g.slice(heads, 1, 0, K), g.slice(heads, 1, K, K)
        if config.qk_norm:
            k = layers.normed_heads(k, attention["k_norm"])
        g.output(f"key_{index}", k)
        g.output(f"value_{index}", g.transpose(v, 0, 1, 3, 2))
    return g


def decoder_graph(
    config: ModelConfig, params: Params, precision: Precision, vocabulary_size: int = 0
) -> LitertGraph:
    """Graph of one decoder step: from a token and the caches to the next token.

    Inputs: token [1, 1] and position [1] int32; mask [1, 1, 1, C] float32, 0 for the first cache
    slot and those that hold a token and very negative for others; first [1, 1, 1, C], 1 for the
    first slot and 0 for others; the source's key_i [1, K, S, D] and value_i [1, K, D, S];
    past_key_i [1, K, C, D] and past_value_i [1, K, D, C], whose first slot is zero.

    Outputs: logits [1, V]; next int32 [1], the likeliest token of the first ``vocabulary_size``
    (0: of all), and next_log_prob [1, 1], its log-probability; new_keys and new_values
    [1, L * K, 1, D], the token's own, layer by layer, which the caller writes to slot
    ``position + 1`` of its cache.
    """
    layers = _Layers(config, precision)
    g, H, K, D = layers.g, config.num_heads, config.num_kv_heads, config.head_dim
    group = H // K
    token = g.input("token", [1, 1], "int32")
    position = g.input("position", [1], "int32")
    mask = g.input("mask", [1, 1, 1, ANY])
    first = g.input("first", [1, 1, 1, ANY])
    memories = [
        {
            "key": g.input(f"key_{i}", [1, K, ANY, D]),
            "value": g.input(f"value_{i}", [1, K, D, ANY]),
            "past_key": g.input(f"past_key_{i}", [1, K, ANY, D]),
            "past_value": g.input(f"past_value_{i}", [1, K, D, ANY]),
        }
        for i in range(config.decoder_layers)
    ]
    rope = layers.rope(position)
    x = layers.embed(token, params["embedder"]["embedding"])
    new_keys, new_values = [], []

    def capped(scores: int) -> int:
        return layers.capped(scores, config.attention_logit_cap)

    for index, memory in enumerate(memories):
        layer, path = params["decoder"][f"layers_{index}"], f"decoder/layers_{index}"
        q, k, v = layers.self_attention_heads(x, layer, rope, path)
        new_keys.append(k)
        new_values.append(v)
        q = g.reshape(q, [1, K, group, D])
        past = g.add(capped(g.matmul(q, memory["past_key"], transpose_y=True)), mask)
        own = capped(g.matmul(q, k, transpose_y=True))
        # The first slot's key is zero and so is its score, which leaves its place for the token's
        # own score: XNNPACK has no slice of the rest of a row whose length is not known beforehand.
        shares = g.softmax(g.add(past, g.mul(own, first)))
        y = g.matmul(shares, memory["past_value"], transpose_y=True)
        y = g.add(y, g.mul(g.slice(shares, 3, 0, 1), v))
        y = g.reshape(y, [1, H, 1, D])
        y = layers.out(y, layer["self_attention"], f"{path}/self_attention")
        x = layers.residual(x, y, layer, "self_attention")

        attention, place = layer["encoder_attention"], f"{path}/encoder_attention"
        q = layers.qkv(
            layers.unscaled_norm(x),
            attention,
            layers.scale(layer["cross_attention_norm"]),
            "q",
            place,
        )
        if config.qk_norm:
            q = layers.normed_heads(q, attention["q_norm"], config.scores_scale)
        q = g.reshape(q, [1, K, group, D])
        shares = g.softmax(capped(g.matmul(q, memory["key"], transpose_y=True)))
        y = g.reshape(g.matmul(shares, memory["value"], transpose_y=True), [1, H, 1, D])
        x = layers.residual(x, layers.out(y, attention, place), layer, "cross_attention")
        y = layers.mlp(
            layers.unscaled_norm(x), layer["mlp"], layers.scale(layer["mlp_norm"]), f"{path}/mlp"
        )
        x = layers.residual(x, y, layer, "mlp")

    _choose(layers, params, x, vocabulary_size)
    g.output("new_keys", g.concatenate(new_keys, axis=1))
    g.output("new_values", g.concatenate(new_values, axis=1))
    return g


def _choose(layers: _Layers, params: Params, x: int, vocabulary_size: int) -> None:
    """The outputs logits, next and next_log_prob, from the last layer's x [1, 1, M]."""
    g, config, embedder = layers.g, layers.config, params["embedder"]
    head = embedder["embedding"].T if config.tie_embeddings else embedder["head"]
    head = head * layers.scale(params["decoder"]["final_norm"])[:, None]
    logits = layers.linear(layers.unscaled_norm(x), head, None, "head")
    logits = g.reshape(layers.capped(logits, config.final_logit_cap), [1, config.vocab_size])
    top = g.reduce(Operator.REDUCE_MAX, logits)
    total = g.reduce(Operator.SUM, g.unary(Operator.EXP, g.sub(logits, top)))
    g.output("logits", logits)
    log_prob = g.mul(g.unary(Operator.LOG, total), g.float(-1.0))
    choices = logits
    if 0 < vocabulary_size < config.vocab_size:
        choices = g.slice(logits, 1, 0, vocabulary_size)
        log_prob = g.add(log_prob, g.sub(g.reduce(Operator.REDUCE_MAX, choices), top))
    g.output("next", g.argmax(choices))
    g.output("next_log_prob", log_prob)
