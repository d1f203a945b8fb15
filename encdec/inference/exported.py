"""Exported models behind the same generator as our own, whichever runtime runs them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Generator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from encdec.errors import CheckpointError, ConfigError
from encdec.inference.beam import Hypotheses
from encdec.inference.decoding import Decoding, DecodingPlan, append, blank
from encdec.inference.generator import (
    PreparedInput,
    TextGenerator,
    bucket,
    choosing_of,
    read_prompt_format,
    row_settings,
)
from encdec.inference.sampling import Choosing
from encdec.inference.settings import GenerationSettings
from encdec.inference.text import PromptFormat
from encdec.model import ModelConfig
from encdec.train.workdir import read_config

append_compiled = jax.jit(append, static_argnames="plan", donate_argnames="decoding")


class ExportedMemory(Protocol):
    """What an exported decoder remembers of every row."""

    def repeat(self, times: int) -> None:
        """Repeats every row so many times, copies next to each other."""

    def step(self, tokens_R: np.ndarray) -> np.ndarray:
        """Feeds one token a row; logits [R, V] of the next."""

    def greedy(self, tokens_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Feeds one token a row; the likeliest next token and its log-probability, both [R]."""


class ExportedModel(Protocol):
    """A model that a runtime runs.

    Attributes:
        config: the model.
        rows_at_once: how many inputs it reads together; 0 is any number.
    """

    config: ModelConfig
    rows_at_once: int

    def prefill(
        self, tokens_BxS: np.ndarray, lengths_B: np.ndarray, start_id: int, room: int
    ) -> tuple[np.ndarray, ExportedMemory]:
        """Logits [B, V] of each row's first new token, and a memory that holds ``room`` more."""


def export_format(directory: str | os.PathLike[str]) -> str | None:
    """The format in which ``encdec export`` wrote this directory; None for any other.

    Raises:
        CheckpointError: it holds no config.json.
    """
    return read_config(directory).get("export", {}).get("format")


def load_exported_model(directory: str | os.PathLike[str], threads: int = 0) -> ExportedModel:
    """The model of a directory that ``encdec export --format=onnx`` or ``=litert`` wrote.

    Args:
        directory: what was written.
        threads: of the runtime; 0 is one a core.

    Raises:
        CheckpointError: it is no such directory, or a file is missing.
        ConfigError: the runtime is not installed.
    """
    kind = export_format(directory)
    if kind == "onnx":
        from encdec.inference.onnx_runtime import OnnxModel

        return OnnxModel(directory, threads)
    if kind == "litert":
        from encdec.inference.litert_runtime import LitertModel

        return LitertModel(directory, threads)
    raise CheckpointError(
        f"{directory} holds no exported model; write one with encdec export "
        "--format=litert or --format=onnx"
    )


class ExportedRows:
    """``RowDecoder`` of an exported model; tokens are chosen as everywhere else."""

    def __init__(self, model: ExportedModel):
        self._model, self.config, self.rows_at_once = model, model.config, model.rows_at_once

    def run(
        self,
        inputs: Sequence[PreparedInput],
        settings: GenerationSettings,
        prompts: PromptFormat,
        limit: int,
        steps: int,
    ) -> Generator[Decoding, np.ndarray | None, None]:
        lengths_B = np.array([len(item.ids) for item in inputs])
        tokens_BxS = np.zeros((len(inputs), lengths_B.max()), np.int64)  # shapes are dynamic
        for row, item in enumerate(inputs):
            tokens_BxS[row, : len(item.ids)] = item.ids
        choosing = choosing_of(settings, prompts.vocabulary.size)
        plan = DecodingPlan(choosing, bucket(limit), prompts.decoder_start_id)
        logits, memory = self._model.prefill(tokens_BxS, lengths_B, plan.start_id, plan.room)
        memory.repeat(settings.samples)
        rows = row_settings(settings, inputs, len(inputs), limit, prompts.vocabulary.eos_id)
        decoding = blank(plan, None, jax.tree.map(jnp.array, rows))
        logits = np.repeat(logits, settings.samples, axis=0)
        decoding = append_compiled(plan, decoding, logits)
        greedy = choosing == Choosing(prompts.vocabulary.size)
        if greedy:  # nothing but the memory's own step is then needed for a token
            decoding = jax.tree.map(
                np.array, decoding.replace(settings=decoding.settings.replace(keys_R=None))
            )
        while True:
            stop_R = yield decoding
            if stop_R is not None:
                decoding = decoding.replace(finished_R=decoding.finished_R | stop_R)
            if np.asarray(decoding.finished_R).all():
                return
            for _ in range(steps):
                if greedy:
                    decoding = append_greedy(decoding, *memory.greedy(np.asarray(decoding.last_R)))
                else:
                    decoding = append_compiled(
                        plan, decoding, memory.step(np.asarray(decoding.last_R))
                    )
                if np.asarray(decoding.finished_R).all():
                    break

    def search(
        self,
        inputs: Sequence[PreparedInput],
        settings: GenerationSettings,
        prompts: PromptFormat,
        limit: int,
    ) -> Hypotheses:
        raise ConfigError(
            f"beams is {settings.beams}, but an exported model has no beam search; "
            "leave it out, or generate with the work directory"
        )


class ExportedGenerator(TextGenerator):
    """Texts in, texts out, by another runtime, without beam search.

    Args:
        model: the exported model.
        prompts: how texts become inputs.
        max_tokens: new tokens where the settings leave it open.
        batch_rows: rows decoded together at most.
    """

    def __init__(
        self,
        model: ExportedModel,
        prompts: PromptFormat,
        *,
        max_tokens: int = 128,
        batch_rows: int = 16,
    ):
        rows = ExportedRows(model)
        super().__init__(rows, prompts, max_tokens=max_tokens, batch_rows=batch_rows)


def append_greedy(decoding: Decoding, chosen_R: np.ndarray, log_probs_R: np.ndarray) -> Decoding:
    """``append`` for tokens that are chosen already, on NumPy arrays, without compiled code."""
    running_R, counts_R = ~decoding.finished_R, decoding.counts_R
    rows = np.flatnonzero(running_R)
    tokens, log_probs = decoding.tokens_RxN.copy(), decoding.log_probs_RxN.copy()
    tokens[rows, counts_R[rows]] = chosen_R[rows]
    log_probs[rows, counts_R[rows]] = log_probs_R[rows]
    counts_R = counts_R + running_R
    limit_R = np.minimum(decoding.settings.limit_R, tokens.shape[1])
    ended_R = (chosen_R == decoding.settings.eos_R) | (counts_R >= limit_R)
    return decoding.replace(
        last_R=np.where(running_R, chosen_R, decoding.last_R).astype(np.int32),
        tokens_RxN=tokens,
        log_probs_RxN=log_probs,
        counts_R=counts_R,
        finished_R=decoding.finished_R | ended_R,
    )


def load_exported_generator(
    directory: str | os.PathLike[str],
    *,
    max_input_tokens: int | None = None,
    batch_rows: int = 16,
    threads: int = 0,
) -> ExportedGenerator:
    """The generator of a directory that ``encdec export`` wrote for onnxruntime or LiteRT."""
    directory = pathlib.Path(directory)
    prompts, max_tokens = read_prompt_format(directory, max_input_tokens=max_input_tokens)
    return ExportedGenerator(
        load_exported_model(directory, threads),
        prompts,
        max_tokens=max_tokens,
        batch_rows=batch_rows,
    )
