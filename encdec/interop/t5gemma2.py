"""T5Gemma 2 (transformers' ``T5Gemma2ForConditionalGeneration``, arXiv 2512.14856), text alone.

Both directions share one layout. Each stack is a Gemma 3; its decoder's attention is merged, and
reads a source whose keys are not rotated. One table serves both stacks and the head.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from encdec.errors import DataError
from encdec.interop import huggingface_import
from encdec.interop.huggingface_import import Imported, ids_of
from encdec.interop.layout import (
    Entry,
    attention_entries,
    check_tied,
    layernorm_entries,
    mlp_entries,
    qk_norm_entries,
    to_ours,
)
from encdec.interop.rope import required
from encdec.model import ModelConfig

MODEL_TYPE = "t5gemma2"
TABLE = "model.encoder.embed_tokens.weight"
# Stored names that reading texts makes no use of.
_IMAGES = ("vision_tower.", "multi_modal_projector.", "eoi_embedding")
_OF_STACKS = ("encoder_layers", "decoder_layers", "global_layer_every", "decoder_global_layers")


def layout(config: ModelConfig) -> list[Entry]:
    """Their names of our parameters."""
    entries = [Entry(TABLE, "embedder/embedding")]
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.out_proj.weight", "embedder/head", "matrix"))
    for stack, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        entries.append(Entry(f"model.{stack}.norm.weight", f"{stack}/final_norm/scale"))
        for layer in range(count):
            theirs, ours = f"model.{stack}.layers.{layer}", f"{stack}/layers_{layer}"
            attention = f"{theirs}.self_attn", f"{ours}/self_attention"
            entries += attention_entries(config, *attention)
            entries += qk_norm_entries(*attention)
            entries += mlp_entries(config, f"{theirs}.mlp", f"{ours}/mlp")
            norms = {"self_attn": "self_attention", "feedforward": "mlp"}
            entries += layernorm_entries(theirs, ours, norms)
    return entries


def encoder_window(window: int) -> tuple[int, int]:
    """Tokens (back, ahead) that its encoder's local layers read in addition to their own."""
    return (window + 1) // 2 - 1, window // 2


def read_config(directory: pathlib.Path) -> Imported:
    """Translates a T5Gemma 2's config.json; what it has for images is left out.

    Raises:
        DataError: a setting is not supported.
    """
    path = directory / "config.json"
    values = json.loads(path.read_text())
    encoder = required(values, "encoder", path, dict)
    stacks = {
        "encoder": required(encoder, "text_config", f"{path}, encoder,", dict),
        "decoder": required(values, "decoder", path, dict),
    }
    found = {
        name: huggingface_import.translate("gemma3_text", stack, path, "")
        for name, stack in stacks.items()
    }
    mine, theirs = (found[name].model.to_dict() for name in ("decoder", "encoder"))
    for field, value in mine.items():
        if field not in _OF_STACKS and theirs[field] != value:
            raise DataError(
                f"{path} has an encoder whose {field} is {theirs[field]!r}, but the decoder's is "
                f"{value!r}: encdec has one value for both stacks; this model cannot be imported"
            )
    encoder_model, model = found["encoder"].model, found["decoder"].model
    changes: dict[str, Any] = {}
    if window := model.attention_window:
        changes = {"encoder_window": encoder_window(window), "global_layer_every": 0}
        for name, stack in (("encoder", encoder_model), ("decoder", model)):
            changes[f"{name}_global_layers"] = tuple(
                i for i in range(stack.decoder_layers) if not stack.is_local(i)
            )
    model = model.replace(
        architecture="encoder_decoder",
        encoder_layers=encoder_model.decoder_layers,
        merged_attention=True,
        tie_embeddings=bool(values.get("tie_word_embeddings", True)),
        **changes,
    )
    eos = ids_of(values.get("eos_token_id", found["decoder"].eos_ids))
    return Imported(
        MODEL_TYPE,
        model,
        min(one.max_length for one in found.values()),
        int(stacks["decoder"].get("bos_token_id", 2)),
        eos,
    )


def convert(
    config: ModelConfig, tensors: Mapping[str, np.ndarray]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Our configuration and its unrolled parameters, as views of the tensors.

    Raises:
        DataError: tensors are missing, unexpected or of the wrong shape.
    """
    # Older files name the text model within the encoder.
    tensors = {
        name.replace("model.encoder.text_model.", "model.encoder."): x
        for name, x in tensors.items()
    }
    copies = ["model.decoder.embed_tokens.weight"]
    if config.tie_embeddings:
        copies.append("lm_head.out_proj.weight")
    check_tied(tensors, TABLE, *copies)
    images = [name for name in tensors if any(part in name for part in _IMAGES)]
    return config, to_ours(layout(config), config, tensors, [*images, *copies])
