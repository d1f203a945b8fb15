"""TFLite files under construction: operators, tensors, quantized weights, written to disk.

The format is the flatbuffer schema that the ``ai-edge-litert`` package ships
(``ai_edge_litert.schema_py_generated``). Weights are appended behind the flatbuffer and named by
offset, so that a file may exceed the 2 GB of a flatbuffer and a weight is copied once.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

Operator, Type = schema.BuiltinOperator, schema.TensorType
_TYPES = {
    "float32": Type.FLOAT32,
    "float16": Type.FLOAT16,
    "int32": Type.INT32,
    "int8": Type.INT8,
    "bool": Type.BOOL,
}
# Operator versions that the features used here require; 1 for all others.
_VERSIONS = {Operator.FULLY_CONNECTED: 9, Operator.BATCH_MATMUL: 1, Operator.GELU: 1}
_ALIGNMENT = 64
ANY = -1  # a dimension that the reader sets; tensors are declared with 1 there


class LitertGraph:
    """One graph; operators return the number of their output tensor.

    Shapes may hold ``ANY``: the file declares 1 there and marks the dimension as dynamic.
    """

    def __init__(self) -> None:
        self._graph = schema.SubGraphT()
        self._graph.tensors, self._graph.operators = [], []
        self._graph.inputs, self._graph.outputs, self._graph.name = [], [], "main"
        self._buffers: list[np.ndarray] = []
        self._codes: list[int] = []
        self._constants: dict[Any, int] = {}

    def shape(self, tensor: int) -> list[int]:
        found = self._graph.tensors[tensor]
        return list(found.shape if found.shapeSignature is None else found.shapeSignature)

    def _tensor(
        self,
        shape: Sequence[int],
        kind: int = Type.FLOAT32,
        *,
        name: str = "",
        buffer: int = 0,
        quantization: Any = None,
    ) -> int:
        tensor = schema.TensorT()
        tensor.shape = [1 if size == ANY else int(size) for size in shape]
        if ANY in shape:
            tensor.shapeSignature = [int(size) for size in shape]
        tensor.type, tensor.buffer, tensor.hasRank = kind, buffer, True
        tensor.name = name or f"t{len(self._graph.tensors)}"
        tensor.quantization = quantization
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def input(self, name: str, shape: Sequence[int], kind: str = "float32") -> int:
        tensor = self._tensor(shape, _TYPES[kind], name=name)
        self._graph.inputs.append(tensor)
        return tensor

    def output(self, name: str, tensor: int) -> None:
        self._graph.tensors[tensor].name = name
        self._graph.outputs.append(tensor)

    def constant(
        self,
        value: np.ndarray,
        *,
        name: str = "",
        kind: int | None = None,
        shape: Sequence[int] | None = None,
        quantization: Any = None,
    ) -> int:
        array = np.ascontiguousarray(value)
        self._buffers.append(array)
        return self._tensor(
            array.shape if shape is None else shape,
            _TYPES[array.dtype.name] if kind is None else kind,
            name=name,
            buffer=len(self._buffers),
            quantization=quantization,
        )

    def ints(self, *values: int) -> int:
        if values not in self._constants:
            self._constants[values] = self.constant(np.array(values, np.int32))
        return self._constants[values]

    def float(self, value: float) -> int:
        key = ("float", float(value))
        if key not in self._constants:
            self._constants[key] = self.constant(np.full((1,), value, np.float32))
        return self._constants[key]

    def op(
        self,
        kind: int,
        inputs: Sequence[int],
        shape: Sequence[int],
        options: Any = None,
        *,
        output: str = "float32",
    ) -> int:
        operator = schema.OperatorT()
        if kind not in self._codes:
            self._codes.append(kind)
        operator.opcodeIndex = self._codes.index(kind)
        operator.inputs = [int(x) for x in inputs]
        operator.outputs = [self._tensor(shape, _TYPES[output])]
        if options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(
                schema.BuiltinOptions, type(options).__name__.removesuffix("T")
            )
        self._graph.operators.append(operator)
        return operator.outputs[0]

    # The operators that are used, by the names that NumPy has for them.

    def _broadcast(self, kind: int, x: int, y: int, options: Any) -> int:
        a, b = self.shape(x), self.shape(y)
        rank = max(len(a), len(b))
        a, b = [1] * (rank - len(a)) + a, [1] * (rank - len(b)) + b
        return self.op(kind, (x, y), [q if p == 1 else p for p, q in zip(a, b)], options)

    def add(self, x: int, y: int) -> int:
        return self._broadcast(Operator.ADD, x, y, schema.AddOptionsT())

    def sub(self, x: int, y: int) -> int:
        return self._broadcast(Operator.SUB, x, y, schema.SubOptionsT())

    def mul(self, x: int, y: int) -> int:
        return self._broadcast(Operator.MUL, x, y, schema.MulOptionsT())

    def unary(self, kind: int, x: int, options: Any = None) -> int:
        return self.op(kind, (x,), self.shape(x), options)

    def gelu(self, x: int, approximate: bool) -> int:
        options = schema.GeluOptionsT()
        options.approximate = approximate
        return self.unary(Operator.GELU, x, options)

    def softmax(self, x: int) -> int:
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        return self.unary(Operator.SOFTMAX, x, options)

    def reshape(self, x: int, shape: Sequence[int]) -> int:
        if self.shape(x) == list(shape):
            return x
        return self.op(Operator.RESHAPE, (x, self.ints(*shape)), shape)

    def transpose(self, x: int, *order: int) -> int:
        shape = self.shape(x)
        return self.op(
            Operator.TRANSPOSE,
            (x, self.ints(*order)),
            [shape[i] for i in order],
            schema.TransposeOptionsT(),
        )

    def slice(self, x: int, axis: int, begin: int, size: int) -> int:
        """Part of one axis; all others whole, whatever the reader sets: XNNPACK's SLICE wants
        sizes, and its STRIDED_SLICE takes masks instead."""
        shape = self.shape(x)
        starts, ends = [0] * len(shape), [0] * len(shape)
        starts[axis], ends[axis], shape[axis] = begin, begin + size, size
        options = schema.StridedSliceOptionsT()
        options.beginMask = options.endMask = sum(1 << i for i in range(len(shape)) if i != axis)
        return self.op(
            Operator.STRIDED_SLICE,
            (x, self.ints(*starts), self.ints(*ends), self.ints(*[1] * len(shape))),
            shape,
            options,
        )

    def concatenate(self, parts: Sequence[int], axis: int) -> int:
        options = schema.ConcatenationOptionsT()
        options.axis = axis
        shape = self.shape(parts[0])
        sizes = [self.shape(part)[axis] for part in parts]
        shape[axis] = ANY if ANY in sizes else sum(sizes)
        return self.op(Operator.CONCATENATION, parts, shape, options)

    def gather(self, table: int, rows: int, kind: str = "float32") -> int:
        options = schema.GatherOptionsT()
        options.axis = 0
        return self.op(
            Operator.GATHER,
            (table, rows),
            [*self.shape(rows), *self.shape(table)[1:]],
            options,
            output=kind,
        )

    def cast(self, x: int, kind: str, to: str) -> int:
        options = schema.CastOptionsT()
        options.inDataType, options.outDataType = _TYPES[kind], _TYPES[to]
        return self.op(Operator.CAST, (x,), self.shape(x), options, output=to)

    def matmul(self, x: int, y: int, *, transpose_y: bool = False) -> int:
        """Batched ``x @ y``, or ``x @ y.T`` in the last two dimensions."""
        options = schema.BatchMatMulOptionsT()
        options.adjX, options.adjY, options.asymmetricQuantizeInputs = False, transpose_y, False
        last = self.shape(y)[-2 if transpose_y else -1]
        return self.op(Operator.BATCH_MATMUL, (x, y), [*self.shape(x)[:-1], last], options)

    def reduce(self, kind: int, x: int, *axes: int) -> int:
        """Over the last axis or others, which are kept with size 1."""
        options = schema.ReducerOptionsT()
        options.keepDims = True
        shape = self.shape(x)
        axes = axes or (len(shape) - 1,)
        kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
        return self.op(kind, (x, self.ints(*axes)), kept, options)

    def argmax(self, x: int) -> int:
        options = schema.ArgMaxOptionsT()
        options.outputType = Type.INT32
        shape = self.shape(x)
        return self.op(
            Operator.ARG_MAX, (x, self.ints(len(shape) - 1)), shape[:-1], options, output="int32"
        )

    def fully_connected(self, x: int, weights: int, bias: int | None = None) -> int:
        """``x @ weights.T + bias``; weights [out, in] may be quantized, ``x`` is not."""
        options = schema.FullyConnectedOptionsT()
        options.keepNumDims, options.asymmetricQuantizeInputs = True, False
        inputs = (x, weights) if bias is None else (x, weights, bias)
        return self.op(
            Operator.FULLY_CONNECTED, inputs, [*self.shape(x)[:-1], self.shape(weights)[0]], options
        )

    def save(self, path: pathlib.Path) -> int:
        """Writes the file and returns its size in bytes."""
        model = schema.ModelT()
        model.version, model.description = 3, "encdec"
        model.subgraphs, model.operatorCodes = [self._graph], []
        for kind in self._codes:
            code = schema.OperatorCodeT()
            code.builtinCode, code.deprecatedBuiltinCode = kind, min(kind, 127)
            code.version = _VERSIONS.get(kind, 1)
            model.operatorCodes.append(code)
        model.signatureDefs = [self._signature()]
        # Offsets take the same number of bytes whatever their value, so a first packing gives the
        # flatbuffer's size.
        offsets = [_ALIGNMENT] * len(self._buffers)
        for _ in range(2):
            model.buffers = [schema.BufferT()]
            for array, offset in zip(self._buffers, offsets):
                buffer = schema.BufferT()
                buffer.offset, buffer.size = offset, array.nbytes
                model.buffers.append(buffer)
            builder = flatbuffers.Builder(1 << 16)
            builder.Finish(model.Pack(builder), b"TFL3")
            packed, offsets, end = builder.Output(), [], len(builder.Output())
            for array in self._buffers:
                end = -(-end // _ALIGNMENT) * _ALIGNMENT
                offsets.append(end)
                end += array.nbytes
        with path.open("wb") as file:
            file.write(packed)
            for array, offset in zip(self._buffers, offsets):
                file.write(b"\0" * (offset - file.tell()))
                file.write(array.reshape(-1).view(np.uint8).data)
            return file.tell()

    def _signature(self) -> Any:
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = [], []
        for maps, tensors in (
            (signature.inputs, self._graph.inputs),
            (signature.outputs, self._graph.outputs),
        ):
            for tensor in tensors:
                entry = schema.TensorMapT()
                entry.name, entry.tensorIndex = self._graph.tensors[tensor].name, tensor
                maps.append(entry)
        return signature


def channel_scales(scales: np.ndarray) -> Any:
    """Quantisation of weights [out, in] by output channel, symmetric."""
    found = schema.QuantizationParametersT()
    found.scale = scales.astype(np.float32)
    found.zeroPoint = np.zeros(len(scales), np.int64)
    found.quantizedDimension = 0
    return found


def block_scales(scales: int, block: int) -> Any:
    """Quantisation of weights [out, in] by blocks of inputs, symmetric.

    Args:
        scales: the tensor float16 [out, in / block].
        block: inputs that share a scale, a multiple of 32.
    """
    details = schema.BlockwiseQuantizationT()
    details.scales, details.zeroPoints, details.blockSize = scales, -1, block
    found = schema.QuantizationParametersT()
    found.detailsType, found.details = schema.QuantizationDetails.BlockwiseQuantization, details
    found.quantizedDimension = 0
    return found
