"""What ``encdec prepare`` reports while it works."""

from __future__ import annotations

import sys
import time

from encdec.data.blocks import Counts
from encdec.data.vocabulary_losses import Losses
from encdec.logs import logger, shows_progress

_LOG = logger(__name__)

LOG_SECONDS = 10.0
TERMINAL_SECONDS = 0.2


class ProgressLine:
    """Counts and rate: one line rewritten on a terminal, plain lines every ten seconds else."""

    def __init__(self):
        self.stream = sys.stderr
        self.terminal = self.stream.isatty()
        self.started = time.perf_counter()
        self.shown = self.started if not self.terminal else 0.0
        self.width = 0
        self.warned = False

    def __call__(self, counts: Counts) -> None:
        if counts.lost and not self.warned:
            # At once: hours of preparing may follow.
            self.close()
            _LOG.warning(f"prepare: warning: {loss_warning(counts.lost)}")
            self.warned = True
        now = time.perf_counter()
        if not shows_progress() or now - self.shown < (
            TERMINAL_SECONDS if self.terminal else LOG_SECONDS
        ):
            return
        self.shown = now
        seconds = max(now - self.started, 1e-9)
        line = (
            f"prepare: {counts.examples:,} examples, {counts.rows:,} rows, "
            f"{counts.tokens / 1e6:.1f}M tokens, {counts.tokens / seconds / 1e3:,.0f}k tokens/s"
        )
        self._write(line)

    def _write(self, line: str) -> None:
        if self.terminal:
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def close(self) -> None:
        if self.terminal and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()


def loss_warning(lost: Losses) -> str:
    """What the vocabulary loses and what to do about it."""
    return (
        f"this vocabulary is not lossless: {lost.describe()}. Use one with byte fallback and "
        "without normalization (encdec vocab trains one); --lossless rejects others"
    )
