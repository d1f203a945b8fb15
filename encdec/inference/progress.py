"""Progress of a long job: a bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import sys
import time

from encdec.logs import logger, shows_progress

_LOG = logger(__name__)

REPORT_SECONDS = 10.0


class ProgressBar:
    """Examples done, tokens per second and time left, on standard error.

    Args:
        name: of the job.
        total: examples in all.
        done: of them, by earlier calls.
    """

    def __init__(self, name: str, total: int, done: int = 0):
        self._name, self._total, self._begun_at, self._done = name, total, done, done
        self._tokens, self._begin, self._bar = 0, time.perf_counter(), None
        self._said = self._begin
        if sys.stderr.isatty() and shows_progress():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(name, total=total, completed=done)
            self._bar.start()

    def __call__(self, examples: int, tokens: int) -> None:
        self._done += examples
        self._tokens += tokens
        now = time.perf_counter()
        if self._bar:
            self._bar.update(
                self._task, completed=self._done, description=f"{self._name}, {self.rate()}"
            )
        elif now - self._said > REPORT_SECONDS:
            self._said = now
            left = (now - self._begin) / (self._done - self._begun_at) * (self._total - self._done)
            _LOG.info(
                f"{self._name}: {self._done:,} of {self._total:,} examples, {self.rate()}, "
                f"{left:,.0f} s left"
            )

    def rate(self) -> str:
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        return f"{self._tokens / seconds:,.0f} tokens/s"

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()
