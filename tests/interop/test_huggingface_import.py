"""Imported families against transformers itself, on small models with random weights."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec import safetensors
from encdec.errors import CheckpointError, ConfigError, DataError
from encdec.inference.decoding import Memory, decode_step
from encdec.interop.families import FAMILIES
from encdec.interop.huggingface_import import _renamed, layout, read_config, translate
from encdec.interop.import_command import main
from encdec.model import build_model, init_cache
from encdec.saved.saved_config import read_config as read_workdir
from encdec.saved.saved_params import load_params_for_inference

torch = pytest.importorskip("torch", reason="needs torch: the extra hf of setup.py")
transformers = pytest.importorskip("transformers", reason="needs transformers: the extra hf")

SIZE = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 3.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 32,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MROPE = {"mrope_section": [2, 3, 3]}
BETA = {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1}
MODELS = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 130_000.0},
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral with a window": ("Mistral", {"sliding_window": 6, "head_dim": 12}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "phi3.5": (
        "Phi3",
        {"pad_token_id": 0, "rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "phi4-mini": (
        "Phi3",
        {
            "pad_token_id": 0,
            "hidden_size": 64,
            "partial_rotary_factor": 0.75,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 32,
        },
    ),
    "yarn": ("Llama", {"rope_parameters": YARN, "head_dim": 16}),
    "dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "ministral": ("Ministral", {"sliding_window": 6, "head_dim": 12}),
    "granite tied": (
        "Granite",
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 1.7,
        },
    ),
    "smollm3": (
        "SmolLM3",
        {
            "pad_token_id": 0,
            "num_hidden_layers": 5,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "olmo2": ("Olmo2", {"pad_token_id": 0, "head_dim": 12}),
    "olmo3": (
        "Olmo3",
        {
            "pad_token_id": 0,
            "num_hidden_layers": 5,
            "sliding_window": 6,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "exaone4": (
        "Exaone4",
        {"num_hidden_layers": 5, "sliding_window": 6, "sliding_window_pattern": 3},
    ),
    "glm": ("Glm", {"pad_token_id": 0, "head_dim": 16, "eos_token_id": 2}),
    "glm4": ("Glm4", {"pad_token_id": 0, "head_dim": 16, "eos_token_id": 2}),
    "ministral3": ("Ministral3", {"head_dim": 16, "rope_parameters": YARN | BETA}),
    "hyperclovax": (
        "HyperCLOVAX",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.7,
        },
    ),
    "hyperclovax without post-norms": (
        "HyperCLOVAX",
        {"use_post_norm": False, "residual_multiplier": 0.6, "tie_word_embeddings": True},
    ),
    "exaone": ("Exaone", {"pad_token_id": 0}),
    "cwm": ("Cwm", {"head_dim": 16, "sliding_window": 6, "num_hidden_layers": 5}),
    "ernie4.5": ("Ernie4_5", {"head_dim": 16, "use_bias": True}),
    "helium": ("Helium", {"head_dim": 12, "attention_bias": True}),
    "internlm3": ("InternLM3", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "iquestcoder": ("IQuestCoder", {"head_dim": 16}),
    "vaultgemma": (
        "VaultGemma",
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24},
    ),
    "seed-oss": ("SeedOss", {"head_dim": 16, "attention_out_bias": True}),
    "qwen2 with late windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "a scaled rotation with windows": (
        "Mistral",
        {"sliding_window": 6, "head_dim": 16, "rope_parameters": YARN},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2, with a key that it does not read": ("Qwen2", {"attention_bias": False}),
    "qwen2.5 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "rope_parameters": GEMMA3_ROPE,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 24,
        },
    ),
}
# Of these, cached decoding is compared, too; others are among those of tests/inference.
CACHED = ("smollm3", "olmo3", "exaone4", "glm4")
LENGTH = 24  # beyond every window


def save_model(directory, name, changes=None, **save):
    """A random model of the family in the directory; returns it."""
    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZE | settings | (changes or {})))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases are constant at first: vary them too
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory, **save)
    return model


def our_logits(directory, tokens):
    config, params, _ = load_params_for_inference(directory)
    batch = {
        "decoder_input_tokens": tokens,
        "decoder_segment_ids": np.ones_like(tokens),
        "decoder_positions": np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)),
    }
    apply = jax.jit(lambda params, batch: build_model(config).apply({"params": params}, batch))
    return np.asarray(apply(params, batch))


def our_steps(directory, tokens):
    """Logits of cached decoding, one token a step."""
    config, params, _ = load_params_for_inference(directory)
    rows, length = tokens.shape
    memory = Memory(init_cache(config, rows, length), None, jnp.zeros(rows, jnp.int32))
    step = jax.jit(decode_step, static_argnums=0)
    logits = []
    for token in tokens.T:
        one, memory = step(config, params, memory, jnp.asarray(token, jnp.int32))
        logits.append(one)
    return np.stack(logits, 1)


def test_every_family_has_an_example():
    configs = [getattr(transformers, f"{kind}Config") for kind, _ in MODELS.values()]
    # Without a class in transformers, and Qwen-VL's text models, of which 2.5 has a test: below.
    own = {"minicpm", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}
    assert {config.model_type for config in configs} == set(FAMILIES) - own


def test_the_base_of_rotations_that_a_file_leaves_out_is_the_familys():
    known = transformers.CONFIG_MAPPING
    bases = {
        name: getattr(known[name], "default_theta", None) for name in FAMILIES if name in known
    }
    bases = {
        name: base["global"] if isinstance(base, dict) else base
        for name, base in bases.items()
        if base is not None  # transformers 4 has it elsewhere
    }
    assert {name: FAMILIES[name].defaults.get("rope_theta", 1e4) for name in bases} == bases


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    model = save_model(tmp_path / "hf", name, max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"]) == 0
    tokens = np.random.default_rng(0).integers(1, 96, (2, LENGTH))
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    got = our_logits(tmp_path / "ours", tokens)
    assert np.ptp(wanted) > 1  # logits that differ, or agreement would say little
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)
    if name in CACHED:
        steps = our_steps(tmp_path / "ours", tokens[:, : LENGTH // 2])
        np.testing.assert_allclose(steps, wanted[:, : LENGTH // 2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in MODELS.values()}))
def test_biases_are_where_transformers_has_them(kind):
    """Whichever of these keys a family reads, and whatever the others say."""
    settings = next(values for one, values in MODELS.values() if one == kind)
    keys = ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias")
    for on in itertools.product((False, True), repeat=len(keys)):
        given = dict(zip(keys, on, strict=True))
        if kind == "InternLM3" and given["attention_bias"] != given["mlp_bias"]:
            continue  # which transformers refuses
        config = getattr(transformers, f"{kind}Config")(**(SIZE | settings | given))
        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(config).state_dict()
        found = translate(config.model_type, config.to_dict(), pathlib.Path("config.json"))
        names = _renamed(theirs, FAMILIES[found.family].renamed)
        ours = layout(found.model, found.family, "model.", "lm_head.weight")
        biases = {entry.theirs for entry in ours if entry.theirs.endswith(".bias")}
        assert biases == {name for name in names if name.endswith(".bias")}, given


@pytest.mark.parametrize("inner, outer", [(True, False), (False, True)])
def test_internlm3_has_biases_of_queries_and_of_outputs_apart(inner, outer, tmp_path):
    """As its own code has them, and vLLM; transformers' class wants them equal."""
    config = transformers.LlamaConfig(
        **SIZE | {"head_dim": 16, "attention_bias": inner, "mlp_bias": outer}
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj = torch.nn.Linear(64, 48, bias=outer)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    values = {k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_bias")}
    values |= {"model_type": "internlm3", "qkv_bias": inner, "bias": outer}
    path.write_text(json.dumps(values))
    assert main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"]) == 0
    tokens = np.random.default_rng(0).integers(1, 96, (2, LENGTH))
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(our_logits(tmp_path / "ours", tokens), wanted, atol=1e-4, rtol=0)


def test_the_text_model_within_one_that_sees_images(tmp_path):
    config = transformers.Mistral3Config(
        text_config=transformers.Ministral3Config(
            **SIZE | {"head_dim": 16, "rope_parameters": YARN | BETA, "tie_word_embeddings": False}
        ),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        ),
        tie_word_embeddings=True,  # which decides
    )
    model = transformers.Mistral3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "hf")
    assert main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"]) == 0
    tokens = np.random.default_rng(0).integers(11, 96, (2, LENGTH))
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(our_logits(tmp_path / "ours", tokens), wanted, atol=1e-4, rtol=0)
    assert read_workdir(tmp_path / "ours")["imported"]["max_length"] == 32  # queries grow from here
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"bits": 8}}))
    with pytest.raises(DataError, match="give the unquantized model"):
        read_config(tmp_path / "hf")


