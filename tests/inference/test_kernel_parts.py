"""Decoding on CPUs: kernels in parts, and an encoder in bfloat16, are the same model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.errors import ConfigError
from encdec.inference import decoding
from encdec.inference.decoding import decode_step, prefill, ready_for_decoding
from encdec.model import for_decoding, preset
from tests.export.examples import pair
from tests.inference.examples import START

TOKENS = np.random.default_rng(0).integers(3, 250, (2, 9)).astype(np.int32)


def two_steps(config, params):
    logits, memory = prefill(config, params, TOKENS, jnp.array([9, 5]), start_id=START, room=2)
    later, _ = decode_step(config, params, memory, jnp.array([7, 8]))
    return np.stack([logits, later])


@pytest.mark.parametrize("name", ["paper", "unrolled", "windowed"])
def test_kernels_in_parts_compute_the_same(name):
    """Tied and separate heads, both MLPs, norms of queries and keys; sizes that do not divide."""
    config, params = pair(name)
    plain = two_steps(*for_decoding(config, params))
    config, params = for_decoding(config, params, 3)
    down = params["decoder"]["layers_0"]["mlp"]["down"]
    assert [down[f"kernel_{i}"].shape for i in range(3)] == [(11, 128), (11, 128), (10, 128)]
    np.testing.assert_allclose(two_steps(config, params), plain, atol=3e-5)


def test_large_models_on_cpus_get_them_by_themselves(monkeypatch):
    config, params = pair("paper")
    assert ready_for_decoding(config, params)[0].kernel_parts == 0
    monkeypatch.setattr(decoding, "LARGE_KERNEL", 1)
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    ready, parts = ready_for_decoding(config, params)
    assert ready.kernel_parts == 2 and ready.encoder_dtype == ""  # it was trained in float32
    np.testing.assert_allclose(
        two_steps(ready, parts), two_steps(*for_decoding(config, params)), atol=3e-5)
    # A batch split over devices keeps kernels whole.
    monkeypatch.setattr(decoding, "one_device", lambda params: False)
    assert ready_for_decoding(config, params)[0].kernel_parts == 0


def test_a_model_of_bfloat16_encodes_in_it_where_the_cpu_can(monkeypatch):
    config, params = pair("paper")
    config = config.replace(dtype="bfloat16")
    monkeypatch.setattr(decoding, "LARGE_KERNEL", 1)
    plain = two_steps(*ready_for_decoding(config, params, "float32"))
    for able, dtype in ((True, "bfloat16"), (False, "")):
        monkeypatch.setattr(decoding, "cpu_has_bfloat16", lambda able=able: able)
        ready, parts = ready_for_decoding(config, params)
        assert (ready.dtype, ready.encoder_dtype) == ("float32", dtype)
        kernels = jax.tree.leaves(parts["encoder"]["layers_0"]["mlp"]["up"])
        assert {x.dtype.name for x in kernels} == {dtype or "float32"}
        apart = np.abs(two_steps(ready, parts) - plain).max() / np.abs(plain).max()
        assert apart < (0.02 if able else 1e-5)


def test_parts_need_unrolled_layers():
    with pytest.raises(ConfigError, match="kernel_parts is 2; wanted 0 with scan_layers=True"):
        preset("test", kernel_parts=2, scan_layers=True)
