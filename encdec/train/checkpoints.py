"""Checkpoints: the whole training state, saved in the background, restored bit for bit.

The folders are those of ``encdec.saved.saved_params``; WORKDIR/damaged/STEP is what could not be
read back as it was written. Damage is found before it is trained on; training then goes back to the
last checkpoint that is whole.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from math import inf, nan
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from encdec.buckets import forget
from encdec.errors import CheckpointError
from encdec.logs import Say, logger
from encdec.processes import from_first, wait_for_all
from encdec.saved.fingerprint import fingerprints
from encdec.saved.saved_params import (
    FINGERPRINTS,
    STATE,
    Damaged,
    checkpoints_folder,
    read_whole,
    saved_steps,
)
from encdec.saved.uploaded_steps import UploadedSteps, are_uploaded
from encdec.storage import make_directory, move_directory
from encdec.train.run_fields import CheckpointConfig
from encdec.train.state import TrainState

_LOG = logger(__name__)

DAMAGED_FOLDER = "damaged"


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
        self.directory = checkpoints_folder(workdir)
        self._say = say
        self._keep = _Keep(config, {} if losses is None else losses)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager | UploadedSteps:
        if are_uploaded(self.directory):
            return UploadedSteps(self.directory, self._keep.kept)
        return _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._keep,
                cleanup_tmp_directories=True,  # what a killed process left unfinished
                enable_async_checkpointing=True,
            ),
            item_names=(*STATE, FINGERPRINTS),
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
                items = read_whole(self.directory / str(step), wanted)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged, step)
            if are_uploaded(self.directory):
                forget(str(self.directory / str(step)))  # space for the next step
            counter = jax.device_put(jnp.int32(step), abstract_state.step.sharding)
            return TrainState(counter, items["params"], items["optimizer"]), step
        if damaged:
            seen = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
            raise CheckpointError(
                f"no checkpoint in {self.directory} is intact ({seen}); restore one from a copy, "
                "or give another --workdir to start from scratch"
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str], good: int) -> None:
        if not damaged:
            return
        for step, why in damaged.items():
            self._say(f"checkpoint {step:,} is damaged: {why}")
        self._say(
            f"falling back to checkpoint {good:,}, the last intact one; the damaged ones are moved "
            f"to {self.directory.parent / DAMAGED_FOLDER}"
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
        return "No checkpoint was complete: the same command starts at step 0."
    return f"Checkpoint {max(steps):,} is complete: the same command continues from there."


class _Manager(ocp.CheckpointManager):
    failure: BaseException | None = None  # of this process, while it saved in the background

    def reached_preemption(self, step: int) -> bool:
        """Never: the loop asks, with a count of its own (``preemption.Notice``), and another
        count in between would spoil the protocol."""
        return False

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:
            self.failure = error
            raise

    def wait_until_finished(self) -> None:
        """Also raises what this process met while the others still wait for it.

        Orbax's thread first meets the others at a barrier, to which they come only after ten
        minutes of waiting for this one's part of the checkpoint.
        """
        several = jax.process_count() > 1
        # Not is_saving_in_progress, which stays true if a save raised before its thread began.
        while several and self._finalize_thread.map(lambda thread: thread and thread.is_alive()):
            if self.failure:
                raise self.failure
            time.sleep(0.01)
        super().wait_until_finished()


def kept_steps(
    steps: Sequence[int], config: CheckpointConfig, losses: Mapping[int, float]
) -> set[int]:
    """The checkpoints that stay: the newest, the best, and the multiples of ``keep_every``.

    ``losses``: held-out loss by step, where it is known; of equal ones the earlier is better.
    """
    if not config.keep:
        return set(steps)
    ordered = sorted(steps)
    # A NaN has no place in an order.
    known = sorted((losses[step], step) for step in ordered if losses.get(step, nan) < inf)
    best = known[: config.keep_best]
    periodic = [s for s in ordered if config.keep_every and s % config.keep_every == 0]
    return {*ordered[-config.keep :], *(step for _, step in best), *periodic}


@dataclasses.dataclass
class _Keep(PreservationPolicy):
    config: CheckpointConfig
    losses: Mapping[int, float]

    def kept(self, steps: Sequence[int]) -> set[int]:
        return kept_steps(steps, self.config, self.losses)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self.kept(steps)
        return [step in kept for step in steps]
