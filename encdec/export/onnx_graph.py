"""The model as ONNX graphs: an encoder, and a decoder that takes and gives its cache.

Written operator by operator from the configuration, so that the graphs hold only what
run time needs: query, key and value projections are one product, cross-attention's keys are
stored transposed, and the vocabulary head is applied to the requested positions only. Batch, source
length, past length and number of new tokens are dynamic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from encdec.export.equivalents import Params
from encdec.export.quantise import BLOCK, Precision, eight_bits, four_bits, in_blocks, nibbles
from encdec.model import ModelConfig
from encdec.model.positions import rope_frequencies

OPSET, IR_VERSION = 21, 10
LEAST = float(np.finfo(np.float32).min)
_CONTRIB = "com.microsoft"


class Graph:
    """Nodes and constants under construction; every operator returns its output's name.

    Args:
        precision: of the weights; int4 is for the MLPs, all others are then in int8.
        many_rows: whether products have many rows: one of the two int8 operators is faster
            with many and the other with few.
    """

    def __init__(self, precision: Precision, *, many_rows: bool):
        self.precision = "int8" if precision == "int4" else precision
        self.mlp_precision, self.many_rows = precision, many_rows
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._quantised: dict[str, tuple[str, str, str]] = {}

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any):
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(
                kind,
                list(inputs),
                names,
                name=f"{kind}_{len(self.nodes)}",
                domain=domain,
                **attributes,
            )
        )
        return names[0] if outputs == 1 else names

    def rename(self, name: str, wanted: str) -> None:
        """Gives the last value an output's name."""
        self.nodes.append(helper.make_node("Identity", [name], [wanted], name=f"out_{wanted}"))

    def constant(self, value: Any, name: str = "") -> str:
        array = np.asarray(value)
        name = name or f"constant_{len(self.constants)}"
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), f"ints_{'_'.join(map(str, values))}")

    def float(self, value: float) -> str:
        return self.constant(np.float32(value), f"float_{value!r}")

    def linear(
        self,
        x: str,
        kernel: np.ndarray,
        bias: np.ndarray | None,
        name: str,
        *,
        precision: Precision | None = None,
    ) -> str:
        """``x @ kernel + bias``, the kernel [in, out] stored in the graph's precision."""
        precision = precision or self.precision
        if precision == "float32":
            y = self.op("MatMul", x, self.constant(kernel.astype(np.float32), name))
        elif precision == "int8" and self.many_rows:
            y = self._eight_bits(x, kernel, name)
        else:
            y = self._in_blocks(x, kernel, name, 4 if precision == "int4" else 8)
        return y if bias is None else self.op("Add", y, self.constant(bias, f"{name}.bias"))

    def _eight_bits(self, x: str, kernel: np.ndarray, name: str) -> str:
        """Integer product: weights scaled by output column, activations quantized at run time."""
        weights, scales = eight_bits(kernel, axis=0)
        if x not in self._quantised:
            self._quantised[x] = tuple(self.op("DynamicQuantizeLinear", x, outputs=3))
        levels, x_scale, zero = self._quantised[x]
        sums = self.op("MatMulInteger", levels, self.constant(weights, name), zero)
        scale = self.op("Mul", x_scale, self.constant(scales[0], f"{name}.scale"))
        return self.op("Mul", self.op("Cast", sums, to=TensorProto.FLOAT), scale)

    def _in_blocks(self, x: str, kernel: np.ndarray, name: str, bits: int) -> str:
        """Weights scaled by block, activations quantized at run time (accuracy level 4)."""
        block = BLOCK if bits == 4 else 256
        while block > BLOCK and len(kernel) % block:  # an incomplete last block would be padded
            block //= 2
        weights = in_blocks(kernel.T, block)
        levels, scales = four_bits(weights) if bits == 4 else eight_bits(weights, axis=-1)
        # Levels count from 0 here; the middle one is zero.
        levels = (levels.view(np.uint8) + np.uint8(1 << bits - 1)) & np.uint8((1 << bits) - 1)
        return self.op(
            "MatMulNBits",
            x,
            self.constant(nibbles(levels) if bits == 4 else levels, name),
            self.constant(scales[..., 0], f"{name}.scale"),
            domain=_CONTRIB,
            K=kernel.shape[0],
            N=kernel.shape[1],
            bits=bits,
            block_size=block,
            accuracy_level=4,
        )

    def model(self, inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "encdec", inputs, outputs, list(self.constants.values())
        )
        return helper.make_model(
            graph,
            ir_version=IR_VERSION,
            producer_name="encdec",
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(_CONTRIB, 1)],
        )


