"""Exported models behind the same generator as our own, whichever runtime runs them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from encdec.errors import CheckpointError, ConfigError
from encdec.inference.beam import Hypotheses
from encdec.inference.decoding import Decoding, DecodingPlan, append, blank
from encdec.inference.drafting import Paces, SpeculativeDecoding, texts_of
from encdec.inference.drafts import LookupTexts, look_up
from encdec.inference.generation_settings import AUTO, LOOKUP, OFF, GenerationSettings
from encdec.inference.generator import TextGenerator, read_prompt_format
from encdec.inference.ready import waits_for_memory
from encdec.inference.rows import PreparedInput, choosing_of, row_settings, until_finished
from encdec.inference.sampling import Choosing
from encdec.inference.shapes import bucket
from encdec.inference.speculation import accept
from encdec.inference.text_io import PromptFormat
from encdec.model import ModelConfig
from encdec.saved.saved_config import read_config
from encdec.storage import on_this_machine

append_compiled = jax.jit(append, static_argnames="plan", donate_argnames="decoding")
accept_compiled = jax.jit(accept, static_argnames="plan", donate_argnames="decoding")
# Of a step of N tokens: the likeliest token after each, int32 [R, N]; and the log-probabilities
# [R, C] of the first C of them.
GreedyChoices = tuple[np.ndarray, Callable[[int], np.ndarray]]


class ExportedMemory(Protocol):
    """An exported decoder's state of every row."""

    def repeat(self, times: int) -> None:
        """Repeats every row, with its copies next to each other."""

    def step(self, tokens_R: np.ndarray) -> np.ndarray:
        """Feeds one token per row; logits [R, V] of the next."""

    def greedy(self, tokens_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Feeds one token per row; the most likely next token and its log-probability, both [R]."""

    def verify(self, tokens_RxN: np.ndarray) -> np.ndarray:
        """Feeds N tokens per row; logits [R, N, V] after each. ``keep`` must come next."""

    def verify_greedy(self, tokens_RxN: np.ndarray) -> GreedyChoices:
        """Feeds N tokens per row; what ``greedy`` would tell after each."""

    def keep(self, counts_R: np.ndarray) -> None:
        """Of the tokens that ``verify`` fed, keeps each row's first ones."""


class ExportedModel(Protocol):
    """A model that a runtime runs.

    Attributes:
        config: the model.
        rows_at_once: how many inputs it reads together; 0 is any number.
        tokens_at_once: how many tokens of a row a step takes at most; 0 is any number.
        verifies: whether its memory's ``verify``, ``verify_greedy`` and ``keep`` can be used.
        exact: whether they give what steps of one token do, up to float32's rounding.
    """

    config: ModelConfig
    rows_at_once: int
    tokens_at_once: int
    verifies: bool
    exact: bool

    def prefill(
        self, tokens_BxS: np.ndarray, lengths_B: np.ndarray, start_id: int, capacity: int
    ) -> tuple[np.ndarray, ExportedMemory]:
        """Logits [B, V] of each row's first new token; a memory that holds ``capacity`` more."""


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
        threads: of the runtime; 0 is one per core.

    Raises:
        CheckpointError: it is not such a directory, or a file is missing.
        ConfigError: the runtime is not installed.
    """
    kind = export_format(directory)
    if kind:
        directory = on_this_machine(directory)
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
    """``RowDecoder`` of an exported model; tokens are chosen as everywhere else.

    ``draft`` is "auto", "lookup" or "off".

    Raises:
        ConfigError: a draft model, or drafts for a graph that cannot verify them.
    """

    def __init__(self, model: ExportedModel, draft: str = AUTO):
        self._model, self.config, self.rows_at_once = model, model.config, model.rows_at_once
        if draft not in (OFF, AUTO, LOOKUP):
            raise ConfigError(
                f"--draft={draft} is a draft model, which an export cannot use; expected {AUTO}, "
                f"{OFF} or {LOOKUP}"
            )
        if draft == LOOKUP and not model.verifies:
            raise ConfigError(
                f"--draft={draft}, but this export supports one token per step; leave --draft out, "
                "or run encdec export again if it is of an earlier version (a decoder-only model: "
                "in float32)"
            )
        # Of the 330M model a step of 5 tokens takes 1.04 (ONNX) and 1.06 times (LiteRT) as long
        # as one of one; of models of 9M parameters 1.65 (LiteRT), and drafts gained nothing.
        pays = model.verifies and model.exact and waits_for_memory(model.config)
        self.paces = Paces(draft, pays)

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
        logits, memory = self._model.prefill(tokens_BxS, lengths_B, plan.start_id, plan.capacity)
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
        texts = texts_of(tokens_BxS, lengths_B, settings.samples, len(prompts.inputs_prefix))
        work = _Work(plan, memory, greedy, texts)
        advance, pace = work.plain, self.paces.of(len(decoding.counts_R))
        if pace is not None:
            advance = SpeculativeDecoding(pace, work.plain, work.verify, texts).advance
        yield from until_finished(decoding, advance, steps)

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


@dataclasses.dataclass(frozen=True)
class _Work:
    """Steps of one batch.

    Attributes:
        plan: the batch's.
        memory: what the decoder remembers.
        greedy: whether the likeliest token is all that is needed of a step.
        texts: what drafts are looked up in.
    """

    plan: DecodingPlan
    memory: ExportedMemory
    greedy: bool
    texts: LookupTexts

    def plain(self, decoding: Decoding, steps: int) -> Decoding:
        for _ in range(steps):
            last_R = np.asarray(decoding.last_R)
            if self.greedy:
                decoding = append_greedy(decoding, *self.memory.greedy(last_R))
            else:
                decoding = append_compiled(self.plan, decoding, self.memory.step(last_R))
            if np.asarray(decoding.finished_R).all():
                break
        return decoding

    def verify(self, decoding: Decoding, size: int, steps: int) -> tuple[Decoding, int, np.ndarray]:
        """Verifying steps of ``size`` tokens, as ``SpeculativeDecoding.verify`` describes them."""
        made_K, done = np.zeros(size, np.int64), 0
        while done < steps and not np.asarray(decoding.finished_R).all():
            tokens_RxN, counts_R, eos_R, last_R = map(
                np.asarray,
                (decoding.tokens_RxN, decoding.counts_R, decoding.settings.eos_R, decoding.last_R),
            )
            drafts_RxD = look_up(self.texts, tokens_RxN, counts_R, eos_R, size - 1, np)
            fed_RxK = np.concatenate([last_R[:, None], np.maximum(drafts_RxD, 0)], axis=1)
            counts_R = counts_R.copy()
            if self.greedy:
                choices = self.memory.verify_greedy(fed_RxK)
                decoding = accept_greedy(decoding, drafts_RxD, choices)
            else:
                logits = self.memory.verify(fed_RxK)
                decoding = accept_compiled(self.plan, decoding, drafts_RxD, logits)
            made_R = np.asarray(decoding.counts_R) - counts_R
            self.memory.keep(made_R)
            made_K += (made_R[:, None] > np.arange(size)).sum(axis=0)
            done += 1
        return decoding, done, made_K


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


def accept_greedy(decoding: Decoding, drafts_RxD: np.ndarray, choices: GreedyChoices) -> Decoding:
    """``speculation.accept`` of rows that take the likeliest token, on NumPy arrays."""
    settings, counts_R = decoding.settings, decoding.counts_R
    chosen_RxK, log_probs_of = choices
    tokens, log_probs = decoding.tokens_RxN.copy(), decoding.log_probs_RxN.copy()
    # A token is followed by the next if it is the drafted one, and ends no answer.
    goes_on_RxD = (chosen_RxK[:, :-1] == drafts_RxD) & (
        chosen_RxK[:, :-1] != np.asarray(settings.eos_R)[:, None]
    )
    limit_R = np.minimum(settings.limit_R, tokens.shape[1])
    made_R = 1 + np.logical_and.accumulate(goes_on_RxD, axis=1).sum(axis=1)
    made_R = np.where(decoding.finished_R, 0, np.minimum(made_R, limit_R - counts_R))
    log_probs_RxC = log_probs_of(int(made_R.max()))
    last_R = decoding.last_R.copy()
    for row in np.flatnonzero(made_R):
        made, place = made_R[row], np.s_[row, counts_R[row] : counts_R[row] + made_R[row]]
        tokens[place], log_probs[place] = chosen_RxK[row, :made], log_probs_RxC[row, :made]
        last_R[row] = chosen_RxK[row, made - 1]
    counts_R = counts_R + made_R
    ended_R = (made_R > 0) & ((last_R == settings.eos_R) | (counts_R >= limit_R))
    return decoding.replace(
        last_R=last_R,
        tokens_RxN=tokens,
        log_probs_RxN=log_probs,
        counts_R=counts_R.astype(np.int32),
        finished_R=decoding.finished_R | ended_R,
    )


def load_exported_generator(
    directory: str | os.PathLike[str],
    *,
    max_input_tokens: int | None = None,
    batch_rows: int = 16,
    draft: str = AUTO,
) -> TextGenerator:
    """The generator of a directory that ``encdec export`` wrote for onnxruntime or LiteRT."""
    directory = on_this_machine(directory)
    prompts, max_tokens = read_prompt_format(directory, max_input_tokens=max_input_tokens)
    rows = ExportedRows(load_exported_model(directory), draft)
    return TextGenerator(rows, prompts, max_tokens=max_tokens, batch_rows=batch_rows)