def test_one_axis_of_three_is_enough_for_texts(tmp_path):
    """Qwen-VL's positions are equal on all axes in a text; transformers 4 wrote its keys flat."""
    text = SIZE | {"hidden_size": 64, "rope_parameters": {"rope_type": "default"} | MROPE}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=64
        ),
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "hf")
    assert main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"]) == 0
    tokens = np.random.default_rng(0).integers(1, 90, (2, LENGTH))
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(our_logits(tmp_path / "ours", tokens), wanted, atol=1e-4, rtol=0)
    new, path = read_config(tmp_path / "hf"), tmp_path / "hf" / "config.json"
    flat = {"rope_scaling": {"type": "mrope", **MROPE}, "vision_config": {}}
    text = {key: value for key, value in text.items() if key != "rope_parameters"}
    path.write_text(json.dumps(text | flat | {"model_type": "qwen2_5_vl"}))
    old = read_config(tmp_path / "hf")
    assert old.unread == new.unread == () and old.model == new.model


def test_minicpm_is_a_granite_with_multipliers_of_its_own(tmp_path):
    scales = {"embedding_multiplier": 12.0, "residual_multiplier": 1.4 / 3**0.5}
    scales |= {"attention_multiplier": 12**-0.5, "logits_scaling": 48 / 16}
    model = save_model(tmp_path / "hf", "granite tied", scales)
    path = tmp_path / "hf" / "config.json"
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in scales}
    values |= {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
    for other in ({"sparse_config": {"a": 1}}, {"mup_denominator": 32}, {"scale_depth": None}):
        path.write_text(json.dumps(values | other))
        with pytest.raises(DataError, match=next(iter(other))):
            read_config(tmp_path / "hf")
    path.write_text(json.dumps(values | {"mup_denominator": 3}))
    assert main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"]) == 0
    tokens = np.random.default_rng(0).integers(1, 96, (2, LENGTH))
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(our_logits(tmp_path / "ours", tokens), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_every_key_of_a_family_is_read_or_known_to_be_harmless(name, tmp_path):
    """As transformers writes it in full; a key that nobody here knows is named."""
    kind, settings = MODELS[name]
    values = getattr(transformers, f"{kind}Config")(**(SIZE | settings)).to_dict()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert read_config(tmp_path).unread == ()
    path.write_text(json.dumps(values | {"head_gates": 3, "off": None}))
    assert "head_gates" in read_config(tmp_path).unread
    path.write_text(json.dumps(values | {"quantization_config": {"bits": 4}}))
    with pytest.raises(DataError, match="give the unquantized model"):
        read_config(tmp_path)


def test_settings_of_transformers_4_mean_the_same(tmp_path):
    """rope_theta, rope_scaling and the window's pattern stood elsewhere."""
    for name, old in {
        "llama3": {
            "rope_theta": 500_000.0,
            "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        },
        "phi3.5": {
            "rope_theta": 10_000.0,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": LONGROPE["short_factor"],
                "long_factor": LONGROPE["long_factor"],
            },
        },
        "gemma3": {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 6,
        },
        "gemma2": {"rope_theta": 1e4},
    }.items():
        directory = tmp_path / name
        save_model(directory, name)
        new = read_config(directory)
        path = directory / "config.json"
        values = json.loads(path.read_text())
        for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
            values.pop(key, None)
        path.write_text(json.dumps(values | old))
        assert read_config(directory) == new


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba"}, "model_type 'mamba'; supported: llama"),
        ({"model_type": "gpt_oss"}, "distill logits --backend=torch --teacher=DIR"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "'proportional'"),
        ({"partial_rotary_factor": 0.6}, "partial_rotary_factor 0.6"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, which its family does not"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling .* but rope_parameters",
        ),
        ({"max_position_embeddings": "long"}, "config.json has a value of another kind.*'long'"),
        ({"tie_word_embeddings": True}, "says that lm_head.weight is model.embed_tokens.weight"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu'"),
        (
            {
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "chunked_attention", "full_attention"],
                "model_type": "gemma2",
                "hidden_activation": "gelu_pytorch_tanh",
            },
            "layer_types 'chunked_attention'",
        ),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention"], "model_type": "gemma2"},
            r"num_hidden_layers \d, but 1 layer_types",
        ),
        (
            {
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                "model_type": "mistral",
            },
            "but all layers of a mistral have its window",
        ),
        ({"rope_parameters": GEMMA3_ROPE}, "rope_parameters .* expected one for all layers"),
        (
            {"model_type": "gemma3_text", "rope_parameters": YARN},
            "expected those of full_attention and sliding_attention",
        ),
        (
            {"rope_parameters": YARN, "original_max_position_embeddings": 8},
            "original_max_position_embeddings 8, but 16 in its RoPE settings",
        ),
        ({"model_type": "iquestcoder", "clip_qkv": 8.0}, "clip_qkv 8.0, which .* in iquestcoder"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "but 1 no_rope_layers"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 9}},
            "short_factor .* expected 6 numbers",
        ),
    ],
)
def test_what_our_model_cannot_be_is_refused_by_name(change, message, tmp_path):
    save_model(tmp_path, "llama2")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        main([str(tmp_path), f"--out={tmp_path / 'ours'}"])
    assert not (tmp_path / "ours").exists()


