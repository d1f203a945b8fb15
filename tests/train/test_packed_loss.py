"""The loss on prepared, packed rows is the sum over their examples alone, in both architectures."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from encdec.data.batches import Batches
from encdec.data.prepare import prepare
from encdec.data.records import open_records
from encdec.model import build_model, preset
from encdec.train.run_fields import LossConfig
from encdec.train.step import batch_metrics
from tests.model.examples import drawn


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed_loss")
    random = np.random.default_rng(0)
    text = lambda longest: "".join(random.choice(list("abcdef "), random.integers(1, longest)))
    pairs = [{"source": text(12) + "a", "target": text(7) + "b"} for _ in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for packing in ("best_fit", "greedy", "none"):
        prepare(
            out=folder / packing,
            vocabulary="bytes",
            jsonl=[str(folder / "rows.jsonl")],
            inputs_length=32,
            targets_length=16,
            packing=packing,
            workers=1,
        )
    return folder


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_loss_on_packed_rows_is_the_sum_over_examples(records, architecture):
    layers = {"encoder_layers": 0} if architecture == "decoder_only" else {}
    config = preset("test", architecture=architecture, vocab_size=259, dtype="float32", **layers)
    model = build_model(config)
    params = jax.tree.map(lambda x: 20 * x, drawn(model))
    measure = jax.jit(
        lambda batch: batch_metrics(model, params, batch, LossConfig(z_loss=0.0), 16).losses
    )

    def total(packing):
        """Sums over all rows, eight at a time, so that one program serves every packing."""
        batches = Batches(
            open_records(records / packing), global_batch=8, layout=architecture, repeat=False
        )
        sums = [jax.device_get(measure(batches[step])) for step in range(len(batches))]
        return jax.tree.map(lambda *parts: np.sum(parts, dtype=np.float64), *sums), len(batches)

    alone, steps = total("none")
    assert float(alone.objective) > 100
    for packing in ("best_fit", "greedy"):
        packed, fewer = total(packing)
        assert fewer < steps
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), packed, alone)
