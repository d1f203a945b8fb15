"""Which special tokens a Hugging Face model's tokenizer puts around a text."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from encdec.errors import DataError

# Tokenizers that put BOS in front of every text where no file says otherwise.
_BOS_CLASSES = ("Llama", "CodeLlama", "Gemma")


def tokens_around(directory: pathlib.Path) -> tuple[list[int], list[int]]:
    """Ids before and after a text, as the model's tokenizer adds them; the start token first.

    Raises:
        DataError: a file that cannot be read.
    """
    content = read_object(directory / "tokenizer.json")
    if content:
        return _template(content.get("post_processor")) or ([], [])
    settings = read_object(directory / "tokenizer_config.json")
    config = read_object(directory / "config.json")
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer")
    ids = {}
    for side, default in (("bos", kind in _BOS_CLASSES), ("eos", False)):
        token, adds = config.get(f"{side}_token_id"), settings.get(f"add_{side}_token")
        token = token[0] if isinstance(token, list) else token
        wanted = default if adds is None else adds
        ids[side] = [token] if wanted and token is not None else []
    return ids["bos"], ids["eos"]


def _template(processor: Mapping[str, Any] | None) -> tuple[list[int], list[int]] | None:
    """Ids before and after a single text in a tokenizer.json's post-processor, if it adds any."""
    if not processor:
        return None
    if processor.get("type") == "Sequence":
        found = [_template(one) for one in processor.get("processors", ())]
        return next((one for one in found if one is not None), None)
    if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]], [processor["sep"][1]]
    if processor.get("type") != "TemplateProcessing":
        return None
    sides: tuple[list[int], list[int]] = ([], [])
    side = 0
    for part in processor["single"]:
        if "Sequence" in part:
            side = 1
        else:
            name = part["SpecialToken"]["id"]
            sides[side].extend(processor["special_tokens"][name]["ids"])
    return sides


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; empty if the file does not exist.

    Raises:
        DataError: it cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON: {error}; download it again") from error
    return content if isinstance(content, dict) else {}
