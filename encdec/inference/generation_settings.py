"""Settings of generation, checked before anything is loaded or compiled."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from encdec.errors import ConfigError
from encdec.fields import requirements
from encdec.storage import any_path

# A program of more positions takes XLA seconds for constants alone, and its cache is large.
MOST_TOKENS = 2**15
MOST_BIASES = 300  # as in OpenAI's API
WITH_BEAMS = ("max_tokens", "samples", "beams", "length_penalty")  # have an effect
OFF, AUTO, LOOKUP = "off", "auto", "lookup"  # what makes drafts, if not a directory's model


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How to generate; the default is greedy.

    Attributes:
        max_tokens: new tokens at most, EOS included; None for the length that the model was
            trained to answer with; MOST_TOKENS at most.
        temperature: 0 is greedy; otherwise logits are divided by it and tokens drawn.
        top_k: draw from the k likeliest tokens only; 0 is off.
        top_p: draw from the likeliest tokens that together reach this mass; 1 is off.
        repetition_penalty: above 1, tokens already in the answer become less likely.
        presence_penalty: taken from the logits of tokens already in the answer; 0 is off.
        frequency_penalty: the same for each time that a token is in it already; 0 is off.
        logit_bias: tokens and what is added to their logits, at most MOST_BIASES.
        no_repeat_ngram: no n-gram of this length comes twice in an answer; 0 is off.
        seed: of drawing; the same input, number and seed give the same answer in any batch.
        samples: answers to each input.
        beams: hypotheses that beam search keeps; 1 means no beam search.
        length_penalty: alpha of beam search, 0 or more; above 0 favours longer answers.
        stop: a string, or several, that end an answer, not part of it.

    Raises:
        ConfigError: a value out of range, or one that another setting leaves without effect.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Sequence[tuple[int, float]] = ()
    no_repeat_ngram: int = 0
    seed: int = 0
    samples: int = 1
    beams: int = 1
    length_penalty: float = 0.6
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "logit_bias", tuple(map(tuple, self.logit_bias)))
        for name in ("max_tokens", "top_k", "no_repeat_ngram", "seed", "samples", "beams"):
            value = getattr(self, name)
            if type(value) is not int and not (name == "max_tokens" and value is None):
                raise ConfigError(f"{name} is {value!r}; expected a whole number")
        require, tokens = requirements(self, ""), self.max_tokens
        fits = tokens is None or 1 <= tokens <= MOST_TOKENS
        require(fits, "max_tokens", f"1 to {MOST_TOKENS}")
        # So little that the division would overflow is meant to be greedy.
        heat = self.temperature
        require(heat == 0 or 0.01 <= heat <= 100, "temperature", "0 (greedy), or from 0.01 to 100")
        require(0 <= self.top_k < 2**31, "top_k", "0 (off) or a number of tokens")
        require(0 < self.top_p <= 1, "top_p", "above 0, up to 1 (off)")
        repetition = 0.01 <= self.repetition_penalty <= 100
        require(repetition, "repetition_penalty", "from 0.01 to 100; 1 is off")
        for name in ("presence_penalty", "frequency_penalty"):
            require(-2 <= getattr(self, name) <= 2, name, "from -2 to 2; 0 is off")
        require(len(self.logit_bias) <= MOST_BIASES, "logit_bias", f"at most {MOST_BIASES}")
        if not all(-100 <= bias <= 100 for _, bias in self.logit_bias):
            raise ConfigError(f"logit_bias is {dict(self.logit_bias)}; expected -100 to 100 each")
        require(0 <= self.no_repeat_ngram < 2**31, "no_repeat_ngram", "0 (off) or a length")
        require(0 <= self.seed < 2**32, "seed", "from 0 to 2**32 - 1")
        require(self.samples >= 1, "samples", "1 or more")
        require(self.beams >= 1, "beams", "1 or more")
        require(0 <= self.length_penalty < math.inf, "length_penalty", "0 or more")
        texts = all(isinstance(text, str) and text for text in self.stop)
        require(texts, "stop", "strings that are not empty")
        if self.beams > 1:
            self._check_beams()
        elif self.length_penalty != GenerationSettings.length_penalty:
            raise ConfigError(
                f"length_penalty is {self.length_penalty}, which has no effect without beam "
                "search; set beams above 1, or leave it out"
            )
        elif self.temperature == 0:
            self._check_greedy()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that tell these settings from others.

        The penalties and biases that only the server offers are left out where they are off.
        """
        values = dataclasses.asdict(self) | {
            "stop": list(self.stop),
            "logit_bias": [list(pair) for pair in self.logit_bias],
        }
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if not values[name]:
                del values[name]
        return values

    def _check_beams(self) -> None:
        for field in dataclasses.fields(self):
            name = field.name
            if name not in WITH_BEAMS and getattr(self, name) != field.default:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, which beam search (beams is {self.beams}) "
                    "does not support; leave one of the two out"
                )
        if self.samples > self.beams:
            raise ConfigError(
                f"samples is {self.samples}, but beam search returns at most beams, "
                f"which is {self.beams}; set beams to {self.samples}"
            )

    def _check_greedy(self) -> None:
        for name in ("top_k", "top_p", "samples", "seed"):
            if getattr(self, name) != getattr(GenerationSettings, name):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, which has no effect in greedy generation; "
                    f"set temperature above 0, or leave {name} out"
                )


def check_numbers(options: object, **least: int) -> None:
    """Raises ConfigError for a number attribute below its least; None is not a number."""
    for name, wanted in least.items():
        value = getattr(options, name)
        if value is not None and value < wanted:
            raise ConfigError(f"{name} is {value}; expected {wanted} or more")


def check_draft(draft: str, settings: GenerationSettings) -> None:
    """Raises ConfigError for drafts that are asked for where none are made."""
    if settings.beams > 1 and draft not in (AUTO, OFF):
        raise ConfigError(
            f"draft is {draft}, which has no effect in beam search; leave it out, or set beams to 1"
        )


def add_draft_option(parser: argparse.ArgumentParser) -> None:
    """The flag whose value ``encdec.inference.draft_model.load_draft`` reads."""
    parser.add_argument(
        "--draft",
        type=lambda text: text if text in (OFF, AUTO, LOOKUP) else any_path(text),
        default=AUTO,
        metavar="auto|off|lookup|DIR",
        help="draft tokens and verify several in one step, which changes no answer: from the "
        "source and the answer so far (lookup), with a small model of the same vocabulary, never "
        "(off), or by lookup where that pays and is exact (auto, the default)",
    )
