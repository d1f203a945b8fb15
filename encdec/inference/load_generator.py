"""From a directory to the generator of the model in it."""

from __future__ import annotations

import os

import jax

from encdec.errors import ConfigError
from encdec.inference.draft_model import check_draft_model, load_draft
from encdec.inference.exported import export_format, load_exported_generator
from encdec.inference.generation_settings import AUTO
from encdec.inference.generator import Generator, TextGenerator, read_prompt_format
from encdec.inference.rows import check_division
from encdec.saved.saved_params import load_params_for_inference, step_to_read
from encdec.shipped import model_directory


def load(
    checkpoint: str | os.PathLike[str],
    step: int | None = None,
    *,
    max_input_tokens: int | None = None,
    batch_rows: int = 16,
    devices: int = 1,
    tensor: int = 1,
    dtype: str | None = None,
    draft: str = AUTO,
) -> TextGenerator:
    """The generator of a trained model, with nothing else given.

    Args:
        checkpoint: work directory of ``train`` or ``import_model``; a model that comes with
            encdec, by its name (``java2cs``); or an export for LiteRT or onnxruntime, which runs
            on this machine's CPU as a whole and in its own dtype.
        step: checkpoint; None: the last.
        max_input_tokens: longest input allowed; None: the longest in training.
        batch_rows: answers made together at most.
        devices: number of this process's devices that share the rows.
        tensor: number of devices over which each copy of the model is split.
        dtype: of the activations; None: the model's.
        draft: see ``encdec.inference.draft_model.load_draft``.

    Raises:
        ConfigError: more devices than there are, settings that exports do not have, or a draft
            model that cannot be used.
        CheckpointError: no trained model there, or no such step.
        DataError: its vocabulary is missing or another one.
    """
    checkpoint = model_directory(checkpoint)
    step = check_load(checkpoint, step, devices=devices, tensor=tensor, dtype=dtype)
    if export_format(checkpoint):
        return load_exported_generator(
            checkpoint, max_input_tokens=max_input_tokens, batch_rows=batch_rows, draft=draft
        )
    prompts, max_tokens = read_prompt_format(checkpoint, max_input_tokens=max_input_tokens)
    check_draft_model(draft, prompts.vocabulary)
    config, params, _ = load_params_for_inference(checkpoint, step or None)
    generator = Generator(
        config,
        params,
        prompts,
        max_tokens=max_tokens,
        batch_rows=batch_rows,
        devices=jax.local_devices()[:devices],
        tensor=tensor,
        dtype=dtype,
        draft=load_draft(draft, prompts.vocabulary, dtype),
    )
    generator.step = step
    return generator


def check_load(
    checkpoint: str | os.PathLike[str],
    step: int | None = None,
    *,
    devices: int = 1,
    tensor: int = 1,
    dtype: str | None = None,
) -> int:
    """What ``load`` checks before it reads parameters; returns the step that it will read.

    Raises:
        ConfigError, CheckpointError: see ``load``.
    """
    if export_format(checkpoint):
        given = {"step": step, "dtype": dtype}
        given |= {name: n for name, n in (("devices", devices), ("tensor", tensor)) if n > 1}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"{name} is {value}, but {checkpoint} is an export, which has no checkpoints "
                    f"and runs on the whole CPU; leave {name} out, or give the work directory"
                )
        return 0
    read_step = step_to_read(checkpoint, step)
    if devices > (there := jax.local_device_count()):
        raise ConfigError(f"devices is {devices}, but this machine has {there}")
    check_division(devices, tensor)
    return read_step
