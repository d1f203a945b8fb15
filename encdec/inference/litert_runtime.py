"""Exported LiteRT models, as ``encdec.inference.exported`` needs them: one row at a time.

The decoder's cache is the interpreter's own input tensors: a step writes its tokens' keys and
values there, so that nothing is copied from one step to the next. A step of another number of
tokens than the one before it needs other shapes, for which the runtime moves all tensors: the
cache is then copied out and back.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from encdec.errors import CheckpointError, ConfigError
from encdec.inference.huge_pages import NewMemory
from encdec.inference.pace import SIZES
from encdec.logs import logger
from encdec.machine import available_cores
from encdec.packages import install_hint
from encdec.saved.saved_config import model_config_of, read_config

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter

ENCODER_FILE, DECODER_FILE = "encoder.tflite", "decoder.tflite"
MOST_TOKENS = max(SIZES)  # of one step
_NEVER = np.float32(-1e9)  # added to the attention logits of cache slots that hold nothing
_FAR = 1 << 40  # more tokens than any cache holds
_log = logger(__name__)


class LitertModel:
    """The encoder and the decoder of an export.

    Attributes:
        verifies: whether a step takes several tokens; those of exports by earlier versions do not.
        exact: see ``ExportedModel``.

    Args:
        directory: what ``encdec export --format=litert`` wrote.
        threads: 0 is one per core.

    Raises:
        CheckpointError: a graph is missing.
        ConfigError: ai-edge-litert is not installed.
    """

    rows_at_once, tokens_at_once = 1, MOST_TOKENS

    def __init__(self, directory: str | os.PathLike[str], threads: int = 0):
        directory = pathlib.Path(directory)
        content = read_config(directory)
        self.config = model_config_of(content)
        # Else a rounding before an activation is quantized may move it by a level.
        self.exact = content.get("export", {}).get("precision") == "float32"
        threads = threads or available_cores()
        self._encoder = _Graph(directory / ENCODER_FILE, threads)
        self.decoder = _Graph(directory / DECODER_FILE, threads)
        self.verifies = "place" in self.decoder.inputs
        if not self.verifies:
            if "first" not in self.decoder.inputs:
                raise CheckpointError(
                    f"{directory / DECODER_FILE} has the format of an earlier version; run encdec "
                    "export again"
                )
            _log.info(
                "%s is of an earlier version, whose steps take one token: it decodes without "
                "drafts; run encdec export again to use them",
                directory / DECODER_FILE,
            )

    def encode(self, tokens_S: np.ndarray) -> dict[str, np.ndarray]:
        """What the decoder's layers read of one source: keys ``key_i``, values ``value_i``."""
        graph, length = self._encoder, len(tokens_S)
        graph.resize({"tokens": (1, length), "positions": (length,)})
        graph.write("tokens", np.asarray(tokens_S, np.int32)[None])
        graph.write("positions", np.arange(length, dtype=np.int32))
        graph.run()
        return {name: graph.read(name) for name in graph.outputs}

    def prefill(
        self, tokens_BxS: np.ndarray, lengths_B: np.ndarray, start_id: int, capacity: int
    ) -> tuple[np.ndarray, LitertMemory]:
        """Logits [1, V] of the first new token, and a memory that holds ``capacity`` more."""
        if len(tokens_BxS) != 1:
            raise ConfigError(f"{len(tokens_BxS)} inputs at once; an exported LiteRT model reads 1")
        source = self.encode(tokens_BxS[0, : int(lengths_B[0])])
        memory = LitertMemory(self, source, capacity + 1)
        return memory.step(np.array([start_id])), memory

    def forced_logits(self, source: np.ndarray, target: np.ndarray, start_id: int) -> np.ndarray:
        """Logits [T, V] of every target token given those before it, step by step."""
        logits, memory = self.prefill(source[None], np.array([len(source)]), start_id, len(target))
        return np.concatenate([logits, *(memory.step(np.array([token])) for token in target[:-1])])


