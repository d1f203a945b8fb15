"""Exported ONNX models in onnxruntime, as ``encdec.inference.exported`` needs them."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from encdec.errors import CheckpointError, ConfigError
from encdec.inference.huge_pages import NewMemory
from encdec.inference.sampling import greedy_choice
from encdec.machine import available_cores
from encdec.packages import install_hint
from encdec.saved.saved_config import model_config_of, read_config

if TYPE_CHECKING:
    import onnxruntime

ENCODER_FILE, DECODER_FILE = "encoder.onnx", "decoder.onnx"
Values = dict[str, "onnxruntime.OrtValue"]
# Places of tokens that were not kept until the cache is copied without them: every step reads all.
MOST_WASTED = 64
NEVER = np.iinfo(np.int64).max  # a position that is never reached: padding's


class OnnxModel:
    """The encoder and the decoder of an export.

    Raises:
        CheckpointError: a graph is missing.
        ConfigError: onnxruntime is not installed.
    """

    rows_at_once = tokens_at_once = 0  # any number

    def __init__(self, directory: str | os.PathLike[str], threads: int = 0):
        directory = pathlib.Path(directory)
        content = read_config(directory)
        self.config = model_config_of(content)
        self.vocabulary_size = content["data"]["vocabulary"]["size"]
        # The quantized decoder of a decoder-only model has one scale for all activations of a
        # product: a step of several tokens would give other logits than several steps. That of an
        # encoder-decoder has scales for each, but a rounding before them may move a level.
        self.exact = content.get("export", {}).get("precision", "float32") == "float32"
        self.verifies = self.exact or self.config.is_encoder_decoder
        memory = NewMemory()
        self.decoder = _session(directory / DECODER_FILE, threads)
        self.encoder = (
            _session(directory / ENCODER_FILE, threads) if self.config.is_encoder_decoder else None
        )
        memory.onto_huge_pages()

    def encode(self, tokens_BxS: np.ndarray, mask_BxS: np.ndarray) -> Values:
        """What the decoder reads of the sources: keys, values and mask, by input name."""
        mask = _held({"mask": mask_BxS.astype(np.int64)})
        found = _run(self.encoder, _held({"tokens": tokens_BxS.astype(np.int64)}) | mask)
        return found | {"source_mask": mask["mask"]}

    def empty_cache(self, rows: int) -> Values:
        shape = (rows, self.config.num_kv_heads, 0, self.config.head_dim)
        return _held(
            {
                f"past_{x}_{i}": np.zeros(shape, np.float32)
                for i in range(self.config.decoder_layers)
                for x in ("key", "value")
            }
        )

    def decode(
        self,
        tokens_RxN: np.ndarray,
        positions_RxN: np.ndarray,
        key_positions_RxC: np.ndarray,
        wanted_RxW: np.ndarray,
        source: Values,
        cache: Values,
    ) -> tuple[np.ndarray, Values]:
        """Logits [R, W, V] of the requested places among the new tokens, and the longer cache."""
        feed = {
            "tokens": tokens_RxN,
            "positions": positions_RxN,
            "key_positions": key_positions_RxC,
            "wanted": wanted_RxW,
        }
        feed = _held({name: value.astype(np.int64) for name, value in feed.items()})
        values = _run(self.decoder, feed | source | cache)
        logits = values.pop("logits").numpy()
        return logits, {name.replace("present", "past"): x for name, x in values.items()}

    def prefill(
        self, tokens_BxS: np.ndarray, lengths_B: np.ndarray, start_id: int, capacity: int = 0
    ) -> tuple[np.ndarray, _Memory]:
        """Logits [B, V] of each row's first new token, and the memory, which grows by itself."""
        rows, width = tokens_BxS.shape
        places_S = np.arange(width)
        source: Values = {}
        if self.encoder is not None:
            source = self.encode(tokens_BxS, places_S < lengths_B[:, None])
            prompt, ends = np.full((rows, 1), start_id), np.zeros(rows, np.int64)
        else:
            prompt = np.concatenate([np.full((rows, 1), start_id), tokens_BxS], axis=1)
            ends = lengths_B.astype(np.int64)
        positions = np.tile(np.arange(prompt.shape[1]), (rows, 1))
        keys = np.where(positions <= ends[:, None], positions, NEVER)
        logits, cache = self.decode(
            prompt, positions, keys, ends[:, None], source, self.empty_cache(rows)
        )
        return logits[:, 0], _Memory(self, source, cache, keys, ends + 1)

    def forced_logits(self, source: np.ndarray, target: np.ndarray, start_id: int) -> np.ndarray:
        """Logits [T, V] of every target token given those before it, in one call."""
        prompt = [start_id] if self.encoder is not None else [start_id, *source]
        tokens = np.array([[*prompt, *target[:-1]]], np.int64)
        places = np.arange(tokens.shape[1])[None]
        inputs = {}
        if self.encoder is not None:
            inputs = self.encode(source[None], np.ones((1, len(source))))
        wanted = np.arange(len(prompt) - 1, tokens.shape[1])[None]
        logits, _ = self.decode(tokens, places, places, wanted, inputs, self.empty_cache(1))
        return logits[0]


