"""``--draft``: a word, or the work directory of a small model that drafts for a larger one."""

from __future__ import annotations

from encdec.data.vocabulary import Vocabulary
from encdec.errors import ConfigError
from encdec.inference.drafting import Draft, DraftModel
from encdec.inference.generation_settings import AUTO, LOOKUP, OFF
from encdec.inference.generator import read_prompt_format
from encdec.inference.ready import ready_for_decoding
from encdec.saved.saved_config import read_config
from encdec.saved.saved_params import load_params_for_inference


def load_draft(draft: str, vocabulary: Vocabulary, dtype: str | None = None) -> Draft:
    """What ``--draft`` names: itself for a word, otherwise the model of a work directory.

    Args:
        draft: "off", "auto", "lookup" or a directory.
        vocabulary: the one of the model that is drafted for.
        dtype: see ``ready_for_decoding``.

    Raises:
        CheckpointError: no trained model there.
        ConfigError: an export, or a model of another vocabulary.
    """
    if draft in (OFF, AUTO, LOOKUP):
        return draft
    if "export" in read_config(draft):
        raise ConfigError(
            f"--draft={draft} is an export; expected {AUTO}, {OFF}, {LOOKUP} or the work directory "
            "of a trained model"
        )
    prompts, _ = read_prompt_format(draft)
    if prompts.vocabulary.fingerprint != vocabulary.fingerprint:
        raise ConfigError(
            f"--draft={draft} has another vocabulary than the model ({prompts.vocabulary.size:,} "
            f"ids against {vocabulary.size:,}); give a model trained with the same vocabulary"
        )
    config, params, _ = load_params_for_inference(draft)
    return DraftModel(*ready_for_decoding(config, params, dtype), prompts.decoder_start_id)
