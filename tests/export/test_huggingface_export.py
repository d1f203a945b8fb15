"""Exports against transformers: the same logits, the same greedy answers, the same token ids."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from encdec import safetensors
from encdec.data.chat_template import TEMPLATE_FILE
from encdec.errors import ConfigError, DataError
from encdec.export import formats, huggingface_export
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.generator import Generator, read_prompt_format
from encdec.inference.ready import ready_for_decoding
from encdec.interop.import_command import main as import_main
from encdec.model import build_model
from encdec.saved.saved_params import load_params_for_inference
from tests.export.examples import MODELS, MODELS_OF_GRAPHS, PROMPTS, batch, pair
from tests.inference.examples import START, plan, rows
from tests.inference.test_decoding import run

torch = pytest.importorskip("torch", reason="needs torch: the extra hf of setup.py")
transformers = pytest.importorskip("transformers", reason="needs transformers: the extra hf")

FAMILIES = {
    "paper": "encdec",
    "untied head": "encdec",
    "unrolled": "encdec",
    "merged": "encdec",
    "t5gemma": "t5gemma",
    "t5gemma folded": "t5gemma",
    "of later families": "encdec",
    "t5gemma2": "t5gemma2",
    "windowed pair": "encdec",
    "t5gemma of gemma 2": "t5gemma",
    "llama": "llama",
}


CHAT = "{{ messages[0]['content'] }}{{ eos_token }}"


def logits(config, params, fields):
    apply = jax.jit(lambda params, fields: build_model(config).apply({"params": params}, fields))
    return np.asarray(apply(params, fields))


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """Name, directory, and the model as transformers loads it."""
    out = tmp_path_factory.mktemp("export") / "hf"
    (out.parent / TEMPLATE_FILE).write_text(CHAT)
    export = formats.Export(*pair(request.param), PROMPTS, directory=out.parent, targets_length=12)
    written = formats.write("hf", out, export)
    family, reasons = written.family, written.reasons
    assert family == FAMILIES[request.param]
    assert bool(reasons) == (family == "encdec")
    auto = (
        transformers.AutoModelForCausalLM
        if family == "llama"
        else transformers.AutoModelForSeq2SeqLM
    )
    model = auto.from_pretrained(
        out, trust_remote_code=family == "encdec", attn_implementation="eager", dtype="float32"
    )
    return request.param, out, model.eval()


def test_logits_are_ours(exported):
    name, _, model = exported
    config, params = pair(name)
    rng = np.random.default_rng(1)
    source, target = rng.integers(3, 259, (2, 9)), rng.integers(3, 259, (2, 7))
    with torch.no_grad():
        if config.is_encoder_decoder:
            theirs = model(
                input_ids=torch.tensor(source),
                decoder_input_ids=torch.tensor(target),
                attention_mask=torch.ones(2, 9, dtype=torch.long),
            ).logits
        else:
            theirs = model(torch.tensor(target)).logits
    ours = logits(config, params, batch(config, source, target))
    assert np.ptp(ours) > 1
    np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-4, rtol=1e-4)


def test_greedy_answers_are_ours(exported):
    """Texts in, texts out, with the caches of both, inputs of unlike lengths padded."""
    name, out, model = exported
    texts = ["a hare", "and a tortoise", "two"]
    generator = Generator(*pair(name), PROMPTS, max_tokens=12)
    ours = [made[0] for made in generator.generate(texts, GenerationSettings())]
    own = FAMILIES[name] == "encdec"
    tokens = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=own)
    inputs = tokens(texts, return_tensors="pt", padding=True)
    chat = [{"role": "user", "content": "a hare"}]
    ids = PROMPTS.vocabulary.encode_marked("a hare</s>")
    assert tokens.apply_chat_template(chat, tokenize=True, return_dict=False) == ids
    fed = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, named: fed.append(
            named.get("input_ids", args[0] if args else None).shape[1]
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        theirs = model.generate(**inputs, do_sample=False, num_beams=1)
    hook.remove()
    assert model.generation_config.suppress_tokens == [263]  # has a row, but is not an id
    assert len(fed) > 5 and set(fed[1:]) == {1}  # one token at a time
    skip = 1 if name != "llama" else inputs["input_ids"].shape[1]
    for answer, row in zip(ours, theirs.tolist(), strict=True):
        assert row[skip : skip + len(answer.tokens)] == answer.tokens
        if "<extra_id_" not in answer.text:  # special tokens there, which are left out
            assert tokens.decode(row[skip:], skip_special_tokens=True) == answer.text


def test_an_export_comes_back_as_it_went(exported, tmp_path):
    """Function, vocabulary and framing; in the modelling file's format every field too."""
    name, out, _ = exported
    assert import_main([str(out), f"--out={tmp_path / 'ours'}"]) == 0
    config, params, _ = load_params_for_inference(tmp_path / "ours")
    was, _ = pair(name)
    rng = np.random.default_rng(2)
    fields = batch(config, rng.integers(3, 259, (2, 9)), rng.integers(3, 259, (2, 7)))
    there = logits(*pair(name), fields)
    rounding = 1e-5 * max(10, np.abs(there).max())  # merged's logits reach 17, others' 10
    np.testing.assert_allclose(logits(config, params, fields), there, atol=rounding, rtol=1e-4)
    assert config.share_embeddings == was.share_embeddings
    assert (tmp_path / "ours" / TEMPLATE_FILE).read_text() == CHAT
    prompts, max_tokens = read_prompt_format(tmp_path / "ours")
    assert prompts.vocabulary.fingerprint == PROMPTS.vocabulary.fingerprint and max_tokens == 12
    same = ("decoder_start_id", "inputs_eos", "inputs_prefix", "max_input_tokens")
    assert all(getattr(prompts, field) == getattr(PROMPTS, field) for field in same)
    if FAMILIES[name] == "encdec":
        # How heads are paired and layers stacked is another order of the same parameters.
        layout = ("kv_pairing", "encoder_positions", "execution")
        training = ("attention_dropout", "mlp_dropout", "residual_dropout", "init_std")
        differ = {
            field for field, value in was.to_dict().items() if getattr(config, field) != value
        }
        assert differ <= {*layout, *training}


