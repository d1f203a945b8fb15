"""Self- and cross-attention of the decoder under one softmax; see also the variants of
``test_models``, ``test_flops``, ``test_cpu_layout``, ``test_kernels`` and ``test_step``."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from encdec.errors import ConfigError
from encdec.model import build_model, preset
from tests.model.examples import decoder_fields
from tests.model.test_models import apply, make

MERGED = preset("test").replace(merged_attention=True, decoder_layers=2)


@pytest.mark.parametrize("positions", ["none", "continued"])
def test_an_empty_source_leaves_a_decoder_only_model_with_the_same_parameters(positions):
    model, params, batch = make(MERGED.replace(cross_attention_rope=positions))
    alone = MERGED.replace(architecture="decoder_only", encoder_layers=0, merged_attention=False)
    parts = {name: params[name] for name in ("embedder", "decoder")}
    wanted = apply(build_model(alone), parts, decoder_fields(batch), method="hidden")
    empty = batch | {"encoder_segment_ids": np.zeros_like(batch["encoder_segment_ids"])}
    real = batch["decoder_segment_ids"] > 0
    got = apply(model, params, empty, method="hidden")
    np.testing.assert_allclose(got[real], wanted[real], rtol=1e-5, atol=1e-5)
    read = apply(model, params, batch, method="hidden")
    assert np.abs(read - wanted)[real].max(-1).min() > 1e-3  # each token, where there is a source


def test_one_softmax_spans_source_and_target_whose_positions_continue():
    """Against NumPy: a layer that reads the encoder's outputs as if they came before the target."""
    config = MERGED.replace(cross_attention_rope="continued", decoder_layers=1)
    model, params, batch = make(config)
    rows, width = batch["encoder_input_tokens"].shape
    params = jax.device_get(params)
    source = apply(
        model,
        params,
        batch["encoder_input_tokens"],
        np.ones((rows, width), np.int32),
        np.tile(np.arange(width), (rows, 1)),
        method="encode",
    )
    layer = jax.tree.map(lambda x: x[0], params["decoder"]["layers"])
    tokens = batch["decoder_input_tokens"]
    length = tokens.shape[1]
    x = params["embedder"]["embedding"][tokens]
    normed = lambda x, scale: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale
    attention, heads = layer["self_attention"], config.num_heads
    inputs = np.concatenate([source, normed(x, layer["self_attention_norm"]["scale"])], 1)
    project = lambda n, y: (
        np.einsum("btm,mhd->bthd", y, attention[n]["kernel"]) + (attention[n]["bias"])
    )
    places = np.arange(width + length)

    def rotate(y, places):
        angles = places[:, None] * 10_000.0 ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        cos, sin = (np.tile(f(angles), 2)[None, :, None] for f in (np.cos, np.sin))
        first, second = np.split(y, 2, -1)
        return y * cos + np.concatenate([-second, first], -1) * sin

    q = rotate(project("q", inputs[:, width:]), places[width:])
    k, v = rotate(project("k", inputs), places), project("v", inputs)
    k, v = (np.tile(y, (1, 1, heads // config.num_kv_heads, 1)) for y in (k, v))  # "tiled"
    logits = np.einsum("bthd,bshd->bhts", q, k) * config.head_dim**-0.5
    logits = np.where(places[None, :] <= places[width:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshd->bthd", weights, v)
    x = x + np.einsum("bthd,hdm->btm", out, attention["o"]["kernel"]) + attention["o"]["bias"]
    y = normed(x, layer["mlp_norm"]["scale"]) @ layer["mlp"]["up"]["kernel"]
    y = np.asarray(jax.nn.gelu(y + layer["mlp"]["up"]["bias"]))
    x = x + y @ layer["mlp"]["down"]["kernel"] + layer["mlp"]["down"]["bias"]
    wanted = normed(x, params["decoder"]["final_norm"]["scale"])
    batch = batch | {
        "encoder_segment_ids": np.ones((rows, width), np.int32),
        "encoder_positions": np.tile(np.arange(width), (rows, 1)),
        "decoder_segment_ids": np.ones((rows, length), np.int32),
        "decoder_positions": np.tile(np.arange(length), (rows, 1)),
    }
    got = apply(model, params, batch, method="hidden")
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-4)


def test_a_decoder_only_model_has_nothing_to_merge():
    with pytest.raises(ConfigError, match="merged_attention is True; expected False in a decoder"):
        MERGED.replace(architecture="decoder_only", encoder_layers=0)
