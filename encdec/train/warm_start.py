"""Starting a run from another run's parameters, with an account of every one of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from encdec.data.records import DatasetCard
from encdec.data.vocabulary import recorded_vocabulary
from encdec.errors import CheckpointError, DataError
from encdec.train.checkpoints import load_params_for_inference
from encdec.train.sharding import path_name
from encdec.train.state import TrainState
from encdec.train.workdir import read_config

REPORT_FILE = "warm-start.txt"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run's first parameters came from.

    Attributes:
        source: the work directory.
        step: its checkpoint; 0 of an imported model.
        taken: parameters of the same name and shape in both.
        left: parameters of the source that the run has no place for, with the reason.
        initialised: parameters of the run that the source has not got: drawn as ever.
    """

    source: str
    step: int
    taken: tuple[str, ...]
    left: tuple[str, ...]
    initialised: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"starting from {self.source}, step {self.step}: "
            f"{len(self.taken)} parameters taken, {len(self.left)} left, "
            f"{len(self.initialised)} drawn anew ({REPORT_FILE})"
        )

    def write(self, workdir: epath.PathLike) -> None:
        """Every name, in the work directory; process 0 alone."""
        if jax.process_index():
            return
        lines = [str(self)]
        for name in ("taken", "left", "initialised"):
            lines += ["", f"{name}:", *(f"  {one}" for one in getattr(self, name))]
        (epath.Path(workdir) / REPORT_FILE).write_text("\n".join(lines) + "\n")


def check_source(workdir: str, card: DatasetCard) -> None:
    """Raises DataError unless the parameters there belong to the records' vocabulary.

    Raises:
        CheckpointError: it is no work directory.
    """
    vocabulary = recorded_vocabulary(read_config(workdir), workdir)
    if vocabulary["fingerprint"] != card.vocabulary.fingerprint:
        raise DataError(
            f"config.init_from={workdir} was trained with vocabulary fingerprint "
            f"{vocabulary['fingerprint'][:16]}, the records have "
            f"{card.vocabulary.fingerprint[:16]}; prepare the records with "
            f"--vocabulary={workdir}"
        )


def start_from(state: TrainState, workdir: str) -> tuple[TrainState, Origin]:
    """The state with the last checkpoint's parameters wherever name and shape agree.

    The optimizer begins anew.

    Raises:
        CheckpointError: no checkpoint there, or not one parameter that fits.
    """
    _, params, step = load_params_for_inference(workdir)
    there = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    taken, left, initialised = [], [], []

    def pick(path: Any, leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        found = there.pop(name, None)
        if found is None or found.shape != leaf.shape:
            if found is not None:
                left.append(f"{name}: shape {found.shape}, wanted {leaf.shape}")
            initialised.append(name)
            return leaf
        taken.append(name)
        values = np.asarray(found, leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])

    params = jax.tree_util.tree_map_with_path(pick, state.params)
    left += [f"{name}: no such parameter in the run" for name in there]
    if not taken:
        raise CheckpointError(
            f"config.init_from={workdir} has no parameter of the run's names and shapes; set "
            "config.model and its overrides (scan_layers too) as they were there"
        )
    origin = Origin(workdir, step, tuple(taken), tuple(left), tuple(initialised))
    return state.replace(params=params), origin