def test_keys_count_where_transformers_reads_them(tmp_path):
    """Llama has no windows and no caps; only unknown keys of rotations are named; an explicit
    activation of Gemma counts, though "gelu" there means the approximation."""

    def read(**changes):
        (tmp_path / "config.json").write_text(
            json.dumps(LLAMA | {"num_key_value_heads": 4} | changes)
        )
        return read_config(tmp_path)

    images = read(model_type="llava", text_config={"vocab_size": 32_064}).model
    assert (images.d_model, images.mlp_dim, images.decoder_layers) == (4096, 11_008, 32)
    plain, keys = read(), {"sliding_window": 8, "final_logit_softcapping": 30.0}
    assert read(**keys).model == plain.model and set(read(**keys).unread) == set(keys)
    assert read(**keys, model_type="mistral").model.attention_window == 8
    window = {"sliding_window": 8, "sliding_window_pattern": 2, "rope_local_base_freq": 5.0}
    mistral, smollm3 = ({"model_type": name} for name in ("mistral", "smollm3"))
    assert read(**window, **mistral).model == read(sliding_window=8, **mistral).model
    local = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False}
    assert read(**window, **local, **smollm3).model.attention_window == 8
    scaled = GEMMA3_ROPE["full_attention"]
    rope = {"full_attention": scaled, "sliding_attention": scaled}
    both = read(model_type="gemma3_text", sliding_window=8, rope_parameters=rope).model
    assert (both.attention_window, both.local_rope_theta, both.rope_factor) == (8, 0.0, 8.0)
    named = read(rope_parameters=YARN | {"alpha": 3.0, "truncate": True})
    assert named.unread == ("rope_parameters.alpha",) and named.model.rope_scaling == "per_pair"
    short = {"short_factor": [1.0] * 6, "original_max_position_embeddings": 16}
    grown = read(rope_scaling=short | {"type": "longrope", "factor": 4.0})
    assert grown.model.rope_magnitude == pytest.approx((1 + np.log(4) / np.log(16)) ** 0.5)
    for given, meant in {
        "gelu": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
    }.items():
        assert read(model_type="gemma", hidden_act=given).model.mlp_activation == meant


LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
STACK = {"vocab_size": 96, "hidden_size": 48}


@pytest.mark.parametrize(
    "content, message",
    [
        *(
            ({k: v for k, v in LLAMA.items() if k != key}, f"has no {key}")
            for key in LLAMA
            if key != "model_type"
        ),
        (LLAMA | {"hidden_size": None}, "has no hidden_size"),
        (
            LLAMA | {"num_attention_heads": 0},
            "num_attention_heads 0, expected a positive whole number",
        ),
        (
            LLAMA | {"num_key_value_heads": 0},
            "num_key_value_heads 0, expected a positive whole number",
        ),
        (LLAMA | {"hidden_size": "48"}, "hidden_size '48', expected a positive whole number"),
        (LLAMA | {"num_hidden_layers": True}, "num_hidden_layers True"),
        ([], "contains a JSON list, expected an object"),
        ({"model_type": "gemma3"}, "has no text_config"),
        ({"model_type": "gemma3", "text_config": []}, r"text_config \[\], expected an object"),
        ({"model_type": "gemma3", "text_config": {}}, "has no hidden_size"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope scaling 'linear', has no factor"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "has no low_freq_factor",
        ),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope"}}, "has no short_factor"),
        (
            {
                "model_type": "t5gemma",
                "encoder": STACK,
                "decoder": STACK | {"num_attention_heads": 0},
            },
            "num_attention_heads",
        ),
        (
            {
                "model_type": "t5gemma",
                "encoder": STACK | {"num_hidden_layers": "x"},
                "decoder": STACK,
            },
            "encoder, has num_hidden_layers 'x', expected a positive whole number",
        ),
        (
            {
                "model_type": "t5gemma",
                "encoder": STACK | {"rope_scaling": {"type": "linear"}},
                "decoder": STACK,
            },
            "encoder, has no factor",
        ),
        (
            {
                "model_type": "t5gemma",
                "encoder": STACK | {"rope_parameters": GEMMA3_ROPE},
                "decoder": STACK,
            },
            "rope_parameters .*with full_attention, expected rope_type",
        ),
    ],
)
def test_what_a_config_lacks_is_named_with_its_file(content, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"{tmp_path}/config\.json.*{message}"):
        main([str(tmp_path), f"--out={tmp_path / 'ours'}"])


