"""How a Hugging Face model's tokenizer frames its inputs: BOS in front, EOS at the end.

Read from the template in ``tokenizer.json``, which alone counts where there is such a file, as in
transformers 5; without it from ``tokenizer_config.json`` (``add_bos_token``, ``add_eos_token``);
and from ``config.json`` and ``generation_config.json``.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from encdec.data.tokenizer_files import read_object, tokens_around
from encdec.data.vocabulary import VOCABULARY_FOLDER, Vocabulary, load_vocabulary, vocabulary_file
from encdec.errors import ConfigError, DataError
from encdec.interop.huggingface_import import ids_of
from encdec.logs import logger

_LOG = logger(__name__)

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
    found = read_object(directory / "generation_config.json").get("eos_token_id")
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


def read_vocabulary(
    directory: pathlib.Path, eos_ids: Sequence[int], rows: int
) -> Vocabulary | None:
    """The vocabulary stored with a model, with the EOS that ends its texts; None if it has none.

    tokenizer.json is used instead of a tokenizer.model whose EOS is not the model's, or that lacks
    tokens which were added later, unless the model's table has fewer ``rows``.
    """
    file = vocabulary_file(directory)
    if file is None:
        return None
    try:
        vocabulary, full = load_vocabulary(file), directory / "tokenizer.json"
        if not full.is_file():
            return vocabulary
        eos_id = vocabulary.eos_id
        if eos_ids and eos_id not in eos_ids:
            eos_id = eos_ids[0]
        added = [token["id"] for token in read_object(full).get("added_tokens") or ()]
        lacks = file.name == "tokenizer.model" and max(added, default=0) >= vocabulary.size
        if lacks or eos_id != vocabulary.eos_id:
            from encdec.data.huggingface_vocabulary import HuggingFaceVocabulary

            whole = HuggingFaceVocabulary(full.read_bytes(), eos_id=eos_id, name=str(full))
            if 0 <= eos_id < whole.size <= rows:
                return whole
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
    config = read_object(directory / "config.json")
    generation = read_object(directory / "generation_config.json")
    settings = read_object(directory / "tokenizer_config.json")
    before, after = tokens_around(directory)
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
