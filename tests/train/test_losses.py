"""Losses against their definitions, computed plainly in numpy."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.model import build_model, init_params, preset
from encdec.train.losses import loss_positions, target_losses
from encdec.train.metrics import eval_report
from encdec.train.run_fields import LossConfig
from encdec.train.step import batch_metrics
from tests.model.examples import drawn, packed_batch

B, T, V = 3, 5, 11


@pytest.fixture
def example():
    random = np.random.default_rng(0)
    return (
        random.normal(size=(B, T, V)).astype(np.float32),
        random.integers(0, V, (B, T)),
        random.integers(0, 2, (B, T)).astype(np.float32),
    )


@pytest.mark.parametrize("z_loss, smoothing", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.1, 0.2)])
def test_sums_follow_the_definitions(example, z_loss, smoothing):
    logits, targets, weights = example
    loss = LossConfig(z_loss, smoothing)
    sums = jax.jit(lambda *parts: target_losses(lambda x: x, *parts, loss))(
        logits, targets, weights
    )
    cross_entropy = objective = z_total = correct = 0.0
    for b in range(B):
        for t in range(T):
            log_z = np.log(np.exp(logits[b, t].astype(np.float64)).sum())
            log_p = logits[b, t] - log_z
            wanted = np.full(V, smoothing / V)
            wanted[targets[b, t]] += 1 - smoothing
            cross_entropy -= weights[b, t] * log_p[targets[b, t]]
            z = weights[b, t] * z_loss * log_z**2
            objective += z - weights[b, t] * (wanted * log_p).sum()
            z_total += z
            correct += weights[b, t] * (np.argmax(logits[b, t]) == targets[b, t])
    np.testing.assert_allclose(sums.cross_entropy, cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(sums.objective, objective, rtol=1e-5)
    np.testing.assert_allclose(sums.z_loss, z_total, rtol=1e-5, atol=1e-7)
    assert sums.correct == correct and sums.weight == weights.sum()


def test_gathered_positions_are_the_loss_bearing_ones_in_order():
    random = np.random.default_rng(1)
    length, count, width = 9, 4, 3
    weights = np.zeros((4, length), np.float32)
    weights[0, [2, 3, 7]] = 1  # fewer than count
    weights[1, [0, 5, 6, 8]] = 1  # exactly count
    weights[3, [8]] = 0.5  # a weight of its own
    hidden = random.normal(size=(4, length, width)).astype(np.float32)
    targets = random.integers(1, 50, (4, length))
    batch = {
        "decoder_loss_weights": jnp.array(weights),
        "decoder_target_tokens": jnp.array(targets),
    }
    got_hidden, got_targets, got_weights = jax.jit(loss_positions, static_argnums=2)(
        hidden, batch, count
    )
    assert got_hidden.shape == (4, count, width)
    for row in range(4):
        places = np.flatnonzero(weights[row])
        n = len(places)
        np.testing.assert_array_equal(got_hidden[row, :n], hidden[row, places])
        np.testing.assert_array_equal(got_targets[row, :n], targets[row, places])
        np.testing.assert_array_equal(got_weights[row, :n], weights[row, places])
        np.testing.assert_array_equal(got_weights[row, n:], 0)


def test_gathering_changes_neither_loss_nor_gradient():
    random = np.random.default_rng(2)
    hidden, head = random.normal(size=(2, 8, 4)), jnp.array(random.normal(size=(4, V)))
    weights = jnp.array([[0, 0, 1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]], jnp.float32)
    batch = {
        "decoder_loss_weights": weights,
        "decoder_target_tokens": jnp.array(random.integers(0, V, (2, 8))),
    }

    def loss(x, gather):
        parts = (
            loss_positions(x, batch, 3) if gather else (x, batch["decoder_target_tokens"], weights)
        )
        return target_losses(lambda h: h @ head, *parts, LossConfig(z_loss=0.1)).objective

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, gathered = both(hidden.astype(np.float32), False), both(hidden.astype(np.float32), True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, gathered
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "architecture": "decoder_only",
            "encoder_layers": 0,
            "tie_embeddings": False,
            "final_logit_cap": 3.0,
        },
    ],
)
def test_vocabulary_tiles_change_neither_sums_nor_gradients(changes):
    config = preset("test", **{"encoder_layers": 1} | changes)
    model = build_model(config)
    params = jax.tree.map(lambda x: 20 * x, drawn(model))
    batch = packed_batch(np.random.default_rng(0), 250, (5, 3), (4, 6), 10, 12)

    def gradients(tile):
        loss = LossConfig(z_loss=0.1, label_smoothing=0.2, vocab_tile=tile)

        def objective(params):
            metrics = batch_metrics(model, params, batch, loss, 12)
            return metrics.losses.objective, metrics.losses

        return jax.jit(jax.grad(objective, has_aux=True))(params)

    wanted, wanted_sums = gradients(0)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    # The last tile smaller; many tiles; none needed.
    for tile in (100,) if changes else (7, 256):
        got, sums = gradients(tile)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sums, wanted_sums)
        # Against the largest gradient: that of a key bias, which shifts all logits, is noise.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale), got, wanted
        )


def test_logits_never_exist_whole_in_tiles():
    """No value of the compiled program, forward or backward, has all tokens and all entries."""
    config = preset("test", vocab_size=1024)
    model = build_model(config)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    batch = packed_batch(np.random.default_rng(0), 250, (5, 3), (4, 6), 10, 12)

    def whole(tile):
        loss = LossConfig(z_loss=0.1, vocab_tile=tile)
        step = jax.grad(lambda p: batch_metrics(model, p, batch, loss, 12).losses.objective)
        text = jax.jit(step).lower(params).compile().as_text()
        return "f32[2,12,1024]" in text or "f32[24,1024]" in text

    assert whole(0) and not whole(128)


def test_a_sample_of_the_rows_is_set_against_its_share_of_the_bytes():
    """30 of 120 target tokens evaluated: 100 of the 400 bytes are theirs."""
    losses = types.SimpleNamespace(cross_entropy=50.0, weight=25.0, correct=5.0)
    sums = types.SimpleNamespace(losses=losses, target_tokens=30)
    report = eval_report(sums, target_bytes=400, target_tokens=120)
    assert report["eval/loss"] == 2.0
    assert report["eval/loss_per_byte"] == 0.5
    assert report["eval/bits_per_byte"] == pytest.approx(0.5 / np.log(2))
