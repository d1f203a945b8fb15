"""Trained models as Hugging Face directories: safetensors, config.json, tokenizer.

Decoder-only models become Llamas. Encoder-decoders become T5Gemmas where that family has all of
their features, and otherwise are written with our modelling file (``trust_remote_code``).
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from encdec import safetensors
from encdec.errors import ConfigError
from encdec.export import equivalents, tokenizer
from encdec.export.equivalents import Params
from encdec.export.formats import Export, Written
from encdec.export.special_ids import padding_id
from encdec.files import write_json
from encdec.interop import own as own_format
from encdec.interop import t5gemma
from encdec.interop.framing import VOCABULARY_FOLDER
from encdec.interop.layout import Entry, attention_entries, mlp_entries, to_theirs
from encdec.model import ModelConfig
from encdec.model.positions import rope_base, rope_frequencies

SHIPPED = pathlib.Path(__file__).parent / "shipped"
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Their major versions are read alike: tests/export/test_transformers_versions.py tries each.
TRANSFORMERS = {"least": "4.57", "tested": ["4.57.3", "5.24.0"]}
MAX_POSITIONS = 1 << 15  # stated where a length is asked for; nothing of ours depends on it
Need = tuple[str, bool, str]  # a field, whether it is as expected, what is expected


def write(out: pathlib.Path, export: Export) -> Written:
    """Writes the directory; config.json comes last.

    An encoder-decoder becomes a T5Gemma where it can and ``export.own`` is False; else it travels
    with our modelling file.

    Returns:
        The family, and why an encoder-decoder did not become a T5Gemma.
    """
    config, params, prompts = export.config, export.params, export.prompts
    vocabulary, start_id = prompts.vocabulary, prompts.decoder_start_id
    pad_id = padding_id(
        vocabulary, config.vocab_size, start_id, is_encoder_decoder=config.is_encoder_decoder
    )
    reasons = []
    if config.is_encoder_decoder and not export.own:
        longest = max(prompts.max_input_tokens, export.targets_length + 1)
        reasons = obstacles(t5gemma_needs(config, longest), config)
        if pad_id == start_id:
            reasons.append(f"no id is left for padding: the decoder starts with EOS, {start_id}")
    family = (
        "llama"
        if not config.is_encoder_decoder
        else "t5gemma"
        if not export.own and not reasons
        else "encdec"
    )
    config, params = equivalents.on_host(config, params)
    rewrite = {"llama": llama, "t5gemma": to_t5gemma, "encdec": own}[family]
    values, tensors = rewrite(config, params)
    ids = {"pad_token_id": pad_id, "eos_token_id": vocabulary.eos_id, "bos_token_id": start_id}
    generation = ids | {"max_new_tokens": export.targets_length}
    if surplus := list(range(vocabulary.size, config.vocab_size)):
        generation["suppress_tokens"] = surplus  # rows of the table that are not ids
    if config.is_encoder_decoder:
        generation["decoder_start_token_id"] = start_id
        ids["decoder_start_token_id"] = start_id
    for stack in ("encoder", "decoder"):
        if stack in values:
            values[stack] |= {k: ids[k] for k in ("pad_token_id", "eos_token_id", "bos_token_id")}
    if "encoder" in values and pad_id == vocabulary.eos_id:
        # Inputs end with EOS, and a mask derived from it would hide that; none has the start token.
        values["encoder"]["pad_token_id"] = start_id
    out.mkdir(parents=True, exist_ok=True)
    stored = {name: np.asarray(x).astype(_DTYPES[export.precision]) for name, x in tensors.items()}
    files = safetensors.write_directory(out, stored, stem="model", metadata={"format": "pt"})
    weight_map = {tensor: file for file in files for tensor in safetensors.open_file(out / file)}
    write_json(
        out / safetensors.INDEX_FILE,
        {
            "metadata": {"total_size": sum(x.nbytes for x in stored.values())},
            "weight_map": weight_map,
        },
    )
    tokenizer.write(out, prompts, config.architecture, pad_id)
    vocabulary.save(out / VOCABULARY_FOLDER)  # as it is, for the way back
    if family == "encdec":
        for file in SHIPPED.glob("*_encdec.py"):
            shutil.copyfile(file, out / file.name)
    write_json(out / "generation_config.json", generation)
    write_json(
        out / "config.json",
        values | ids | {"dtype": export.precision, "transformers_versions": TRANSFORMERS},
    )
    size = sum((out / file).stat().st_size for file in files)
    return Written(size, family, tuple(reasons))


def check(config: ModelConfig) -> None:
    """Raises ConfigError if no exported format can express the model."""
    needs = [("cross_attention_rope", config.cross_attention_rope == "none", "'none'")]
    if not config.is_encoder_decoder:
        needs += llama_needs(config)
    if found := obstacles(needs, config):
        raise ConfigError(
            "this model cannot be exported to Hugging Face's format: " + "; ".join(found)
        )


def obstacles(needs: list[Need], config: ModelConfig) -> list[str]:
    """Each unmet requirement, in words."""
    return [
        f"{field} is {getattr(config, field)!r}, expected {wanted}"
        for field, met, wanted in needs
        if not met
    ]


def llama_needs(config: ModelConfig) -> list[Need]:
    """Requirements for writing a decoder-only model as a Llama."""
    return [
        ("mlp_gated", config.mlp_gated, "True, because Llama's MLP is gated"),
        ("post_norms", not config.post_norms, "False"),
        ("qk_norm", not config.qk_norm, "False"),
        ("attention_logit_cap", not config.attention_logit_cap, "0"),
        ("final_logit_cap", not config.final_logit_cap, "0"),
        ("attention_window", not config.attention_window, "0"),
        ("rope_scaling", config.rope_scaling != "per_pair", "not 'per_pair'"),
    ]


def t5gemma_needs(config: ModelConfig, longest: int) -> list[Need]:
    """Requirements for writing an encoder-decoder as a T5Gemma.

    ``longest``: of its texts, in tokens. Beyond an encoder's window transformers 4 and 5 differ:
    a token reads what is nearer than the window there, and what is exactly as far here.
    """
    return [
        ("merged_attention", not config.merged_attention, "False"),
        (
            "attention_window",
            not config.attention_window or config.attention_window >= longest,
            f"0, or {longest} and more, as long as its texts: versions of transformers read the "
            "edge of an encoder's window differently",
        ),
        ("local_rope_theta", not config.local_rope_theta, "0"),
        ("post_norms", config.post_norms, "True"),
        ("mlp_gated", config.mlp_gated, "True"),
        ("mlp_bias", not config.mlp_bias, "False"),
        ("qk_norm", not config.qk_norm, "False"),
        ("rope_scaling", config.rope_scaling != "per_pair", "not 'per_pair'"),
        (
            "num_heads",
            config.d_model % config.num_heads == 0,
            f"a divisor of d_model = {config.d_model}",
        ),
    ]


def _common(config: ModelConfig) -> dict[str, Any]:
    """config.json's keys that Llama and T5Gemma have in common."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rope_base(config)}
    if config.rope_scaling == "linear":
        rope |= {"rope_type": "linear", "factor": config.rope_factor}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        # The same for transformers 4.
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "attention_bias": config.qkv_bias,
        "max_position_embeddings": MAX_POSITIONS,
    }


