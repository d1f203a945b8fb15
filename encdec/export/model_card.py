"""The page of an exported model: what it is, what it learned from, how it is run."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from encdec.cost.flops import count_parameters
from encdec.errors import ConfigError
from encdec.export.formats import Export, Written
from encdec.saved.saved_config import origin
from encdec.storage import directory_name

CARD = "README.md"
LICENSE = "LICENSE"
SPDX_CHARACTERS = 40  # of the longest identifier that is in use


def check_license(license: str | None) -> None:
    """ConfigError unless it is an identifier such as apache-2.0, or an existing file."""
    if license is None or pathlib.Path(license).is_file():
        return
    plain = license.replace("-", "").replace(".", "").replace("+", "")
    if not plain.isalnum() or len(license) > SPDX_CHARACTERS:
        raise ConfigError(
            f"--license={license}; expected an identifier such as apache-2.0, or a file"
        )


def write_card(
    out: pathlib.Path, export: Export, written: Written, format: str, step: int, license: str | None
) -> None:
    """Writes README.md and, of a licence that is a file, LICENSE."""
    if license and pathlib.Path(license).is_file():
        shutil.copyfile(license, out / LICENSE)
    (out / CARD).write_text(card_text(export, written, format, step, license), encoding="utf-8")


def card_text(export: Export, written: Written, format: str, step: int, license: str | None) -> str:
    """The page, with the Hub's fields at its head."""
    seq2seq = export.config.is_encoder_decoder
    fields = {
        **_license_fields(license),
        "library_name": {"hf": "transformers", "onnx": "onnx"}.get(format, format),
        "pipeline_tag": "text-generation",
        "tags": list(
            dict.fromkeys(["encdec", "encoder-decoder" if seq2seq else "decoder-only", format])
        ),
    }
    head = "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())
    body = "\n\n".join(
        [_what(export, step), _data(export.content), _use(export, written, format) + _form(export)]
    )
    return f"---\n{head}\n---\n\n{body}\n"


def _license_fields(license: str | None) -> dict[str, str]:
    if license is None:
        return {}  # to be chosen when the model is published
    if pathlib.Path(license).is_file():
        return {"license": "other", "license_name": "see-license", "license_link": LICENSE}
    return {"license": license.lower()}


def _what(export: Export, step: int) -> str:
    config = export.config
    kind = "An encoder-decoder" if config.is_encoder_decoder else "A decoder-only"
    layers = (
        f"{config.encoder_layers} encoder and {config.decoder_layers} decoder layers"
        if config.is_encoder_decoder
        else f"{config.decoder_layers} layers"
    )
    return (
        f"# {directory_name(export.directory)}\n\n{kind} language model of "
        f"{count_parameters(config).total:,} parameters, made with encdec: {layers}, width "
        f"{config.d_model}, {config.num_heads} heads of {config.head_dim} "
        f"({config.num_kv_heads} for keys and values), MLP {config.mlp_dim}, vocabulary "
        f"{config.vocab_size:,}. Weights are {export.precision}, of step {step:,}."
    )


def _data(content: Mapping[str, Any]) -> str:
    data = content.get("data", {})
    lines = ["## Training"]
    if source := origin(content):
        lines.append(f"{source[0].upper()}{source[1:]}.")
    if task := data.get("task"):
        lines.append(
            f"Trained on records of `{task}`, in rows of {data.get('inputs_length'):,} source and "
            f"{data.get('targets_length'):,} target tokens."
        )
    lines.append(
        "Its publisher should state here how it was evaluated, what it should not be used for, and "
        "the limits of its data."
    )
    return "\n\n".join(lines)


def _use(export: Export, written: Written, format: str) -> str:
    if format != "hf":
        return "## Use\n\n```sh\nencdec generate --checkpoint=DIR 'an input'\n```" + (
            ""
            if format == "encdec"
            else "\n\nAny program that runs the format can use the graphs; `config.json` describes "
            "the special tokens around inputs."
        )
    own = written.family == "encdec"
    kind = "AutoModelForSeq2SeqLM" if export.config.is_encoder_decoder else "AutoModelForCausalLM"
    remote = ", trust_remote_code=True" if own else ""
    note = (
        "\n\nThe modelling file that is loaded by `trust_remote_code` is Apache-2.0, whatever the "
        "licence of the weights."
        if own
        else ""
    )
    return (
        "## Use\n\n```python\nfrom transformers import AutoTokenizer, "
        f"{kind}\n\ntokenizer = AutoTokenizer.from_pretrained(DIR{remote})\n"
        f"model = {kind}.from_pretrained(DIR{remote})\n"
        'inputs = tokenizer("an input", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))\n```"
        f"{note}"
    )


def _form(export: Export) -> str:
    """How a text becomes an input, where that takes more than its tokens."""
    template = export.content.get("data", {}).get("template")
    if template is None:
        return ""
    return (
        "\n\nAn input has the following form, which `encdec generate` and `serve` add and other "
        f"programs must add themselves:\n\n```text\n{template}\n```"
    )
