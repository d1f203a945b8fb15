"""Layers that read a window, their own rotation base, and rotations scaled pair by pair."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.errors import ConfigError
from encdec.model import ModelConfig, build_model, init_cache, preset
from encdec.model.positions import apply_rope, rope_table
from tests.model.examples import segment
from tests.model.test_models import apply, make

LOCAL = preset("test").replace(
    architecture="decoder_only",
    encoder_layers=0,
    decoder_layers=3,
    kv_pairing="grouped",
    scan_layers=False,
    attention_window=3,
    global_layer_every=2,
    rope_theta=1e5,
    local_rope_theta=50.0,
    rope_scaling="per_pair",
    rope_divisors=(1.0, 2.0, 3.5, 8.0),
    rope_magnitude=1.2,
)


def cached_step(model):
    return jax.jit(
        lambda params, *args: model.apply({"params": params}, *args, method="decode_cached")
    )


def test_a_token_sees_as_far_as_the_windows_of_its_layers_reach():
    """Two local layers of window 3 reach four tokens back; a global layer reaches all."""
    for every, reach in ((0, 4), (2, 8)):
        config = LOCAL.replace(decoder_layers=2, global_layer_every=every)
        model, params, _ = make(config)
        length = 9
        batch = {
            "decoder_input_tokens": jnp.arange(length)[None],
            "decoder_segment_ids": jnp.ones((1, length), jnp.int32),
            "decoder_positions": jnp.arange(length)[None],
        }
        table = params["embedder"]["embedding"]

        def last(rows, batch=batch, model=model, params=params, table=table):
            embedder = {"embedding": table.at[: len(rows)].set(rows)}
            return model.apply({"params": params | {"embedder": embedder}}, batch, method="hidden")[
                0, -1
            ].sum()

        seen = np.abs(jax.jit(jax.grad(last))(table[:length])).sum(-1) > 0
        assert seen.tolist() == [place >= length - 1 - reach for place in range(length)]


def test_packed_segments_and_cached_decoding_agree_with_the_full_pass():
    model, params, batch = make(LOCAL)
    packed, step = apply(model, params, batch, method="hidden"), cached_step(model)
    for number in (1, 2):
        mask = batch["decoder_segment_ids"][0] == number
        alone = apply(
            model, params, {name: x[:, mask] for name, x in batch.items()}, method="hidden"
        )
        np.testing.assert_allclose(alone, packed[:, mask], rtol=1e-5, atol=1e-5)
        tokens = batch["decoder_input_tokens"][:, mask]
        positions = batch["decoder_positions"][:, mask]
        cache = init_cache(LOCAL, 2, 8)
        got, start = [], 0
        for count in [2] + [1] * (tokens.shape[1] - 2):
            piece = slice(start, start + count)
            hidden, cache = step(params, tokens[:, piece], positions[:, piece], cache)
            got.append(hidden)
            start += count
        np.testing.assert_allclose(np.concatenate(got, 1), alone, rtol=1e-4, atol=1e-5)


PAIR = LOCAL.replace(
    architecture="encoder_decoder",
    encoder_layers=2,
    decoder_layers=2,
    global_layer_every=0,
    decoder_global_layers=(1,),
)


def test_an_encoder_s_windows_reach_both_ways_and_its_decoder_s_back():
    """By gradient: two local layers of window 3 reach four tokens either way."""
    model, params, _ = make(PAIR)
    length, middle = 11, 5
    batch = {
        f"{side}_{name}": value[None]
        for side in ("encoder", "decoder")
        for name, value in (
            ("input_tokens", jnp.arange(length)),
            ("segment_ids", jnp.ones(length, jnp.int32)),
            ("positions", jnp.arange(length)),
        )
    }
    source = [batch[f"encoder_{name}"] for name in ("input_tokens", "segment_ids", "positions")]
    table = params["embedder"]["embedding"]

    def encoded(rows):
        embedder = {"embedding": table.at[:length].set(rows)}
        return model.apply({"params": params | {"embedder": embedder}}, *source, method="encode")[
            0, middle
        ].sum()

    seen = np.abs(jax.jit(jax.grad(encoded))(table[:length])).sum(-1) > 0
    assert seen.tolist() == [abs(place - middle) <= 4 for place in range(length)]

    # Layer 0 of the decoder reads a window, layer 1 all: a far token reaches the last place
    # through layer 1 alone.
    for listed, reaches in (((1,), True), ((), False)):
        decoder = build_model(PAIR.replace(decoder_global_layers=listed))
        other = batch | {"decoder_input_tokens": batch["decoder_input_tokens"].at[0, 0].set(50)}
        hidden = [apply(decoder, params, x, method="hidden")[0, -1] for x in (batch, other)]
        assert bool(np.abs(hidden[0] - hidden[1]).max() > 1e-6) == reaches


def test_windows_of_an_encoder_decoder_in_packed_rows_and_in_cached_decoding():
    model, params, batch = make(PAIR)
    packed, step = apply(model, params, batch, method="hidden"), cached_step(model)
    for number in (1, 2):
        alone = segment(batch, number)
        full = apply(model, params, alone, method="hidden")
        mask = batch["decoder_segment_ids"][0] == number
        np.testing.assert_allclose(full, packed[:, mask], rtol=1e-4, atol=1e-5)
        source = apply(
            model,
            params,
            *(alone[f"encoder_{name}"] for name in ("input_tokens", "segment_ids", "positions")),
            method="source",
        )
        tokens, positions = alone["decoder_input_tokens"], alone["decoder_positions"]
        cache = init_cache(PAIR, 2, 8)
        got, start = [], 0
        for count in [2] + [1] * (tokens.shape[1] - 2):
            piece = slice(start, start + count)
            hidden, cache = step(params, tokens[:, piece], positions[:, piece], cache, source)
            got.append(hidden)
            start += count
        np.testing.assert_allclose(np.concatenate(got, 1), full, rtol=1e-4, atol=1e-5)


def test_pairs_are_rotated_each_at_its_own_speed():
    x = np.random.default_rng(0).normal(size=(1, 2, 1, 8)).astype(np.float32)
    positions = np.array([[0, 7]])
    got = apply_rope(jnp.array(x), rope_table(LOCAL, jnp.array(positions)))
    for pair, divisor in enumerate(LOCAL.rope_divisors):
        turn = 7 * 1e5 ** (-2 * pair / 8) / divisor
        first, second = x[0, 1, 0, pair], x[0, 1, 0, pair + 4]
        np.testing.assert_allclose(
            got[0, 1, 0, [pair, pair + 4]],
            1.2
            * np.array(
                [
                    first * np.cos(turn) - second * np.sin(turn),
                    second * np.cos(turn) + first * np.sin(turn),
                ]
            ),
            rtol=2e-5,
            atol=1e-6,
        )
    np.testing.assert_allclose(got[0, 0], 1.2 * x[0, 0], rtol=1e-6)
    # Local layers: a base of their own, neither divisors nor magnitude.
    plain = LOCAL.replace(
        rope_theta=50.0, rope_scaling="none", rope_divisors=(), rope_magnitude=1.0
    )
    np.testing.assert_array_equal(
        rope_table(LOCAL, jnp.array(positions), local=True), rope_table(plain, jnp.array(positions))
    )


def test_the_configuration_survives_json():
    assert ModelConfig.from_dict(json.loads(json.dumps(LOCAL.to_dict()))) == LOCAL


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scan_layers": True}, "set scan_layers=False"),
        ({"rope_divisors": (1.0,)}, "expected 4 numbers, one per rotated pair"),
        ({"rope_scaling": "none"}, "none unless rope_scaling is 'per_pair'"),
        ({"attention_window": 0}, "0 without an attention_window"),
        ({"decoder_global_layers": (0,)}, r"\(\) with global_layer_every=2"),
        ({"global_layer_every": 0, "decoder_global_layers": (3,)}, "at least 0 and below 3"),
    ],
)
def test_settings_at_odds_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        LOCAL.replace(**changes)
