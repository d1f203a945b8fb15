"""What ``encdec benchmark edge`` times: our model, its exports, and the same weights in peers."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from encdec.benchmarks import ctranslate2_runtime, openvino_runtime, transformers_runtime
from encdec.benchmarks.generation import START_ID, cached_run
from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import ConfigError
from encdec.export import formats
from encdec.export.formats import Export
from encdec.inference.exported import ExportedModel, export_format, load_exported_model
from encdec.inference.ready import ready_for_decoding
from encdec.inference.sampling import greedy_choice
from encdec.inference.text_io import PromptFormat
from encdec.model import ModelConfig

PEERS = {
    "transformers": transformers_runtime,  # `generate` on our export for Hugging Face
    "openvino": openvino_runtime,  # on our export for ONNX
    "ctranslate2": ctranslate2_runtime,
}
# name: (format or peer, precision); jax runs as `encdec generate` does, and in float32 throughout.
PATHS = {
    "jax": ("jax", "as generate runs it"),
    "jax-float32": ("jax", "float32"),
    **{
        f"{kind}-{precision}": (kind, precision)
        for kind in ("litert", "onnx")
        for precision in ("float32", "int8", "int4")
    },
    **{
        f"{kind}-{precision}": (kind, precision)
        for kind, peer in PEERS.items()
        for precision in peer.PRECISIONS
    },
}
# Without the peers that this machine lacks.
DEFAULT = (
    "jax",
    "jax-float32",
    "litert-int8",
    "litert-int4",
    "onnx-int8",
    *(name for name, (kind, _) in PATHS.items() if kind in PEERS),
)
REFERENCE = "jax-float32"  # whose tokens are compared with the others'

# From an input's tokens to the first new token and a state; from the state to all others.
Halves = tuple[Callable[[np.ndarray], Any], Callable[[Any, int], Any]]


class Halting(Protocol):
    """A peer that answers in one call, which waits after its first token."""

    def start(self, tokens_BxS: np.ndarray, count: int) -> Any:
        """Runs up to the first of ``count`` new tokens."""

    def finish(self, answer: Any) -> np.ndarray:
        """All new tokens [B, count]."""


def chosen_paths(names: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
    """The paths to run, and a line for those of the default that this machine cannot.

    Raises:
        ConfigError: an unknown path, or one asked for that cannot run here.
    """
    chosen: list[str] = []
    without: dict[str, list[str]] = {}
    for name in names or DEFAULT:
        if name not in PATHS:
            raise ConfigError(f"--paths has {name!r}; expected some of {', '.join(PATHS)}")
        kind, precision = PATHS[name]
        reason = PEERS[kind].missing(precision) if kind in PEERS else ""
        if reason and names:
            raise ConfigError(f"--paths has {name}, but {reason}")
        if reason:
            without.setdefault(reason, []).append(name)
        else:
            chosen.append(name)
    return tuple(chosen), [
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} left out: {reason}"
        for reason, names in without.items()
    ]


def load_path(
    name: str, config: ModelConfig, params: Any, folder: pathlib.Path, outputs: int
) -> Halves:
    """One path, ready to run; its export is written to ``folder`` unless it is there."""
    kind, precision = PATHS[name]
    if kind == "jax":
        return jax_run(config, params, "float32" if precision == "float32" else None, outputs)
    if kind == "transformers":
        exported = transformers_runtime.artefact(config, params, folder)
        return halted_run(transformers_runtime.TransformersModel(exported, precision), outputs)
    if kind == "ctranslate2":
        exported = ctranslate2_runtime.artefact(config, params, folder)
        return halted_run(ctranslate2_runtime.Ctranslate2Model(exported, precision), outputs)
    if kind == "openvino":
        exported = artefact("onnx-float32", config, params, folder)
        model = openvino_runtime.OpenvinoModel(exported, precision)
        return exported_run(cast(ExportedModel, model), outputs)  # for one row, greedy, it is one
    path = artefact(name, config, params, folder)
    assert export_format(path) == kind
    return exported_run(load_exported_model(path), outputs)


def artefact(name: str, config: ModelConfig, params: Any, folder: pathlib.Path) -> pathlib.Path:
    """The directory of an export, written now unless it is there."""
    kind, precision = PATHS[name]
    out = folder / name
    if not (out / "config.json").is_file():
        vocabulary = folder / "vocabulary"
        vocabulary.mkdir(parents=True, exist_ok=True)
        prompts = PromptFormat(ByteVocabulary())
        spec = prompts.vocabulary.save(vocabulary).to_dict() | {"size": config.vocab_size}
        content = {"format_version": 1, "data": {"vocabulary": spec}}
        export = Export(config, params, prompts, precision, content, vocabulary)
        formats.write(kind, out, export)
    return out


def jax_run(config: ModelConfig, params: Any, dtype: str | None, outputs: int) -> Halves:
    """Our own model: the same compiled programs that ``encdec generate`` runs."""
    config, params = ready_for_decoding(config, params, dtype)
    made: dict[int, Any] = {}

    def first(tokens_S: np.ndarray) -> Any:
        length = len(tokens_S)
        if length not in made:
            made[length] = cached_run(
                config, params, jnp.asarray(tokens_S, jnp.int32)[None], outputs
            )
        return length, jax.block_until_ready(made[length][0]())

    def rest(state: Any, count: int) -> Any:
        length, decoding = state
        return np.asarray(jax.block_until_ready(made[length][1](decoding)).tokens_RxN)

    return first, rest


def exported_run(model: ExportedModel, outputs: int) -> Halves:
    """An exported model, step by step as its generator does it."""

    def first(tokens_S: np.ndarray) -> Any:
        logits, memory = model.prefill(
            np.asarray(tokens_S, np.int64)[None], np.array([len(tokens_S)]), START_ID, outputs
        )
        return memory, greedy_choice(logits, model.config.vocab_size)[0]

    def rest(state: Any, count: int) -> Any:
        memory, token_R = state
        tokens = [token_R]
        for _ in range(count - 1):
            tokens.append(memory.greedy(tokens[-1])[0])
        return np.stack(tokens, axis=1)

    return first, rest


def halted_run(model: Halting, outputs: int) -> Halves:
    """A peer: one call, halted after its first token."""
    return (
        lambda tokens_S: model.start(tokens_S[None], outputs),
        lambda state, count: model.finish(state),
    )