class _Memory:
    """What the decoder remembers of every row."""

    def __init__(
        self,
        model: OnnxModel,
        source: Values,
        cache: Values,
        keys_RxC: np.ndarray,
        slots_R: np.ndarray,
    ):
        self._model, self._source, self._cache = model, source, cache
        self._keys, self._slots = keys_RxC, slots_R
        self._fed = 0  # tokens by the last ``verify``

    def repeat(self, times: int) -> None:
        """Repeats every row, with its copies next to each other."""
        if times > 1:
            again = functools.partial(np.repeat, repeats=times, axis=0)
            self._source, self._cache = (
                _held({name: again(x.numpy()) for name, x in values.items()})
                for values in (self._source, self._cache)
            )
            self._keys, self._slots = again(self._keys), again(self._slots)

    def step(self, tokens_R: np.ndarray) -> np.ndarray:
        """Feeds one token per row; logits [R, V] of the next."""
        self._keys = np.concatenate([self._keys, self._slots[:, None]], axis=1)
        logits, self._cache = self._model.decode(
            tokens_R[:, None],
            self._slots[:, None],
            self._keys,
            np.zeros((len(tokens_R), 1)),
            self._source,
            self._cache,
        )
        self._slots = self._slots + 1
        return logits[:, 0]

    def greedy(self, tokens_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Feeds one token per row; the likeliest next token and its log-probability, both [R]."""
        return greedy_choice(self.step(tokens_R), self._model.vocabulary_size)

    def verify(self, tokens_RxN: np.ndarray) -> np.ndarray:
        """Feeds N tokens per row; logits [R, N, V] after each. ``keep`` must come next."""
        rows, count = tokens_RxN.shape
        positions_RxN = self._slots[:, None] + np.arange(count)
        self._keys = np.concatenate([self._keys, positions_RxN], axis=1)
        wanted_RxN = np.tile(np.arange(count), (rows, 1))
        logits, self._cache = self._model.decode(
            tokens_RxN, positions_RxN, self._keys, wanted_RxN, self._source, self._cache
        )
        self._fed = count
        return logits

    def verify_greedy(
        self, tokens_RxN: np.ndarray
    ) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
        """Feeds N tokens per row; what ``greedy`` would tell after each."""
        logits, size = self.verify(tokens_RxN), self._model.vocabulary_size
        chosen_RxN = logits[..., :size].argmax(axis=-1).astype(np.int32)
        return chosen_RxN, lambda count: greedy_choice(logits[:, :count], size)[1]

    def keep(self, counts_R: np.ndarray) -> None:
        """Of the tokens that ``verify`` fed, keeps each row's first ones."""
        newest_RxN = self._keys[:, -self._fed :]
        newest_RxN[np.arange(self._fed) >= counts_R[:, None]] = NEVER
        self._slots = self._slots + counts_R
        held_RxC = self._keys != NEVER
        width = int(held_RxC.sum(axis=1).max())
        if self._keys.shape[1] - width >= MOST_WASTED:
            self._compact(np.argsort(~held_RxC, axis=1, kind="stable")[:, :width])

    def _compact(self, places_RxC: np.ndarray) -> None:
        """Keeps these places of every row's cache."""
        self._keys = np.take_along_axis(self._keys, places_RxC, axis=1)
        index = places_RxC[:, None, :, None]
        self._cache = _held(
            {name: np.take_along_axis(x.numpy(), index, axis=2) for name, x in self._cache.items()}
        )


def _held(arrays: dict[str, np.ndarray]) -> Values:
    """Arrays as values of the runtime, which shares their memory."""
    from onnxruntime import OrtValue

    return {
        name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()
    }


def _run(session: onnxruntime.InferenceSession, feed: Values) -> Values:
    """All outputs by name. They stay with the runtime: as arrays they would be copied."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run_with_ort_values(names, feed)))


def _session(path: pathlib.Path, threads: int) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"exported ONNX models need onnxruntime: {install_hint('onnx')}"
        ) from error
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; run encdec export again")
    options = onnxruntime.SessionOptions()
    # Of a number that is given, no thread is bound to a core. By default each worker is, while the
    # calling thread is not: where other threads of this process (JAX's) or other programs take one
    # core, both wait for each other on the other one, spinning in turns.
    options.intra_op_num_threads = threads or available_cores()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
