"""``--draft``: a word, or the work directory of a small model that drafts for a larger one."""

from __future__ import annotations

import os

from encdec.data.vocabulary import Vocabulary
from encdec.errors import ConfigError
from encdec.inference.drafting import Draft, DraftModel
from encdec.inference.generation_settings import AUTO, LOOKUP, OFF
from encdec.inference.generator import read_prompt_format
from encdec.inference.ready import ready_for_decoding
from encdec.model import ModelConfig
from encdec.saved.saved_config import model_config_of, read_config
from encdec.saved.saved_params import load_params_for_inference
from encdec.shipped import model_directory

WORDS = (OFF, AUTO, LOOKUP)


def load_draft(
    draft: str | os.PathLike[str], vocabulary: Vocabulary, dtype: str | None = None
) -> Draft:
    """What ``--draft`` names: itself for a word, otherwise the model of a work directory.

    Args:
        draft: "off", "auto", "lookup", a directory, or the name of a model that comes with encdec.
        vocabulary: the one of the model that is drafted for.
        dtype: see ``ready_for_decoding``.

    Raises:
        CheckpointError: no trained model there.
        ConfigError: an export, or a model of another vocabulary.
    """
    if draft in WORDS:
        return str(draft)
    check_draft_model(draft, vocabulary)
    directory = model_directory(draft)
    prompts, _ = read_prompt_format(directory)
    config, params, _ = load_params_for_inference(directory)
    return DraftModel(*ready_for_decoding(config, params, dtype), prompts.decoder_start_id)


def check_draft_model(draft: str | os.PathLike[str], vocabulary: Vocabulary) -> None:
    """Raises what ``load_draft`` does, without reading parameters; words are always right."""
    if draft in WORDS:
        return
    directory = model_directory(draft)
    content = read_config(directory)
    if "export" in content:
        raise ConfigError(
            f"--draft={draft} is an export; expected {AUTO}, {OFF}, {LOOKUP} or the work directory "
            "of a trained model"
        )
    other = read_prompt_format(directory)[0].vocabulary
    if other.fingerprint != vocabulary.fingerprint:
        raise ConfigError(
            f"--draft={draft} has another vocabulary than the model ({other.size:,} ids against "
            f"{vocabulary.size:,}); give a model trained with the same vocabulary"
        )
    if (rows := model_config_of(content).vocab_size) < vocabulary.size:
        raise ConfigError(
            f"--draft={draft} has a table of {rows:,} tokens, but the vocabulary has "
            f"{vocabulary.size:,}; give a model trained with the whole vocabulary"
        )


def draft_configs(draft: str | os.PathLike[str]) -> list[ModelConfig]:
    """The configuration of the model that ``draft`` names; none for a word."""
    return [] if draft in WORDS else [model_config_of(read_config(model_directory(draft)))]


def check_draft_lengths(
    draft: str | os.PathLike[str], longest_input: int, longest_answer: int
) -> None:
    """Raises ConfigError for a draft model that was trained with shorter texts than these.

    Beyond the positions that it was trained at, it drafts noise: every answer would pay for it.

    Args:
        draft: see ``load_draft``.
        longest_input: tokens, as the model that is drafted for reads it.
        longest_answer: tokens.
    """
    if draft in WORDS:
        return
    directory = model_directory(draft)
    prompts, answers = read_prompt_format(directory)
    inputs = prompts.max_input_tokens
    checks = [
        ("inputs", inputs, longest_input, f"lower --max_input_tokens to {inputs}"),
        ("answers", answers, longest_answer, f"lower --max_tokens to {answers}"),
    ]
    if not model_config_of(read_config(directory)).is_encoder_decoder:
        # Both are one text to it: what an input leaves is there for the answer.
        whole = inputs + answers
        remedy = f"lower --max_input_tokens and --max_tokens to {whole:,} together"
        checks = [("inputs and answers together", whole, longest_input + longest_answer, remedy)]
    for kind, trained, asked, remedy in checks:
        if asked > trained:
            raise ConfigError(
                f"--draft={draft} was trained with {kind} of up to {trained:,} tokens, but the "
                f"server accepts {asked:,}; give a draft model trained with as many, or {remedy}"
            )
