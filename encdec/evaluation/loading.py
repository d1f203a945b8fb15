"""The model that is evaluated: which checkpoint, what it answers with, what its training cost."""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

import jax

from encdec.errors import ConfigError
from encdec.evaluation.likelihood import LikelihoodModel
from encdec.inference.exported import load_exported_generator
from encdec.inference.generator import Generator, read_prompt_format
from encdec.model import parameter_count
from encdec.model.flops import count_parameters
from encdec.train.checkpoints import load_params_for_inference, saved_steps
from encdec.train.lineage import lineage
from encdec.train.metrics import read_metrics
from encdec.train.workdir import read_config


def load_models(
    options: argparse.Namespace,
) -> tuple[Generator, LikelihoodModel | None, dict[str, Any]]:
    """What answers and what reads references, on all devices of this process; about the model."""
    prompts, max_tokens = read_prompt_format(
        options.checkpoint, max_input_tokens=options.max_input_tokens
    )
    content = read_config(options.checkpoint)
    if "export" in content:
        return _load_export(options, content)
    config, params, step = load_params_for_inference(
        options.checkpoint, chosen_step(options.checkpoint, options.step)
    )
    # An imported model has no run of ours behind it.
    run = content.get("run") or {"model": content["imported"]["name"], "seed": 0}
    behind = lineage(options.checkpoint, step)
    model = {
        "checkpoint": str(options.checkpoint),
        "step": step,
        "name": run["model"],
        "architecture": config.architecture,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "parameters": parameter_count(params),
        "training_flops": behind.training_flops,
        "seed": run["seed"],
        "seeds": behind.seeds,
        "max_input_tokens": prompts.max_input_tokens,
        "run": hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest(),
    }
    generator = Generator(
        config,
        params,
        prompts,
        max_tokens=max_tokens,
        batch_rows=options.batch_rows,
        devices=jax.local_devices(),
    )
    references = (
        None
        if options.no_likelihood
        else LikelihoodModel(
            config, params, prompts, batch_rows=options.batch_rows, devices=jax.local_devices()
        )
    )
    return generator, references, model


def _load_export(
    options: argparse.Namespace, content: dict[str, Any]
) -> tuple[Generator, None, dict[str, Any]]:
    """The same of a directory that ``encdec export`` wrote, which reads no references.

    Its training is not known to it.
    """
    if options.step is not None:
        raise ConfigError(
            f"{options.checkpoint} is an export, which has no checkpoints; leave --step out"
        )
    generator = load_exported_generator(
        options.checkpoint, max_input_tokens=options.max_input_tokens, batch_rows=options.batch_rows
    )
    config, export = generator.config, content["export"]
    return (
        generator,
        None,
        {
            "checkpoint": str(options.checkpoint),
            "step": 0,
            "name": f"{export['format']} {export['precision']}",
            "architecture": config.architecture,
            "encoder_layers": config.encoder_layers,
            "decoder_layers": config.decoder_layers,
            "parameters": count_parameters(config).total,
            "training_flops": None,
            "seed": 0,
            "seeds": None,
            "max_input_tokens": generator.prompts.max_input_tokens,
            "run": hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest(),
        },
    )


def chosen_step(workdir: str, step: str | None) -> int | None:
    """A checkpoint's step from what --step says.

    Raises:
        ConfigError: no number and not "best", or "best" of a run without held-out loss.
    """
    if step is None:
        return None
    if step.isdigit():
        return int(step)
    if step != "best":
        raise ConfigError(f"--step is {step!r}; wanted a number, or best")
    saved = set(saved_steps(workdir))
    losses = [
        (row["eval/loss"], int(row["step"]))
        for row in read_metrics(workdir)
        if "eval/loss" in row and int(row["step"]) in saved
    ]
    if not losses:
        raise ConfigError(
            f"--step=best, but no checkpoint in {workdir} has a held-out loss; "
            "train with --config.data.eval_records, or give a number"
        )
    return min(losses)[1]