class LitertMemory:
    """What the decoder remembers of the rows that answer one input.

    The cache has ``MOST_TOKENS`` slots that stay empty and stand for the tokens that are fed; then,
    in merged attention, the source's; then one for each token of the answer. With a single
    row everything lives in the interpreter; with several, each keeps a copy of its
    cache, which goes in and out at every step.
    """

    def __init__(self, model: LitertModel, source: dict[str, np.ndarray], capacity: int):
        config, graph = model.config, model.decoder
        graph.user = self
        self._config, self._graph, self._capacity = config, graph, capacity
        merged, length = config.merged_attention, source["key_0"].shape[2]
        # Several query heads read a key head; the graphs of earlier versions have one mask for all.
        self._mask_rows = config.num_heads // config.num_kv_heads if model.verifies else 1
        self._place = "place" if model.verifies else "first"
        self._begin = MOST_TOKENS + merged * length  # slot of the answer's first token
        self._width = self._begin + capacity
        self._offset = length * (config.cross_attention_rope == "continued")
        heads, dim = config.num_kv_heads, config.head_dim
        past = {"key": (1, heads, self._width, dim), "value": (1, heads, dim, self._width)}
        layers = range(config.decoder_layers)
        self._shapes: dict[str, tuple[int, ...]] = {
            f"past_{kind}_{i}": past[kind] for kind in past for i in layers
        }
        self._caches = list(self._shapes)
        if not merged:
            self._shapes |= {name: value.shape for name, value in source.items()}
        self._count = 0  # tokens that the graph's shapes are for
        self._fit(1)
        for name in self._caches:
            graph.write(name, np.zeros(self._shapes[name], np.float32))
        for name, value in source.items():
            if merged:
                spot = np.s_[..., MOST_TOKENS : self._begin]
                graph.view(f"past_{name}")[spot if "value" in name else (*spot, np.s_[:])] = value
            else:
                graph.write(name, value)
        self._slots = np.zeros(1, np.int64)  # tokens in each row's cache
        self._rows: list[dict[str, np.ndarray]] = []  # of several rows, each one's cache
        self._fed: list[tuple[np.ndarray, np.ndarray]] = []  # by the last ``verify``: their own

    def repeat(self, times: int) -> None:
        """The row, repeated ``times`` times."""
        if times > 1:
            self._slots = np.repeat(self._slots, times)
            self._rows = [
                {name: self._graph.view(name).copy() for name in self._caches} for _ in range(times)
            ]

    def step(self, tokens_R: np.ndarray) -> np.ndarray:
        """Feeds one token per row; logits [R, V] of the next."""
        graph, rows = self._graph, self._feed_one(tokens_R)
        return np.concatenate([graph.read("logits").reshape(1, -1) for _ in rows])

    def greedy(self, tokens_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Feeds one token per row; the likeliest next token and its log-probability, both [R]."""
        chosen, log_probs = zip(*(self._choices() for _ in self._feed_one(tokens_R)))
        return np.concatenate(chosen), np.concatenate(log_probs)

    def verify(self, tokens_RxN: np.ndarray) -> np.ndarray:
        """Feeds N tokens per row; logits [R, N, V] after each. ``keep`` must come next."""
        return np.concatenate([self._graph.read("logits") for _ in self._feed_several(tokens_RxN)])

    def verify_greedy(
        self, tokens_RxN: np.ndarray
    ) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
        """Feeds N tokens per row; what ``greedy`` would tell after each."""
        found = [self._choices() for _ in self._feed_several(tokens_RxN)]
        chosen_RxN, log_probs_RxN = (np.stack(parts) for parts in zip(*found))
        return chosen_RxN, lambda count: log_probs_RxN[:, :count]

    def keep(self, counts_R: np.ndarray) -> None:
        """Of the tokens that ``verify`` fed, keeps each row's first ones."""
        for row, (new, count) in enumerate(zip(self._fed, counts_R, strict=True)):
            self._write(row, *new, int(count))
        self._fed = []

    def _choices(self) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens [N] of the row that was run, and their log-probabilities."""
        chosen, log_probs = map(self._graph.read, ("next", "next_log_prob"))
        return chosen.reshape(-1), log_probs.reshape(-1)

    def _feed_one(self, tokens_R: np.ndarray) -> Iterator[int]:
        """Runs the graph for each row; its outputs are to be read before the next."""
        for row in self._feed(np.asarray(tokens_R)[:, None]):
            yield row
            self._write(row, self._graph.view("new_keys"), self._graph.view("new_values"), 1)

    def _feed_several(self, tokens_RxN: np.ndarray) -> Iterator[int]:
        """The same with several tokens each, which ``keep`` writes to the cache."""
        if tokens_RxN.shape[1] > MOST_TOKENS:
            raise ConfigError(
                f"{tokens_RxN.shape[1]} tokens in one step; an exported LiteRT model reads "
                f"{MOST_TOKENS} at most"
            )
        self._fed = []
        for row in self._feed(tokens_RxN):
            yield row
            self._fed.append((self._graph.read("new_keys"), self._graph.read("new_values")))

    def _feed(self, tokens_RxN: np.ndarray) -> Iterator[int]:
        # Of several rows, those that are finished are fed on beyond their last slot.
        if self._slots.min() >= self._capacity:
            raise ConfigError(f"the cache holds {self._capacity} tokens; raise its capacity")
        if self._graph.user is not self:
            raise ConfigError(
                "this LiteRT export has begun another answer meanwhile, and its graph holds the "
                "cache of one; take an answer's whole text before the next, or load the export "
                "again for it"
            )
        self._fit(tokens_RxN.shape[1])
        graph, steps_N = self._graph, np.arange(tokens_RxN.shape[1])
        for row, tokens_N in enumerate(tokens_RxN):
            if self._rows:
                for name, value in self._rows[row].items():
                    graph.write(name, value)
            slot = int(self._slots[row])
            merged = self._config.merged_attention
            graph.view("token")[0] = tokens_N
            graph.view("position")[:] = slot + self._offset * merged + steps_N
            if "cross_position" in graph.inputs:
                graph.view("cross_position")[:] = slot + self._offset + steps_N
            for name in ("mask", "local_mask"):
                if name in graph.inputs:
                    self._write_mask(name, slot)
            graph.run()
            yield row

    def _write_mask(self, name: str, slot: int) -> None:
        """What every token reads: the source, the tokens before, and those fed up to itself."""
        mask_NxHxC = self._graph.view(name).reshape(self._count, self._mask_rows, self._width)
        mask_NxHxC[:] = _NEVER
        mask_NxHxC[..., MOST_TOKENS : self._begin] = 0
        reach = self._config.attention_window if name == "local_mask" else _FAR
        for place, mask_HxC in enumerate(mask_NxHxC):
            mask_HxC[:, max(0, place - reach + 1) : place + 1] = 0
            mask_HxC[:, self._begin + max(0, slot + place - reach + 1) : self._begin + slot] = 0

    def _write(self, row: int, keys: np.ndarray, values: np.ndarray, count: int) -> None:
        """Appends the first tokens of [1, L * K, N, D] to a row's cache."""
        heads, slot = self._config.num_kv_heads, int(self._slots[row])
        begin, count_now = self._begin + slot, min(count, self._capacity - slot)
        if count_now > 0:
            for index in range(self._config.decoder_layers):
                own = np.s_[heads * index : heads * (index + 1), :count_now]
                for name, place, new in (
                    (f"past_key_{index}", np.s_[0, :, begin : begin + count_now], keys[0][own]),
                    (
                        f"past_value_{index}",
                        np.s_[0, :, :, begin : begin + count_now],
                        values[0][own].swapaxes(1, 2),
                    ),
                ):
                    cache = self._rows[row][name] if self._rows else self._graph.view(name)
                    cache[place] = new
        self._slots[row] += count

    def _fit(self, count: int) -> None:
        """Shapes for steps of this many tokens."""
        if count == self._count:
            return
        graph, masks = self._graph, count * self._mask_rows
        held = {
            name: graph.view(name).copy()
            for name in self._shapes
            if self._count and not (self._rows and name in self._caches)
        }
        shapes: dict[str, tuple[int, ...]] = {"mask": (1, 1, masks, self._width)}
        shapes |= {"local_mask": shapes["mask"], "cross_position": (count,)}
        shapes |= {"token": (1, count), "position": (count,)}
        shapes[self._place] = (1, 1, count, self._width)
        graph.resize({name: x for name, x in shapes.items() if name in graph.inputs} | self._shapes)
        for name, value in held.items():
            graph.write(name, value)
        graph.write(self._place, np.eye(count, self._width, dtype=np.float32)[None, None])
        self._count = count


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
        self.user: object = None  # whose state its inputs hold

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
