"""The codec: every representable distribution survives, damage is named, draws are unbiased."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.data.sparse_logits import (
    MAX_PAIRS,
    SparseFormat,
    SparseLogits,
    count_draws,
    decode_rows,
    encode_row,
)
from encdec.distill.draw import draw_ids, keep, to_sparse
from encdec.errors import ConfigError, DataError

FORMATS = {
    "sampled": SparseFormat("sampled", 32_000),
    "sampled, large vocabulary": SparseFormat("sampled", 262_144, draws=256),
    "sampled, proposal": SparseFormat("sampled", 131_072, proposal=0.8),
    "sampled, proposal, large vocabulary": SparseFormat("sampled", 2**24, proposal=1.2),
    "top_k": SparseFormat("top_k", 32_000, k=12),
    "top_k, large vocabulary": SparseFormat("top_k", 151_936, k=128),
    "full": SparseFormat("full", 37),
}


def random_row(fmt: SparseFormat, tokens: int, seed: int) -> SparseLogits:
    """Distributions of every size that the format allows, with ids and values at both ends."""
    random = np.random.default_rng(seed)
    scalars = dict(
        log_normaliser=random.normal(0, 30, tokens).astype(np.float16).astype(np.float32),
        entropy=random.uniform(0, 12, tokens).astype(np.float16).astype(np.float32),
    )
    if fmt.method == "full":
        log_probs = random.normal(-5, 2, (tokens, fmt.vocab_size)).astype(np.float32)
        empty = np.zeros(0, np.int32)
        return SparseLogits(np.zeros(tokens, np.int32), empty, log_probs=log_probs, **scalars)
    sizes = (
        np.full(tokens, fmt.k)
        if fmt.method == "top_k"
        else (random.integers(1, fmt.pairs_limit + 1, tokens))
    )
    edges = np.array([0, fmt.vocab_size - 1])
    ids = np.concatenate(
        [np.empty(0, np.int64)]
        + [
            np.sort(
                np.concatenate(
                    [
                        edges,
                        random.choice(
                            np.arange(1, min(fmt.vocab_size, 9000) - 1), n, replace=False
                        ),
                    ]
                )[:n]
            )
            for n in sizes
        ]
    )
    if fmt.method == "top_k":
        steps = random.integers(0, 2**15, len(ids))
        steps[: len(steps) // 2 : 2] = [2**15 - 1]
        return SparseLogits(
            sizes.astype(np.int32),
            ids.astype(np.int32),
            log_probs=(steps / -1024).astype(np.float32),
            tail=random.uniform(0, 1, tokens).astype(np.float16).astype(np.float32),
            **scalars,
        )
    counts = random.integers(1, MAX_PAIRS + 1, len(ids))
    ratios = (random.integers(-(2**15), 2**15, len(ids)) / 2048).astype(np.float32)
    return SparseLogits(
        sizes.astype(np.int32),
        ids.astype(np.int32),
        counts=counts.astype(np.int32),
        log_ratios=ratios if fmt.weighted else None,
        **scalars,
    )


def assert_same(a: SparseLogits, b: SparseLogits) -> None:
    for name in SparseLogits.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_every_row_survives_storage(fmt, lengths, seed):
    rows = [random_row(fmt, n, seed + i) for i, n in enumerate(lengths)]
    tokens, together = decode_rows([encode_row(row, fmt) for row in rows], fmt)
    assert tokens.tolist() == lengths
    join = lambda name: (
        None
        if getattr(rows[0], name) is None
        else (np.concatenate([getattr(row, name) for row in rows]))
    )
    assert_same(together, SparseLogits(**{n: join(n) for n in SparseLogits.__dataclass_fields__}))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_an_empty_row_has_no_tokens(fmt):
    tokens, nothing = decode_rows([b""], fmt)
    assert tokens.tolist() == [0] and len(nothing) == 0 and len(nothing.ids) == 0
    assert decode_rows([], fmt)[0].tolist() == []


def raw_bytes(data: bytes) -> int:
    return len(zlib.decompress(data[12:], -15))


def test_a_pair_takes_the_bytes_it_should():
    wanted = {
        "sampled": 3,
        "sampled, large vocabulary": 4,
        "sampled, proposal": 6,
        "sampled, proposal, large vocabulary": 6,
        "top_k": 4,
        "top_k, large vocabulary": 5,
    }
    for name, size in wanted.items():
        row = random_row(FORMATS[name], 40, 3)
        assert FORMATS[name].pair_bytes == size
        scalars = 7 if FORMATS[name].method == "top_k" else 5
        assert raw_bytes(encode_row(row, FORMATS[name])) == 40 * scalars + size * len(row.ids)


def test_a_teacher_as_sure_as_large_ones_takes_less_than_36_bytes_a_token():
    """The goal at 50 draws and 32,000 ids, on 12 ids per token (as in arXiv 2503.16870 with a 3B
    teacher): tokens of very different certainty over a Zipfian vocabulary in random order,
    which leaves the ids as little to compress as can be."""
    vocab, tokens = 32_000, 256
    random = np.random.default_rng(0)
    prior = random.permutation(-np.log(np.arange(3, vocab + 3)))
    sharpness = random.gamma(1.0, 1.2, (tokens, 1)) + 0.5
    logits = sharpness * (prior + 1.7 * random.gumbel(size=(tokens, vocab)))
    fmt = SparseFormat("sampled", vocab)
    keys = jax.random.split(jax.random.key(0), tokens)
    row = to_sparse(jax.tree.map(np.asarray, keep(jnp.array(logits), keys, fmt)), fmt)
    assert 12 < row.sizes.mean() < 14 and row.sizes.min() == 1 and row.sizes.max() > 45
    data = encode_row(row, fmt)
    assert len(data) < 30 * tokens and len(data) < 0.7 * raw_bytes(data)


def test_rows_that_cannot_be_stored_are_refused():
    row = random_row(FORMATS["sampled"], 3, 0)
    swapped = row.ids.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    with pytest.raises(ValueError, match="are not in ascending order"):
        encode_row(dataclasses.replace(row, ids=swapped), FORMATS["sampled"])
    long = SparseLogits(
        np.array([257], np.int32),
        np.arange(257, dtype=np.int32),
        row.log_normaliser[:1],
        row.entropy[:1],
        counts=np.ones(257, np.int32),
    )
    with pytest.raises(ValueError, match="257 pairs; 1 to 256"):
        encode_row(long, FORMATS["sampled"])


def test_values_out_of_range_are_clipped_not_wrapped():
    fmt = SparseFormat("top_k", 100, k=2)
    row = SparseLogits(
        np.array([2], np.int32),
        np.array([3, 7], np.int32),
        np.array([1e9], np.float32),
        np.array([0.5], np.float32),
        log_probs=np.array([1e-6, -90.0], np.float32),
        tail=np.array([0.0], np.float32),
    )
    _, back = decode_rows([encode_row(row, fmt)], fmt)
    assert back.log_probs[0] == 0 and back.log_probs[1] == -(2**15 - 1) / 1024
    assert back.log_normaliser[0] == np.finfo(np.float16).max


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_any_flipped_byte_or_missing_end_is_refused_by_row(fmt):
    data = encode_row(random_row(fmt, 5, 1), fmt)
    good = encode_row(random_row(fmt, 3, 2), fmt)
    for place in range(0, len(data), max(1, len(data) // 60)):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        with pytest.raises(DataError, match="row 4711 is damaged"):
            decode_rows([good, bytes(broken)], fmt, names=[3, 4711])
    for end in (3, 11, len(data) // 2, len(data) - 1):
        with pytest.raises(DataError, match="row 1 is damaged"):
            decode_rows([good, data[:end]], fmt)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"draws": 257}, "--draws is 257; expected 1 to 256"),
        ({"draws": 0}, "--draws is 0"),
        ({"method": "top_p"}, "--method is 'top_p'"),
        ({"temperature": 0.0}, "--temperature is 0.0"),
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"proposal": float("inf")}, "--proposal is inf"),
        ({"method": "top_k", "k": 500}, "--k is 500"),
        ({"method": "top_k", "proposal": 0.9}, "--proposal is 0.9; expected 1"),
        ({"vocab_size": 2**24 + 1}, "16,777,216"),
    ],
)
def test_impossible_formats_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SparseFormat(**({"method": "sampled", "vocab_size": 400} | change))


def test_counting_draws_equals_counting_one_by_one():
    draws = np.random.default_rng(0).integers(0, 30, (50, 20))
    sizes, ids, counts, first = count_draws(draws)
    start = 0
    for token, size in enumerate(sizes):
        part = slice(start, start + size)
        unique, count = np.unique(draws[token], return_counts=True)
        np.testing.assert_array_equal(ids[part], unique)
        np.testing.assert_array_equal(counts[part], count)
        np.testing.assert_array_equal(draws.reshape(-1)[first[part]], unique)
        assert (first[part] // 20 == token).all()
        start += size


def skewed_logits(vocab: int) -> np.ndarray:
    """A few likely ids, a long tail, impossible ids at the ends and in between."""
    logits = -1.2 * np.log(1 + np.arange(vocab, dtype=np.float32))
    np.random.default_rng(0).shuffle(logits)
    logits[[0, vocab // 2, vocab - 1]] = -np.inf
    return logits


@pytest.mark.parametrize("vocab", [2, 7, 100, 1023])
def test_draws_follow_the_distribution(vocab):
    """Chi-square over 200,000 draws, at one in 10^5; impossible ids never come."""
    logits = skewed_logits(vocab) if vocab > 7 else np.log(np.arange(1, vocab + 1))
    probs = np.exp(logits - np.max(logits)).astype(np.float32)
    probs /= probs.sum()
    rows, draws = 2000, 100
    keys = jax.random.split(jax.random.key(3), rows)
    got = np.asarray(jax.jit(draw_ids, static_argnums=2)(jnp.tile(probs, (rows, 1)), keys, draws))
    counts = np.bincount(got.reshape(-1), minlength=vocab)
    assert len(counts) == vocab and counts[probs == 0].sum() == 0
    expected = probs.astype(np.float64) / probs.sum() * rows * draws
    possible = expected > 0
    chi = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    # Wilson-Hilferty: the cube root of chi-square / freedom is close to normal.
    z = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert z < 4.3, (chi, freedom)
    # Draws of one token are independent of each other: pairs agree as often as chance says.
    agree = (got[:, 0::2] == got[:, 1::2]).mean()
    chance = (probs.astype(np.float64) ** 2).sum()
    assert abs(agree - chance) < 5 * np.sqrt(chance * (1 - chance) / (rows * draws / 2))


def test_very_unlikely_ids_keep_their_share():
    """One likely id in front of 2^17 that share one thousandth: each adds 2^-27 to a sum near 1,
    less than a float32 there can tell, and still they come as often as they should."""
    vocab = 2**17
    probs = np.full(vocab, 0.001 / (vocab - 1), np.float32)
    probs[0] = 0.999
    rows, draws = 50, 1000
    keys = jax.random.split(jax.random.key(0), rows)
    got = np.concatenate(
        [np.asarray(draw_ids(jnp.array(probs)[None], key[None], draws)) for key in keys]
    )
    unlikely = got[got > 0]
    assert abs(len(unlikely) - 50) < 5 * np.sqrt(50)
    assert len(np.unique(unlikely)) > 0.9 * len(unlikely)  # a rounded sum would repeat a few


@pytest.mark.parametrize("proposal, temperature", [(1.0, 1.0), (0.8, 1.0), (1.2, 2.0)])
def test_mean_weights_converge_to_the_teacher(proposal, temperature):
    """The expectation of the stored weights is the tempered distribution, with any proposal."""
    vocab, rows = 50, 20_000
    fmt = SparseFormat("sampled", vocab, draws=20, proposal=proposal, temperature=temperature)
    logits = skewed_logits(vocab + 6)  # six rows of the table belong to no id
    keys = jax.random.split(jax.random.key(1), rows)
    kept = jax.jit(keep, static_argnums=2)(jnp.tile(logits, (rows, 1)), keys, fmt)
    row = to_sparse(jax.tree.map(np.asarray, kept), fmt)
    _, back = decode_rows([encode_row(row, fmt)], fmt)
    weights = back.weights(fmt)
    mean = np.bincount(back.ids, weights, minlength=vocab) / rows
    wanted = np.exp(logits[:vocab] / temperature)
    wanted /= wanted.sum()
    ratio = np.maximum(wanted, 1e-30) ** (1 - proposal) * (wanted**proposal).sum()
    error = np.sqrt(wanted * ratio / (20 * rows)) + 1e-9
    assert (np.abs(mean - wanted) < 5 * error + 3e-4 * wanted).all()
    entropy = -(wanted[wanted > 0] * np.log(wanted[wanted > 0])).sum()
    np.testing.assert_allclose(back.entropy, entropy, rtol=1e-3)
    log_normaliser = np.log(np.exp(logits[:vocab] / temperature).sum())
    np.testing.assert_allclose(back.log_normaliser, log_normaliser, rtol=1e-3)
    if proposal == 1:
        sums = np.add.reduceat(weights, np.cumsum(back.sizes) - back.sizes)
        np.testing.assert_allclose(sums, 1, rtol=1e-6)


def test_top_k_keeps_the_likeliest_and_the_mass_of_the_rest():
    fmt = SparseFormat("top_k", 300, k=5, temperature=1.5)
    logits = np.random.default_rng(2).normal(0, 3, (7, 304)).astype(np.float32)
    kept = keep(jnp.array(logits), jax.random.split(jax.random.key(0), 7), fmt)
    _, back = decode_rows([encode_row(to_sparse(jax.tree.map(np.asarray, kept), fmt), fmt)], fmt)
    probs = np.exp(logits[:, :300].astype(np.float64) / 1.5)
    probs /= probs.sum(1, keepdims=True)
    for token in range(7):
        wanted = np.sort(np.argsort(probs[token])[-5:])
        part = slice(token * 5, token * 5 + 5)
        np.testing.assert_array_equal(back.ids[part], wanted)
        np.testing.assert_allclose(back.weights(fmt)[part], probs[token, wanted], rtol=6e-4)
        np.testing.assert_allclose(back.tail[token], 1 - probs[token, wanted].sum(), rtol=1e-3)


def test_full_rows_are_exact():
    fmt = SparseFormat("full", 40)
    logits = np.random.default_rng(2).normal(0, 3, (7, 48)).astype(np.float32)
    kept = keep(jnp.array(logits), jax.random.split(jax.random.key(0), 7), fmt)
    _, back = decode_rows([encode_row(to_sparse(jax.tree.map(np.asarray, kept), fmt), fmt)], fmt)
    np.testing.assert_array_equal(back.log_probs, kept["log_probs"])
    np.testing.assert_allclose(np.exp(back.log_probs).sum(1), 1, rtol=1e-5)