def llama(config: ModelConfig, params: Params) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """A Llama's config.json and tensors."""
    config, params = equivalents.equal_biases(config, params)
    config, params = equivalents.norms_around(config, params, plus_one=False)
    config, params = equivalents.scaled_embedding(config, params, scaled=False)
    config, params = equivalents.plain_attention_scale(config, params)
    entries = [
        Entry("model.embed_tokens.weight", "embedder/embedding"),
        Entry("model.norm.weight", "decoder/final_norm/scale"),
    ]
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", "embedder/head", "matrix"))
    for layer in range(config.decoder_layers):
        theirs, ours = f"model.layers.{layer}", f"decoder/layers_{layer}"
        entries += attention_entries(config, f"{theirs}.self_attn", f"{ours}/self_attention")
        entries += mlp_entries(config, f"{theirs}.mlp", f"{ours}/mlp", _MLP)
        entries += [
            Entry(f"{theirs}.input_layernorm.weight", f"{ours}/self_attention_norm/scale"),
            Entry(f"{theirs}.post_attention_layernorm.weight", f"{ours}/mlp_norm/scale"),
        ]
    values = _common(config) | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": config.decoder_layers,
        "mlp_bias": config.mlp_bias,
        "hidden_act": _ACTIVATIONS[config.mlp_activation],
        "tie_word_embeddings": config.tie_embeddings,
    }
    return values, to_theirs(entries, params)