def random_t5gemma(directory):
    stack = dict(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=6,
        query_pre_attn_scalar=24,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    config = transformers.T5GemmaConfig(
        encoder=stack | {"num_hidden_layers": 3}, decoder=stack, vocab_size=96
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def test_t5gemmas_are_imported(tmp_path):
    """With soft caps, windows, and a table for each stack; the windows stay when exported again."""
    model = random_t5gemma(tmp_path / "hf")
    import_main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"])
    config, params, _ = load_params_for_inference(tmp_path / "ours")
    assert not config.share_embeddings and config.encoder_layers == 3
    rng = np.random.default_rng(3)
    source, target = rng.integers(3, 96, (2, 18)), rng.integers(3, 96, (2, 15))
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(source), decoder_input_ids=torch.tensor(target))
    ours = logits(config, params, batch(config, source, target))
    np.testing.assert_allclose(ours, theirs.logits.numpy(), atol=1e-4, rtol=1e-4)
    # Greedy, each with its own cache.
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(source),
            do_sample=False,
            max_new_tokens=7,
            use_cache=True,
            decoder_start_token_id=START,
            eos_token_id=None,
            pad_token_id=0,
        )
    answers, _ = run(
        *ready_for_decoding(config, params), source.tolist(), rows(2, 7), plan(config, 7)
    )
    assert [tokens for tokens, _ in answers] == theirs[:, 1:].tolist()
    needs = huggingface_export.t5gemma_needs(config, 1000)
    assert not huggingface_export.obstacles(needs, config)
    values, _ = huggingface_export.to_t5gemma(config, params)
    for stack in ("encoder", "decoder"):
        assert values[stack]["sliding_window"] == 6
        assert values[stack]["layer_types"] == getattr(model.config, stack).layer_types


