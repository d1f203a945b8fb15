"""Choosing the next token: greedy, sampled, truncated to top-k or top-p, with penalties."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

NO_EOS = -1  # an EOS that no token is: the answer runs to its limit


@dataclasses.dataclass(frozen=True)
class Choosing:
    """What is compiled into a decoding program; ``RowSettings`` has the values.

    A step pays for what is compiled in only while one of its rows asks for it.

    Attributes:
        vocabulary_size: ids from here on are never chosen (a model's table may be padded).
        sampled: rows may have a temperature above 0; otherwise every row is greedy.
        truncated: rows may have a top-k or top-p; needs ``sampled``.
        penalised: rows may have a repetition, presence or frequency penalty.
        ngrams: rows may forbid n-grams to come twice.
        biases: B, tokens of a row whose logits may be moved.
        alternatives: K, likeliest tokens that are kept of each place.
    """

    vocabulary_size: int
    sampled: bool = False
    truncated: bool = False
    penalised: bool = False
    ngrams: bool = False
    biases: int = 0
    alternatives: int = 0


class RowSettings(flax.struct.PyTreeNode):
    """Settings of each row, so that rows of one batch may differ.

    Attributes:
        temperature_R: float32; 0 is greedy.
        top_k_R: int32; only the k likeliest tokens; 0 is off.
        top_p_R: float32; of these, the likeliest that together reach this mass; 1 is off.
        repetition_penalty_R: float32; 1 is off.
        presence_penalty_R: float32; taken from the logits of tokens in the answer; 0 is off.
        frequency_penalty_R: float32; the same for each time that a token is in it; 0 is off.
        bias_ids_RxB: int32; tokens whose logits are moved, -1 for none.
        biases_RxB: float32; by how much.
        no_repeat_ngram_R: int32; no n-gram of this length comes twice in the answer; 0 is off.
        given_R: int32; tokens with which the answer begins: they are there already and are not
            chosen.
        alternatives_R: int32; above 0, the likeliest tokens of each place are kept.
        limit_R: int32; tokens at most, with those given; 0 for a row that only fills the batch.
        eos_R: int32; the token that ends the answer; ``NO_EOS`` for none.
        keys_R: random keys; token i of a row is drawn with ``fold_in(key, i)``, so that it depends
            neither on the batch's other rows nor on how the loop is cut.
    """

    temperature_R: jax.Array
    top_k_R: jax.Array
    top_p_R: jax.Array
    repetition_penalty_R: jax.Array
    presence_penalty_R: jax.Array
    frequency_penalty_R: jax.Array
    bias_ids_RxB: jax.Array
    biases_RxB: jax.Array
    no_repeat_ngram_R: jax.Array
    given_R: jax.Array
    alternatives_R: jax.Array
    limit_R: jax.Array
    eos_R: jax.Array
    keys_R: jax.Array


def greedy_rows(count: int, limit: int, biases: int = 0) -> RowSettings:
    """Rows that take the likeliest token until they have ``limit``."""
    fill = lambda value, dtype: jnp.full(count, value, dtype)
    return RowSettings(
        temperature_R=fill(0, jnp.float32),
        top_k_R=fill(0, jnp.int32),
        top_p_R=fill(1, jnp.float32),
        repetition_penalty_R=fill(1, jnp.float32),
        presence_penalty_R=fill(0, jnp.float32),
        frequency_penalty_R=fill(0, jnp.float32),
        bias_ids_RxB=jnp.full((count, biases), -1, jnp.int32),
        biases_RxB=jnp.zeros((count, biases), jnp.float32),
        no_repeat_ngram_R=fill(0, jnp.int32),
        given_R=fill(0, jnp.int32),
        alternatives_R=fill(0, jnp.int32),
        limit_R=fill(limit, jnp.int32),
        eos_R=fill(NO_EOS, jnp.int32),
        keys_R=jax.random.split(jax.random.key(0), count),
    )


def choose(
    logits_RxV: jax.Array,
    choosing: Choosing,
    settings: RowSettings,
    tokens_RxN: jax.Array,
    counts_R: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The next token of every row, int32 [R], and its log-probability, float32 [R].

    The log-probability is the model's own: of the plain softmax, before penalties, temperature
    and truncation.

    Args:
        logits_RxV: float32.
        choosing: what is compiled in.
        settings: the rows' settings.
        tokens_RxN: each row's answer so far, in its first ``counts_R`` places; behind it the rest
            of the tokens given, if any are left.
        counts_R: tokens in each row's answer.
    """
    size = logits_RxV.shape[-1]
    adjusted = logits_RxV
    if choosing.vocabulary_size < size:
        adjusted = jnp.where(jnp.arange(size) < choosing.vocabulary_size, adjusted, -jnp.inf)
    if choosing.penalised:
        adjusted = _where_asked(
            settings.repetition_penalty_R != 1,
            lambda adjusted: _penalise(adjusted, settings, tokens_RxN, counts_R),
            adjusted,
        )
        adjusted = _where_asked(
            (settings.presence_penalty_R != 0) | (settings.frequency_penalty_R != 0),
            lambda adjusted: _lower(adjusted, settings, tokens_RxN, counts_R),
            adjusted,
        )
    if choosing.biases:
        adjusted = _where_asked(
            jnp.any(settings.bias_ids_RxB >= 0, axis=-1),
            lambda adjusted: _bias(adjusted, settings),
            adjusted,
        )
    if choosing.ngrams:
        # Finite: a row whose every token is banned still chooses one of the vocabulary.
        adjusted = _where_asked(
            settings.no_repeat_ngram_R > 0,
            lambda adjusted: jnp.where(
                repeating_tokens(tokens_RxN, counts_R, settings.no_repeat_ngram_R, size),
                adjusted - 1e30,
                adjusted,
            ),
            adjusted,
        )
    chosen_R = first_highest(adjusted)
    if choosing.sampled:
        chosen_R = _where_asked(
            settings.temperature_R > 0,
            lambda chosen_R: jnp.where(
                settings.temperature_R > 0, _draw(adjusted, choosing, settings, counts_R), chosen_R
            ),
            chosen_R,
        )
    places_R = jnp.minimum(counts_R, tokens_RxN.shape[1] - 1)
    given_R = jnp.take_along_axis(tokens_RxN, places_R[:, None], axis=1)[:, 0]
    chosen_R = jnp.where(counts_R < settings.given_R, given_R, chosen_R)
    return chosen_R.astype(jnp.int32), log_probs_of(logits_RxV, chosen_R)


def first_highest(values: Any, xp: Any = jnp) -> Any:
    """``argmax`` over the last axis, int32; of equal numbers, the first.

    In two passes: XLA's CPU compiler searches number by number, which takes ten times as long (16
    rows of 4,096: 293 us against 21), a third of a small model's step.

    Args:
        values: [..., V].
        xp: ``jax.numpy`` or ``numpy``.
    """
    last = values.shape[-1] - 1
    highest = xp.max(values, axis=-1, keepdims=True)
    places_V = xp.arange(last + 1, dtype=xp.int32)
    return xp.min(xp.where(values < highest, xp.int32(last), places_V), axis=-1)


def log_probs_of(logits_RxV: jax.Array, tokens_R: jax.Array) -> jax.Array:
    """The log-probability of one token in each row, float32 [R]."""
    picked = jnp.take_along_axis(logits_RxV, tokens_R[:, None], axis=-1)[:, 0]
    return picked - jax.nn.logsumexp(logits_RxV, axis=-1)


def likeliest(logits_RxV: jax.Array, choosing: Choosing) -> tuple[jax.Array, jax.Array]:
    """The K likeliest tokens of the vocabulary, int32 [R, K], and their log-probabilities.

    The first one's is exactly that of ``log_probs_of`` where it is the one asked for.
    """
    total_R = jax.nn.logsumexp(logits_RxV, axis=-1)
    known = logits_RxV[:, : choosing.vocabulary_size]
    values_RxK, ids_RxK = jax.lax.top_k(known, choosing.alternatives)
    return ids_RxK.astype(jnp.int32), values_RxK - total_R[:, None]


def greedy_choice(logits: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest of the first ``size`` tokens and its log-probability among all, both [...], of
    logits [..., V]."""
    chosen, top = logits[..., :size].argmax(axis=-1), logits.max(axis=-1)
    total = np.exp(logits - top[..., None]).sum(axis=-1)
    picked = np.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
    return chosen.astype(np.int32), picked - top - np.log(total)


def _where_asked(
    asked_R: jax.Array, change: Callable[[jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
    """``change(x)``, if any row asks for it; it must leave the other rows as they are."""
    return jax.lax.cond(jnp.any(asked_R), change, lambda x: x, x)


def _draw(
    logits_RxV: jax.Array, choosing: Choosing, settings: RowSettings, counts_R: jax.Array
) -> jax.Array:
    """A token drawn for every row; draws for greedy rows (temperature 0) are discarded."""
    temperature = settings.temperature_R[:, None]
    warmed = logits_RxV / jnp.where(temperature > 0, temperature, 1.0)
    if choosing.truncated:
        warmed = _where_asked(
            (settings.top_k_R > 0) | (settings.top_p_R < 1),
            lambda warmed: truncate(warmed, settings.top_k_R, settings.top_p_R),
            warmed,
        )
    keys = jax.vmap(jax.random.fold_in)(settings.keys_R, counts_R)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_RxV.shape[-1:]))(keys)
    return first_highest(warmed + noise)  # the Gumbel-max trick


def truncate(logits_RxV: jax.Array, top_k_R: jax.Array, top_p_R: jax.Array) -> jax.Array:
    """Logits with -inf outside the top k, and outside the nucleus of what the top k leave.

    The nucleus is the smallest set of likeliest tokens whose mass reaches ``top_p``
    (arXiv 1904.09751), the mass taken among the top k. Tokens equal to the last one kept are
    kept too.
    """
    ranks_RxV = _ordered_bits(logits_RxV)
    wanted = jnp.where(top_k_R > 0, top_k_R, logits_RxV.shape[-1]).astype(jnp.float32)
    floor_R = _threshold(ranks_RxV, jnp.ones_like(logits_RxV), wanted)
    logits_RxV = jnp.where(ranks_RxV >= floor_R[:, None], logits_RxV, -jnp.inf)
    mass = jax.nn.softmax(logits_RxV, axis=-1)
    floor_R = jnp.where(top_p_R < 1, _threshold(ranks_RxV, mass, top_p_R), 0)
    return jnp.where(ranks_RxV >= floor_R[:, None], logits_RxV, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 as uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(ranks_RxV: jax.Array, weights_RxV: jax.Array, wanted_R: jax.Array) -> jax.Array:
    """The highest rank at or above which a row's weights add up to ``wanted_R``, uint32 [R].

    Found bit by bit: 32 sums over the vocabulary, where sorting it takes 20 times as long on a
    CPU (32,128 tokens).
    """

    def set_bit(i: jax.Array, floor_R: jax.Array) -> jax.Array:
        higher_R = floor_R | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        kept = jnp.sum(jnp.where(ranks_RxV >= higher_R[:, None], weights_RxV, 0), axis=-1)
        return jnp.where(kept >= wanted_R, higher_R, floor_R)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(ranks_RxV.shape[0], jnp.uint32))


def _penalise(
    logits_RxV: jax.Array, settings: RowSettings, tokens_RxN: jax.Array, counts_R: jax.Array
) -> jax.Array:
    """Logits of tokens already in the answer divided (if positive) or multiplied (if negative).

    CTRL's repetition penalty (arXiv 1909.05858), over the answer and not the input.
    """
    size = logits_RxV.shape[-1]
    there = jnp.arange(tokens_RxN.shape[1]) < counts_R[:, None]
    seen = _mark(jnp.where(there, tokens_RxN, size), size)
    penalty = settings.repetition_penalty_R[:, None]
    lowered = jnp.where(logits_RxV > 0, logits_RxV / penalty, logits_RxV * penalty)
    return jnp.where(seen, lowered, logits_RxV)


def _lower(
    logits_RxV: jax.Array, settings: RowSettings, tokens_RxN: jax.Array, counts_R: jax.Array
) -> jax.Array:
    """OpenAI's presence and frequency penalties, over the answer and not the input:
    https://platform.openai.com/docs/advanced-usage#frequency-and-presence-penalties"""
    size = logits_RxV.shape[-1]
    rows = jnp.arange(tokens_RxN.shape[0])[:, None]
    there = jnp.arange(tokens_RxN.shape[1]) < counts_R[:, None]
    times = jnp.zeros_like(logits_RxV)
    times = times.at[rows, jnp.where(there, tokens_RxN, size)].add(1, mode="drop")
    presence, frequency = settings.presence_penalty_R, settings.frequency_penalty_R
    return logits_RxV - presence[:, None] * (times > 0) - frequency[:, None] * times


def _bias(logits_RxV: jax.Array, settings: RowSettings) -> jax.Array:
    """Logits moved by each row's own biases."""
    size = logits_RxV.shape[-1]
    rows = jnp.arange(logits_RxV.shape[0])[:, None]
    ids = jnp.where(settings.bias_ids_RxB >= 0, settings.bias_ids_RxB, size)
    return logits_RxV.at[rows, ids].add(settings.biases_RxB, mode="drop")


def repeating_tokens(
    tokens_RxN: jax.Array, counts_R: jax.Array, n_R: jax.Array, vocabulary_size: int
) -> jax.Array:
    """Tokens that would complete an n-gram that the row already has, bool [R, V].

    Each row has an n of its own; where it is 0, none is marked.
    """
    places_N, n = jnp.arange(tokens_RxN.shape[1]), n_R[:, None]
    counts = counts_R[:, None]

    def compare(back: jax.Array, ends_RxN: jax.Array) -> jax.Array:
        # Whether the token `back` places before each place is that before the next token.
        last = jnp.take_along_axis(tokens_RxN, jnp.maximum(counts - back, 0), axis=1)
        before = jnp.roll(tokens_RxN, back, axis=1)
        return ends_RxN & ((before == last) & (places_N >= back) | (back >= n))

    ends_RxN = (n > 0) & (places_N < counts) & (counts >= n)
    ends_RxN = jax.lax.fori_loop(1, jnp.max(n_R), compare, ends_RxN)
    return _mark(jnp.where(ends_RxN, tokens_RxN, vocabulary_size), vocabulary_size)


def _mark(ids_RxN: jax.Array, size: int) -> jax.Array:
    """bool [R, size], True at each row's ids; ids of ``size`` mark nothing."""
    rows = jnp.arange(ids_RxN.shape[0])[:, None]
    return jnp.zeros((ids_RxN.shape[0], size), bool).at[rows, ids_RxN].set(True, mode="drop")
