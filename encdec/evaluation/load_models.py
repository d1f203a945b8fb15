"""Loads the model to evaluate: its generator, its likelihood reader, and facts about it."""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any

import jax

from encdec.cost.flops import count_parameters
from encdec.errors import ConfigError
from encdec.evaluation.likelihood import LikelihoodModel
from encdec.files import lines_exist
from encdec.inference.draft_model import check_draft_model, load_draft
from encdec.inference.exported import load_exported_generator
from encdec.inference.generation_settings import AUTO
from encdec.inference.generator import Generator, TextGenerator, read_prompt_format
from encdec.model import parameter_count
from encdec.saved.lineage import lineage
from encdec.saved.saved_config import origin, read_config
from encdec.saved.saved_params import load_params_for_inference, saved_steps
from encdec.storage import as_path, directory_name
from encdec.train.metrics import METRICS_FILE, read_metrics


def load_models(
    checkpoint: str,
    *,
    step: str | None = None,
    max_input_tokens: int | None = None,
    batch_rows: int = 16,
    likelihood: bool = True,
    draft: str = AUTO,
) -> tuple[TextGenerator, LikelihoodModel | None, dict[str, Any]]:
    """The generator, the likelihood reader (on all devices of this process) and model facts.

    Args:
        checkpoint: a work directory, or an export, which cannot read references.
        step: a number or "best"; None: the last.
        max_input_tokens: longest source; None: the longest in training.
        batch_rows: texts at a time.
        likelihood: whether references are read.
        draft: see ``encdec.inference.draft_model.load_draft``.
    """
    content = read_config(checkpoint)
    if "export" in content:
        if step is not None:
            raise ConfigError(
                f"{checkpoint} is an export, which has no checkpoints; leave --step out"
            )
        exported = load_exported_generator(
            checkpoint, max_input_tokens=max_input_tokens, batch_rows=batch_rows, draft=draft
        )
        return exported, None, _facts(checkpoint, content, exported)
    prompts, max_tokens = read_prompt_format(checkpoint, max_input_tokens=max_input_tokens)
    check_draft_model(draft, prompts.vocabulary)
    config, params, read_step = load_params_for_inference(checkpoint, chosen_step(checkpoint, step))
    behind = lineage(checkpoint, read_step)
    generator = Generator(
        config,
        params,
        prompts,
        max_tokens=max_tokens,
        batch_rows=batch_rows,
        devices=jax.local_devices(),
        draft=load_draft(draft, prompts.vocabulary),
    )
    reader = None
    if likelihood:
        reader = LikelihoodModel(
            config, params, prompts, batch_rows=batch_rows, devices=jax.local_devices()
        )
    facts = _facts(checkpoint, content, generator) | {
        "step": read_step,
        "parameters": parameter_count(params),
        "training_flops": behind.training_flops,
        "seed": content.get("run", {}).get("seed", 0),  # an imported model has no training run
        "seeds": behind.seeds and list(behind.seeds),
    }
    return generator, reader, facts


def _facts(checkpoint: str, content: dict[str, Any], generator: TextGenerator) -> dict[str, Any]:
    """Facts about a model, of an export all; those before 2026-11-29 tell nothing of its run."""
    config, export = generator.config, content.get("export", {})
    behind = export.get("lineage", {})
    seeds = behind.get("seeds")
    return {
        "checkpoint": str(checkpoint),
        "step": export.get("step", 0),
        "name": directory_name(checkpoint),
        "origin": origin(content),
        "architecture": config.architecture,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "parameters": count_parameters(config).total,
        "training_flops": behind.get("training_flops"),
        "seed": seeds[0] if seeds else 0,
        "seeds": seeds,
        "max_input_tokens": generator.prompts.max_input_tokens,
        "run": hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest(),
    }


def chosen_step(workdir: str | os.PathLike[str], step: str | None) -> int | None:
    """The checkpoint step that --step names.

    Raises:
        ConfigError: neither a number nor "best", or "best" of a run without held-out loss.
    """
    if step is None:
        return None
    if step.isdecimal():
        return int(step)
    if step != "best":
        raise ConfigError(f"--step is {step!r}; expected a number, or best")
    saved = set(saved_steps(workdir))
    # Imported and averaged models have no metrics.
    rows = read_metrics(workdir) if lines_exist(as_path(workdir) / METRICS_FILE) else []
    losses = [
        (row["eval/loss"], int(row["step"]))
        for row in rows
        if math.isfinite(row.get("eval/loss", math.nan)) and int(row["step"]) in saved
    ]
    if not losses:
        raise ConfigError(
            f"--step=best, but no checkpoint in {workdir} has a finite held-out loss; "
            "train with --config.data.eval_records, or give a number"
        )
    return min(losses)[1]
