"""The server's counters, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

Kind = TypeVar("Kind", Counter, Gauge, Histogram)


class ServerMetrics:
    """Counters of one server, in their own registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def make(kind: type[Kind], name: str, text: str, **rest: Any) -> Kind:
            return kind(f"encdec_{name}", text, registry=self._registry, **rest)

        self.requests = make(
            Counter,
            "http_requests",
            "Requests by route and status.",
            labelnames=("route", "status"),
        )
        self.answers = make(
            Counter, "answers", "Answers by how they ended.", labelnames=("finish",)
        )
        self.input_tokens = make(Counter, "input_tokens", "Input tokens read.")
        self.output_tokens = make(Counter, "output_tokens", "Tokens generated.")
        self.steps = make(Counter, "decode_steps", "Decoding steps of the whole batch.")
        self.drafted_tokens = make(
            Counter, "drafted_tokens", "Places after an answer's last token that steps verified."
        )
        self.accepted_tokens = make(
            Counter, "accepted_tokens", "Drafted tokens that were right, and were kept."
        )
        self.first_token = make(
            Histogram,
            "first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
        )
        self.duration = make(
            Histogram,
            "answer_seconds",
            "From a request's arrival to an answer's end.",
            buckets=_SECONDS,
        )
        self.slots = make(Gauge, "slots", "Rows of the running batch.")

    def watch(self, active: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Sets gauges whose values are read when Prometheus asks for them."""
        for name, text, value in (
            ("slots_active", "Rows occupied by a request.", active),
            ("answers_waiting", "Answers that wait for a slot.", waiting),
        ):
            Gauge(f"encdec_{name}", text, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self._registry)
