"""Checkpoints: the whole training state, saved in the background, restored bit for bit.

    WORKDIR/checkpoints/STEP/params        parameters, all that inference reads
                            /optimizer     the optimizer's state
                            /fingerprints  of every array, taken before it was written
    WORKDIR/damaged/STEP                   what could not be read back as it was written

A step's folder gets its name only when it is complete; unfinished ones are never taken for it.
What is read is held against the fingerprints, so that damage of any kind is found before it is
trained on; training then goes back to the last checkpoint that is whole.
Imported models have no steps: their parameters are stored as safetensors in WORKDIR/params.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from encdec import safetensors
from encdec.buckets import is_address
from encdec.errors import CheckpointError, DataError
from encdec.logs import logger
from encdec.model import ModelConfig, abstract_params, build_model
from encdec.storage import as_path, make_directory, move_directory, on_this_machine
from encdec.train.fingerprint import fingerprints, mismatches
from encdec.train.processes import any_process, from_first, wait_for_all
from encdec.train.run_config import CheckpointConfig
from encdec.train.sharding import path_name
from encdec.train.state import TrainState
from encdec.train.workdir import (
    CHECKPOINTS_FOLDER,
    PARAMS_FOLDER,
    SCALE,
    model_config_of,
    read_config,
)

_LOG = logger(__name__)

DAMAGED_FOLDER = "damaged"
FINGERPRINTS = "fingerprints"
_STATE = ("params", "optimizer")
# Reasons for which a whole checkpoint may be unreadable for the moment: no sign of damage.
_PASSING = (PermissionError, ConnectionError, TimeoutError, MemoryError)
_PASSING_CODES = (
    "PERMISSION_DENIED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
)

Say = Callable[[str], None]


class Damaged(Exception):
    """A checkpoint that does not give back what was saved."""


class Checkpoints:
    """The checkpoints of one work directory. All processes call the same methods."""

    def __init__(
        self,
        workdir: epath.PathLike,
        config: CheckpointConfig = CheckpointConfig(),
        losses: Mapping[int, float] | None = None,
        say: Say = _LOG.warning,
    ):
        """
        Args:
            workdir: of the run.
            config: what to keep.
            losses: held-out loss by step, for ``config.keep_best``; read again at every save.
            say: takes what the user should know.
        """
        self.directory = _folder(workdir)
        self._say = say
        self._keep = _Keep(config, {} if losses is None else losses)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._keep,
                cleanup_tmp_directories=True,  # what a killed process left unfinished
                enable_async_checkpointing=True,
            ),
            item_names=(*_STATE, FINGERPRINTS),
        )

    def latest(self) -> int | None:
        """The last complete step; None before the first."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state off the devices and writes it in the background."""
        items = {"params": state.params, "optimizer": state.opt_state}
        prints = {name: fingerprints(tree) for name, tree in items.items()}
        _LOG.debug("checkpoint %d is written to %s", step, self.directory)
        # Forced: whether a checkpoint is due is the loop's decision.
        self._manager.save(
            step,
            force=True,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                **{FINGERPRINTS: ocp.args.JsonSave(prints)},
            ),
        )

    def prepare(self, state: TrainState) -> None:
        """Compiles what saving needs, so that a save in a machine's last seconds is a short one."""
        fingerprints(state.params), fingerprints(state.opt_state)

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, int] | None:
        """The last whole checkpoint, placed as ``abstract_state`` says; None before the first.

        Damaged ones after it are named and moved to WORKDIR/damaged.

        Raises:
            CheckpointError: there are checkpoints but none is whole, or one that may be whole
                cannot be read for the moment. Nothing is moved then.
        """
        wanted = {"params": abstract_state.params, "optimizer": abstract_state.opt_state}
        steps = from_first(sorted(self._manager.all_steps()))
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            try:
                items = _read_whole(self.directory / str(step), wanted)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged, step)
            counter = jax.device_put(jnp.int32(step), abstract_state.step.sharding)
            return TrainState(counter, items["params"], items["optimizer"]), step
        if damaged:
            seen = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
            raise CheckpointError(
                f"no checkpoint in {self.directory} is whole ({seen}); restore one from a copy, "
                "or give another --workdir to begin from scratch"
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str], good: int) -> None:
        if not damaged:
            return
        for step, why in damaged.items():
            self._say(f"checkpoint {step:,} is damaged: {why}")
        self._say(
            f"going back to checkpoint {good:,}, the last that is whole; the damaged ones "
            f"are moved to {self.directory.parent / DAMAGED_FOLDER}"
        )
        if not jax.process_index():
            folder = self.directory.parent / DAMAGED_FOLDER
            make_directory(folder)
            for step in damaged:
                names = (str(step), *(f"{step}-{n}" for n in range(2, 1000)))
                free = next(name for name in names if not (folder / name).exists())
                move_directory(self.directory / str(step), folder / free)
        wait_for_all("encdec: damaged checkpoints are out of the way")
        self._manager.reload()

    def wait(self) -> None:
        """Returns when everything saved is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def kept_state(workdir: epath.PathLike) -> str:
    """What of a run is safe, as a sentence; read from names alone, for storage that refuses."""
    try:
        steps = saved_steps(workdir)
    except Exception:  # the storage is what refuses
        steps = []
    if not steps:
        return "No checkpoint was complete: the same command begins at step 0."
    return f"Checkpoint {max(steps):,} is whole: the same command goes on from there."


def _folder(workdir: epath.PathLike) -> epath.Path:
    """Where checkpoints are, as orbax takes it."""
    if is_address(workdir):
        return as_path(workdir) / CHECKPOINTS_FOLDER
    return epath.Path(workdir).resolve() / CHECKPOINTS_FOLDER


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: the loop asks, with a count of its own (``preemption.Notice``), and another
        count in between would spoil the protocol."""
        return False


