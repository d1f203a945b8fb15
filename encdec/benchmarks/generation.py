"""How long generation takes: first token and rate, cached and not, several models in one run."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from encdec.errors import ConfigError
from encdec.inference.decoding import Decoding, DecodingPlan, advance_compiled, start_compiled
from encdec.inference.ready import ready_for_decoding
from encdec.inference.sampling import Choosing, first_highest, greedy_rows
from encdec.model import ModelConfig, Params, build_model, init_params

START_ID = 0  # which token it is changes no time


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Parameters of a model that nobody trained: their values do not affect the time."""
    return jax.jit(init_params, static_argnums=0)(build_model(config), jax.random.key(seed))


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def shown(self, factor: float = 1.0, digits: int | None = None) -> str:
        """Median and quartiles times ``factor``; by default with one decimal below 100."""
        low, median, high = (factor * value for value in (self.low, self.median, self.high))
        digits = int(median < 100) if digits is None else digits
        return f"{median:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


@dataclasses.dataclass(frozen=True)
class GenerationTiming:
    """Greedy generation of one model at one input length; EOS ends nothing.

    Attributes:
        model: its name.
        cached: with a key-value cache; without it, every token reads the whole row again.
        input_length: tokens of each input.
        output_length: new tokens of each row.
        batch: rows.
        first_token_seconds: from the inputs' tokens to the first new token, of each repeat.
        total_seconds: to the last new token, of each repeat.
        same_tokens: share of the new tokens that are those of the model of the same parameters
            with which this one is compared; None where there is none.
    """

    model: str
    cached: bool
    input_length: int
    output_length: int
    batch: int
    first_token_seconds: tuple[float, ...]
    total_seconds: tuple[float, ...]
    same_tokens: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Lengths and spreads, for reports."""
        return {
            "inputs": self.input_length,
            "outputs": self.output_length,
            "first_token_seconds": dataclasses.asdict(self.first_token),
            "total_seconds": dataclasses.asdict(self.total),
            "tokens_per_second": dataclasses.asdict(self.tokens_per_second),
        }

    @property
    def first_token(self) -> Spread:
        """Seconds."""
        return Spread.of(self.first_token_seconds)

    @property
    def total(self) -> Spread:
        """Seconds."""
        return Spread.of(self.total_seconds)

    @property
    def tokens_per_second(self) -> Spread:
        """Of the tokens after the first, all rows together."""
        tokens = self.batch * (self.output_length - 1)
        return Spread.of(
            [
                tokens / (total - first)
                for first, total in zip(self.first_token_seconds, self.total_seconds, strict=True)
            ]
        )


def time_generation(
    models: Mapping[str, tuple[ModelConfig, Params]],
    input_lengths: Sequence[int],
    output_length: int,
    *,
    batch: int = 1,
    repeats: int = 5,
    uncached_lengths: Collection[int] | None = None,
    dtype: str | None = None,
    runtimes: Mapping[str, Callable[[np.ndarray, int], _Run]] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> list[GenerationTiming]:
    """Times greedy generation from random inputs; every repeat runs all models in turn.

    Everything is compiled and run once before the clock starts, and shapes are exact: no
    bucket's padding is timed.

    Args:
        models: configuration and parameters by name.
        input_lengths: tokens of the inputs.
        output_length: new tokens, 2 or more.
        batch: rows.
        repeats: timed runs of each model at each length.
        uncached_lengths: those of ``input_lengths`` at which decoder-only models are timed without
            a cache, too; None: all.
        dtype: see ``ready_for_decoding``.
        runtimes: by name, other programs that run the first of ``models``: given tokens [B, S] and
            a count, the first token and from its result all tokens [B, count]. Each is timed right
            behind that model, and ``same_tokens`` holds its tokens against that model's.
        on_progress: told what is about to be timed.

    Returns:
        Timings, ordered by input length, then as ``models`` are, the cached one first.

    Raises:
        ConfigError: a length or number that cannot be.
    """
    for name, value, least in (
        ("output_length", output_length, 2),
        ("batch", batch, 1),
        ("repeats", repeats, 1),
        *(("input_lengths", n, 1) for n in input_lengths),
    ):
        if value < least:
            raise ConfigError(f"{name} is {value}; expected {least} or more")
    ready = {name: ready_for_decoding(*model, dtype) for name, model in models.items()}
    timings = []
    for length in input_lengths:
        uncached = uncached_lengths is None or length in uncached_lengths
        runs = _runs(ready, length, output_length, batch, runtimes or {}, uncached)
        answers = {}
        for (name, cached), (first, rest) in runs.items():
            if on_progress:
                on_progress(f"{name}, {length} tokens in, {'' if cached else 'un'}cached")
            answers[name, cached] = jax.block_until_ready(rest(first()))  # compiles
        wanted = next(iter(answers.values())).tokens_RxN
        same = {(name, True): equal_share(answers[name, True], wanted) for name in runtimes or ()}
        del answers
        taken: dict[tuple[str, bool], list[tuple[float, float]]] = {key: [] for key in runs}
        for _ in range(repeats):
            for key, run in runs.items():
                taken[key].append(_time_once(run))
        timings += [
            GenerationTiming(
                name,
                cached,
                length,
                output_length,
                batch,
                tuple(first for first, _ in times),
                tuple(total for _, total in times),
                same_tokens=same.get((name, cached)),
            )
            for (name, cached), times in taken.items()
        ]
    return timings


def _runs(
    models: Mapping[str, tuple[ModelConfig, Params]],
    length: int,
    output_length: int,
    batch: int,
    runtimes: Mapping[str, Callable[[np.ndarray, int], _Run]],
    uncached: bool,
) -> dict[tuple[str, bool], _Run]:
    """What is timed at one input length, by name and by whether it is cached."""
    runs: dict[tuple[str, bool], _Run] = {}
    for name, (config, params) in models.items():
        drawn = np.random.default_rng(length).integers(2, config.vocab_size, (batch, length))
        tokens = jnp.asarray(drawn, jnp.int32)
        first_model = not runs
        runs[name, True] = cached_run(config, params, tokens, output_length)
        if first_model:
            runs |= {(other, True): make(drawn, output_length) for other, make in runtimes.items()}
        if uncached and not config.is_encoder_decoder:
            runs[name, False] = _uncached_run(config, params, tokens, output_length)
    return runs


def equal_share(tokens: Any, wanted: Any) -> float:
    """Share of equal tokens at equal places of two arrays of one shape."""
    return float(np.mean(np.asarray(tokens) == np.asarray(wanted)))


# The first token, and from its result all others.
_Run = tuple[Callable[[], Any], Callable[[Any], Any]]


def _time_once(run: _Run) -> tuple[float, float]:
    first, rest = run
    begin = time.perf_counter()
    state = jax.block_until_ready(first())
    middle = time.perf_counter()
    jax.block_until_ready(rest(state))
    return middle - begin, time.perf_counter() - begin


def cached_run(config: ModelConfig, params: Params, tokens: jax.Array, count: int) -> _Run:
    """Greedy generation of ``count`` tokens after tokens [B, S]; parameters are ready for it."""
    batch, length = tokens.shape
    plan = DecodingPlan(Choosing(config.vocab_size), count, START_ID)
    lengths = jnp.full(batch, length, jnp.int32)
    settings = greedy_rows(batch, count)

    def first() -> Decoding:
        return start_compiled(config, plan, params, tokens, lengths, settings)

    def rest(decoding: Decoding) -> Decoding:
        return advance_compiled(config, plan, params, decoding, count - 1)

    return first, rest


def _uncached_run(config: ModelConfig, params: Params, tokens: jax.Array, count: int) -> _Run:
    """Later tokens run over rows of the final length: one program, at most count - 1 too long."""
    batch = tokens.shape[0]
    prompt = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=START_ID)

    def first() -> jax.Array:
        return next_token_uncached(config, params, prompt, prompt.shape[1] - 1)

    def rest(token_B: jax.Array) -> jax.Array:
        row = jnp.concatenate([prompt, jnp.zeros((batch, count), jnp.int32)], axis=1)
        return _rest_uncached(config, params, row, token_B, prompt.shape[1])

    return first, rest


@functools.partial(jax.jit, static_argnames=("config",))
def next_token_uncached(
    config: ModelConfig, params: Params, tokens_BxT: jax.Array, place: jax.Array
) -> jax.Array:
    """The most likely token after ``place`` by a full forward pass of a decoder-only model, [B]."""
    model, (batch, length) = build_model(config), tokens_BxT.shape
    fields = {
        "decoder_input_tokens": tokens_BxT,
        "decoder_segment_ids": jnp.ones((batch, length), jnp.int32),
        "decoder_positions": jnp.tile(jnp.arange(length, dtype=jnp.int32), (batch, 1)),
    }
    hidden = model.apply({"params": params}, fields, method="hidden")
    last_BxM = jax.lax.dynamic_index_in_dim(hidden, place, axis=1, keepdims=False)
    logits_BxV = model.apply({"params": params}, last_BxM, method="logits")
    return cast(jax.Array, first_highest(logits_BxV))


@functools.partial(jax.jit, static_argnames=("config",))
def _rest_uncached(
    config: ModelConfig, params: Params, row_BxT: jax.Array, token_B: jax.Array, begin: jax.Array
) -> jax.Array:
    """Fills the row from place ``begin``, the first token given, up to its end; the whole row."""

    def step(place: jax.Array, row_BxT: jax.Array) -> jax.Array:
        token_B = next_token_uncached(config, params, row_BxT, place)
        return jax.lax.dynamic_update_index_in_dim(row_BxT, token_B, place + 1, axis=1)

    row_BxT = jax.lax.dynamic_update_index_in_dim(row_BxT, token_B, begin, axis=1)
    return jax.lax.fori_loop(begin, row_BxT.shape[1] - 1, step, row_BxT)
