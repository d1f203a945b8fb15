"""Models that also see images, of which the text model alone is read."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from encdec.interop.rope import required

# Of the text model within each, what its configuration may leave out.
_IDEFICS = {"model_type": "llama", "rms_norm_eps": 1e-5}
_ABSENT: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "gemma3_text"},
    "idefics3": _IDEFICS,
    "internvl": {"model_type": "qwen2"},
    "llava": {  # Llama 2 7B's
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "mistral3": {"model_type": "mistral"},
    "qwen2_vl": {"model_type": "qwen2_vl_text"},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl_text"},
    "qwen3_vl": {"model_type": "qwen3_vl_text"},
    "smolvlm": _IDEFICS,
}
_FLAT = ("qwen2_vl", "qwen2_5_vl")  # transformers 4 wrote the text model's keys among the others
_TIED_IN_TEXT = (*_FLAT, "llava")  # and said there alone that these have one table


def text_values(values: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """The configuration of the text model; of a model without images, its own.

    A text alone has equal positions on all axes that such a model has, which is plain RoPE.

    Raises:
        DataError: it has none.
    """
    kind = values.get("model_type")
    if kind not in _ABSENT:
        return dict(values)
    absent = _ABSENT[kind]
    if kind in _FLAT and "text_config" not in values:
        return dict(values) | absent
    text = absent | required(values, "text_config", path, dict)
    if kind in _FLAT and text["model_type"] == kind:
        text |= absent
    key = "tie_word_embeddings"
    if values.get(key) is not None:  # the head is of the whole model
        text[key] = bool(values[key] or kind in _TIED_IN_TEXT and text.get(key))
    return text


def of_images(names: Iterable[str], prefix: str) -> list[str]:
    """Tensors next to the text model, whose names begin with ``prefix``, and its head."""
    return [
        name
        for name in names
        if name.startswith("visual.")  # next to "model."
        or prefix != "model."
        and not name.startswith(prefix)
        and "lm_head" not in name
    ]