def kept_steps(
    steps: Sequence[int], config: CheckpointConfig, losses: Mapping[int, float]
) -> set[int]:
    """The checkpoints that stay: the newest, the best, and the multiples of ``keep_every``.

    ``losses``: held-out loss by step, where it is known; of equal ones the earlier is better.
    """
    if not config.keep:
        return set(steps)
    ordered = sorted(steps)
    best = sorted((losses[step], step) for step in ordered if step in losses)[: config.keep_best]
    periodic = [s for s in ordered if config.keep_every and s % config.keep_every == 0]
    return {*ordered[-config.keep :], *(step for _, step in best), *periodic}


@dataclasses.dataclass
class _Keep(PreservationPolicy):
    config: CheckpointConfig
    losses: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = kept_steps(steps, self.config, self.losses)
        return [step in kept for step in steps]


def _read_whole(folder: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads items of a step and proves them; all processes come to the same verdict.

    Args:
        folder: of the step.
        expected: an abstract tree with shardings by item.

    Raises:
        Damaged: what is there is not what was saved.
        CheckpointError: it cannot be read for the moment.
    """
    items: dict[str, Any] = {}
    trouble: Exception | None = None
    try:
        prints = _saved_fingerprints(folder)
        # Not through the manager, whose barriers would keep the other processes waiting for one
        # that has met an error.
        handler = ocp.StandardCheckpointHandler()
        for name, tree in wanted.items():
            items[name] = handler.restore(folder / name, args=ocp.args.StandardRestore(tree))
    except Exception as error:  # orbax raises whatever its storage raised
        trouble = error
    if any_process(
        any(
            isinstance(error, _PASSING) or any(code in str(error) for code in _PASSING_CODES)
            for error in _causes(trouble)
        )
    ):
        raise CheckpointError(
            f"checkpoint {folder} cannot be read now: {_short(trouble)}; try again"
        ) from trouble
    if any_process(trouble is not None):
        raise Damaged(_short(trouble)) from trouble
    for name, tree in items.items():
        if prints and (wrong := mismatches(fingerprints(tree), prints[name])):
            raise Damaged(
                f"{name} {wrong[0]}"
                + (f" and {len(wrong) - 1} more are" if len(wrong) > 1 else " is")
                + " not what was saved (fingerprints differ)"
            )
    return items


def _saved_fingerprints(folder: epath.Path) -> dict[str, dict[str, str]] | None:
    """The step's fingerprints by item; None for a checkpoint from before there were any."""
    if not (folder / FINGERPRINTS).exists():
        if f'"{FINGERPRINTS}"' in (folder / "_CHECKPOINT_METADATA").read_text():
            raise FileNotFoundError(f"{FINGERPRINTS} is missing")
        return None
    handler = ocp.JsonCheckpointHandler()
    prints = handler.restore(folder / FINGERPRINTS, args=ocp.args.JsonRestore())
    return {name: dict(prints[name]) for name in _STATE if name in prints}


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it was raised from, the first cause last."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _short(error: Exception | None) -> str:
    """The first cause of a storage's error on one line; None stands for another process's."""
    if error is None:
        return "another process could not read it"
    first = _causes(error)[-1]
    # Tensorstore adds the lines of its own source, and what it was asked.
    text = " ".join(re.split(r"\[(?:source locations|tensorstore_spec)", str(first))[0].split())
    text = text if " " in text else f"{type(first).__name__} {text}".strip()
    return text if len(text) <= 300 else text[:300] + " ..."


def load_params_for_inference(
    workdir: epath.PathLike, step: int | None = None, shardings: Any = None
) -> tuple[ModelConfig, Any, int]:
    """The model of a work directory, without its optimizer's state.

    Args:
        workdir: what ``encdec train --workdir=`` or ``encdec import --out=`` wrote.
        step: which checkpoint; by default the last.
        shardings: where each parameter goes, as a tree; by default all to the first device.

    Returns:
        The model's configuration, its parameters, and their step (0 for imported ones).

    Raises:
        CheckpointError: no such work directory or checkpoint.
    """
    config = model_config_of(read_config(workdir))
    abstract = abstract_params(build_model(config))
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    if (as_path(workdir) / PARAMS_FOLDER).is_dir():
        return config, _read_imported(workdir, step, abstract, shardings), 0
    directory = _folder(workdir)
    step = latest_step(workdir, step)
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    try:
        items = _read_whole(_readable(directory / str(step)), {"params": placed})
    except Damaged as error:
        others = ", ".join(str(s) for s in saved_steps(workdir) if s != step) or "none"
        raise CheckpointError(
            f"checkpoint {directory / str(step)} is damaged: {error}; other steps there: {others}"
        ) from error
    return config, items["params"], step


def _readable(folder: epath.Path) -> epath.Path:
    """A step's folder where orbax can read it: what inference needs of it, if it must be copied."""
    if not is_address(folder) or os.fspath(folder).startswith("gs://"):
        return folder
    copies = [on_this_machine(folder / name) for name in ("_CHECKPOINT_METADATA", "params")]
    with contextlib.suppress(FileNotFoundError):
        copies.append(on_this_machine(folder / FINGERPRINTS))
    return epath.Path(copies[0].parent)


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """The steps of which there is a complete checkpoint, in order."""
    directory = _folder(workdir)
    if not directory.exists():
        return []
    if is_address(workdir) and not os.fspath(directory).startswith("gs://"):
        # Copied there: orbax knows no marker of an unfinished one.
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
    return sorted(ocp.utils.checkpoint_steps(directory))


def latest_step(workdir: epath.PathLike, step: int | None = None) -> int:
    """The last checkpoint's step, or ``step`` if there is a checkpoint of it.

    Raises:
        CheckpointError: there is none.
    """
    steps = saved_steps(workdir)
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"checkpoint {step}"
        have = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"{workdir} does not have {wanted} (there are: {have}); train first, "
            "or give one of these steps"
        )
    return steps[-1] if step is None else step


