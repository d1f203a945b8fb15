"""Small servers of random models, and their answers by the plain generator."""

from __future__ import annotations

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from encdec.inference.drafting import DraftModel
from encdec.inference.generator import Generator
from encdec.inference.ready import ready_for_decoding
from encdec.serving.app import Service
from encdec.serving.engine import Engine
from encdec.serving.protocol import Limits
from tests.inference.test_generator import PROMPTS, printing_model

MAX_TOKENS = 16
NAME = "tiny"


class SlowEngine(Engine):
    """A step takes long, so that something can happen meanwhile."""

    seconds = 0.02

    def _advance(self) -> None:
        time.sleep(self.seconds)
        self._step_seconds = 1.0  # one step between two looks
        super()._advance()


def make_engine(name="encoder_decoder", kind=Engine, **settings) -> Engine:
    settings = {"max_tokens": MAX_TOKENS, "slots": 4, "max_queue": 64} | settings
    return kind(*printing_model(name), PROMPTS, **settings)


@functools.cache
def noisy_draft(name="encoder_decoder") -> DraftModel:
    """A draft model that often chooses what the model itself would, but not always."""
    config, params = ready_for_decoding(*printing_model(name))
    rng = np.random.default_rng(0)
    change = lambda x: x + jnp.asarray(rng.normal(0, 0.03, x.shape), x.dtype)
    return DraftModel(config, jax.tree.map(change, params), PROMPTS.decoder_start_id)


def make_service(engine: Engine, **settings) -> Service:
    limits = Limits(engine.max_tokens, min(12, engine.max_tokens), 16)
    return Service(engine, NAME, limits, **settings)


@functools.cache
def generator(name="encoder_decoder") -> Generator:
    return Generator(*printing_model(name), PROMPTS, max_tokens=12, batch_rows=4)


def events(text: str) -> list:
    """What a stream of server-sent events holds; "[DONE]" as it is."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    data = [part.removeprefix("data: ") for part in parts]
    return [part if part == "[DONE]" else json.loads(part) for part in data]


def until(condition, seconds=20.0) -> None:
    """Waits for something that happens in another thread."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
