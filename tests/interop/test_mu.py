"""The authors' checkpoint against a plain torch forward pass of the published architecture."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from encdec.errors import ConfigError, DataError
from encdec.interop.import_command import main
from encdec.model import build_model
from encdec.train.checkpoints import load_params_for_inference
from tests.export.examples import batch

torch = pytest.importorskip("torch", reason="needs torch: pip install encdec[hf]")
F = torch.nn.functional

M, H, K, D, MLP, V, LAYERS = 24, 6, 3, 4, 40, 50, {"e": 2, "h": 2}


def random_state() -> dict[str, torch.Tensor]:
    """Every tensor of the release, small and random; norms and biases vary too."""
    torch.manual_seed(0)
    state = {"transformer.wte.weight": torch.randn(V, M)}

    def linear(name, out, width):
        state[f"{name}.weight"] = 0.3 * torch.randn(out, width)
        state[f"{name}.bias"] = 0.1 * torch.randn(out)

    for stack, count in LAYERS.items():
        for layer in range(count):
            name = f"transformer.{stack}.{layer}"
            for attention in ("attn",) if stack == "e" else ("causal_attn", "cross_attn"):
                for x, out in (("q", H * D), ("k", K * D), ("v", K * D)):
                    linear(f"{name}.{attention}.{x}_linear", out, M)
                linear(f"{name}.{attention}.out_linear", M, H * D)
            linear(f"{name}.mlp.fc1", MLP, M)
            linear(f"{name}.mlp.fc2", M, MLP)
            for norm in range(1, 3 if stack == "e" else 4):
                state[f"{name}.ln{norm}.weight"] = 1 + 0.2 * torch.randn(M)
        state[f"transformer.ln_{'e' if stack == 'e' else 'f'}.weight"] = 1 + 0.2 * torch.randn(M)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def forward(state, source, target):
    """Logits by the published facts alone, without batching tricks or masks of padding."""
    get = lambda name: state[f"transformer.{name}.weight"].float()

    def dense(x, name):
        return x @ get(name).T + state[f"transformer.{name}.bias"].float()

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * get(name)

    def turn(x, positions):
        angles = positions[:, None] * 10_000.0 ** (-torch.arange(0, D, 2) / D)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def attend(x, y, name, positions=None, causal=False):
        q = dense(x, f"{name}.q_linear").unflatten(-1, (H, D))
        k, v = (dense(y, f"{name}.{z}_linear").unflatten(-1, (K, D)) for z in "kv")
        if positions is not None:
            q, k = turn(q, positions), turn(k, positions)
        rows = []
        for head in range(H):  # query head h reads kv head h mod K
            scores = torch.einsum("btd,bsd->bts", q[:, :, head], k[:, :, head % K]) / D**0.5
            if causal:
                later = torch.ones(scores.shape[1:]).triu(1).bool()
                scores = scores.masked_fill(later, -torch.inf)
            rows.append(scores.softmax(-1) @ v[:, :, head % K])
        return dense(torch.cat(rows, -1), f"{name}.out_linear")

    def mlp(x, name):
        return dense(F.gelu(dense(x, f"{name}.fc1"), approximate="tanh"), f"{name}.fc2")

    length = source.shape[1]
    x = get("wte")[source]
    for i in range(LAYERS["e"]):
        y = norm(x, f"e.{i}.ln1")
        x = x + attend(y, y, f"e.{i}.attn", torch.arange(length) - (length - 1) // 2)
        x = x + mlp(norm(x, f"e.{i}.ln2"), f"e.{i}.mlp")
    encoded = norm(x, "ln_e")
    x = get("wte")[target]
    for i in range(LAYERS["h"]):
        y = norm(x, f"h.{i}.ln1")
        x = x + attend(y, y, f"h.{i}.causal_attn", torch.arange(target.shape[1]), causal=True)
        x = x + attend(norm(x, f"h.{i}.ln2"), encoded, f"h.{i}.cross_attn")
        x = x + mlp(norm(x, f"h.{i}.ln3"), f"h.{i}.mlp")
    return norm(x, "ln_f") @ get("wte").T


def test_logits_are_the_published_models(tmp_path):
    state = {name: x.bfloat16() for name, x in random_state().items()}  # as released
    torch.save({"model_state_dict": state, "step": 7}, tmp_path / "model.pt")
    assert (
        main(
            [
                str(tmp_path / "model.pt"),
                "--from=mu",
                f"--head_dim={D}",
                f"--out={tmp_path / 'ours'}",
            ]
        )
        == 0
    )
    config, params, _ = load_params_for_inference(tmp_path / "ours")
    assert config.param_dtype == "bfloat16" and config.tie_embeddings
    assert (config.num_heads, config.num_kv_heads, config.kv_pairing) == (H, K, "tiled")
    assert (config.encoder_positions, config.norm_cast) == ("centred", "before_scale")
    rng = np.random.default_rng(0)
    source, target = rng.integers(1, V, (2, 9)), rng.integers(1, V, (2, 6))
    wanted = forward(state, torch.tensor(source), torch.tensor(target)).numpy()
    model = build_model(config.replace(dtype="float32"))
    got = jax.jit(lambda p, b: model.apply({"params": p}, b))(params, batch(config, source, target))
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)


def test_nothing_in_the_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"model_state_dict": Trap()}, tmp_path / "model.pt")
    with pytest.raises(DataError, match="cannot be read as weights alone"):
        main([str(tmp_path / "model.pt"), "--from=mu", f"--out={tmp_path / 'ours'}"])
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "ours").exists()


def test_a_head_has_a_width(tmp_path):
    torch.save({"model_state_dict": random_state()}, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="head_dim is 0; wanted 1 or more"):
        main([str(tmp_path / "model.pt"), "--from=mu", "--head_dim=0", f"--out={tmp_path / 'x'}"])


def test_wrong_checkpoints_are_named(tmp_path):
    whole = random_state()
    arguments = [
        str(tmp_path / "model.pt"),
        "--from=mu",
        f"--head_dim={D}",
        f"--out={tmp_path / 'ours'}",
    ]

    def refused(content, message):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(DataError, match=message):
            main(arguments)

    refused({"weights": whole}, "no 'model_state_dict' of tensors")
    part = {k: v for k, v in whole.items() if k != "transformer.e.1.ln2.weight"}
    part["transformer.e.0.extra"] = part["transformer.ln_f.weight"]
    part["transformer.h.1.mlp.fc2.bias"] = torch.zeros(3)
    refused(
        {"model_state_dict": part},
        r"missing: transformer.e.1.ln2.weight \(24,\).*model: transformer.e.0.extra.*"
        r"misshapen: transformer.h.1.mlp.fc2.bias \(3,\), wanted \(24,\)",
    )
    refused({"model_state_dict": {}}, "no matrix transformer.wte.weight")
