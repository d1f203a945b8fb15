"""Loss on held-out records during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from encdec.data.records import Records
from encdec.model import ModelConfig
from encdec.train.config import RunConfig
from encdec.train.feed import on_devices, open_batches
from encdec.train.metrics import eval_report
from encdec.train.program import Program


class Evaluator:
    """Evaluates parameters on the same rows every time: all of them, or a fixed sample."""

    def __init__(self, program: Program, run: RunConfig, model: ModelConfig, records: Records):
        self._program, self._card = program, records.card
        self._batches = open_batches(
            records,
            model,
            program.batch_sharding,
            run.eval.batch_size or run.micro_batch_size,
            # The first rows may all come from one source; a sample has to be drawn.
            shuffle=run.eval.batches > 0,
            seed=0,
            repeat=False,
        )
        self._steps = min(run.eval.batches or len(self._batches), len(self._batches))

    def __call__(
        self, params: Any, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The numbers of ``metrics.eval_report``; None where ``interrupted``, which is asked
        before every batch, said so."""
        total = None
        waiting: list[Any] = []
        for batch in on_devices(self._batches, self._program.batch_sharding, 0, self._steps):
            if interrupted():
                return None
            waiting.append(self._program.eval_step(params, batch))
            # Added on the host in float64, two steps late: the device always has work.
            if len(waiting) > 2:
                total = _add(total, waiting.pop(0))
        for metrics in waiting:
            total = _add(total, metrics)
        return eval_report(total, self._card.target_bytes, self._card.target_tokens)


def _add(total: Any, metrics: Any) -> Any:
    new = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(metrics))
    return new if total is None else jax.tree.map(np.add, total, new)
