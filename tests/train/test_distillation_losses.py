"""Distillation losses against dense formulas in float64, and what sampling does to gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.data.sparse_logits import SparseFormat, decode_rows, encode_row
from encdec.distill.draw import keep, to_sparse
from encdec.errors import ConfigError
from encdec.train.distillation_losses import (
    alpha_schedule,
    check_divergence,
    check_tail,
    distillation_losses,
)
from encdec.train.losses import Teaching, target_losses
from encdec.train.run_fields import DistillConfig, LossConfig

B, T, V, TABLE = 2, 5, 40, 48
DIVERGENCES = ("forward_kl", "soft_cross_entropy", "reverse_kl", "jensen_shannon")


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def reference(divergence, log_t, log_s, beta=0.5):
    """Plain definitions over the last axis."""
    t, s = np.exp(log_t), np.exp(log_s)
    kl = lambda p, log_p, log_q: (p * (log_p - log_q)).sum(-1)
    if divergence == "forward_kl":
        return kl(t, log_t, log_s)
    if divergence == "soft_cross_entropy":
        return -(t * log_s).sum(-1)
    if divergence == "reverse_kl":
        return kl(s, log_s, log_t)
    log_m = np.log(beta * t + (1 - beta) * s)
    return beta * kl(t, log_t, log_m) + (1 - beta) * kl(s, log_s, log_m)


def fields_of(kept: dict, fmt: SparseFormat, tokens: list[int], pairs: int = 0):
    """Batch fields made plainly, token by token, after a trip through storage."""
    _, table = decode_rows([encode_row(to_sparse(jax.tree.map(np.asarray, kept), fmt), fmt)], fmt)
    start = 0
    width = pairs or max(1, int(table.sizes.sum()))
    fields = {"teacher_entropy": np.zeros((len(tokens), T), np.float32)}
    if fmt.method == "full":
        fields["teacher_log_probs"] = np.zeros((len(tokens), T, fmt.vocab_size), np.float32)
    else:
        fields |= {
            "teacher_ids": np.zeros((len(tokens), width), np.int32),
            "teacher_weights": np.zeros((len(tokens), width), np.float32),
            "teacher_positions": np.zeros((len(tokens), width), np.int32),
        }
        weights, starts = table.weights(fmt), np.cumsum(table.sizes) - table.sizes
    if fmt.method == "top_k":
        fields["teacher_tail"] = np.zeros((len(tokens), T), np.float32)
    for row, count in enumerate(tokens):
        place = 0
        for position in range(count):
            token = start + position
            fields["teacher_entropy"][row, position] = table.entropy[token]
            if fmt.method == "full":
                fields["teacher_log_probs"][row, position] = table.log_probs[token]
                continue
            if fmt.method == "top_k":
                fields["teacher_tail"][row, position] = table.tail[token]
            for pair in range(starts[token], starts[token] + table.sizes[token]):
                fields["teacher_ids"][row, place] = table.ids[pair]
                fields["teacher_weights"][row, place] = weights[pair]
                fields["teacher_positions"][row, place] = position
                place += 1
        start += count
    return fields, table


@pytest.fixture(scope="module")
def logits():
    random = np.random.default_rng(0)
    teacher = random.normal(0, 2, (B * T, V)).astype(np.float32)
    student = random.normal(0, 2, (B, T, TABLE)).astype(np.float32)
    return teacher, student


def kept_of(teacher, fmt, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(teacher))
    return keep(jnp.array(teacher), keys, fmt)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_full_rows_give_the_dense_formulas(logits, divergence, temperature):
    teacher, student = logits
    student = student[..., :V]
    fmt = SparseFormat("full", V, temperature=temperature)
    fields, _ = fields_of(kept_of(teacher, fmt), fmt, [T] * B)
    got = distillation_losses(
        jnp.array(student), fields, divergence=divergence, temperature=temperature, beta=0.3
    )
    wanted = (
        reference(
            divergence,
            log_softmax(teacher.reshape(B, T, V) / temperature),
            log_softmax(student / temperature),
            0.3,
        )
        * temperature**2
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_formulas_hold_in_float64_to_a_millionth(divergence):
    """In float64, so that the formula is compared and no rounding."""
    random = np.random.default_rng(1)
    teacher, student = random.normal(0, 3, (2, B, T, V))
    with jax.enable_x64(True):
        log_t = jnp.array(log_softmax(teacher / 1.7))
        got = distillation_losses(
            jnp.array(student),
            {"teacher_log_probs": log_t},
            divergence=divergence,
            temperature=1.7,
            beta=0.1,
        )
    assert got.dtype == np.float64
    wanted = reference(divergence, log_softmax(teacher / 1.7), log_softmax(student / 1.7), 0.1)
    np.testing.assert_allclose(got, wanted * 1.7**2, rtol=1e-9)


def stored(method, random, tail):
    """Rows as a teacher keeps them, in float64: fields, and the same as dense outcomes.

    Dense are log t [B, T, V + 1] with -inf where nothing is kept (the last outcome is the merged
    tail) and the mask of real tokens, of which the second row has fewer.
    """
    lengths, pairs = [T, 2], 6
    table = np.full((B, T, V + 1), -np.inf)
    fields = {
        "teacher_ids": np.zeros((B, T * pairs + 3), np.int32),
        "teacher_weights": np.zeros((B, T * pairs + 3)),
        "teacher_positions": np.zeros((B, T * pairs + 3), np.int32),
        "teacher_entropy": np.zeros((B, T)),
    }
    if method == "top_k":
        fields["teacher_tail"] = np.zeros((B, T))
    for row, length in enumerate(lengths):
        for place in range(length):
            part = slice(place * pairs, (place + 1) * pairs)
            ids = random.choice(V, pairs, replace=False)
            weights = random.dirichlet(np.ones(pairs + 1))
            if method == "sampled":
                weights = weights[:-1] * random.uniform(0.5, 2, pairs)  # with importance ratios
                fields["teacher_entropy"][row, place] = random.uniform(0, 3)
            else:
                fields["teacher_tail"][row, place] = weights[-1]
                if tail == "merged":
                    table[row, place, V] = np.log(weights[-1])
                weights = weights[:-1]
            kept = weights / weights.sum() if tail == "dropped" else weights
            table[row, place, ids] = np.log(kept)
            fields["teacher_ids"][row, part] = ids
            fields["teacher_weights"][row, part] = weights
            fields["teacher_positions"][row, part] = place
    return fields, table, np.arange(T) < np.array(lengths)[:, None]


@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize(
    "method, divergence, tail",
    [
        ("sampled", "forward_kl", "merged"),
        ("sampled", "soft_cross_entropy", "merged"),
        *(
            ("top_k", divergence, tail)
            for divergence in DIVERGENCES
            for tail in ("merged", "dropped")
            if (divergence, tail) != ("reverse_kl", "dropped")  # refused by parse_config
        ),
    ],
)
def test_stored_rows_give_the_dense_sums_in_float64_with_masks(method, divergence, tail, tile):
    """What training sums: weights mask padding, tiles of the vocabulary change nothing."""
    random = np.random.default_rng(3)
    fields, log_t, mask = stored(method, random, tail)
    student, temperature = random.normal(0, 2, (B, T, V)), 1.7
    log_s = log_softmax(student / temperature)
    kept = np.isfinite(log_t[..., :V])
    rest = np.log(np.where(kept, 0, np.exp(log_s)).sum(-1, keepdims=True))
    log_s = np.concatenate([log_s, rest], -1)
    # Outcomes of which nothing is kept add nothing, on either side.
    fill = np.where(np.isfinite(log_t), log_t, 0.0)
    terms = {
        "forward_kl": np.exp(fill) * (fill - log_s),
        "soft_cross_entropy": -np.exp(fill) * log_s,
        "reverse_kl": np.exp(log_s) * (log_s - fill),
    }
    log_m = np.log(0.3 * np.exp(fill) + 0.7 * np.exp(log_s))
    terms["jensen_shannon"] = 0.3 * np.exp(fill) * (fill - log_m) + 0.7 * np.exp(log_s) * (
        log_s - log_m
    )
    if method == "sampled":  # linear in t: the weights as they are, and the stored entropy
        terms["forward_kl"] = terms["soft_cross_entropy"]
    wanted = np.where(np.isfinite(log_t), terms[divergence], 0.0).sum(-1)
    if method == "sampled" and divergence == "forward_kl":
        wanted -= fields["teacher_entropy"]
    wanted = (wanted * mask).sum() * temperature**2
    with jax.enable_x64(True):
        config = DistillConfig("x", divergence, temperature=temperature, beta=0.3, tail=tail)
        teaching = Teaching(jax.tree.map(jnp.array, fields), config, jnp.float64(1.0))
        table = jnp.array(student)
        head = lambda hidden, start=0, stop=V: hidden[..., start:stop]
        sums = target_losses(
            head,
            table,
            jnp.zeros((B, T), jnp.int32),
            jnp.array(mask * 1.0),
            LossConfig(z_loss=0.0, vocab_tile=tile),
            V,
            teaching,
        )
    np.testing.assert_allclose(sums.teacher.divergence, wanted, rtol=1e-6)
    np.testing.assert_allclose(sums.objective, wanted, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_is_the_divergence_with_the_tail_merged(logits, divergence, temperature):
    teacher, student = logits
    fmt = SparseFormat("top_k", V, k=6, temperature=temperature)
    fields, table = fields_of(kept_of(teacher, fmt), fmt, [T] * B, pairs=T * 6 + 5)
    got = distillation_losses(
        jnp.array(student), fields, divergence=divergence, temperature=temperature, beta=0.3
    )
    log_s = log_softmax(student / temperature)
    for row in range(B):
        for position in range(T):
            token = row * T + position
            ids = table.ids[token * 6 : token * 6 + 6]
            kept_s = log_s[row, position, ids]
            s = np.append(kept_s, np.log1p(-np.exp(kept_s).sum()))
            kept_t = table.log_probs[token * 6 : token * 6 + 6].astype(np.float64)
            t = np.append(kept_t, np.log(table.tail[token]))
            wanted = reference(divergence, t, s, 0.3) * temperature**2
            np.testing.assert_allclose(got[row, position], wanted, rtol=1e-4, atol=1e-5)


def test_merged_top_k_bounds_the_full_divergence_from_below_and_meets_it(logits):
    teacher, student = logits
    fmt = SparseFormat("top_k", V, k=6)
    fields, _ = fields_of(kept_of(teacher, fmt), fmt, [T] * B)
    log_t = log_softmax(teacher.reshape(B, T, V))
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
        got = distillation_losses(jnp.array(student[..., :V]), fields, divergence=divergence)
        full = reference(divergence, log_t, log_softmax(student[..., :V]))
        assert (np.asarray(got) < full + 1e-3).all() and (np.asarray(got) > 0).all()
        same = distillation_losses(
            jnp.array(teacher.reshape(B, T, V)), fields, divergence=divergence
        )
        np.testing.assert_allclose(same, 0, atol=2e-3)


def test_dropping_the_tail_pulls_the_optimum_away(logits):
    """The gradient at the teacher itself vanishes with the tail merged, not with it dropped."""
    teacher, _ = logits
    fmt = SparseFormat("top_k", V, k=6)
    fields, _ = fields_of(kept_of(teacher, fmt), fmt, [T] * B)
    loss = lambda x, tail: distillation_losses(x, fields, tail=tail).sum()
    at = jnp.array(teacher.reshape(B, T, V))
    merged, dropped = (jnp.abs(jax.grad(loss)(at, tail)).max() for tail in ("merged", "dropped"))
    assert merged < 2e-3 and dropped > 0.02


@pytest.mark.parametrize("proposal, temperature", [(1.0, 1.0), (0.8, 1.0), (1.2, 2.0)])
def test_sampled_rows_follow_their_definition(logits, proposal, temperature):
    teacher, student = logits
    fmt = SparseFormat("sampled", V, draws=9, proposal=proposal, temperature=temperature)
    tokens = [T, 2]
    kept = kept_of(teacher[: sum(tokens)], fmt)
    fields, table = fields_of(kept, fmt, tokens, pairs=80)
    log_s = log_softmax(student / temperature)
    weights, starts = table.weights(fmt), np.cumsum(table.sizes) - table.sizes
    for divergence in ("forward_kl", "soft_cross_entropy"):
        got = distillation_losses(
            jnp.array(student), fields, divergence=divergence, temperature=temperature
        )
        token = 0
        for row, count in enumerate(tokens):
            for position in range(count):
                part = slice(starts[token], starts[token] + table.sizes[token])
                wanted = -(weights[part] * log_s[row, position, table.ids[part]]).sum()
                wanted -= table.entropy[token] if divergence == "forward_kl" else 0
                np.testing.assert_allclose(
                    got[row, position], wanted * temperature**2, rtol=2e-5, atol=1e-5
                )
                token += 1


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_losses_that_draws_cannot_give_are_refused(divergence):
    with pytest.raises(ConfigError, match="--method=top_k"):
        check_divergence(divergence, "sampled")
    check_divergence(divergence, "top_k")
    check_divergence(divergence, "full")


def text_case(tokens: int, vocab: int, seed: int):
    """Teachers as text has them, word frequencies shared and contexts on top of these; a student
    that has learned part of it."""
    random = np.random.default_rng(seed)
    prior = random.permutation(-1.1 * np.log(1 + np.arange(vocab)))
    teacher = (prior + random.normal(0, 1.5, (tokens, vocab))).astype(np.float32)
    student = (0.6 * teacher + random.normal(0, 0.7, teacher.shape)).astype(np.float32)
    features = random.normal(0, 1, (tokens, 4)).astype(np.float32)
    features[:, 0] = 1  # what a bias would see
    return teacher, student, features


@functools.partial(jax.jit, static_argnames="tail")
def gradient(student, features, fields, tail="merged"):
    """Of the mean loss, with respect to a head that all tokens share: [4, V]."""

    def loss(head):
        return distillation_losses((student + features @ head)[None], fields, tail=tail).mean()

    return jax.grad(loss)(jnp.zeros((features.shape[1], student.shape[1])))


def batch_fields(kept, fmt, pairs=None):
    """One row that holds all tokens, filled up to ``pairs``."""
    sparse = to_sparse(jax.tree.map(np.asarray, kept), fmt)
    _, table = decode_rows([encode_row(sparse, fmt)], fmt)
    fields = {"teacher_entropy": table.entropy[None]}
    if fmt.method == "full":
        return fields | {"teacher_log_probs": table.log_probs[None]}
    if fmt.method == "top_k":
        fields["teacher_tail"] = table.tail[None]
    fill = lambda x: np.pad(x, (0, (pairs or len(x)) - len(x)))[None]
    return fields | {
        "teacher_ids": fill(table.ids),
        "teacher_weights": fill(table.weights(fmt)),
        "teacher_positions": fill(np.repeat(np.arange(len(table)), table.sizes)),
    }


def angle(a, b):
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def test_the_mean_gradient_of_draws_is_the_full_gradient():
    """Over many draws the angle shrinks like one over the root of their number; the norm is met."""
    teacher, student, features = text_case(12, 200, 0)
    full = gradient(
        student,
        features,
        batch_fields(kept_of(teacher, SparseFormat("full", 200)), SparseFormat("full", 200)),
    )
    for proposal in (1.0, 0.8):
        fmt = SparseFormat("sampled", 200, draws=50, proposal=proposal)
        single = [
            np.asarray(
                gradient(
                    student, features, batch_fields(kept_of(teacher, fmt, seed), fmt, pairs=600)
                )
            )
            for seed in range(60)
        ]
        one = np.mean([angle(g, full) for g in single])
        mean = np.mean(single, axis=0)
        assert angle(mean, full) < 1.6 * one / np.sqrt(60)
        assert abs(np.linalg.norm(mean) / np.linalg.norm(full) - 1) < 0.02


def test_draws_point_nearer_to_the_full_gradient_than_top_k_at_equal_bytes():
    """Noise averages out over tokens, bias does not."""
    teacher, student, features = text_case(4000, 400, 1)

    def of(fmt, tail="merged"):
        return gradient(student, features, batch_fields(kept_of(teacher, fmt), fmt), tail)

    full = of(SparseFormat("full", 400))
    angles = {n: angle(of(SparseFormat("sampled", 400, draws=n)), full) for n in (10, 50, 128)}
    fmt = SparseFormat("sampled", 400, draws=50)
    sizes = to_sparse(jax.tree.map(np.asarray, kept_of(teacher, fmt)), fmt).sizes
    top = angle(of(SparseFormat("top_k", 400, k=int(np.ceil(sizes.mean()))), "dropped"), full)
    assert angles[10] > angles[50] > angles[128]
    assert angles[50] < top, (angles, top)


def test_padding_takes_no_part(logits):
    """Pairs that fill a row up change neither loss nor gradient, and no gradient is NaN."""
    teacher, student = logits
    for fmt in (SparseFormat("sampled", V, draws=9), SparseFormat("top_k", V, k=6)):
        small, table = fields_of(kept_of(teacher[: T + 2], fmt), fmt, [T, 2])
        wide, _ = fields_of(
            kept_of(teacher[: T + 2], fmt), fmt, [T, 2], pairs=int(table.sizes.sum()) + 17
        )
        mask = np.arange(T) < np.array([[T], [2]])
        loss = lambda x, f, mask=mask: (distillation_losses(x, f) * mask).sum()
        a, b = (jax.value_and_grad(loss)(jnp.array(student), f) for f in (small, wide))
        np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
        np.testing.assert_allclose(a[1], b[1], rtol=1e-5, atol=1e-7)
        assert np.isfinite(np.asarray(b[1])).all()
        assert (np.asarray(b[1])[1, 2:] == 0).all()


def test_alpha_schedules():
    rate = lambda step: 1e-3 * (1 - step / 100)
    get = lambda name: [
        float(alpha_schedule(name, 0.9, 10, rate, 1e-3)(jnp.int32(step))) for step in (0, 4, 9, 50)
    ]
    np.testing.assert_allclose(get("constant"), [0.9] * 4, rtol=1e-6)
    np.testing.assert_allclose(get("warmup"), [0.09, 0.45, 0.9, 0.9], rtol=1e-6)
    np.testing.assert_allclose(get("learning_rate"), [0.9, 0.864, 0.819, 0.45], rtol=1e-6)


def test_a_tail_is_dropped_only_where_something_was_left_out():
    for method in ("sampled", "full"):
        with pytest.raises(ConfigError, match=f"distill.tail is 'dropped', .* are {method}"):
            check_tail("dropped", method)
        check_tail("merged", method)
    check_tail("dropped", "top_k")
