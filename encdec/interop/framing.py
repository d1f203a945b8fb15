"""How a Hugging Face model's tokenizer frames its inputs: BOS in front, EOS at the end.

Read from the template in ``tokenizer.json``, which alone counts where there is such a file, as in
transformers 5; without it from ``tokenizer_config.json`` (``add_bos_token``, ``add_eos_token``);
and from ``config.json`` and ``generation_config.json``.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from encdec.data.vocabulary import SPEC_FILE, Vocabulary, load_vocabulary, vocabulary_file
from encdec.errors import ConfigError, DataError
from encdec.interop.huggingface_import import ids_of
from encdec.logs import logger

_LOG = logger(__name__)

# Where our own exports keep the vocabulary as it was, extra ids and fingerprint included.
VOCABULARY_FOLDER = "vocabulary"
# Tokenizers that put BOS in front of every text where no file says otherwise.
_BOS_CLASSES = ("Llama", "CodeLlama", "Gemma")
_UNBOUNDED = 10**9  # transformers writes 1e30 for a tokenizer without a longest input


@dataclasses.dataclass(frozen=True)
class Framing:
    """Special tokens around a model's texts, and their longest lengths.

    Attributes:
        start_id: the decoder's first input; in a decoder-only model it comes before every prompt.
        inputs_eos: whether inputs end with EOS.
        inputs_prefix: ids in front of an input's tokens (after ``start_id``).
        inputs_length: longest input in tokens, or None if unknown.
        targets_length: default number of new tokens, or None if unknown.
        adds_start: whether the tokenizer itself puts ``start_id`` there.
    """

    start_id: int
    inputs_eos: bool = False
    inputs_prefix: tuple[int, ...] = ()
    inputs_length: int | None = None
    targets_length: int | None = None
    adds_start: bool = True

    def to_dict(self, max_length: int) -> dict[str, Any]:
        """These values as fields of ``data`` in a work directory's config.json."""
        return {
            "decoder_start_id": self.start_id,
            "inputs_eos": self.inputs_eos,
            "inputs_prefix": list(self.inputs_prefix),
            "inputs_length": self.inputs_length or max_length // 2,
            "targets_length": self.targets_length or max_length // 2,
        }


def read_eos_ids(directory: pathlib.Path, configured: Sequence[int]) -> tuple[int, ...]:
    """The ids that end a text: of generation_config.json, else of config.json."""
    found = _read(directory / "generation_config.json").get("eos_token_id")
    return tuple(configured) if found is None else ids_of(found)


def other_ends(vocabulary: Vocabulary, eos_ids: Sequence[int]) -> str:
    """A sentence on the ids that end the source's answers and not ours; "" where there are none."""

    def shown(token: int) -> str:
        return f"{vocabulary.piece(token)} ({token})"

    others = [token for token in eos_ids if token != vocabulary.eos_id]
    if not others:
        return ""
    return (
        f"Answers end only at {shown(vocabulary.eos_id)}; the source model also ends them at "
        f"{', '.join(map(shown, others))}, which are ordinary tokens here"
    )


def read_vocabulary(directory: pathlib.Path, eos_ids: Sequence[int]) -> Vocabulary | None:
    """The vocabulary stored with a model, with the EOS that ends its texts; None if it has none.

    tokenizer.json is used instead of a tokenizer.model whose EOS is not the model's.
    """
    if (directory / VOCABULARY_FOLDER / SPEC_FILE).is_file():
        return load_vocabulary(directory / VOCABULARY_FOLDER)
    file = vocabulary_file(directory)
    if file is None:
        return None
    try:
        vocabulary = load_vocabulary(file)
        if not eos_ids or vocabulary.eos_id in eos_ids:
            return vocabulary
        if (directory / "tokenizer.json").is_file() and 0 <= eos_ids[0] < vocabulary.size:
            from encdec.data.huggingface_vocabulary import HuggingFaceVocabulary

            file = directory / "tokenizer.json"
            vocabulary = HuggingFaceVocabulary(file.read_bytes(), eos_id=eos_ids[0], name=str(file))
        return vocabulary
    except ConfigError as error:
        # A package is missing: the model can be used without its vocabulary.
        _LOG.warning("%s", error)
        return None


def read_framing(
    directory: pathlib.Path, start_id: int, eos_id: int | None, *, encoder_decoder: bool
) -> Framing:
    """The framing of a model's inputs.

    Args:
        directory: of the model.
        start_id: the start token where neither tokenizer nor generation settings name one.
        eos_id: of the vocabulary; None where it is unknown.
        encoder_decoder: whether prompts go into an encoder.

    Raises:
        DataError: inputs end with a token other than EOS.
    """
    config = _read(directory / "config.json")
    generation = _read(directory / "generation_config.json")
    settings = _read(directory / "tokenizer_config.json")
    before, after = _around(directory, settings, config)
    if after and after != [eos_id]:
        raise DataError(
            f"the tokenizer in {directory} ends inputs with the ids {after}; supported are EOS "
            f"({eos_id}) and no token at all, so this model cannot be imported"
        )
    adds_start = bool(before) or encoder_decoder
    if encoder_decoder:
        named = (generation.get("decoder_start_token_id"), config.get("decoder_start_token_id"))
        start_id = next((token for token in named if isinstance(token, int)), start_id)
    elif before:
        start_id, *before = before
    inputs_length = None
    if (directory / VOCABULARY_FOLDER).is_dir():  # our own exports state their training lengths
        longest = int(min(settings.get("model_max_length") or _UNBOUNDED, _UNBOUNDED))
        if longest < _UNBOUNDED:
            inputs_length = longest - (not encoder_decoder)
    return Framing(
        start_id,
        bool(after),
        tuple(before),
        inputs_length,
        generation.get("max_new_tokens"),
        adds_start,
    )


def _around(
    directory: pathlib.Path, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """Ids before and after a text, as the tokenizer adds them."""
    content = _read(directory / "tokenizer.json")
    if content:
        return _template(content.get("post_processor")) or ([], [])
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


def _read(path: pathlib.Path) -> dict[str, Any]:
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
