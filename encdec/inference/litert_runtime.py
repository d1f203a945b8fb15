"""Exported LiteRT models, as ``encdec.inference.exported`` needs them: one row at a time.

The decoder's cache is the interpreter's own input tensors: a step writes the new token's keys
and values there, so that nothing is copied from one step to the next.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from encdec.errors import CheckpointError, ConfigError
from encdec.inference.huge_pages import NewMemory
from encdec.machine import available_cores
from encdec.packages import install_hint
from encdec.saved.saved_config import model_config_of, read_config

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter

ENCODER_FILE, DECODER_FILE = "encoder.tflite", "decoder.tflite"
_NEVER = np.float32(-1e9)  # added to the scores of cache slots that hold nothing


class LitertModel:
    """The encoder and the one-token decoder of an export.

    Args:
        directory: what ``encdec export --format=litert`` wrote.
        threads: 0 is one a core.

    Raises:
        CheckpointError: a graph is missing.
        ConfigError: ai-edge-litert is not installed.
    """

    rows_at_once = 1
    verifies = False  # the graph takes one token

    def __init__(self, directory: str | os.PathLike[str], threads: int = 0):
        directory = pathlib.Path(directory)
        self.config = model_config_of(read_config(directory))
        threads = threads or available_cores()
        self._encoder = _Graph(directory / ENCODER_FILE, threads)
        self.decoder = _Graph(directory / DECODER_FILE, threads)
        if "first" not in self.decoder.inputs:
            raise CheckpointError(
                f"{directory / DECODER_FILE} has the format of an earlier version; run encdec "
                "export again"
            )
        self._source: dict[str, np.ndarray] = {}

    def encode(self, tokens_S: np.ndarray) -> dict[str, np.ndarray]:
        """Cross-attention's keys and values of one source, by the decoder's input names."""
        graph, length = self._encoder, len(tokens_S)
        graph.resize({"tokens": (1, length), "positions": (length,)})
        graph.write("tokens", np.asarray(tokens_S, np.int32)[None])
        graph.write("positions", np.arange(length, dtype=np.int32))
        graph.run()
        return {name: graph.read(name) for name in graph.outputs}

    def prefill(
        self, tokens_BxS: np.ndarray, lengths_B: np.ndarray, start_id: int, room: int
    ) -> tuple[np.ndarray, LitertMemory]:
        """Logits [1, V] of the first new token, and a memory with capacity for ``room`` more."""
        if len(tokens_BxS) != 1:
            raise ConfigError(f"{len(tokens_BxS)} inputs at once; an exported LiteRT model reads 1")
        source = self.encode(tokens_BxS[0, : int(lengths_B[0])])
        memory = LitertMemory(self, source, room + 1)
        return memory.step(np.array([start_id])), memory

    def forced_logits(self, source: np.ndarray, target: np.ndarray, start_id: int) -> np.ndarray:
        """Logits [T, V] of every target token given those before it, step by step."""
        logits, memory = self.prefill(source[None], np.array([len(source)]), start_id, len(target))
        return np.concatenate([logits, *(memory.step(np.array([token])) for token in target[:-1])])


class LitertMemory:
    """What the decoder remembers of the rows that answer one input.

    With a single row everything lives in the interpreter; with several, each keeps a copy of its
    cache, which goes in and out at every step.
    """

    def __init__(self, model: LitertModel, source: dict[str, np.ndarray], capacity: int):
        config, graph = model.config, model.decoder
        self._graph, self._layers, self._heads = graph, config.decoder_layers, config.num_kv_heads
        self._capacity = capacity
        slots = 1 + capacity  # the first, always empty, stands for the token that is fed
        past = {
            "key": (1, config.num_kv_heads, slots, config.head_dim),
            "value": (1, config.num_kv_heads, config.head_dim, slots),
        }
        shapes: dict[str, tuple[int, ...]] = {name: (1, 1, 1, slots) for name in ("mask", "first")}
        shapes |= {name: value.shape for name, value in source.items()}
        shapes |= {
            f"past_{kind}_{i}": shape for kind, shape in past.items() for i in range(self._layers)
        }
        graph.resize(shapes)
        self._caches = [name for name in shapes if name.startswith("past_")]
        for name, value in source.items():
            graph.write(name, value)
        for name in self._caches:
            graph.write(name, np.zeros(shapes[name], np.float32))
        first = np.zeros(shapes["first"], np.float32)
        first[..., 0] = 1
        graph.write("first", first)
        graph.write("mask", (1 - first) * _NEVER)
        self._slot = 0
        self._rows: list[dict[str, np.ndarray]] = []  # of several rows, each one's cache

    def repeat(self, times: int) -> None:
        """The row, repeated ``times`` times."""
        if times > 1:
            self._rows = [
                {name: self._graph.view(name).copy() for name in self._caches} for _ in range(times)
            ]

    def step(self, tokens_R: np.ndarray) -> np.ndarray:
        """Feeds one token a row; logits [R, V] of the next."""
        return np.concatenate([self._graph.read("logits") for _ in self._feed(tokens_R)])

    def greedy(self, tokens_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Feeds one token a row; the likeliest next token and its log-probability, both [R]."""
        graph = self._graph
        found = [
            (graph.view("next")[0], graph.view("next_log_prob")[0, 0]) for _ in self._feed(tokens_R)
        ]
        chosen, log_probs = zip(*found)
        return np.array(chosen, np.int32), np.array(log_probs, np.float32)

    def _feed(self, tokens_R: np.ndarray):
        """Runs the graph for each row; its outputs are to be read before the next."""
        if self._slot >= self._capacity:
            raise ConfigError(f"the cache holds {self._capacity} tokens; raise its capacity")
        graph, heads, slot = self._graph, self._heads, self._slot
        graph.view("position")[0] = slot
        for row, token in enumerate(tokens_R):
            if self._rows:
                for name, value in self._rows[row].items():
                    graph.write(name, value)
            graph.view("token")[0, 0] = token
            graph.run()
            yield row
            keys, values = graph.view("new_keys"), graph.view("new_values")
            for index in range(self._layers):
                own = slice(heads * index, heads * (index + 1))
                for name, place, new in (
                    (f"past_key_{index}", np.s_[0, :, 1 + slot], keys[0, own, 0]),
                    (f"past_value_{index}", np.s_[0, :, :, 1 + slot], values[0, own, 0]),
                ):
                    cache = self._rows[row][name] if self._rows else graph.view(name)
                    cache[place] = new
            del keys, values, cache, new  # the interpreter runs only while nobody looks into it
        graph.view("mask")[0, 0, 0, 1 + slot] = 0
        self._slot += 1


