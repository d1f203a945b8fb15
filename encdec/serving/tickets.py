"""Requests in the engine: their place, the answers made for them, and the news of these."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal

from encdec.inference.settings import GenerationSettings
from encdec.inference.text import TextStream
from encdec.serving.prompts import Prompt

Failure = Literal["timeout", "shutdown", "error"]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Tokens and what the model thinks of them.

    Attributes:
        tokens: ids.
        log_probs: the model's log-probabilities of these; None of what it does not foretell.
        likeliest: the likeliest ids in the place of each, with theirs; no lists where nobody asked.
    """

    tokens: list[int]
    log_probs: list[float | None]
    likeliest: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Update:
    """News of one answer.

    Attributes:
        index: which answer of the request.
        text: what is new of it.
        tokens: ids that are new.
        log_probs: the model's log-probabilities of these.
        finish: why it ended, or None while it grows.
        likeliest: see ``Scored``.
        prompt: the tokens of the prompt that the model scores, with its first news, if asked for.
    """

    index: int
    text: str
    tokens: list[int]
    log_probs: list[float]
    finish: str | None = None
    likeliest: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt: Scored | None = None


class Ticket:
    """A request's place in the engine.

    Args:
        prompts: as the model reads them.
        settings: the same for all prompts.
        deliver: called on the engine's thread, with an ``Update`` or, once and then nothing more,
            with why it failed.
        stream: deliver text as it grows; otherwise only whole answers.
        timeout_seconds: from now until it is given up.
        samples: answers to each prompt; those of the settings where it is None.
        max_tokens: new tokens at most, 0 for none; those of the settings where it is None.
        alternatives: whether the likeliest tokens come with each token.
        score_prompts: whether the prompts' own tokens are scored.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        deliver: Callable[[Update | Failure], None],
        *,
        stream: bool,
        timeout_seconds: float,
        samples: int | None = None,
        max_tokens: int | None = None,
        alternatives: bool = False,
        score_prompts: bool = False,
    ):
        self.prompts, self.settings, self.deliver, self.stream = prompts, settings, deliver, stream
        self.samples = settings.samples if samples is None else samples
        self.max_tokens = settings.max_tokens if max_tokens is None else max_tokens
        self.alternatives, self.score_prompts = alternatives, score_prompts
        self.arrived = time.monotonic()
        self.deadline = self.arrived + timeout_seconds
        self.ended = False  # cancelled or failed: nobody waits any more


@dataclasses.dataclass
class Answer:
    """One answer to be made, waiting or in a slot."""

    ticket: Ticket
    place: int  # of its prompt in the request
    sample: int
    seen: int = 0  # tokens delivered, with those given
    text: TextStream | None = None
    input_scores: Scored | None = None
    begun: bool = False  # its first news are out

    @property
    def index(self) -> int:
        return self.place * self.ticket.samples + self.sample

    @property
    def prompt(self) -> Prompt:
        return self.ticket.prompts[self.place]
