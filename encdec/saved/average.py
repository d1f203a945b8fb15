"""``encdec average``: the mean of a run's last checkpoints, as a model of its own.

Averaging weights along the end of a run often generalizes better than its last step does
(Izmailov et al. 2018, arXiv 1803.05407; T5 and Transformer reports average the last checkpoints).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

from encdec.data.chat_template import copy_template
from encdec.data.vocabulary import copy_vocabulary
from encdec.errors import CheckpointError, ConfigError
from encdec.files import write_json
from encdec.flags import Parser, bounded
from encdec.saved.fingerprint import fingerprints
from encdec.saved.saved_config import CHECKPOINTS_FOLDER, CONFIG_FILE, read_config
from encdec.saved.saved_params import (
    FINGERPRINTS,
    latest_step,
    load_params_for_inference,
    saved_steps,
)
from encdec.storage import any_path, as_path, is_free, user_place, whole_directory


def chosen_steps(workdir: str, last: int | None, steps: Sequence[int] = ()) -> list[int]:
    """The checkpoints to average: the last ``last``, or those named.

    Raises:
        ConfigError: fewer than two asked for.
        CheckpointError: the run does not have them.
    """
    if not steps:
        if last is None or last < 2:
            raise ConfigError(
                f"--last is {last}; expected 2 or more checkpoints, or --steps=A,B,..."
            )
        steps = saved_steps(workdir)[-last:]
        if len(steps) < last:
            have = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"{workdir} has {len(steps)} checkpoints ({have}), fewer than "
                f"--last={last}; train with --config.checkpoint.keep={last}"
            )
    if len(set(steps)) < 2:
        raise ConfigError(f"--steps is {','.join(map(str, steps))}; expected two or more")
    return [latest_step(workdir, step) for step in sorted(set(steps))]


def average(workdir: str, steps: Sequence[int], out: str) -> None:
    """Writes the mean parameters to ``out``, a work directory that all but training reads.

    The mean is taken in float64 and kept in each parameter's own dtype: host memory holds about
    five times a model stored in float32.

    Raises:
        ConfigError: ``out`` is not empty.
        CheckpointError: a checkpoint is missing or damaged.
    """
    target = as_path(user_place("--out", out))
    if not is_free(target):
        raise ConfigError(f"--out={out} is not empty; give another directory")
    description = read_config(workdir)
    total = None
    for step in steps:
        _, params, _ = load_params_for_inference(workdir, step)
        values = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(params))
        if total is None:
            total, dtypes = values, jax.tree.map(lambda x: x.dtype, params)
        else:
            jax.tree.map(lambda a, b: np.add(a, b, out=a), total, values)
    mean = jax.tree.map(
        lambda x, dtype: jax.numpy.asarray((x / len(steps)).astype(dtype)), total, dtypes
    )
    with whole_directory(target) as partial:
        with ocp.CheckpointManager(
            partial / CHECKPOINTS_FOLDER, item_names=("params", FINGERPRINTS)
        ) as manager:
            manager.save(
                steps[-1],
                args=ocp.args.Composite(
                    **{
                        "params": ocp.args.StandardSave(mean),
                        FINGERPRINTS: ocp.args.JsonSave({"params": fingerprints(mean)}),
                    }
                ),
            )
        copy_vocabulary(workdir, partial)
        copy_template(workdir, partial)
        description["averaged"] = {"workdir": os.fspath(workdir), "steps": list(steps)}
        write_json(partial / CONFIG_FILE, description)


def main(argv: list[str]) -> int:
    """``encdec average --checkpoint=DIR --last=K --out=DIR``."""
    parser = Parser(
        prog="encdec average",
        description="Averages the parameters of a run's checkpoints. The result can be used for "
        "generation, evaluation, export and --config.init_from like any other model.",
    )
    parser.add("--checkpoint", "work directory of `encdec train`", any_path, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    last = bounded("--last", int, least=2)
    which.add_argument("--last", type=last, metavar="K", help="the last K checkpoints")
    which.add_argument("--steps", metavar="A,B,...", help="the checkpoints of these steps")
    parser.add("--out", "receives the model", any_path, required=True)
    options = parser.parse_args(argv)
    try:
        named = [int(step) for step in options.steps.split(",")] if options.steps else []
    except ValueError:
        raise ConfigError(
            f"--steps is {options.steps!r}; expected numbers, as in 8000,9000,10000"
        ) from None
    steps = chosen_steps(options.checkpoint, options.last, named)
    average(options.checkpoint, steps, options.out)
    print(f"the mean of steps {', '.join(f'{step:,}' for step in steps)} is in {options.out}")
    return 0
