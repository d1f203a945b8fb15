"""Requests in the engine: their answers, and updates about these."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal, Self

import numpy as np

from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.text_io import TextStream
from encdec.serving.prompts import Prompt

Failure = Literal["timeout", "shutdown", "error"]


@dataclasses.dataclass(frozen=True)
class TokenLogProbs:
    """Tokens and their log-probabilities by the model.

    Attributes:
        tokens: ids.
        log_probs: their log-probabilities; None for tokens that the model does not predict.
        likeliest: the most likely ids at each position, with log-probabilities; empty unless
            requested.
    """

    tokens: list[int]
    log_probs: list[float]
    likeliest: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)

    @classmethod
    def of_arrays(
        cls,
        tokens_N: np.ndarray,
        log_probs_N: np.ndarray,
        ids_NxK: np.ndarray | None = None,
        values_NxK: np.ndarray | None = None,
    ) -> Self:
        likeliest = []
        if ids_NxK is not None and values_NxK is not None:
            pairs = zip(ids_NxK.tolist(), values_NxK.tolist(), strict=True)
            likeliest = [list(zip(*pair)) for pair in pairs]
        return cls(tokens_N.tolist(), log_probs_N.tolist(), likeliest)


@dataclasses.dataclass(frozen=True)
class Update:
    """An update about one answer.

    Attributes:
        index: which answer of the request.
        text: its new text.
        tokens: its new ids.
        log_probs: log-probabilities of these.
        finish: why it ended, or None while it is generated.
        likeliest: see ``TokenLogProbs``.
        prompt: the prompt's tokens, in the first update, if requested.
    """

    index: int
    text: str
    tokens: list[int]
    log_probs: list[float]
    finish: str | None = None
    likeliest: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt: TokenLogProbs | None = None


class Ticket:
    """A request in the engine.

    Args:
        prompts: as the model reads them.
        settings: the same for all prompts.
        deliver: called on the engine's thread with every ``Update``, or once, as the last call,
            with the reason of a failure.
        stream: deliver text as it grows; otherwise only whole answers.
        timeout_seconds: from now until it is abandoned.
        samples: answers to each prompt; None: as in the settings.
        max_tokens: most new tokens, 0 for none; None: as in the settings.
        alternatives: whether the most likely tokens are returned with each token.
        prompt_log_probs: whether the prompts' own tokens have log-probabilities.
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
        prompt_log_probs: bool = False,
    ):
        self.prompts, self.settings, self.deliver, self.stream = prompts, settings, deliver, stream
        self.samples = settings.samples if samples is None else samples
        self.max_tokens = settings.max_tokens if max_tokens is None else max_tokens
        self.alternatives, self.prompt_log_probs = alternatives, prompt_log_probs
        self.arrived = time.monotonic()
        self.deadline = self.arrived + timeout_seconds
        self.ended = False  # cancelled or failed
        self.failure: Failure | None = None


@dataclasses.dataclass
class Answer:
    """One answer, waiting or in a slot."""

    ticket: Ticket
    place: int  # index of its prompt in the request
    sample: int
    seen: int = 0  # tokens delivered, forced ones included
    text: TextStream | None = None
    input_log_probs: TokenLogProbs | None = None
    begun: bool = False  # its first update was delivered

    @property
    def index(self) -> int:
        return self.place * self.ticket.samples + self.sample

    @property
    def prompt(self) -> Prompt:
        return self.ticket.prompts[self.place]