def to_t5gemma(config: ModelConfig, params: Params) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """A T5Gemma's config.json and tensors; the encoder's table is stored apart."""
    config, params = equivalents.equal_biases(config, params)
    config, params = equivalents.norms_around(config, params, plus_one=True)
    config, params = equivalents.scaled_embedding(config, params, scaled=True)
    config, params = equivalents.plain_attention_scale(config, params)
    stack = _common(config) | {
        "model_type": "t5_gemma_module",
        "hidden_activation": _ACTIVATIONS[config.mlp_activation],
        "query_pre_attn_scalar": config.head_dim,
        # Asked for even where no layer has one.
        "sliding_window": config.attention_window or MAX_POSITIONS,
        "attn_logit_softcapping": config.attention_logit_cap or None,
        "final_logit_softcapping": config.final_logit_cap or None,
        "tie_word_embeddings": config.tie_embeddings,
    }
    stacks = {
        name: stack
        | {
            "num_hidden_layers": layers,
            "layer_types": [
                "sliding_attention" if config.is_local(layer, name) else "full_attention"
                for layer in range(layers)
            ],
            "is_decoder": name == "decoder",
        }
        for name, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers))
    }
    values = stacks | {
        "model_type": t5gemma.MODEL_TYPE,
        "architectures": ["T5GemmaForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "dropout_rate": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.attention_logit_cap:
        # transformers 4 would choose an attention that leaves the cap out.
        values["_attn_implementation"] = "eager"
    tensors = to_theirs(t5gemma.layout(config), params)
    if config.share_embeddings:
        tensors["model.encoder.embed_tokens.weight"] = tensors["model.decoder.embed_tokens.weight"]
    return values, tensors


def own(config: ModelConfig, params: Params) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """config.json and tensors of the modelling file shipped with them."""
    # transformers ties no weights at all where the head is untied: the table is then stored twice.
    tied_tables = config.share_embeddings and config.tie_embeddings
    entries = own_format.layout(config, one_table=tied_tables)
    kept = (*own_format.FIELDS, *own_format.LATER_FIELDS, "rope_magnitude")
    reads_all = {
        f"{stack}_global_layers": [
            layer
            for layer in range(getattr(config, f"{stack}_layers"))
            if config.attention_window and not config.is_local(layer, stack)
        ]
        for stack in ("encoder", "decoder")
    }
    values = {name: getattr(config, name) for name in kept} | reads_all
    values |= {
        "model_type": "encdec",
        "architectures": ["EncdecForConditionalGeneration"],
        "share_embeddings": tied_tables,
        "auto_map": {
            "AutoConfig": "configuration_encdec.EncdecConfig",
            "AutoModelForSeq2SeqLM": "modeling_encdec.EncdecForConditionalGeneration",
        },
        "is_encoder_decoder": True,
        "mlp_activation": _ACTIVATIONS[config.mlp_activation],
        "attention_scale": config.scores_scale,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_frequencies": np.asarray(rope_frequencies(config)).tolist(),
    }
    return values, to_theirs(entries, params)
