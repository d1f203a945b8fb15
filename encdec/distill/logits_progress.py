"""What ``encdec distill logits`` reports while it works."""

from __future__ import annotations

import time

from encdec.data.records import open_records
from encdec.distill.teacher_logits import LogitsTally
from encdec.train.metrics import Console

REPORT_SECONDS = 10.0


class LogitsProgress:
    """Tokens stored, rate, bytes per token and time left: a bar, or a line now and then."""

    def __init__(self, records: str):
        self._records, self._begin, self._said = records, 0.0, 0.0
        self._console: Console | None = None
        self._first = self._seen = (0, 0)

    def __call__(self, tally: LogitsTally) -> None:
        now = time.monotonic()
        if self._console is None:
            self._rows = len(open_records(self._records))
            self._console = Console(self._rows, tally.rows, what="distill logits")
            # The first batch took the compilation and what was there before.
            self._begin, self._first = now, (tally.rows, tally.tokens)
        self._seen = tally.rows, tally.tokens
        self._console.advance(tally.rows)
        if now - self._said > REPORT_SECONDS and sum(self._seen) > sum(self._first):
            self._said = now
            left = (now - self._begin) * (self._rows - tally.rows) / (tally.rows - self._first[0])
            self._console.say(
                f"{tally.rows:,} of {self._rows:,} rows{self.rate()}, "
                f"{tally.bytes / max(tally.tokens, 1):.1f} bytes per token, {left:,.0f} s left"
            )

    def rate(self) -> str:
        """ ", N tokens/s" once there is something to tell."""
        seconds = time.monotonic() - self._begin
        if self._seen is None or self._seen == self._first or not seconds:
            return ""
        return f", {(self._seen[1] - self._first[1]) / seconds:,.0f} target tokens/s"

    def close(self) -> None:
        if self._console:
            self._console.close()
