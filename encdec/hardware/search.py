"""Searches for the batch, remat policy and mesh with the fastest training step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from encdec.errors import ConfigError
from encdec.hardware.compile import CompiledStep, DoesNotFit, halved, with_remat
from encdec.logs import logger
from encdec.model.stacks import REMAT_POLICIES
from encdec.train.run_config import RunConfig
from encdec.train.run_fields import MeshConfig

_LOG = logger(__name__)


@dataclasses.dataclass(frozen=True)
class Searched:
    """Result of a search on one topology.

    Attributes:
        steps: every variant that fits (at least one), the highest MFU first.
        unfit: the others, with the compiler's reasons.
    """

    steps: tuple[CompiledStep, ...]
    unfit: tuple[tuple[RunConfig, str], ...]


def search(
    run: RunConfig,
    attempt: Callable[[RunConfig], CompiledStep],
    divides: Callable[[RunConfig], bool],
    over: Sequence[str],
    meshes: Sequence[MeshConfig],
) -> Searched:
    """Tries every mesh and remat policy, doubling the batch while it fits, or halving it until it
    does.

    Args:
        run: the run to vary.
        attempt: compiles a variant, or raises DoesNotFit.
        divides: whether a variant's rows divide over its mesh.
        over: which of "batch" and "remat" to vary.
        meshes: to try.

    Raises:
        DoesNotFit: nothing fits.
    """
    remats = ("none", *REMAT_POLICIES) if "remat" in over else (run.model_config().execution.remat,)
    steps: list[CompiledStep] = []
    unfit: list[tuple[RunConfig, str]] = []

    def fits(variant: RunConfig) -> bool:
        mesh, said = variant.mesh, ""
        try:
            steps.append(attempt(variant))
            said = f"{100 * steps[-1].mfu:.1f} % MFU"
        except DoesNotFit as error:
            unfit.append((variant, str(error)))
            said = "does not fit"
        _LOG.info(
            f"data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, remat "
            f"{variant.model_config().execution.remat}, {variant.batch_size} rows: {said}"
        )
        return said != "does not fit"

    for mesh, remat in itertools.product(meshes, remats):
        variant = dataclasses.replace(with_remat(run, remat), mesh=mesh)
        as_it_is = fits(variant)
        if "batch" not in over:
            continue
        if as_it_is:
            while fits(variant := dataclasses.replace(variant, batch_size=2 * variant.batch_size)):
                pass
        else:
            any(map(fits, itertools.takewhile(divides, halved(variant))))
    if not steps:
        least = min(variant.batch_size for variant, _ in unfit)
        fewer = f", nor with fewer, tried down to {least}" if least < run.batch_size else ""
        raise DoesNotFit(
            f"nothing fits with {run.batch_size} rows{fewer}: {unfit[0][1]} Use a smaller "
            "--config.batch_size, or shard the state over more devices (--config.mesh.fsdp, "
            "--config.mesh.tensor)"
        )
    return Searched(tuple(sorted(steps, key=lambda step: -step.mfu)), tuple(unfit))


def search_meshes(mesh: MeshConfig, devices: int, slices: int = 1) -> list[MeshConfig]:
    """Meshes with copies of the model, with its state sharded over a slice, and over 16 devices.

    The tensor axis of ``mesh`` is kept: at these sizes it never pays.

    Raises:
        ConfigError: a slice's devices are not divisible by the tensor axis.
    """
    tensor, whole = max(1, mesh.tensor), devices // slices
    if whole % tensor:
        raise ConfigError(
            f"config.mesh.tensor is {tensor}; expected a divisor of the {whole} devices of a slice"
        )
    rest = whole // tensor
    shards = sorted({1, rest} | ({16} if rest % 16 == 0 else set()))
    return [dataclasses.replace(mesh, data=slices * rest // n, fsdp=n) for n in shards]