class _Graph:
    """An interpreter whose tensors have names; shapes change only where they differ."""

    def __init__(self, path: pathlib.Path, threads: int):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; run encdec export again")
        self._memory: NewMemory | None = NewMemory()
        self._interpreter = _interpreter(path, threads)
        inputs = self._interpreter.get_input_details()
        outputs = self._interpreter.get_output_details()
        self.inputs, self.outputs = ([one["name"] for one in x] for x in (inputs, outputs))
        self._places = {one["name"]: one["index"] for one in (*inputs, *outputs)}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._views: dict[str, Callable[[], np.ndarray]] = {}

    def resize(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if shapes == self._shapes:
            return
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._interpreter.resize_tensor_input(self._places[name], shape)
        self._interpreter.allocate_tensors()
        self._shapes, self._views = dict(shapes), {}

    def write(self, name: str, value: np.ndarray) -> None:
        self._interpreter.set_tensor(self._places[name], value)

    def read(self, name: str) -> np.ndarray:
        return self._interpreter.get_tensor(self._places[name])

    def view(self, name: str) -> np.ndarray:
        """The tensor's own memory; not to be kept."""
        if name not in self._views:
            self._views[name] = self._interpreter.tensor(self._places[name])
        return self._views[name]()

    def run(self) -> None:
        self._interpreter.invoke()
        if self._memory:  # the first time, when all weights are packed
            self._memory.onto_huge_pages()
            self._memory = None


def _interpreter(path: pathlib.Path, threads: int) -> Interpreter:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ConfigError(
            f"exported LiteRT models need ai-edge-litert: {install_hint('litert')}"
        ) from error
    return Interpreter(model_path=str(path), num_threads=threads)
