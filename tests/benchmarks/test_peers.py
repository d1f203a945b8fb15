"""The same weights in OpenVINO and CTranslate2 give our logits and our answers."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from encdec.benchmarks import ctranslate2_runtime, edge_paths, openvino_runtime
from encdec.benchmarks.generation import START_ID
from encdec.errors import ConfigError
from encdec.model import build_model, init_params, preset
from tests.export.examples import batch

NEW = 6
SOURCE = np.arange(3, 30)
CONFIGS = {
    "paper": preset("test", scan_layers=False, tie_embeddings=False, init_std=0.3),
    # What the presets do not have and CTranslate2 expresses, some of it folded into weights.
    "others": preset(
        "test",
        scan_layers=False,
        init_std=0.2,
        mlp_gated=True,
        mlp_activation="silu",
        norm_plus_one=True,
        attention_scale=0.3,
        share_embeddings=False,
        qkv_bias=False,
        rope_theta=500.0,
        norm_eps=1e-3,
    ),
}


@pytest.fixture(scope="module")
def models():
    """Configuration and parameters by name, none of which is zero or one."""
    found = {}
    for name, config in CONFIGS.items():
        params = init_params(build_model(config), jax.random.key(0))
        leaves, tree = jax.tree.flatten(params)
        noise = [
            leaf + 0.1 * np.random.default_rng(i).normal(size=leaf.shape).astype(np.float32)
            for i, leaf in enumerate(leaves)
        ]
        found[name] = config, jax.tree.unflatten(tree, noise)
    return found


def our_logits(config, params, tokens):
    """[N, V] of these new tokens, each after those before it."""
    target = np.array([[START_ID, *tokens[:-1]]])
    return np.asarray(
        build_model(config).apply({"params": params}, batch(config, SOURCE[None], target))[0]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_ctranslate2_computes_our_logits(name, models, tmp_path):
    pytest.importorskip("ctranslate2", reason="needs ctranslate2: the extra peers of setup.py")
    config, params = models[name]
    directory = ctranslate2_runtime.artefact(config, params, tmp_path)
    model = ctranslate2_runtime.Ctranslate2Model(directory, "float32")
    (answer,) = model.translate(SOURCE[None], NEW, return_logits_vocab=True)
    tokens = [int(token) for token in answer.hypotheses[0]]
    # Its end token, which is made impossible, is the start token here.
    theirs = np.stack([np.asarray(step) for step in answer.logits[0]])[:, START_ID + 1 :]
    ours = our_logits(config, params, tokens)[:, START_ID + 1 :]
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert (ours.argmax(axis=1) + START_ID + 1).tolist() == tokens
    begun = model.start(SOURCE[None], NEW)
    assert not begun.done.is_set()  # it waits after its first token
    assert model.finish(begun).tolist() == [tokens]


def test_what_is_not_written_for_ctranslate2_is_refused(models):
    pytest.importorskip("ctranslate2", reason="needs ctranslate2: the extra peers of setup.py")
    config, params = models["paper"]
    with pytest.raises(ConfigError, match="attention_window is 4, .*expected 0"):
        ctranslate2_runtime.specification(config.replace(attention_window=4), params)


def test_openvino_computes_our_logits(models, tmp_path):
    for package in ("openvino", "onnx"):
        pytest.importorskip(package, reason=f"needs {package}: the extra peers of setup.py")
    config, params = models["paper"]
    directory = edge_paths.artefact("onnx-float32", config, params, tmp_path)
    found = {}
    for precision in ("float32", "int8", "int4"):
        model = openvino_runtime.OpenvinoModel(directory, precision, threads=1)
        for _ in range(2):  # the second answer must not see the first
            logits, memory = model.prefill(SOURCE[None], np.array([len(SOURCE)]), START_ID)
            steps = [logits.copy()]
            for _ in range(NEW - 1):
                steps.append(memory.step(steps[-1].argmax(axis=1)).copy())
        theirs = np.concatenate(steps)
        found[precision] = np.abs(
            theirs - our_logits(config, params, theirs.argmax(axis=1).tolist())
        ).max()
    assert found["float32"] < 1e-4 < found["int8"] < found["int4"] < 1.5, found


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, peer in edge_paths.PEERS.items():
        assert f"{'torch' if name == 'transformers' else name} is not installed: pip install" in (
            peer.missing("float32")
        )
