"""The encoder-decoder as two LiteRT (TFLite) graphs: an encoder, and a decoder step.

Written operator by operator, so that XNNPACK gets what it runs fastest at batch 1 on a CPU: one
product for queries, keys and values; scales of norms and attention logits folded into the weights
behind them; rotation as a product with a constant; sums as products with ones; keys laid out
[S, D] and values [D, S], the layout that XNNPACK packs in half the time of any other tried (it
packs the right side of a product of two activations at every call). Weights are int8 by output
channel or int4 by block, and activations are quantized at run time, inside the operator. Source
length, cache capacity and the number of tokens in a step are dynamic: the reader resizes inputs.

In here heads are [1, K, N, count, D]: of every key head, N tokens, and of each the query heads that
read the key head, its key, its value, or all of them.
"""

from __future__ import annotations

import numpy as np

from encdec.export.equivalents import Params
from encdec.export.litert_file import ANY, LitertGraph, Operator, Type, block_scales, channel_scales
from encdec.export.quantise import BLOCK, Precision, eight_bits, four_bits, in_blocks, nibbles
from encdec.model import ModelConfig
from encdec.model.model_config import StackName
from encdec.model.positions import rope_frequencies

NEVER = -1e9  # added to the logits of what a query may not read


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

    def ropes(self, positions: int, stack: StackName) -> dict[bool, tuple[int, int]]:
        """Rotations at positions [N], of a stack's layers that read all (False) and local ones."""
        config = self.config
        layers = range(config.encoder_layers if stack == "encoder" else config.decoder_layers)
        rotated = [i for i in layers if config.is_rotated(i, stack)]
        kinds = {config.is_local(i, stack) for i in rotated}
        return {local: self.rope(positions, local) for local in sorted(kinds)}

    def rope(self, positions: int, local: bool = False) -> tuple[int, int]:
        """Cosines and sines [1, 1, N, 1, D] of positions [N]."""
        g, config = self.g, self.config
        half = np.asarray(rope_frequencies(config, local), np.float32)
        magnitude = 1.0 if local and config.local_rope_theta else config.rope_magnitude
        places = g.reshape(g.cast(positions, "int32", "float32"), [1, 1, ANY, 1, 1])
        angles = g.mul(places, g.constant(np.concatenate([half, half])))
        tables = [g.unary(Operator.COS, angles), g.unary(Operator.SIN, angles)]
        if magnitude != 1:
            tables = [g.mul(table, g.float(magnitude)) for table in tables]
        return tables[0], tables[1]

    def rotate(self, x: int, table: tuple[int, int] | None) -> int:
        """Heads rotated: ``x * cos + turned(x) * sin``; as they are without a table."""
        g, dim = self.g, self.config.head_dim
        if table is None:
            return x
        if self._half_turn is None:
            turn = np.zeros((dim, dim), np.float32)  # [out, in]
            half = np.arange(dim // 2)
            turn[half, half + dim // 2], turn[half + dim // 2, half] = -1, 1
            self._half_turn = g.constant(turn, name="half_turn")
        turned = g.fully_connected(x, self._half_turn)
        return g.add(g.mul(x, table[0]), g.mul(turned, table[1]))

    def read(self, x: int, layer: Params, name: str) -> tuple[int, np.ndarray]:
        """A sublayer's input, and what its weights are to be multiplied with: its norm's scale."""
        if self.config.omit_pre_norms:
            return x, np.ones(self.config.d_model, np.float32)
        return self.unscaled_norm(x), self.scale(layer[f"{name}_norm"])

    def project(self, x: int, params: Params, before: np.ndarray, names: str, path: str) -> int:
        """Projections of x [1, N, M] as one product, heads [1, K, N, count, D]."""
        g, config = self.g, self.config
        K, D = config.num_kv_heads, config.head_dim
        kernels, biases = [], []
        for name in names:
            factor = config.attention_logit_scale if name == "q" and not config.qk_norm else 1.0
            kernel = params[name]["kernel"].reshape(config.d_model, K, -1, D)
            kernels.append(kernel * before[:, None, None, None] * np.float32(factor))
            if "bias" in params[name]:
                biases.append(params[name]["bias"].reshape(K, -1, D) * np.float32(factor))
        kernel = np.concatenate(kernels, axis=2)
        bias = np.concatenate(biases, axis=1).reshape(-1) if biases else None
        both = self.linear(x, kernel.reshape(config.d_model, -1), bias, f"{path}/{names}")
        count = kernel.shape[2]
        if K == 1:
            return g.reshape(both, [1, 1, ANY, count, D])
        both = g.transpose(g.reshape(both, [1, ANY, K, count * D]), 0, 2, 1, 3)
        return g.reshape(both, [1, K, ANY, count, D])

    def normed_heads(self, x: int, params: Params, name: str) -> int:
        """Queries ("q_norm") or keys ("k_norm"), where the model norms them: each head, or all of
        a token's together; queries with the scale of the logits."""
        g, config = self.g, self.config
        if not config.qk_norm:
            return x
        scale = self.scale(params[name])
        scale = scale * np.float32(config.attention_logit_scale) if name == "q_norm" else scale
        if not config.qk_norm_over_heads:
            return g.mul(self.unscaled_norm(x), g.constant(scale))
        mean = g.reduce(Operator.MEAN, g.mul(x, x), 1, 3, 4)
        factor = g.unary(Operator.RSQRT, g.add(mean, g.float(config.norm_eps)))
        shape = (1, config.num_kv_heads, 1, -1, config.head_dim)
        return g.mul(g.mul(x, factor), g.constant(scale.reshape(shape)))

    def rows(self, heads: int) -> int:
        """[1, K, N, count, D] as [1, K, N * count, D], for products."""
        return self.g.reshape(heads, [1, self.config.num_kv_heads, ANY, self.config.head_dim])

    def capped(self, x: int, cap: float) -> int:
        g = self.g
        if not cap:
            return x
        return g.mul(g.unary(Operator.TANH, g.mul(x, g.float(1 / cap))), g.float(cap))

    def out(self, rows: int, params: Params, path: str) -> int:
        """Attention's output [1, N, M] from the queries' rows [1, K, N * H / K, D]."""
        g, config = self.g, self.config
        if (K := config.num_kv_heads) > 1:
            rows = g.reshape(rows, [1, K, ANY, config.attention_width // K])
            rows = g.transpose(rows, 0, 2, 1, 3)
        rows = g.reshape(rows, [1, ANY, config.attention_width])
        kernel = params["o"]["kernel"].reshape(config.attention_width, config.d_model)
        return self.linear(rows, kernel, params["o"].get("bias"), f"{path}/o")

    def mlp(self, x: int, layer: Params, path: str) -> int:
        """The MLP of x, added to it."""
        g, config, params, residual = self.g, self.config, layer["mlp"], x
        x, before = self.read(x, layer, "mlp")
        path = f"{path}/mlp"
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
        y = self.linear(
            hidden,
            params["down"]["kernel"],
            params["down"].get("bias"),
            f"{path}/down",
            precision=self.mlp_precision,
        )
        return self.residual(residual, y, layer, "mlp")

    def self_attention_heads(
        self, x: int, layer: Params, rope: tuple[int, int] | None, path: str
    ) -> tuple[int, int, int]:
        """Rotated queries [1, K, N * H / K, D] and keys [1, K, N, D], and values [1, K, N, D]."""
        g, config, attention = self.g, self.config, layer["self_attention"]
        group = config.num_heads // config.num_kv_heads
        x, before = self.read(x, layer, "self_attention")
        heads = self.project(x, attention, before, "qkv", f"{path}/self_attention")
        v = g.slice(heads, 3, group + 1, 1)
        if config.qk_norm:
            q = self.rotate(
                self.normed_heads(g.slice(heads, 3, 0, group), attention, "q_norm"), rope
            )
            k = self.rotate(
                self.normed_heads(g.slice(heads, 3, group, 1), attention, "k_norm"), rope
            )
        else:
            both = self.rotate(g.slice(heads, 3, 0, group + 1), rope)
            q, k = g.slice(both, 3, 0, group), g.slice(both, 3, group, 1)
        return self.rows(q), self.rows(k), self.rows(v)

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
    """tokens [1, S] and positions [S] int32 to what every decoder layer reads of the source.

    Outputs ``key_i`` [1, K, S, D] and ``value_i`` [1, K, D, S] float32. Positions are 0, 1, ...:
    rotated logits depend on differences alone, so centred positions make no difference.
    """
    # The encoder is bound by arithmetic, which int4 does not speed up.
    layers = _Layers(config, "int8" if precision == "int4" else precision)
    g = layers.g
    tokens = g.input("tokens", [1, ANY], "int32")
    positions = g.input("positions", [ANY], "int32")
    ropes = layers.ropes(positions, "encoder")
    near = None
    if any(config.is_local(i, "encoder") for i in range(config.encoder_layers)):
        near = _near_mask(layers, positions)
    table = params["embedder" if config.share_embeddings else "encoder_embedder"]["embedding"]
    x = layers.embed(tokens, table)
    for index in range(config.encoder_layers):
        layer, path = params["encoder"][f"layers_{index}"], f"encoder/layers_{index}"
        local = config.is_local(index, "encoder")
        rope = ropes[local] if config.is_rotated(index, "encoder") else None
        q, k, v = layers.self_attention_heads(x, layer, rope, path)
        # All queries that read one key head are rows of one product.
        logits = layers.capped(g.matmul(q, k, transpose_y=True), config.attention_logit_cap)
        if near is not None and local:
            logits = g.add(logits, near)
        y = g.matmul(g.softmax(logits), v)
        y = layers.out(y, layer["self_attention"], f"{path}/self_attention")
        x = layers.residual(x, y, layer, "self_attention")
        x = layers.mlp(x, layer, path)
    _source_outputs(layers, params, layers.unscaled_norm(x), positions)
    return g


def _near_mask(layers: _Layers, positions: int) -> int:
    """Added to logits [1, K, S * H / K, S] of local encoder layers: 0 within the window."""
    g, config = layers.g, layers.config
    group = config.num_heads // config.num_kv_heads
    back, ahead = config.encoder_window or (config.attention_window - 1,) * 2
    places = g.cast(positions, "int32", "float32")
    each = g.mul(g.reshape(places, [1, 1, ANY, 1]), g.constant(np.ones((1, group), np.float32)))
    rows = g.reshape(each, [1, 1, ANY, 1])
    distance = g.sub(rows, g.reshape(places, [1, 1, 1, ANY]))
    # How many places too far, in either direction.
    before = g.unary(Operator.RELU, g.sub(distance, g.float(back)))
    after = g.unary(Operator.RELU, g.sub(g.mul(distance, g.float(-1.0)), g.float(ahead)))
    return g.mul(g.add(before, after), g.float(NEVER))


def _source_outputs(layers: _Layers, params: Params, x: int, positions: int) -> None:
    """Outputs of the encoder's graph, from its normed but unscaled activations [1, S, M]."""
    g, config = layers.g, layers.config
    merged = config.merged_attention
    name = "self_attention" if merged else "encoder_attention"
    before = layers.scale(params["encoder"]["final_norm"])
    ropes: dict[bool, tuple[int, int]] = {}
    for index in range(config.decoder_layers):
        attention = params["decoder"][f"layers_{index}"][name]
        heads = layers.project(x, attention, before, "kv", f"decoder/layers_{index}/{name}")
        k, v = g.slice(heads, 3, 0, 1), g.slice(heads, 3, 1, 1)
        k = layers.normed_heads(k, attention, "k_norm")
        if config.cross_attention_rope != "none" and (not merged or config.is_rotated(index)):
            local = merged and config.is_local(index)
            if local not in ropes:
                ropes[local] = layers.rope(positions, local)
            k = layers.rotate(k, ropes[local])
        g.output(f"key_{index}", layers.rows(k))
        g.output(f"value_{index}", g.transpose(layers.rows(v), 0, 1, 3, 2))


def decoder_graph(
    config: ModelConfig, params: Params, precision: Precision, vocabulary_size: int = 0
) -> LitertGraph:
    """Graph of a decoder step: from N tokens and the caches to the token after each.

    Inputs: token [1, N] and position [N] int32; cross_position [N] int32 where cross-attention
    continues the source's positions; mask [1, 1, N * H / K, C] float32, added to the logits of
    every token's query heads, and local_mask of local layers where there are any; place
    [1, 1, N, C], 1 where row n is token n's slot and 0 elsewhere; past_key_i [1, K, C, D] and
    past_value_i [1, K, D, C], zero in the slots of the N tokens; the source's key_i [1, K, S, D]
    and value_i [1, K, D, S], which merged attention has in slots of the cache instead.

    Outputs: logits [1, N, V]; next int32 [1, N], the likeliest token of the first
    ``vocabulary_size`` (0: of all), and next_log_prob [1, N, 1], its log-probability; new_keys and
    new_values [1, L * K, N, D], the tokens' own, layer by layer, which the caller writes to
    its cache.
    """
    layers = _Layers(config, precision)
    g, K, D = layers.g, config.num_kv_heads, config.head_dim
    local = [config.is_local(i) for i in range(config.decoder_layers)]
    token = g.input("token", [1, ANY], "int32")
    position = g.input("position", [ANY], "int32")
    masks = {
        kind: g.input("local_mask" if kind else "mask", [1, 1, ANY, ANY])
        for kind in sorted(set(local))
    }
    place = g.input("place", [1, 1, ANY, ANY])
    names = ["past_key", "past_value"] + ([] if config.merged_attention else ["key", "value"])
    memories = [
        {
            name: g.input(f"{name}_{i}", [1, K, ANY, D] if "key" in name else [1, K, D, ANY])
            for name in names
        }
        for i in range(config.decoder_layers)
    ]
    ropes = layers.ropes(position, "decoder")
    cross_rope = None
    if config.cross_attention_rope != "none" and not config.merged_attention:
        continued = config.cross_attention_rope == "continued"
        own = g.input("cross_position", [ANY], "int32") if continued else position
        cross_rope = layers.rope(own)
    x = layers.embed(token, params["embedder"]["embedding"])
    new_keys, new_values = [], []
    for index, memory in enumerate(memories):
        layer, path = params["decoder"][f"layers_{index}"], f"decoder/layers_{index}"
        rope = ropes[local[index]] if config.is_rotated(index) else None
        q, k, v = layers.self_attention_heads(x, layer, rope, path)
        new_keys.append(k)
        new_values.append(v)
        y = _cached_attention(layers, q, k, v, memory, masks[local[index]], place)
        y = layers.out(y, layer["self_attention"], f"{path}/self_attention")
        x = layers.residual(x, y, layer, "self_attention")
        if not config.merged_attention:
            x = _cross_attention(layers, x, layer, cross_rope, memory, path)
        x = layers.mlp(x, layer, path)
    _choose(layers, params, x, vocabulary_size)
    g.output("new_keys", g.concatenate(new_keys, axis=1))
    g.output("new_values", g.concatenate(new_values, axis=1))
    return g


def _cached_attention(
    layers: _Layers, q: int, k: int, v: int, memory: dict[str, int], mask: int, place: int
) -> int:
    """Attention of the tokens' queries to the cache and to their own keys, as the queries' rows.

    The tokens' slots are zero in the cache, and so are their logits, which leaves their places in
    the softmax to the tokens' own: concatenating the two and cutting them apart again would
    need a slice whose begin is not known beforehand, which XNNPACK does not have.
    """
    g, cap = layers.g, layers.config.attention_logit_cap
    past = g.add(layers.capped(g.matmul(q, memory["past_key"], transpose_y=True), cap), mask)
    own = layers.capped(g.matmul(q, k, transpose_y=True), cap)
    shares = g.softmax(g.add(past, g.matmul(own, place)))
    y = g.matmul(shares, memory["past_value"], transpose_y=True)
    return g.add(y, g.matmul(g.matmul(shares, place, transpose_y=True), v))


def _cross_attention(
    layers: _Layers,
    x: int,
    layer: Params,
    rope: tuple[int, int] | None,
    memory: dict[str, int],
    path: str,
) -> int:
    """Cross-attention of x [1, N, M], added to it."""
    g, config, attention = layers.g, layers.config, layer["encoder_attention"]
    path = f"{path}/encoder_attention"
    y, before = layers.read(x, layer, "cross_attention")
    q = layers.normed_heads(layers.project(y, attention, before, "q", path), attention, "q_norm")
    q = layers.rows(layers.rotate(q, rope))
    logits = g.matmul(q, memory["key"], transpose_y=True)
    shares = g.softmax(layers.capped(logits, config.attention_logit_cap))
    y = g.matmul(shares, memory["value"], transpose_y=True)
    return layers.residual(x, layers.out(y, attention, path), layer, "cross_attention")


def _choose(layers: _Layers, params: Params, x: int, vocabulary_size: int) -> None:
    """The outputs logits, next and next_log_prob, from the last layer's x [1, N, M]."""
    g, config, embedder = layers.g, layers.config, params["embedder"]
    head = embedder["embedding"].T if config.tie_embeddings else embedder["head"]
    head = head * layers.scale(params["decoder"]["final_norm"])[:, None]
    logits = layers.linear(layers.unscaled_norm(x), head, None, "head")
    logits = layers.capped(logits, config.final_logit_cap)
    top = g.reduce(Operator.REDUCE_MAX, logits)
    total = g.reduce(Operator.SUM, g.unary(Operator.EXP, g.sub(logits, top)))
    g.output("logits", logits)
    log_prob = g.mul(g.unary(Operator.LOG, total), g.float(-1.0))
    choices = logits
    if 0 < vocabulary_size < config.vocab_size:
        choices = g.slice(logits, 2, 0, vocabulary_size)
        log_prob = g.add(log_prob, g.sub(g.reduce(Operator.REDUCE_MAX, choices), top))
    g.output("next", g.argmax(choices))
    g.output("next_log_prob", log_prob)
