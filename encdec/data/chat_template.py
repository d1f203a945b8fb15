"""Chat templates of tokenizers: where they are kept."""

from __future__ import annotations

import json
import os
import pathlib

from encdec.errors import DataError
from encdec.storage import as_path

TEMPLATE_FILE = "chat_template.jinja"  # the name that Hugging Face's tokenizers give it, too


def chat_template_of(directory: pathlib.Path) -> str | None:
    """The chat template of a Hugging Face model: a file of its own, or in its tokenizer's config.

    Raises:
        DataError: that config is not JSON.
    """
    if (file := directory / TEMPLATE_FILE).is_file():
        return file.read_text(encoding="utf-8")
    if not (config := directory / "tokenizer_config.json").is_file():
        return None
    try:
        template = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{config} is not a tokenizer's JSON file: {error}") from None
    if isinstance(template, list):  # several by name, of which one is the default
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def copy_template(source: str | os.PathLike[str], target: pathlib.Path) -> None:
    """Copies a model's chat template, if it has one, into another directory of it."""
    if (file := as_path(source) / TEMPLATE_FILE).is_file():
        (target / TEMPLATE_FILE).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
