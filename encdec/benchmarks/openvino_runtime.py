"""Our float32 ONNX export in OpenVINO: a peer of our own paths.

OpenVINO reads the export's graphs; for int8 and int4 their products get compressed weights, in the
form that OpenVINO's own tools write (levels, a conversion, float16 scales). Two requests take
turns, so that what one step gives is what the next one reads, without a copy.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
from typing import Any

import numpy as np

from encdec.export.quantise import BLOCK, eight_bits, four_bits, in_blocks
from encdec.inference.onnx_runtime import DECODER_FILE, ENCODER_FILE
from encdec.inference.ready import cpu_has_bfloat16
from encdec.inference.sampling import greedy_choice
from encdec.machine import available_cores
from encdec.packages import install_hint
from encdec.saved.saved_config import model_config_of, read_config

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
_KINDS = ("cross_", "present_", "logits")  # of outputs; a tensor has its operator's name, too


def missing(precision: str) -> str:
    """Why OpenVINO cannot run here in one of PRECISIONS; empty where it can."""
    if importlib.util.find_spec("openvino") is None:
        return f"openvino is not installed: {install_hint('peers')}"
    if precision == "bfloat16" and not cpu_has_bfloat16():
        return "this CPU has no bfloat16 products (avx512_bf16 or amx_bf16)"
    return ""


class OpenvinoModel:
    """An ``ExportedModel`` for one row, greedy.

    Args:
        directory: ``encdec export --format=onnx`` in float32.
        precision: float32, bfloat16 (products), int8 or int4 (weights, as in our own exports: four
            bits for the decoder's MLPs; activations in what OpenVINO chooses for this CPU).
        threads: 0 is one per core.
    """

    def __init__(self, directory: str | os.PathLike[str], precision: str, threads: int = 0):
        import openvino

        content = read_config(directory)
        self.config = model_config_of(content)
        self.vocabulary_size = content["data"]["vocabulary"]["size"]
        self._core = openvino.Core()
        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads or available_cores(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        if precision in ("float32", "bfloat16"):
            settings["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[precision]
        path = pathlib.Path(directory)
        self._encoder, self._decoder = (
            _Graph(self._core, path / name, precision, settings)
            for name in (ENCODER_FILE, DECODER_FILE)
        )

    def prefill(
        self, tokens_BxS: np.ndarray, lengths_B: np.ndarray, start_id: int, capacity: int = 0
    ) -> tuple[np.ndarray, OpenvinoMemory]:
        """Logits [1, V] of the first new token, and the memory, which grows by itself."""
        mask = _shared(np.ones_like(tokens_BxS, np.int64))
        source = self._encoder.run({"tokens": _shared(tokens_BxS), "mask": mask})
        memory = OpenvinoMemory(self, source | {"source_mask": mask})
        return memory.step(np.array([start_id])), memory

    def empty_cache(self) -> dict[str, Any]:
        """Keys and values of no token."""
        empty = np.zeros((1, self.config.num_kv_heads, 0, self.config.head_dim), np.float32)
        return {
            f"past_{x}_{i}": _shared(empty)
            for i in range(self.config.decoder_layers)
            for x in ("key", "value")
        }

    def decode(self, feed: dict[str, Any]) -> dict[str, Any]:
        """Outputs of the decoder's graph by name; they stay until the next call but one."""
        return self._decoder.run(feed)


class OpenvinoMemory:
    """What the decoder remembers of the row."""

    def __init__(self, model: OpenvinoModel, source: dict[str, Any]):
        self._model, self._source, self._cache = model, source, model.empty_cache()
        self._fed = 0

    def step(self, tokens_R: np.ndarray) -> np.ndarray:
        """Feeds one token; logits [1, V] of the next."""
        feed = {
            "tokens": tokens_R[:, None],
            "positions": np.array([[self._fed]]),
            "key_positions": np.arange(self._fed + 1)[None],
            "wanted": np.zeros((1, 1), np.int64),
        }
        feed = {name: _shared(value.astype(np.int64)) for name, value in feed.items()}
        values = self._model.decode(feed | self._source | self._cache)
        logits = values.pop("logits").data[:, 0]
        self._cache = {name.replace("present", "past"): x for name, x in values.items()}
        self._fed += 1
        return logits

    def greedy(self, tokens_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Feeds one token; the likeliest next token and its log-probability, both [1]."""
        return greedy_choice(self.step(tokens_R), self._model.vocabulary_size)


class _Graph:
    """A compiled graph, whose two requests alternate."""

    def __init__(self, core: Any, path: pathlib.Path, precision: str, settings: dict[str, Any]):
        model = core.read_model(path)
        if precision in ("int8", "int4"):
            compress(model, 4 if precision == "int4" and path.name == DECODER_FILE else 8)
        compiled = core.compile_model(model, "CPU", settings)
        self._outputs = [
            next(name for name in port.names if name.startswith(_KINDS))
            for port in compiled.outputs
        ]
        self._requests = [compiled.create_infer_request() for _ in range(2)]

    def run(self, feed: dict[str, Any]) -> dict[str, Any]:
        """Tensors by name to tensors by name."""
        request, other = self._requests
        self._requests = [other, request]
        for name, tensor in feed.items():
            request.set_tensor(name, tensor)
        request.infer()
        return {name: request.get_tensor(name) for name in self._outputs}


def compress(model: Any, mlp_bits: int) -> None:
    """Gives every product with a constant matrix int8 or int4 weights, in place.

    Args:
        model: an OpenVINO model.
        mlp_bits: of the MLPs' weights: 4, with a scale for each 32 inputs, where the width is a
            multiple of those. All others have 8, and a scale for each output.
    """
    import openvino
    from openvino import opset13 as op

    for node in model.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        constant = node.input_value(1).get_node()
        if constant.get_type_name() != "Constant":
            continue
        kernel = constant.data.T  # [out, in]
        in_mlp = "/mlp/" in constant.get_friendly_name()
        if mlp_bits == 4 and in_mlp and not kernel.shape[1] % BLOCK:
            levels, scales = four_bits(in_blocks(kernel, BLOCK))
            stored = op.constant(levels, dtype=openvino.Type.i4)
        else:
            levels, scales = eight_bits(kernel, axis=1)
            stored = op.constant(levels)
        weights = op.multiply(op.convert(stored, "f16"), op.constant(scales.astype(np.float16)))
        if levels.ndim == 3:
            weights = op.reshape(weights, op.constant(np.array(kernel.shape)), special_zero=False)
        product = op.matmul(node.input_value(0), op.convert(weights, "f32"), False, True)
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(product.output(0))
    model.validate_nodes_and_infer_types()


def _shared(array: np.ndarray) -> Any:
    """A tensor on an array's own memory."""
    import openvino

    return openvino.Tensor(np.ascontiguousarray(array), shared_memory=True)
