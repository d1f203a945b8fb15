"""Checkpoints: the whole training state, saved in the background, restored bit for bit.

    WORKDIR/checkpoints/STEP/params     parameters, all that inference reads
                            /optimizer  the optimizer's state

A step's folder gets its name only when it is complete; unfinished ones are never taken for it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from encdec.errors import CheckpointError
from encdec.model import ModelConfig, abstract_params, build_model
from encdec.train.config import CheckpointConfig
from encdec.train.state import TrainState
from encdec.train.workdir import CHECKPOINTS_FOLDER, model_config_of, read_config

_ITEMS = ("params", "optimizer")


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, workdir: epath.PathLike, config: CheckpointConfig = CheckpointConfig()):
        self.directory = epath.Path(workdir).resolve() / CHECKPOINTS_FOLDER
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep or None,
                keep_period=config.keep_every or None,
                enable_async_checkpointing=True,
            ),
            item_names=_ITEMS,
        )

    def latest(self) -> int | None:
        """The last complete step; None before the first."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state off the devices and writes it in the background."""
        self._manager.save(step, args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.opt_state)))

    def restore(self, abstract_state: TrainState, step: int) -> TrainState:
        """The state after ``step`` steps, placed as ``abstract_state`` says.

        Raises:
            CheckpointError: the checkpoint cannot be read.
        """
        try:
            items = self._manager.restore(step, args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract_state.params),
                optimizer=ocp.args.StandardRestore(abstract_state.opt_state)))
        except Exception as error:  # orbax raises whatever its storage raised
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be restored: {error}; remove it "
                "to continue from the one before") from error
        counter = jax.device_put(jnp.int32(step), abstract_state.step.sharding)
        return TrainState(counter, items["params"], items["optimizer"])

    def wait(self) -> None:
        """Returns when everything saved is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def load_params_for_inference(
    workdir: epath.PathLike, step: int | None = None
) -> tuple[ModelConfig, Any, int]:
    """The trained model of a work directory, without its optimizer's state.

    Args:
        workdir: what ``encdec train --workdir=`` wrote.
        step: which checkpoint; by default the last.

    Returns:
        The model's configuration, its parameters on the first device, and their step.

    Raises:
        CheckpointError: no such work directory or checkpoint.
    """
    config = model_config_of(read_config(workdir))
    directory = epath.Path(workdir).resolve() / CHECKPOINTS_FOLDER
    steps = sorted(ocp.utils.checkpoint_steps(directory)) if directory.exists() else []
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"checkpoint {step}"
        have = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{workdir} has not got {wanted} (there are: {have}); train first, "
                              "or give one of these steps")
    step = steps[-1] if step is None else step
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        abstract_params(build_model(config)))
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            params = checkpointer.restore(directory / str(step) / "params", abstract)
        except Exception as error:  # orbax raises whatever its storage raised
            raise CheckpointError(f"checkpoint {directory / str(step)} cannot be restored: {error}"
                                  ) from error
    return config, params, step