def test_broken_downloads_are_refused_and_leave_nothing(tmp_path):
    save_model(tmp_path / "hf", "llama2", max_shard_size="40KB")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    whole = files[1].read_bytes()
    arguments = [str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"]
    for data in (whole[:-7], whole[:5], b"\xff" * 8 + whole[8:], whole[:8] + b"{" * 40):
        files[1].write_bytes(data)
        with pytest.raises(DataError, match="download it again"):
            main(arguments)
    files[1].unlink()
    with pytest.raises(DataError, match=f"lacks {files[1].name}"):
        main(arguments)
    files[1].write_bytes(whole)
    config = tmp_path / "hf" / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2')
    )
    with pytest.raises(DataError, match="unexpected: model.layers.2"):
        main(arguments)
    config.write_text(config.read_text().replace('"hidden_size": 48', '"hidden_size": 64'))
    with pytest.raises(
        DataError,
        match=r"wrong shape: model.embed_tokens.weight \(96, 48\), expected "
        r"\(96, 64\)",
    ):
        main(arguments)
    with pytest.raises(DataError, match="does not exist"):
        main([str(tmp_path / "nothing"), "--out=x"])
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "name, lost, fused",
    [
        ("llama2", "self_attn.k_proj.weight", ""),
        ("qwen3", "self_attn.q_norm.weight", ""),
        ("phi3", "self_attn.qkv_proj.weight", "self_attn.qkv_proj[q].weight (48, 48)"),
    ],
)
def test_all_that_is_wrong_is_named_at_once(name, lost, fused, tmp_path):
    save_model(tmp_path / "hf", name)
    path = next((tmp_path / "hf").glob("*.safetensors"))
    tensors = {k: np.array(v) for k, v in safetensors.open_file(path).items()}
    path.unlink()
    shape = tensors[f"model.layers.1.{lost}"].shape
    tensors["model.layers.1.extra"] = tensors.pop(f"model.layers.1.{lost}")
    tensors["model.layers.2.mlp.down_proj.weight"] = np.zeros((48, 79), np.float32)
    tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((48, 80), np.int8)
    safetensors.write_directory(tmp_path / "hf", tensors)
    with pytest.raises(DataError) as caught:
        main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"])
    message = str(caught.value)
    assert f"missing: model.layers.1.{fused or f'{lost} {shape}'}" in message
    assert f"unexpected: model.layers.1.extra {shape}" in message
    assert "wrong shape: model.layers.2.mlp.down_proj.weight (48, 79), expected (48, 80)" in message
    assert "quantized checkpoint: model.layers.1.mlp.down_proj.weight int8" in message
    assert not (tmp_path / "ours").exists()


