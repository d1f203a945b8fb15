"""Loss on held-out records during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from encdec.data.records import Records
from encdec.model import ModelConfig
from encdec.storage import path_ends
from encdec.train.feed import on_devices, open_batches
from encdec.train.metrics import eval_report
from encdec.train.program import Program
from encdec.train.run_config import RunConfig


class Evaluator:
    """Evaluates parameters on the same rows every time: all of them, or a fixed sample.

    Of a mixture each part is evaluated and reported by itself, ``eval/NAME/loss`` and so on. The
    mixture's own numbers are those that rows drawn at its rates would give on average: sums over a
    part weigh its share of the rows over the rows that were evaluated of it.
    """

    def __init__(self, program: Program, run: RunConfig, model: ModelConfig, records: Records):
        self._program = program
        parts = getattr(records, "parts", (records,))
        shares = getattr(records, "shares", (1.0,))
        size = run.eval.batch_size or run.micro_batch_size
        self._parts = []
        names = path_ends(part.directory for part in parts)
        for name, part, share in zip(names, parts, shares):
            batches = open_batches(
                part,
                model,
                program.batch_sharding,
                size,
                # The first rows may all come from one source; a sample has to be drawn.
                shuffle=run.eval.batches > 0,
                seed=0,
                repeat=False,
            )
            wanted = max(round(run.eval.batches * share), 1) if run.eval.batches else len(batches)
            steps = min(wanted, len(batches))
            weight = share / min(steps * size, len(part))
            self._parts.append((name, batches, steps, weight, part.card))

    def __call__(
        self, params: Any, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The numbers of ``metrics.eval_report``; None where ``interrupted``, which is asked
        before every batch, said so."""
        report: dict[str, float] = {}
        mixed, mixed_bytes, mixed_tokens, tokens = None, 0.0, 0.0, 0.0
        for name, batches, steps, weight, card in self._parts:
            total = self._sums(params, batches, steps, interrupted)
            if total is None:
                return None
            found = eval_report(total, card.target_bytes, card.target_tokens)
            if len(self._parts) == 1:
                return found
            report |= {key.replace("eval/", f"eval/{name}/"): v for key, v in found.items()}
            tokens += found["eval/target_tokens"]
            part_tokens = weight * found["eval/target_tokens"]
            mixed_tokens += part_tokens
            mixed_bytes += part_tokens * card.target_bytes / max(card.target_tokens, 1)
            mixed = _add(mixed, jax.tree.map(lambda x, w=weight: x * w, total))
        # Only ratios of the sums are reported: in a size at which no divisor is taken for empty.
        scale = tokens / max(mixed_tokens, 1e-300)
        mixed = jax.tree.map(lambda x: x * scale, mixed)
        found = eval_report(mixed, mixed_bytes * scale, mixed_tokens * scale)
        return found | {"eval/target_tokens": tokens} | report

    def _sums(
        self, params: Any, batches: Any, steps: int, interrupted: Callable[[], bool]
    ) -> Any | None:
        total = None
        waiting: list[Any] = []
        for batch in on_devices(batches, self._program.batch_sharding, 0, steps):
            if interrupted():
                return None
            waiting.append(self._program.eval_step(params, batch))
            # Added on the host in float64, two steps late: the device always has work.
            if len(waiting) > 2:
                total = _add(total, waiting.pop(0))
        for metrics in waiting:
            total = _add(total, metrics)
        return total


def _add(total: Any, metrics: Any) -> Any:
    new = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(metrics))
    return new if total is None else jax.tree.map(np.add, total, new)
