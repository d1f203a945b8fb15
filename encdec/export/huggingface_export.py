"""Trained models as Hugging Face directories: safetensors, config.json, tokenizer.

Decoder-only models become the first of ``encdec.export.family_export`` that has all of their
features, a Llama where that can be. Encoder-decoders become T5Gemmas (T5Gemmas 2 with merged
attention) if those have all of their features, and otherwise are written with our modelling file
(``trust_remote_code``).
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from encdec import safetensors
from encdec.data.chat_template import TEMPLATE_FILE, copy_template
from encdec.data.vocabulary import VOCABULARY_FOLDER
from encdec.errors import ConfigError
from encdec.export import equivalents, family_export, tokenizer
from encdec.export.equivalents import Params
from encdec.export.family_export import ACTIVATIONS, MAX_POSITIONS, Need, common, layer_types
from encdec.export.formats import Export, Written
from encdec.export.special_ids import padding_id
from encdec.files import write_json
from encdec.interop import own as own_format
from encdec.interop import t5gemma, t5gemma2
from encdec.interop.layout import to_theirs
from encdec.model import ModelConfig
from encdec.model.positions import rope_frequencies

SHIPPED = pathlib.Path(__file__).parent / "shipped"
STACKS: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Exports are the same for both major versions: tests/export/test_transformers_versions.py.
TRANSFORMERS = {"least": "4.57", "tested": ["4.57.3", "5.24.0"]}


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
        vocabulary,
        config.vocab_size,
        start_id,
        prompts.inputs_prefix,
        is_encoder_decoder=config.is_encoder_decoder,
    )
    reasons = []
    if config.is_encoder_decoder and not export.own:
        longest = max(prompts.max_input_tokens, export.targets_length + 1)
        needs = t5gemma2_needs if config.merged_attention else t5gemma_needs
        reasons = obstacles(needs(config, longest), config)
        if pad_id == start_id:
            reasons.append(f"no id is left for padding: the decoder starts with EOS, {start_id}")
        both = pad_id == vocabulary.eos_id and prompts.inputs_eos
        if both and start_id in prompts.inputs_prefix:
            reasons.append("no id is left for padding: inputs have the start token and EOS")
    form = None if config.is_encoder_decoder else family_export.choose(config)[0]
    native = "t5gemma2" if config.merged_attention else "t5gemma"
    family = form.name if form else native if not export.own and not reasons else "encdec"
    config, params = equivalents.on_host(config, params)
    if form:
        values, tensors = family_export.convert(form, config, params)
    else:
        rewrite = {"t5gemma": to_t5gemma, "t5gemma2": to_t5gemma2, "encdec": own}[family]
        values, tensors = rewrite(config, params)
    ids = {"pad_token_id": pad_id, "eos_token_id": vocabulary.eos_id, "bos_token_id": start_id}
    generation: dict[str, Any] = ids | {"max_new_tokens": export.targets_length}
    if surplus := list(range(vocabulary.size, config.vocab_size)):
        generation["suppress_tokens"] = surplus  # rows of the table that are not ids
    if config.is_encoder_decoder:
        generation["decoder_start_token_id"] = start_id
        ids["decoder_start_token_id"] = start_id
    stacks = {
        name: values[name].get("text_config", values[name])
        for name in ("encoder", "decoder")
        if name in values
    }
    for stack in stacks.values():
        stack |= {k: ids[k] for k in ("pad_token_id", "eos_token_id", "bos_token_id")}
    begins = start_id in prompts.inputs_prefix
    if "encoder" in stacks and pad_id == vocabulary.eos_id and not begins:
        # Inputs end with EOS, and a mask derived from it would hide that; none has the start token.
        stacks["encoder"]["pad_token_id"] = start_id
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
    copy_template(export.directory, out)
    chat = (out / TEMPLATE_FILE).is_file()
    tokenizer.write(out, prompts, config.architecture, pad_id, chat=chat)
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
        needs += family_export.choose(config)[1]
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


def t5gemma_needs(config: ModelConfig, longest: int) -> list[Need]:
    """Requirements for writing an encoder-decoder as a T5Gemma.

    ``longest``: of its texts, in tokens. Beyond an encoder's window transformers 4 and 5 differ:
    a token reads what is nearer than the window there, and what is exactly as far here.
    """
    window = config.attention_window
    return [
        (
            "attention_window",
            not window or window >= longest or config.encoder_window == (window, window),
            f"0, or {longest} and more, as long as its texts: versions of transformers read the "
            "edge of an encoder's window differently",
        ),
        ("local_rope_theta", not config.local_rope_theta, "0"),
        *_as_always(config),
        ("qk_norm", not config.qk_norm, "False"),
        ("rope_scaling", config.rope_scaling != "per_pair", "not 'per_pair'"),
        (
            "num_heads",
            config.d_model % config.num_heads == 0,
            f"a divisor of d_model = {config.d_model}",
        ),
    ]


def to_t5gemma(config: ModelConfig, params: Params) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """A T5Gemma's config.json and tensors; the encoder's table is stored apart."""
    config, params = equivalents.equal_biases(config, params)
    config, params = equivalents.norms_around(config, params, plus_one=True)
    config, params = equivalents.scaled_embedding(config, params, scaled=True)
    config, params = equivalents.plain_attention_scale(config, params)
    stack = common(config) | {
        "model_type": "t5_gemma_module",
        "hidden_activation": ACTIVATIONS[config.mlp_activation],
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
            "num_hidden_layers": len(layer_types(config, name)),
            "layer_types": layer_types(config, name),
            "is_decoder": name == "decoder",
        }
        for name in STACKS
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


def _as_always(config: ModelConfig) -> list[Need]:
    """What every T5Gemma has, and that a stack has nothing of later decoder-only families."""
    fields = ("encoder_unrotated_layers", "decoder_unrotated_layers")
    return [
        ("omit_pre_norms", not config.omit_pre_norms, "False"),
        *((field, not getattr(config, field), "()") for field in fields),
        ("post_norms", config.post_norms, "True"),
        ("mlp_gated", config.mlp_gated, "True"),
        ("mlp_bias", not config.mlp_bias, "False"),
    ]


def t5gemma2_needs(config: ModelConfig, longest: int) -> list[Need]:
    """Requirements for writing an encoder-decoder as a T5Gemma 2; ``longest`` of its texts."""
    window = config.attention_window
    return [
        *_as_always(config),
        ("qk_norm", config.qk_norm and not config.qk_norm_over_heads, "True, of single heads"),
        ("attention_logit_cap", not config.attention_logit_cap, "0"),
        ("share_embeddings", config.share_embeddings, "True"),
        ("tie_embeddings", config.tie_embeddings, "True"),
        ("embedding_scale", config.embedding_scale, "True"),
        (
            "encoder_window",
            not window
            or window // 2 >= longest
            or config.encoder_window == t5gemma2.encoder_window(window),
            f"{t5gemma2.encoder_window(window)}, as it reads a window of {window}",
        ),
    ]


def to_t5gemma2(config: ModelConfig, params: Params) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """A T5Gemma 2's config.json and tensors; what reads images has no layers and is zero."""
    config, params = equivalents.equal_biases(config, params)
    config, params = equivalents.norms_around(config, params, plus_one=True)
    config, params, scalar = equivalents.whole_query_scalar(config, params)
    stack, theta = common(config), config.local_rope_theta
    near = {"rope_type": "default", "rope_theta": theta} if theta else stack["rope_parameters"]
    stack |= {
        "rope_parameters": {"full_attention": stack["rope_parameters"], "sliding_attention": near},
        "hidden_activation": ACTIVATIONS[config.mlp_activation],
        "query_pre_attn_scalar": scalar,
        "sliding_window": config.attention_window or MAX_POSITIONS,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": config.final_logit_cap or None,
        "tie_word_embeddings": True,
    }
    for key in ("rope_theta", "rope_scaling"):  # of transformers 4, which has no such model
        del stack[key]
    of_stack = {
        name: stack
        | {
            "num_hidden_layers": len(layer_types(config, name)),
            "layer_types": layer_types(config, name),
        }
        for name in STACKS
    }
    width, no_id = 2, config.vocab_size  # of the images' side; an id that no text has
    encoder = {
        "model_type": "t5gemma2_encoder",
        "text_config": of_stack["encoder"] | {"model_type": "t5gemma2_text"},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": width,
            "intermediate_size": width,
            "num_hidden_layers": 0,
            "num_attention_heads": 1,
            "image_size": 1,
            "patch_size": 1,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 1,
        "boi_token_index": no_id,
        "eoi_token_index": no_id,
        "image_token_index": no_id,
        "tie_word_embeddings": True,
    }
    values = {
        "model_type": t5gemma2.MODEL_TYPE,
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "encoder": encoder,
        "decoder": of_stack["decoder"] | {"model_type": "t5gemma2_decoder"},
        "vocab_size": config.vocab_size,
        "image_token_index": no_id,
        "eoi_token_index": no_id,
        "dropout_rate": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }
    blank = {
        "embed_tokens.eoi_embedding": (config.d_model,),
        "vision_tower.embeddings.patch_embedding.weight": (width, 3, 1, 1),
        "vision_tower.embeddings.patch_embedding.bias": (width,),
        "vision_tower.embeddings.position_embedding.weight": (1, width),
        "vision_tower.post_layernorm.weight": (width,),
        "vision_tower.post_layernorm.bias": (width,),
        "multi_modal_projector.mm_input_projection_weight": (width, config.d_model),
        "multi_modal_projector.mm_soft_emb_norm.weight": (width,),
    }
    images = {f"model.encoder.{name}": np.zeros(shape) for name, shape in blank.items()}
    return values, to_theirs(t5gemma2.layout(config), params) | images


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
        "mlp_activation": ACTIVATIONS[config.mlp_activation],
        "attention_scale": config.attention_logit_scale,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_frequencies": np.asarray(rope_frequencies(config)).tolist(),
    }
    return values, to_theirs(entries, params)