def test_a_head_is_tied_where_the_configuration_says_so_alone(tmp_path):
    """Also where a multiplier makes another tensor of it."""
    save_model(tmp_path / "hf", "granite tied")
    arguments = [str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"]
    config = tmp_path / "hf" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"tie_word_embeddings": False}))
    with pytest.raises(DataError, match="missing: lm_head.weight"):
        main(arguments)
    config.write_text(json.dumps(values))
    tensors = dict(safetensors.open_directory(tmp_path / "hf"))
    tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
    (tmp_path / "hf" / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    safetensors.write_directory(tmp_path / "hf", tensors)
    with pytest.raises(DataError, match="says that lm_head.weight is model.embed_tokens.weight"):
        main(arguments)


def test_dtypes_and_names_are_kept(tmp_path):
    model = save_model(tmp_path / "hf", "qwen2")
    for dtype, stored in ((torch.bfloat16, "bfloat16"), (torch.float16, "float32")):
        model.to(dtype).save_pretrained(tmp_path / "hf")
        out = tmp_path / stored
        main([str(tmp_path / "hf"), f"--out={out}", "--name=little"])
        config, params, step = load_params_for_inference(out)
        assert config.param_dtype == stored and step == 0
        table = np.asarray(params["embedder"]["embedding"], np.float32)
        np.testing.assert_array_equal(
            table, model.model.embed_tokens.weight.detach().float().numpy()
        )
    content = read_workdir(tmp_path / "float32")
    assert content["imported"]["name"] == "little"
    assert content["imported"]["family"] == "qwen2" and content["imported"]["max_length"] == 64
    with pytest.raises(ConfigError, match="is not empty"):
        main([str(tmp_path / "hf"), f"--out={out}"])
    main([str(tmp_path / "hf"), f"--out={out}", "--overwrite", "--param_dtype=bfloat16"])
    assert load_params_for_inference(out)[0].param_dtype == "bfloat16"
    with pytest.raises(ConfigError, match="holds no imported model"):
        main([str(tmp_path / "hf"), f"--out={tmp_path / 'hf'}", "--overwrite"])
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    (out / "config.json").unlink()  # as a killed import would leave it
    for name in ("tokenizer.json", "chat_template.jinja"):
        (out / name).write_text("")
    link = tmp_path / "link"
    link.symlink_to(out)
    main([str(tmp_path / "hf"), f"--out={link}", "--overwrite"])
    assert link.is_symlink() and (out / "config.json").is_file()
    assert not (out / "tokenizer.json").exists()


def test_parameters_are_read_where_the_mesh_wants_them(tmp_path):
    """Each device holds its part; a lost parameter is named."""
    from encdec.model import abstract_params, logical_axes
    from encdec.train.run_fields import MeshConfig
    from encdec.train.sharding import ShardingRules, make_mesh, param_shardings

    save_model(tmp_path / "hf", "llama2")
    main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"])
    config, whole, _ = load_params_for_inference(tmp_path / "ours")
    model = build_model(config)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    shardings, _, _ = param_shardings(
        ShardingRules(), mesh, abstract_params(model), logical_axes(model)
    )
    _, split, _ = load_params_for_inference(tmp_path / "ours", shardings=shardings)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), whole, split
    )
    kernel = split["decoder"]["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    path = next((tmp_path / "ours" / "params").iterdir())
    data = path.read_bytes()
    path.write_bytes(data.replace(b"layers_1/mlp/up/kernel", b"layers_1/mlp/xx/kernel"))
    with pytest.raises(CheckpointError, match="layers_1/mlp/up/kernel .*is missing"):
        load_params_for_inference(tmp_path / "ours")


def test_files_are_readable_by_the_safetensors_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="needs safetensors: the extra hf")
    random = np.random.default_rng(0)
    tensors = {
        "a": random.normal(size=(3, 5)).astype(np.float32),
        "b": random.normal(size=(4, 2)).astype(np.float16).T,
        "c": np.arange(7),
    }
    written = safetensors.write_directory(tmp_path, tensors, file_bytes=60)
    assert len(written) == 3
    theirs = {}
    for name in written:
        theirs |= library.load_file(tmp_path / name)
    ours = safetensors.open_directory(tmp_path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(theirs[name], tensor)
        np.testing.assert_array_equal(ours[name], tensor)
    safetensors.write_directory(tmp_path, {"c": tensors["c"] + 1}, stem="other")
    with pytest.raises(DataError, match="has tensor c, as has another file"):
        safetensors.open_directory(tmp_path)
    index = {"weight_map": {"c": next(iter(written))}}
    (tmp_path / safetensors.INDEX_FILE).write_text(json.dumps(index))
    (tmp_path / "other-00000-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    assert safetensors.open_directory(tmp_path)["c"].tolist() == list(range(1, 8))


@pytest.mark.slow
def test_a_large_model_passes_through_little_memory(tmp_path):
    """300 MB of weights in six files, with at most 80 MB (one file is 50) of memory of its own."""
    save_model(
        tmp_path / "hf",
        "llama2",
        dict(hidden_size=512, intermediate_size=2048, vocab_size=8000, num_hidden_layers=16),
        max_shard_size="50MB",
    )
    size = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    assert size > 280e6
    code = (
        "import re, sys, threading, time\n"
        "from encdec.interop import import_command as command, huggingface_import, importing\n"
        "own = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "import encdec.data.vocabulary, encdec.safetensors\n"
        "peak, start, done = [0], own(), False\n"
        "def watch():\n"
        "    while not done:\n"
        "        peak[0] = max(peak[0], own()); time.sleep(0.001)\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "command.main(sys.argv[1:]); done = True; thread.join()\n"
        "print('PEAK', peak[0] - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert int(done.stdout.split("PEAK")[1]) < 80_000, done.stdout
