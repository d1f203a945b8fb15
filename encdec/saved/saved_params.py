"""The parameters of a model on disk: of a run's checkpoint, proven by fingerprints, or imported.

    DIR/checkpoints/STEP/params        parameters, all that inference reads
                        /optimizer     the optimizer's state
                        /fingerprints  of every array, taken before it was written
    DIR/params                         of an imported model, in place of checkpoints

A step's folder gets its name only when it is complete. What is read is compared with the
fingerprints, which detects damage of any kind.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from encdec import safetensors
from encdec.buckets import forget, is_address
from encdec.errors import CheckpointError, DataError
from encdec.model import ModelConfig, abstract_params, build_model
from encdec.model.parameter_names import path_name
from encdec.processes import any_process
from encdec.saved.fingerprint import fingerprints, mismatches
from encdec.saved.saved_config import (
    CHECKPOINTS_FOLDER,
    PARAMS_FOLDER,
    SCALE,
    model_config_of,
    read_config,
)
from encdec.saved.uploaded_steps import MARKER, are_uploaded, whole_steps
from encdec.storage import as_path, on_this_machine

FINGERPRINTS = "fingerprints"
STATE = ("params", "optimizer")
# Transient errors: they do not mean that the checkpoint is damaged.
_PASSING = (PermissionError, ConnectionError, TimeoutError, MemoryError)
_PASSING_CODES = (
    "PERMISSION_DENIED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
)


class Damaged(Exception):
    """A checkpoint whose content is not what was saved."""


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
    step = step_to_read(workdir, step)
    abstract = abstract_params(build_model(config))
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    if (as_path(workdir) / PARAMS_FOLDER).is_dir():
        return config, _read_imported(workdir, abstract, shardings), step
    directory = checkpoints_folder(workdir)
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    try:
        items = read_whole(directory / str(step), {"params": placed})
    except Damaged as error:
        others = ", ".join(str(s) for s in saved_steps(workdir) if s != step) or "none"
        raise CheckpointError(
            f"checkpoint {directory / str(step)} is damaged: {error}; other steps there: {others}"
        ) from error
    return config, items["params"], step


def _readable(folder: epath.Path, wanted: Iterable[str]) -> epath.Path:
    """A step's folder where orbax can read it: the items that are wanted, if it must be copied.

    Raises:
        FileNotFoundError: an item is missing.
        ConnectionError: it may be there, but cannot be copied for the moment.
    """
    if not are_uploaded(folder):
        return folder
    try:
        copies = [on_this_machine(folder / name) for name in (MARKER, *wanted)]
        with contextlib.suppress(FileNotFoundError):
            copies.append(on_this_machine(folder / FINGERPRINTS))
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the libraries of buckets raise, or this machine's disk
        raise ConnectionError(_short(error)) from error
    return epath.Path(copies[0].parent)


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """The steps of which there is a complete checkpoint, in order."""
    directory = checkpoints_folder(workdir)
    if are_uploaded(directory):
        return whole_steps(directory)
    if not directory.exists():
        return []
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


def step_to_read(workdir: epath.PathLike, step: int | None = None, flag: str = "--step") -> int:
    """The step that ``load_params_for_inference`` reads, 0 of an imported model; reads nothing.

    Raises:
        CheckpointError: there is none; ``flag`` asked for it.
    """
    if not (as_path(workdir) / PARAMS_FOLDER).is_dir():
        return latest_step(workdir, step)
    if step is not None:
        raise CheckpointError(
            f"{workdir} holds an imported model, which has no checkpoint {step}; leave {flag} out"
        )
    return 0


def _read_imported(workdir: epath.PathLike, abstract: Any, shardings: Any) -> Any:
    """Parameters that were imported: each device reads its part of the mapped files."""
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


def checkpoints_folder(workdir: epath.PathLike) -> epath.Path:
    """The folder of checkpoints, in the form that Orbax expects."""
    if is_address(workdir):
        return as_path(workdir) / CHECKPOINTS_FOLDER
    return epath.Path(workdir).resolve() / CHECKPOINTS_FOLDER


def read_whole(step: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads items of a step and verifies them; all processes come to the same result.

    Args:
        step: its folder.
        wanted: an abstract tree with shardings by item.

    Raises:
        Damaged: what is there is not what was saved.
        CheckpointError: it cannot be read for the moment.
    """
    try:
        return _read_once(step, wanted)
    except Damaged:
        if not are_uploaded(step):
            raise
        forget(os.fspath(step))  # the copy may be what is damaged
        return _read_once(step, wanted)


def _read_once(step: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    items: dict[str, Any] = {}
    trouble: Exception | None = None
    try:
        folder = _readable(step, wanted)
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
            f"checkpoint {step} cannot be read now: {_short(trouble)}; try again"
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
        if f'"{FINGERPRINTS}"' in (folder / MARKER).read_text():
            raise FileNotFoundError(f"{FINGERPRINTS} is missing")
        return None
    handler = ocp.JsonCheckpointHandler()
    prints = handler.restore(folder / FINGERPRINTS, args=ocp.args.JsonRestore())
    return {name: dict(prints[name]) for name in STATE if name in prints}


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
