"""How far gradients from stored distributions are from those of full ones: angle and norm.

The figure of arXiv 2503.16870 on a model of ours. Draws are unbiased, so their error shrinks as
tokens and draws grow; what top-k leaves out stays left out.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from encdec.data.batches import Batches
from encdec.data.records import open_records
from encdec.data.sparse_logits import MAX_PAIRS, SparseFormat, decode_rows, encode_row
from encdec.data.teacher_rows import batch_fields
from encdec.distill.draw import to_sparse
from encdec.distill.teachers import make_logits_step
from encdec.model import build_model
from encdec.saved.saved_params import load_params_for_inference
from encdec.train.run_fields import DistillConfig, LossConfig, Tail
from encdec.train.step import batch_metrics


@dataclasses.dataclass(frozen=True)
class GradientError:
    """Of one stored format.

    Attributes:
        kind: "draws", "top-k" (renormalized) or "top-k, tail merged".
        size: N or k.
        bytes_per_token: of the rows as encoded.
        angle: degrees between its gradient and that of every logit.
        norm_ratio: its norm over that of every logit.
    """

    kind: str
    size: int
    bytes_per_token: float
    angle: float
    norm_ratio: float


class _Gradients:
    """Gradients of one student on the same rows, under any stored format."""

    def __init__(
        self, student: pathlib.Path, teacher: pathlib.Path, records: str, rows: int, batch_rows: int
    ):
        self._student, self._params, _ = load_params_for_inference(student)
        self._teacher, self._teacher_params, _ = load_params_for_inference(teacher)
        opened = open_records(records)
        self._card = opened.card
        layouts = [
            Batches(opened, global_batch=batch_rows, layout=config.architecture)
            for config in (self._student, self._teacher)
        ]
        self._batches = [
            tuple(layout[step] for layout in layouts) for step in range(-(-rows // batch_rows))
        ]
        self._batch_rows = batch_rows
        self._compiled: dict[str, Any] = {}

    def of(self, fmt: SparseFormat, tail: Tail = "merged") -> tuple[np.ndarray, float]:
        """The gradient of the forward KL over all rows, flat, and bytes per token."""
        total: Any = 0.0  # broadcasts to the gradient's shape
        size, count = 0, 0
        for (student_batch, _), (rows, tokens) in zip(self._batches, self._stored(fmt)):
            size, count = size + sum(map(len, rows)), count + tokens
            # One width for all formats, so that each loss is compiled once.
            fields = batch_fields(
                *decode_rows(rows, fmt),
                fmt,
                self._card.targets_length,
                self._card.targets_length * MAX_PAIRS,
            )
            flat = self._gradient(f"{fmt.method} {tail}", tail)(
                self._params, student_batch | fields
            )
            total = total + np.asarray(flat, np.float64)
        return total, size / count

    def bytes_per_token(self, fmt: SparseFormat) -> float:
        """Of the rows alone."""
        sizes = [(sum(map(len, rows)), tokens) for rows, tokens in self._stored(fmt)]
        return sum(size for size, _ in sizes) / sum(tokens for _, tokens in sizes)

    def _stored(self, fmt: SparseFormat) -> Iterator[tuple[list[bytes], int]]:
        """Each batch's rows as they would be stored, and their number of tokens."""
        model = build_model(self._teacher)
        teach = jax.jit(make_logits_step(model, fmt, self._card.targets_length, seed=0))
        for index, (_, teacher_batch) in enumerate(self._batches):
            first = index * self._batch_rows
            numbers = np.arange(first, first + self._batch_rows, dtype=np.uint32)
            kept = jax.tree.map(
                np.asarray, teach(self._teacher_params, teacher_batch | {"row_numbers": numbers})
            )
            tokens = kept.pop("tokens")
            yield (
                [
                    encode_row(to_sparse({n: x[row, :end] for n, x in kept.items()}, fmt), fmt)
                    for row, end in enumerate(tokens)
                ],
                int(tokens.sum()),
            )

    def _gradient(self, name: str, tail: Tail) -> Any:
        if name not in self._compiled:
            model, config = build_model(self._student), DistillConfig("teacher", tail=tail)

            def objective(params: Any, batch: Any) -> jax.Array:
                return batch_metrics(
                    model,
                    params,
                    batch,
                    LossConfig(z_loss=0.0),
                    self._card.targets_length,
                    None,
                    config,
                    jnp.float32(1),
                ).losses.objective

            def flat(params: Any, batch: Any) -> jax.Array:
                leaves = jax.tree.leaves(jax.grad(objective)(params, batch))
                return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])

            self._compiled[name] = jax.jit(flat)
        return self._compiled[name]


def gradient_errors(
    student: pathlib.Path,
    teacher: pathlib.Path,
    records: str,
    *,
    rows: int = 128,
    batch_rows: int = 16,
    draws: Sequence[int] = (5, 12, 25, 50, 100),
    least_k: int = 2,
) -> list[GradientError]:
    """Draws of several N, and top-k rows of as many bytes, on the same rows of the records.

    Args:
        student, teacher: work directories.
        records: what both read.
        rows: over which gradients are summed; more tokens average the draws' noise away.
        batch_rows: at once.
        draws: numbers of draws.
        least_k: where as many bytes would hold less.
    """
    gradients = _Gradients(student, teacher, records, rows, batch_rows)
    vocabulary = open_records(records).card.vocabulary.size
    full, _ = gradients.of(SparseFormat("full", vocabulary))
    errors = []

    def add(kind: str, size: int, found: tuple[np.ndarray, float]) -> float:
        errors.append(
            GradientError(
                kind,
                size,
                found[1],
                angle_degrees(found[0], full),
                float(np.linalg.norm(found[0]) / np.linalg.norm(full)),
            )
        )
        return found[1]

    # Bytes of top-k rows are nearly linear in k; two sizes tell the line.
    known = (4, min(32, vocabulary - 1))
    few, many = (gradients.bytes_per_token(SparseFormat("top_k", vocabulary, k=k)) for k in known)
    each = (many - few) / (known[1] - known[0])
    for n in draws:
        size = add("draws", n, gradients.of(SparseFormat("sampled", vocabulary, draws=n)))
        k = round(known[0] + (size - few) / each)
        k = min(max(least_k, k), MAX_PAIRS, vocabulary - 1)
        top = SparseFormat("top_k", vocabulary, k=k)
        add("top-k", k, gradients.of(top, "dropped"))
        add("top-k, tail merged", k, gradients.of(top, "merged"))
    return errors


def angle_degrees(a: np.ndarray, b: np.ndarray) -> float:
    """Between two vectors."""
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