class _Layers:
    """The model's layers in a graph; names follow the parameters' paths."""

    def __init__(self, config: ModelConfig, graph: Graph):
        self.config, self.g = config, graph

    def norm(self, x: str, scale: np.ndarray, name: str) -> str:
        g = self.g
        mean = g.op("ReduceMean", g.op("Pow", x, g.float(2.0)), g.ints(-1), keepdims=1)
        spread = g.op("Sqrt", g.op("Add", mean, g.float(self.config.norm_eps)))
        scale = scale + 1 if self.config.norm_plus_one else scale
        return g.op("Mul", g.op("Div", x, spread), g.constant(scale.astype(np.float32), name))

    def pre_norm(self, x: str, layer: Params, name: str, path: str) -> str:
        """A sublayer's input."""
        if self.config.omit_pre_norms:
            return x
        return self.norm(x, layer[f"{name}_norm"]["scale"], f"{path}/{name}_norm")

    def embed(self, tokens: str, table: np.ndarray) -> str:
        g, config = self.g, self.config
        factor = np.float32(config.d_model**0.5 if config.embedding_scale else 1.0)
        if g.precision == "float32":
            return g.op("Gather", g.constant(table * factor, "embedding"), tokens)
        levels, scales = eight_bits(table, axis=1)
        rows = g.op("Gather", g.constant(levels, "embedding"), tokens)
        rows = g.op("Cast", rows, to=TensorProto.FLOAT)
        scales = g.op("Gather", g.constant(scales * factor, "embedding.scale"), tokens)
        return g.op("Mul", rows, scales)

    def rope(self, positions: str, local: bool = False) -> tuple[str, str]:
        """Cosines and sines [B, T, 1, D] of positions [B, T], both halves next to each other."""
        g, config = self.g, self.config
        half = np.asarray(rope_frequencies(config, local), np.float32)
        magnitude = 1.0 if local and config.local_rope_theta else config.rope_magnitude
        places = g.op("Unsqueeze", g.op("Cast", positions, to=TensorProto.FLOAT), g.ints(2, 3))
        angles = g.op("Mul", places, g.constant(np.concatenate([half, half])))
        tables = [g.op("Cos", angles), g.op("Sin", angles)]
        if magnitude != 1:
            tables = [g.op("Mul", table, g.float(magnitude)) for table in tables]
        return tuple(tables)

    def rotate(self, x: str, table: tuple[str, str]) -> str:
        """Heads [B, T, heads, D], rotated."""
        g = self.g
        first, second = g.op("Split", x, axis=-1, num_outputs=2, outputs=2)
        turned = g.op("Concat", g.op("Neg", second), first, axis=-1)
        return g.op("Add", g.op("Mul", x, table[0]), g.op("Mul", turned, table[1]))

    def heads(self, x: str) -> str:
        """[B, T, heads * D] to [B, T, heads, D]."""
        return self.g.op("Reshape", x, self.g.ints(0, 0, -1, self.config.head_dim))

    def bias_of(self, params: Params, names: str) -> np.ndarray | None:
        if "bias" not in params[names[0]]:
            return None
        return np.concatenate([params[x]["bias"].reshape(-1) for x in names])

    def project(self, x: str, params: Params, names: str, path: str) -> str:
        """Several projections as one product."""
        kernel = np.concatenate(
            [params[x]["kernel"].reshape(self.config.d_model, -1) for x in names], axis=1
        )
        return self.g.linear(x, kernel, self.bias_of(params, names), f"{path}/{names}")

    def head_norm(self, x: str, params: Params, name: str, path: str) -> str:
        """Queries or keys [B, T, heads, D], each head normed or all of a token's together."""
        g, config = self.g, self.config
        if not config.qk_norm:
            return x
        scale, path = params[name]["scale"], f"{path}/{name}"
        if not config.qk_norm_over_heads:
            return self.norm(x, scale, path)
        return self.heads(self.norm(g.op("Reshape", x, g.ints(0, 0, -1)), scale, path))

    def self_qkv(
        self, x: str, params: Params, table: tuple[str, str] | None, path: str
    ) -> tuple[str, str, str]:
        """Rotated queries [B, T, H, D]; keys and values [B, K, T, D]."""
        g, config = self.g, self.config
        D, H, K = config.head_dim, config.num_heads, config.num_kv_heads
        both = self.project(x, params, "qkv", path)
        parts = g.op("Split", both, g.ints(H * D, K * D, K * D), axis=-1, outputs=3)
        q, k, v = map(self.heads, parts)
        q, k = (self.head_norm(y, params, norm, path) for y, norm in ((q, "q_norm"), (k, "k_norm")))
        if table is not None:
            both = self.rotate(g.op("Concat", q, k, axis=2), table)
            q, k = g.op("Split", both, g.ints(H, K), axis=2, outputs=2)
        return q, *(g.op("Transpose", y, perm=[0, 2, 1, 3]) for y in (k, v))

    def attend(
        self, q: str, k_transposed: str, v: str, mask: str, params: Params, path: str
    ) -> str:
        """Output of attention: q [B, T, H, D], keys [B, K, D, S], values [B, K, S, D]."""
        g, config = self.g, self.config
        K, D = config.num_kv_heads, config.head_dim
        group = config.num_heads // K
        q = g.op("Mul", q, g.float(config.attention_logit_scale))
        q = g.op("Transpose", g.op("Reshape", q, g.ints(0, 0, K, group, D)), perm=[0, 2, 3, 1, 4])
        logits = g.op("MatMul", q, g.op("Unsqueeze", k_transposed, g.ints(2)))
        if cap := config.attention_logit_cap:
            logits = g.op("Mul", g.op("Tanh", g.op("Div", logits, g.float(cap))), g.float(cap))
        shares = g.op("Softmax", g.op("Add", logits, mask), axis=-1)
        out = g.op("MatMul", shares, g.op("Unsqueeze", v, g.ints(2)))
        out = g.op("Transpose", out, perm=[0, 3, 1, 2, 4])
        out = g.op("Reshape", out, g.ints(0, 0, config.attention_width))
        kernel = params["o"]["kernel"].reshape(config.attention_width, config.d_model)
        return g.linear(out, kernel, params["o"].get("bias"), f"{path}/o")

    def mlp(self, x: str, params: Params, path: str) -> str:
        g, config = self.g, self.config
        product = lambda name, x: g.linear(
            x,
            params[name]["kernel"],
            params[name].get("bias"),
            f"{path}/{name}",
            precision=g.mlp_precision,
        )
        hidden = self.activate(product("gate" if config.mlp_gated else "up", x))
        if config.mlp_gated:
            hidden = g.op("Mul", hidden, product("up", x))
        return product("down", hidden)

    def activate(self, x: str) -> str:
        g, kind = self.g, self.config.mlp_activation
        if kind == "silu":
            return g.op("Mul", x, g.op("Sigmoid", x))
        if kind == "relu":
            return g.op("Relu", x)
        return g.op("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def residual(self, x: str, y: str, layer: Params, name: str, path: str) -> str:
        if self.config.post_norms:
            y = self.norm(y, layer[f"{name}_post_norm"]["scale"], f"{path}/{name}_post_norm")
        return self.g.op("Add", x, y)

    def additive(self, allowed: str) -> str:
        """Mask of logits [B, 1, 1, T, S] from bool [B, T, S]."""
        g = self.g
        mask = g.op("Where", allowed, g.float(0.0), g.float(LEAST))
        return g.op("Unsqueeze", mask, g.ints(1, 2))

    def source_mask(self, name: str) -> str:
        allowed = self.g.op("Cast", name, to=TensorProto.BOOL)
        return self.additive(self.g.op("Unsqueeze", allowed, self.g.ints(1)))

    def near_mask(self, places: str, mask: str) -> str:
        """A mask of logits further limited to the encoder's window, which reaches both ways."""
        g, window = self.g, self.config.attention_window
        back, ahead = self.config.encoder_window or (window - 1, window - 1)
        rows, columns = (g.op("Unsqueeze", places, g.ints(axis)) for axis in (2, 1))
        distance = g.op("Sub", rows, columns)
        reach = [g.constant(np.int64(one)) for one in (back, -ahead)]
        near = g.op(
            "And",
            g.op("LessOrEqual", distance, reach[0]),
            g.op("GreaterOrEqual", distance, reach[1]),
        )
        return g.op("Min", mask, self.additive(near))

    def moved(self, positions: str, mask: str) -> str:
        """Positions [B, T] that continue where each row's source ends."""
        g = self.g
        return g.op("Add", positions, g.op("ReduceSum", mask, g.ints(1), keepdims=1))

    def block_mlp(self, x: str, layer: Params, path: str) -> str:
        """The MLP with its norms, added to the residual."""
        y = self.mlp(self.pre_norm(x, layer, "mlp", path), layer["mlp"], f"{path}/mlp")
        return self.residual(x, y, layer, "mlp", path)


def _value(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def _cross_values(config: ModelConfig) -> list[onnx.ValueInfoProto]:
    K, D = config.num_kv_heads, config.head_dim
    return [
        value
        for i in range(config.decoder_layers)
        for value in (
            _value(f"cross_key_{i}", TensorProto.FLOAT, "batch", K, D, "source"),
            _value(f"cross_value_{i}", TensorProto.FLOAT, "batch", K, "source", D),
        )
    ]


def encoder_graph(config: ModelConfig, params: Params, precision: Precision) -> onnx.ModelProto:
    """tokens and mask [B, S] int64 to every decoder layer's cross-attention keys and values.

    Keys are [B, K, D, S], ready for the product, values [B, K, S, D]. Encoder positions count
    from zero, centred or not: rotated logits depend on differences alone.
    """
    # The encoder is bound by arithmetic, which int4 does not speed up.
    g = Graph("int8" if precision == "int4" else precision, many_rows=True)
    layers = _Layers(config, g)
    table = params["embedder" if config.share_embeddings else "encoder_embedder"]["embedding"]
    x = layers.embed("tokens", table)
    length = g.op("Squeeze", g.op("Shape", "tokens", start=1, end=2), g.ints(0))
    one, zero = (g.constant(np.int64(value), f"int_{value}") for value in (1, 0))
    places = g.op("Unsqueeze", g.op("Range", zero, length, one), g.ints(0))
    kinds = {False: (layers.rope(places), layers.source_mask("mask"))}
    if config.attention_window:
        kinds[True] = layers.rope(places, local=True), layers.near_mask(places, kinds[False][1])
    for index in range(config.encoder_layers):
        layer, path = params["encoder"][f"layers_{index}"], f"encoder/layers_{index}"
        rope, mask = kinds[config.is_local(index, "encoder")]
        y = layers.pre_norm(x, layer, "self_attention", path)
        attention = layer["self_attention"]
        rotation = rope if config.is_rotated(index, "encoder") else None
        q, k, v = layers.self_qkv(y, attention, rotation, f"{path}/self_attention")
        k = g.op("Transpose", k, perm=[0, 1, 3, 2])
        y = layers.attend(q, k, v, mask, attention, f"{path}/self_attention")
        x = layers.residual(x, y, layer, "self_attention", path)
        x = layers.block_mlp(x, layer, path)
    x = layers.norm(x, params["encoder"]["final_norm"]["scale"], "encoder/final_norm")
    ropes = {local: rope for local, (rope, _) in kinds.items()}
    for index in range(config.decoder_layers):
        _cross_key_values(layers, params, index, x, ropes)
    inputs = [_value(name, TensorProto.INT64, "batch", "source") for name in ("tokens", "mask")]
    return g.model(inputs, _cross_values(config))


def _cross_key_values(
    layers: _Layers, params: Params, index: int, x: str, ropes: dict[bool, tuple[str, str]]
) -> None:
    """Outputs of the encoder's graph: what decoder layer ``index`` reads of the source ``x``."""
    g, config = layers.g, layers.config
    merged = config.merged_attention
    name = "self_attention" if merged else "encoder_attention"
    attention = params["decoder"][f"layers_{index}"][name]
    path = f"decoder/layers_{index}/{name}"
    both = layers.project(x, attention, "kv", path)
    k, v = map(layers.heads, g.op("Split", both, axis=-1, num_outputs=2, outputs=2))
    k = layers.head_norm(k, attention, "k_norm", path)
    if config.cross_attention_rope != "none" and (not merged or config.is_rotated(index)):
        k = layers.rotate(k, ropes[merged and config.is_local(index)])
    g.rename(g.op("Transpose", k, perm=[0, 2, 3, 1]), f"cross_key_{index}")
    g.rename(g.op("Transpose", v, perm=[0, 2, 1, 3]), f"cross_value_{index}")


def decoder_graph(config: ModelConfig, params: Params, precision: Precision) -> onnx.ModelProto:
    """Graph of the decoder: from new tokens and the cache to logits and the longer cache.

    Inputs: tokens and positions [B, N]; key_positions [B, P + N], the positions of the cache and
    of the new tokens, padding at a position that is never reached; wanted [B, W], which of the N
    get logits; past_key_i and past_value_i [B, K, P, D]; for an encoder-decoder source_mask [B, S]
    and the encoder's outputs. Outputs: logits [B, W, V], present_key_i and present_value_i.
    """
    # A decoder that reads the prompt itself multiplies as many rows as an encoder does.
    g = Graph(precision, many_rows=not config.is_encoder_decoder)
    layers = _Layers(config, g)
    x = layers.embed("tokens", params["embedder"]["embedding"])
    kinds = _decoder_attention(layers)
    cross = _cross_inputs(layers) if config.is_encoder_decoder else None
    for index in range(config.decoder_layers):
        layer, path = params["decoder"][f"layers_{index}"], f"decoder/layers_{index}"
        rope, mask = kinds[config.is_local(index)]
        y = layers.pre_norm(x, layer, "self_attention", path)
        attention, place = layer["self_attention"], f"{path}/self_attention"
        rotation = rope if config.is_rotated(index) else None
        q, k, v = layers.self_qkv(y, attention, rotation, place)
        k = g.op("Concat", f"past_key_{index}", k, axis=2)
        v = g.op("Concat", f"past_value_{index}", v, axis=2)
        g.rename(k, f"present_key_{index}")
        g.rename(v, f"present_value_{index}")
        k = g.op("Transpose", k, perm=[0, 1, 3, 2])
        if config.merged_attention:
            k = g.op("Concat", f"cross_key_{index}", k, axis=3)
            v = g.op("Concat", f"cross_value_{index}", v, axis=2)
        y = layers.attend(q, k, v, mask, attention, place)
        x = layers.residual(x, y, layer, "self_attention", path)
        if cross is not None and not config.merged_attention:
            x = _cross_attention(layers, x, layer, index, cross)
        x = layers.block_mlp(x, layer, path)
    x = g.op("GatherND", x, g.op("Unsqueeze", "wanted", g.ints(2)), batch_dims=1)
    x = layers.norm(x, params["decoder"]["final_norm"]["scale"], "decoder/final_norm")
    embedder = params["embedder"]
    head = embedder["embedding"].T if config.tie_embeddings else embedder["head"]
    x = g.linear(x, head, None, "head")
    if cap := config.final_logit_cap:
        x = g.op("Mul", g.op("Tanh", g.op("Div", x, g.float(cap))), g.float(cap))
    g.rename(x, "logits")
    return g.model(*_decoder_values(config))


def _decoder_attention(layers: _Layers) -> dict[bool, tuple[tuple[str, str], str]]:
    """Rotation and mask of self-attention in layers that read all (False) and in local ones.

    Merged with cross-attention, the mask begins with the source's places, which every layer reads.
    """
    g, config = layers.g, layers.config
    columns = g.op("Unsqueeze", "key_positions", g.ints(1))
    rows = g.op("Unsqueeze", "positions", g.ints(2))
    places = "positions"
    if config.merged_attention and config.cross_attention_rope == "continued":
        places = layers.moved(places, "source_mask")

    def mask(allowed: str) -> str:
        if config.merged_attention:
            source = g.op("Cast", g.op("Unsqueeze", "source_mask", g.ints(1)), to=TensorProto.BOOL)
            source = g.op("And", source, g.op("GreaterOrEqual", rows, g.ints(0)))  # [B, N, S]
            allowed = g.op("Concat", source, allowed, axis=2)
        return layers.additive(allowed)

    allowed = g.op("LessOrEqual", columns, rows)
    kinds = {False: (layers.rope(places), mask(allowed))}
    if config.attention_window:
        reach = g.constant(np.int64(config.attention_window), "window")
        near = g.op("Less", g.op("Sub", rows, columns), reach)
        kinds[True] = layers.rope(places, local=True), mask(g.op("And", allowed, near))
    return kinds


def _cross_inputs(layers: _Layers) -> tuple[tuple[str, str] | None, str]:
    """Rotation of the queries and mask of cross-attention."""
    style = layers.config.cross_attention_rope
    places = layers.moved("positions", "source_mask") if style == "continued" else "positions"
    rope = None if style == "none" else layers.rope(places)
    return rope, layers.source_mask("source_mask")


def _cross_attention(
    layers: _Layers, x: str, layer: Params, index: int, inputs: tuple[tuple[str, str] | None, str]
) -> str:
    """Cross-attention of decoder layer ``index``, added to the residual."""
    path, (rope, mask) = f"decoder/layers_{index}", inputs
    y = layers.pre_norm(x, layer, "cross_attention", path)
    attention, place = layer["encoder_attention"], f"{path}/encoder_attention"
    q = layers.head_norm(
        layers.heads(layers.project(y, attention, "q", place)), attention, "q_norm", place
    )
    q = q if rope is None else layers.rotate(q, rope)
    y = layers.attend(q, f"cross_key_{index}", f"cross_value_{index}", mask, attention, place)
    return layers.residual(x, y, layer, "cross_attention", path)


def _decoder_values(config: ModelConfig) -> tuple[list[Any], list[Any]]:
    K, D = config.num_kv_heads, config.head_dim
    integer, real = TensorProto.INT64, TensorProto.FLOAT
    inputs = [
        _value("tokens", integer, "batch", "new"),
        _value("positions", integer, "batch", "new"),
        _value("key_positions", integer, "batch", "total"),
        _value("wanted", integer, "batch", "wanted_count"),
    ]
    if config.is_encoder_decoder:
        inputs += [_value("source_mask", integer, "batch", "source"), *_cross_values(config)]
    outputs = [_value("logits", real, "batch", "wanted_count", config.vocab_size)]
    for index in range(config.decoder_layers):
        for x in ("key", "value"):
            inputs.append(_value(f"past_{x}_{index}", real, "batch", K, "past", D))
            outputs.append(_value(f"present_{x}_{index}", real, "batch", K, "total", D))
    return inputs, outputs
