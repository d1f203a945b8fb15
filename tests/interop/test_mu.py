"""The authors' checkpoint against a plain torch forward pass of the published architecture."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from encdec.distill.teachers import teacher_model
from encdec.errors import ConfigError, DataError
from encdec.export.export_command import main as export
from encdec.inference.generate_command import main as generate
from encdec.inference.load_generator import load
from encdec.interop import mu
from encdec.interop.import_command import main
from encdec.model import build_model
from encdec.saved.saved_params import load_params_for_inference
from encdec.train.run_config import RunConfig
from encdec.train.warm_start import plan_start
from tests.export.examples import batch

torch = pytest.importorskip("torch", reason="needs torch: the extra hf of setup.py")
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


def forward(state, source, target, *, theta=10_000, interleaved=False):
    """Logits by the published facts alone, without batching tricks or masks of padding."""
    get = lambda name: state[f"transformer.{name}.weight"].float()

    def dense(x, name):
        return x @ get(name).T + state[f"transformer.{name}.bias"].float()

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * get(name)

    def turn(x, positions):
        angles = positions[:, None] * theta ** (-torch.arange(0, D, 2) / D)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def attend(x, y, name, positions=None, causal=False):
        q = dense(x, f"{name}.q_linear").unflatten(-1, (H, D))
        k, v = (dense(y, f"{name}.{z}_linear").unflatten(-1, (K, D)) for z in "kv")
        if positions is not None:
            q, k = turn(q, positions), turn(k, positions)
        rows = []
        for head in range(H):  # query head h reads kv head h mod K, or its group's
            read = head // (H // K) if interleaved else head % K
            logits = torch.einsum("btd,bsd->bts", q[:, :, head], k[:, :, read]) / D**0.5
            if causal:
                later = torch.ones(logits.shape[1:]).triu(1).bool()
                logits = logits.masked_fill(later, -torch.inf)
            rows.append(logits.softmax(-1) @ v[:, :, read])
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


SETTINGS = {  # as their training saves them next to the weights
    "n_encoder_layer": 2,
    "n_decoder_layer": 2,
    "n_embd": M,
    "qkv_embd": H * D,
    "is_interleaved": False,
    "hidden_dim": MLP,
    "n_head": H,
    "n_kv_head": K,
    "block_size": 64,
    "dropout": 0.1,
    "rope_theta": 10_000,
    "rope_factor": 1.0,
    "pad_token_id": 0,
    "vocab_size": V,
}


@pytest.mark.parametrize(
    "settings, differs",
    [
        (None, {}),
        (SETTINGS | {"is_interleaved": True, "rope_theta": 50}, {"interleaved": True, "theta": 50}),
        # Up to block_size the stretched rotation is the plain one; qkv_embd null is n_embd.
        (SETTINGS | {"rope_factor": 4.0, "qkv_embd": None}, {}),
    ],
)
def test_logits_are_the_published_models(settings, differs, tmp_path):
    state = {name: x.bfloat16() for name, x in random_state().items()}  # as released
    content = {"model_state_dict": state, "step": 7}
    arguments = [str(tmp_path / "model.pt"), "--format=mu", f"--out={tmp_path / 'ours'}"]
    if settings:
        content["model_config"] = settings
    else:
        arguments.append(f"--head_dim={D}")
    torch.save(content, tmp_path / "model.pt")
    assert main(arguments) == 0
    config, params, _ = load_params_for_inference(tmp_path / "ours")
    assert config.param_dtype == "bfloat16" and config.tie_embeddings
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (H, K, D)
    assert config.kv_pairing == ("grouped" if differs else "tiled")
    assert config.attention_dropout == config.mlp_dropout == 0.1
    assert (config.encoder_positions, config.norm_cast) == ("centred", "before_scale")
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert stored["imported"]["max_length"] == (128 if settings else 2048)
    rng = np.random.default_rng(0)
    source, target = rng.integers(1, V, (2, 9)), rng.integers(1, V, (2, 6))
    wanted = forward(state, torch.tensor(source), torch.tensor(target), **differs).numpy()
    model = build_model(config.replace(dtype="float32"))
    got = jax.jit(lambda p, b: model.apply({"params": p}, b))(params, batch(config, source, target))
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        *(
            ({key: SETTINGS[key] + 1}, f"model_config has {key} {SETTINGS[key] + 1}, but its")
            for key in ("n_encoder_layer", "n_decoder_layer", "n_embd", "hidden_dim", "vocab_size")
        ),
        ({"n_kv_head": 6}, "n_kv_head 6, but its tensors have 3"),
        ({"n_kv_head": 4}, "n_kv_head 4, expected a divisor of n_head 6"),
        ({"qkv_embd": 48}, "qkv_embd 48, but its tensors have 24"),
        ({"n_head": 5}, "n_head 5, expected a divisor of qkv_embd 24"),
        ({"pad_token_id": 3}, "pad_token_id 3, but encdec's padding id is 0"),
        ({"dropout": 1}, r"dropout 1, expected a rate in \[0, 1\)"),
        ({"rope_theta": "big"}, "rope_theta 'big', expected a number"),
        ({"block_size": 0}, "block_size 0, expected a positive number"),
        ({"is_interleaved": 1}, "is_interleaved 1, expected true or false"),
        ({"window": 8}, "window 8, which is not one of n_encoder_layer"),
    ],
)
def test_what_a_checkpoint_says_of_itself_is_obeyed_or_refused(change, message):
    with pytest.raises(DataError, match=message):
        mu.read_config({k: x.numpy() for k, x in random_state().items()}, SETTINGS | change)


def test_nothing_in_the_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"model_state_dict": Trap()}, tmp_path / "model.pt")
    with pytest.raises(DataError, match="cannot be read as a file of weights"):
        main([str(tmp_path / "model.pt"), "--format=mu", f"--out={tmp_path / 'ours'}"])
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "ours").exists()


def test_a_head_has_a_width(tmp_path):
    torch.save({"model_state_dict": random_state()}, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="head_dim is 0; expected 1 or more"):
        main([str(tmp_path / "model.pt"), "--format=mu", "--head_dim=0", f"--out={tmp_path / 'x'}"])
    with pytest.raises(ConfigError, match="--head_dim=8, but .* says 4"):
        mu.read_config({k: x.numpy() for k, x in random_state().items()}, SETTINGS, 8)
    with pytest.raises(ConfigError, match="head_dim=4 has no effect without --format=mu"):
        main([str(tmp_path), "--head_dim=4", f"--out={tmp_path / 'x'}"])


def test_wrong_checkpoints_are_named(tmp_path):
    whole = random_state()
    arguments = [
        str(tmp_path / "model.pt"),
        "--format=mu",
        f"--head_dim={D}",
        f"--out={tmp_path / 'ours'}",
    ]

    def refused(content, message):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(DataError, match=message):
            main(arguments)

    refused({"weights": whole}, "no 'model_state_dict' of tensors")
    refused({"model_state_dict": whole, "model_config": 3}, "model_config 3, which is not a dict")
    part = {k: v for k, v in whole.items() if k != "transformer.e.1.ln2.weight"}
    part["transformer.e.0.extra"] = part["transformer.ln_f.weight"]
    part["transformer.h.1.mlp.fc2.bias"] = torch.zeros(3)
    refused(
        {"model_state_dict": part},
        r"missing: transformer.e.1.ln2.weight \(24,\).*unexpected: transformer.e.0.extra.*"
        r"wrong shape: transformer.h.1.mlp.fc2.bias \(3,\), expected \(24,\)",
    )
    refused({"model_state_dict": {}}, "no matrix transformer.wte.weight")


def test_a_model_without_vocabulary_says_how_to_get_one(tmp_path):
    torch.save(
        {"model_state_dict": random_state(), "model_config": SETTINGS}, tmp_path / "model.pt"
    )
    out = f"--out={tmp_path / 'ours'}"
    main([str(tmp_path / "model.pt"), "--format=mu", out])
    needs_text = (
        lambda: load(tmp_path / "ours"),
        lambda: plan_start(RunConfig(init_from=str(tmp_path / "ours")), None, None),
        lambda: teacher_model(tmp_path / "ours", None),
        lambda: export([f"--checkpoint={tmp_path / 'ours'}", "--format=hf", f"--out={tmp_path}/x"]),
        lambda: generate([f"--checkpoint={tmp_path / 'ours'}", "a text"]),
    )
    for use in needs_text:
        with pytest.raises(DataError, match=f"with --vocabulary=FILE --overwrite {out}"):
            use()
    words = {"</s>": 0, "<unk>": 1, "a": 2}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    arguments = [str(tmp_path / "model.pt"), "--format=mu", out, "--overwrite"]
    main([*arguments, f"--vocabulary={tmp_path / 'tokenizer.json'}"])
    assert load(tmp_path / "ours").prompts.encode("a")[0] == [2]