def test_t5gemmas_2_are_imported(tmp_path):
    """Text alone, with windows, their own rotation, and a side for images."""
    stack = dict(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=6,
        sliding_window_pattern=2,
        query_pre_attn_scalar=24,
        max_position_embeddings=64,
        initializer_range=0.2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    images = dict(
        model_type="siglip_vision_model",
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    encoder = {
        "text_config": stack | {"num_hidden_layers": 3},
        "vision_config": images,
        "mm_tokens_per_image": 1,
        "eoi_token_index": 1,
        "image_token_index": 2,
    }
    config = transformers.T5Gemma2Config(encoder=encoder, decoder=stack, image_token_index=2)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.T5Gemma2ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hf")
    import_main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"])
    config, params, _ = load_params_for_inference(tmp_path / "ours")
    assert config.merged_attention and config.encoder_window == (2, 3)
    rng = np.random.default_rng(3)
    source, target = rng.integers(3, 96, (2, 18)), rng.integers(3, 96, (2, 15))
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(source), decoder_input_ids=torch.tensor(target))
    ours = logits(config, params, batch(config, source, target))
    np.testing.assert_allclose(ours, theirs.logits.numpy(), atol=1e-4, rtol=1e-4)


DECODER_ONLY = dict(
    scan_layers=False,
    kv_pairing="grouped",
    qkv_bias=False,
    attention_out_bias=False,
    mlp_bias=False,
    decoder_layers=3,
)
WINDOW = dict(attention_window=4)
AFTER = dict(qk_norm=True, post_norms=True, omit_pre_norms=True)
GEMMA = dict(post_norms=True, norm_plus_one=True, embedding_scale=True, tie_embeddings=True)
OWN_FAMILIES = {
    "gemma": dict(
        mlp_activation="gelu_tanh", norm_plus_one=True, embedding_scale=True, tie_embeddings=True
    ),
    "mistral": WINDOW,
    "qwen2": WINDOW | dict(decoder_global_layers=(0, 1), qkv_bias=True),
    "qwen3": WINDOW | dict(qk_norm=True, decoder_global_layers=(0,)),
    "gemma2": GEMMA | WINDOW | dict(global_layer_every=2, attention_logit_cap=5.0),
    "gemma3_text": GEMMA | WINDOW | dict(qk_norm=True, local_rope_theta=100.0, attention_scale=0.5),
    "smollm3": dict(decoder_unrotated_layers=(2,)),
    "olmo3": AFTER | WINDOW | dict(qk_norm_over_heads=True, local_rope_theta=100.0),
    "exaone4": AFTER | WINDOW | dict(decoder_global_layers=(1,), decoder_unrotated_layers=(1,)),
    # A Phi-3.5 of sorts.
    "llama": dict(rope_scaling="per_pair", rope_divisors=(1.0, 1.5, 2.0, 1e30), rope_magnitude=1.1),
}


@pytest.mark.parametrize("family", OWN_FAMILIES)
def test_decoder_only_models_are_exported_as_their_own_family(family, tmp_path):
    config = MODELS["llama"].replace(
        rope_scaling="none",
        rope_factor=1.0,
        rope_length=0,
        norm_plus_one=False,
        embedding_scale=False,
        attention_scale=0.0,
    )
    MODELS_OF_GRAPHS[family] = config.replace(**DECODER_ONLY | OWN_FAMILIES[family])
    config, params = pair.__wrapped__(family)
    written = formats.write("hf", tmp_path / "hf", formats.Export(config, params, PROMPTS))
    assert written.family == family
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert ("_attn_implementation" in values) == (config.attention_logit_cap > 0)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = np.random.default_rng(1).integers(3, 259, (2, 12))
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(tokens)).logits.numpy()
    ours = logits(config, params, batch(config, tokens, tokens))
    assert np.ptp(ours) > 1
    np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=1e-4)
    import_main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"])
    again, params, _ = load_params_for_inference(tmp_path / "ours")
    back = logits(again, params, batch(again, tokens, tokens))
    np.testing.assert_allclose(back, ours, atol=1e-4, rtol=1e-4)


def test_wrong_tensors_are_named(tmp_path):
    random_t5gemma(tmp_path / "hf")
    path = next((tmp_path / "hf").glob("*.safetensors"))
    tensors = {k: np.array(v) for k, v in safetensors.open_file(path).items()}
    tensors["model.encoder.norm.weight"] = np.zeros(7, np.float32)
    tensors["model.extra"] = tensors.pop("model.decoder.layers.1.cross_attn.q_proj.weight")
    path.unlink()
    safetensors.write_directory(tmp_path / "hf", tensors)
    with pytest.raises(DataError) as caught:
        import_main([str(tmp_path / "hf"), f"--out={tmp_path / 'ours'}"])
    message = str(caught.value)
    assert "missing: model.decoder.layers.1.cross_attn.q_proj.weight (64, 48)" in message
    assert "unexpected: model.extra (64, 48)" in message
    assert "wrong shape: model.encoder.norm.weight (7,), expected (48,)" in message


def test_what_no_family_has_is_refused_by_field(tmp_path):
    config, params = pair("llama")
    for change, named in (
        ({"mlp_gated": False}, "mlp_gated is False"),
        ({"mlp_gated": True, "attention_logit_cap": 5.0}, "attention_logit_cap is 5.0"),
    ):
        with pytest.raises(ConfigError, match=named):
            export = formats.Export(config.replace(**change), params, PROMPTS)
            formats.write("hf", tmp_path / "x", export)
    assert not (tmp_path / "x").exists()