def _read_imported(workdir: epath.PathLike, step: int | None, abstract: Any, shardings: Any) -> Any:
    """Parameters that were imported: each device reads its part of the mapped files."""
    if step:
        raise CheckpointError(
            f"{workdir} holds an imported model, which has no checkpoint {step}; leave --step out"
        )
    try:
        tensors = safetensors.open_directory(on_this_machine(as_path(workdir) / PARAMS_FOLDER))
    except DataError as error:
        raise CheckpointError(f"{error}; or run encdec import again") from error

    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(SCALE)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in scales}
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    extra, missing = sorted(tensors.keys() - names), sorted(names - tensors.keys())
    if extra:
        shown = ", ".join(extra[:6]) + f" and {len(extra) - 6} more" * (len(extra) > 6)
        lost = f", and {', '.join(missing[:6])} is missing" if missing else ""
        raise CheckpointError(
            f"{workdir} holds parameters that its configuration has no place for: {shown}{lost}; "
            "run encdec import again"
        )

    def read(path: Any, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        name = path_name(path)
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != leaf.shape:
            seen = "missing" if tensor is None else f"of shape {tensor.shape}"
            raise CheckpointError(
                f"parameter {name} in {workdir} is {seen}; expected {leaf.shape}: "
                "run encdec import again"
            )
        scale = scales.get(name + SCALE)
        if (tensor.dtype == np.int8) != (scale is not None):
            raise CheckpointError(
                f"parameter {name} in {workdir} is {tensor.dtype} with "
                f"{'no' if scale is None else 'a'} scale; write the directory again"
            )

        def part(index: Any) -> np.ndarray:
            if scale is None:
                return tensor[index].astype(leaf.dtype)
            return (tensor[index] * scale[index[:-1]]).astype(leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(read, abstract, shardings)
