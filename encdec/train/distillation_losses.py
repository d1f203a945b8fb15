"""Divergences between a stored teacher and a student, without a dense teacher tensor.

With t the teacher's and s the student's distribution at temperature T, per token:

* ``forward_kl``          sum t log(t / s)
* ``soft_cross_entropy``  -sum t log s: the same gradient, without the teacher's entropy
* ``reverse_kl``          sum s log(s / t)
* ``jensen_shannon``      b KL(t, m) + (1 - b) KL(s, m), m = b t + (1 - b) s (arXiv 2306.13649)

each times T^2, so that gradients keep their size as T grows (arXiv 1503.02531).

What a sum runs over depends on what was stored. ``full`` rows: every id. ``top_k``: the ids kept,
and all others as one outcome with the teacher's tail mass; that is the divergence of the two
distributions after merging those ids, a lower bound of the full one, and it is zero exactly if
the student agrees on every kept id and on the tail's mass. In particular, reverse KL on a
truncated support does not see where inside the tail the student puts its mass. ``sampled``: the
ids drawn, whose weights are unbiased estimates of t. Only the first two losses are linear in t,
so only these are unbiased; the others need probabilities that a few draws do not give, and are
refused. The forward KL of sampled rows uses the entropy stored with them, so that its expectation
is the full KL, while single tokens may be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from encdec.errors import ConfigError
from encdec.train.run_fields import AlphaSchedule, Tail, TeacherLoss

Fields = Mapping[str, jax.Array]

# Least probability that a logarithm is taken of: a tail that float16 stored as 0, or a student
# that leaves none, would otherwise give infinities.
_LEAST = 1e-6
_LEAST_LOG_PROB = -70.0


def check_divergence(divergence: TeacherLoss, method: str) -> None:
    """Raises ConfigError where rows stored by ``method`` cannot give this loss."""
    if method == "sampled" and divergence not in ("forward_kl", "soft_cross_entropy"):
        raise ConfigError(
            f"config.distill.loss is {divergence!r}, but the teacher's rows are sampled; expected "
            "'forward_kl' or 'soft_cross_entropy', which are unbiased on draws, or a teacher "
            "stored with --method=top_k or --method=full"
        )


def check_tail(tail: Tail, method: str) -> None:
    """Raises ConfigError where rows stored by ``method`` leave no mass out that ``tail`` is for."""
    if tail != "merged" and method != "top_k":
        raise ConfigError(
            f"config.distill.tail is {tail!r}, but the teacher's rows are {method}, which leave "
            "nothing out; expected 'merged', or a teacher stored with --method=top_k"
        )


def distillation_losses(
    logits_BxTxV: jax.Array,
    teacher: Fields,
    *,
    divergence: TeacherLoss = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    tail: Tail = "merged",
) -> jax.Array:
    """The divergence at every token, [B, T] float32; nats, times T^2. Not masked.

    Args:
        logits_BxTxV: the student's; softmax runs over all of V.
        teacher: the batch fields of ``Teacher.fields``.
        divergence: which one.
        temperature: T, that of the stored rows.
        beta: share of the teacher in the mixture of ``jensen_shannon``.
        tail: top-k rows: "merged" as described above; "dropped" renormalizes the kept ids and
            forgets the others, the plain top-k of the literature, biased towards overconfidence.
    """
    precision = jnp.promote_types(logits_BxTxV.dtype, jnp.float32)  # at least
    logits_BxTxV = logits_BxTxV.astype(precision) / temperature
    log_normaliser_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    if is_full(teacher):
        log_s = logits_BxTxV - log_normaliser_BxT[..., None]
        log_t = jnp.maximum(teacher["teacher_log_probs"], _LEAST_LOG_PROB)
        # The student's table may be rounded up beyond the vocabulary.
        log_t = jnp.pad(
            log_t,
            ((0, 0), (0, 0), (0, log_s.shape[-1] - log_t.shape[-1])),
            constant_values=_LEAST_LOG_PROB,
        )
        return jnp.sum(_outcome(divergence, log_s, log_t, beta), axis=-1) * temperature**2
    return sparse_losses(
        picked_logits(logits_BxTxV, teacher),
        log_normaliser_BxT,
        teacher,
        divergence=divergence,
        temperature=temperature,
        beta=beta,
        tail=tail,
    )


def is_full(teacher: Fields) -> bool:
    """Whether the teacher's rows hold every id, so that they need the student's whole logits."""
    return "teacher_log_probs" in teacher


_pick = jax.vmap(lambda values, *places: values[places])


def picked_logits(
    logits_BxTxK: jax.Array, teacher: Fields, start: int | jax.Array = 0
) -> jax.Array:
    """The student's logit of every stored pair, [B, P]; 0 for ids outside ``start`` ... + K - 1.

    So the parts of a vocabulary worked through in tiles add up to the whole.
    """
    ids_BxP, positions_BxP = teacher["teacher_ids"] - start, teacher["teacher_positions"]
    width = logits_BxTxK.shape[-1]
    inside_BxP = (ids_BxP >= 0) & (ids_BxP < width)
    return jnp.where(
        inside_BxP, _pick(logits_BxTxK, positions_BxP, jnp.clip(ids_BxP, 0, width - 1)), 0.0
    )


def sparse_losses(
    picked_BxP: jax.Array,
    log_normaliser_BxT: jax.Array,
    teacher: Fields,
    *,
    divergence: TeacherLoss,
    temperature: float,
    beta: float,
    tail: Tail,
) -> jax.Array:
    """``distillation_losses`` of "sampled" and "top_k" rows, from what they need of the student.

    Args:
        picked_BxP: logits of the stored pairs over the temperature.
        log_normaliser_BxT: logsumexp of all logits over the temperature.
        teacher, divergence, temperature, beta, tail: see ``distillation_losses``.
    """
    weights_BxP, positions_BxP = teacher["teacher_weights"], teacher["teacher_positions"]
    real_BxP = weights_BxP > 0  # the others only fill the row up
    log_s_BxP = picked_BxP - _pick(log_normaliser_BxT, positions_BxP)

    def by_token(values_BxP: jax.Array) -> jax.Array:
        zeros_BxT = jnp.zeros_like(log_normaliser_BxT)
        add = jax.vmap(lambda zeros, places, values: zeros.at[places].add(values))
        return add(zeros_BxT, positions_BxP, jnp.where(real_BxP, values_BxP, 0.0))

    if "teacher_tail" not in teacher:
        losses_BxT = by_token(-weights_BxP * log_s_BxP)
        losses_BxT -= teacher["teacher_entropy"] if divergence == "forward_kl" else 0.0
        return losses_BxT * temperature**2
    if tail == "dropped":
        kept_BxT = by_token(weights_BxP)
        weights_BxP = weights_BxP / jnp.maximum(_pick(kept_BxT, positions_BxP), _LEAST)
    log_t_BxP = jnp.log(jnp.where(real_BxP, weights_BxP, 1.0))
    losses_BxT = by_token(_outcome(divergence, log_s_BxP, log_t_BxP, beta))
    if tail == "merged":
        student_tail = 1.0 - by_token(jnp.exp(log_s_BxP))
        losses_BxT += _outcome(
            divergence,
            jnp.log(jnp.maximum(student_tail, _LEAST)),
            jnp.log(jnp.maximum(teacher["teacher_tail"], _LEAST)),
            beta,
        )
    return losses_BxT * temperature**2


def _outcome(divergence: TeacherLoss, log_s: jax.Array, log_t: jax.Array, beta: float) -> jax.Array:
    """What one outcome adds to the divergence."""
    s, t = jnp.exp(log_s), jnp.exp(log_t)
    if divergence == "forward_kl":
        return t * (log_t - log_s)
    if divergence == "soft_cross_entropy":
        return -t * log_s
    if divergence == "reverse_kl":
        return s * (log_s - log_t)
    log_m = jnp.logaddexp(log_t + jnp.log(beta), log_s + jnp.log1p(-beta))
    return beta * t * (log_t - log_m) + (1 - beta) * s * (log_s - log_m)


def alpha_schedule(
    name: AlphaSchedule,
    alpha: float,
    warmup_steps: float,
    learning_rate: Callable[[jax.Array], jax.Array],
    peak_learning_rate: float,
) -> Callable[[jax.Array], jax.Array]:
    """Weight of the teacher's part of the objective by step; gold targets get the rest.

    "constant": always ``alpha``. "warmup": rises linearly to it over ``warmup_steps``.
    "learning_rate": ``alpha`` times the learning rate over its peak, so that gold targets take
    over as the run cools down.
    """
    if name == "constant":
        return lambda step: jnp.float32(alpha)
    if name == "warmup":
        return lambda step: alpha * jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))
    return lambda step: jnp.float32(alpha * learning_rate(step) / peak_learning_rate)
