"""TPU topologies, usable without a TPU: devices, clocks, links, and how to compile for them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from encdec.cost.chips import Chip, chip_named
from encdec.errors import ConfigError
from encdec.packages import install_hint

MISSING = (
    "compiling for TPUs needs the TPU compiler, libtpu, which is not installed; "
    f"it runs on machines without a TPU: {install_hint('tpu')}"
)


@dataclasses.dataclass(frozen=True)
class ChipGeneration:
    """Facts about one kind of TPU, in addition to ``encdec.cost.chips``.

    Attributes:
        chip: peak rates of one JAX device.
        chip_dims: 2 or 3, the dimensions of a topology name.
        mxu_flops_per_cycle: dense bfloat16 FLOPs of one device's matrix units in one cycle; with
            the peak rate it gives the clock (v5e: four units of 128 x 128, 1.50 GHz).
        link_bytes_per_second: one ICI link, one direction.
        wraps_at: length from which a topology's side closes to a ring; on shorter sides the
            first and last chips are not linked.
        hbm_limit_gib: memory that the compiler lets a program use, from its out-of-memory message.
    """

    chip: Chip
    chip_dims: int
    mxu_flops_per_cycle: float
    link_bytes_per_second: float
    wraps_at: int
    hbm_limit_gib: float

    @property
    def clock_hz(self) -> float:
        return self.chip.bf16_flops / self.mxu_flops_per_cycle


# (device kind, dims, matrix units' FLOPs per cycle, link GB/s, side that closes, usable GiB)
_GENERATIONS = {
    "v4": ("TPU v4", 3, 2 * 8 * 128 * 128, 45, 4, 30.75),
    "v5e": ("TPU v5 lite", 2, 2 * 4 * 128 * 128, 45, 16, 15.75),
    "v5p": ("TPU v5", 3, 2 * 8 * 128 * 128, 90, 4, 95.74),
    "v6e": ("TPU v6 lite", 2, 2 * 4 * 256 * 256, 90, 16, 31.25),
    "tpu7x": ("TPU7x", 3, 2 * 4 * 256 * 256, 90, 4, 94.75),
}
# The compiler takes shapes that no pod has. ``launch/slices.py`` says where these are listed; one
# chip is a part of every slice.
_SHAPES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)),
}
_LARGEST = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}  # chips of a slice


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod, or several.

    Attributes:
        name: "v5e:4x4", or "v5e:4x4*2" for two slices.
        generation: its kind.
        sides: chips along each side of one slice.
        slices: slices joined by the data-centre network.
        devices: compile-only JAX devices.
    """

    name: str
    generation: ChipGeneration
    sides: tuple[int, ...]
    slices: int
    devices: tuple[Any, ...]

    @property
    def chips(self) -> int:
        """Of all slices; a chip may be two devices."""
        return math.prod(self.sides) * self.slices

    def links(self, group: Sequence[int]) -> int:
        """ICI links out of a chip that a collective among these devices can drive at once.

        A ring over a closed side sends both ways; on an open side both directions share the end
        chips' only link. Sides along which the group does not extend carry nothing.
        """
        places = [tuple(self.devices[i].coords) for i in group]
        total = 0
        for axis, side in enumerate(self.sides):
            if len({place[axis] for place in places}) > 1:
                total += 2 if side >= self.generation.wraps_at else 1
        return max(1, total)

    def crosses_slices(self, group: Sequence[int]) -> bool:
        return len({getattr(self.devices[i], "slice_index", 0) for i in group}) > 1


def parse_name(name: str) -> tuple[str, tuple[int, ...], int]:
    """Generation, sides and slices of "v5e:4x4" or "v5p:2x2x4*2".

    Raises:
        ConfigError: unknown generation, or sides that it does not have.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)(?:\*(\d+))?", name)
    if not match or match[1] not in _GENERATIONS:
        raise ConfigError(
            f"unknown topology {name!r}; expected GENERATION:SIDES with a generation of "
            f"{', '.join(_GENERATIONS)}, for example v5e:4x4, v5p:2x2x4, or v5e:16x16*2 for two "
            "slices"
        )
    sides = tuple(map(int, match[2].split("x")))
    dims = _GENERATIONS[match[1]][1]
    if match[3] and not int(match[3]):
        raise ConfigError(f"topology {name!r} has no slices; expected a number of 1 or more")
    shapes = _SHAPES[dims]
    cubes = len(sides) == 3 and list(sides) == sorted(sides) and not any(side % 4 for side in sides)
    largest = _LARGEST.get(match[1], 0)
    if sides not in shapes and not (cubes and 0 < math.prod(sides) <= largest):
        known = ", ".join("x".join(map(str, shape)) for shape in shapes)
        more = f", or ascending multiples of 4 with up to {largest:,} chips" if largest else ""
        raise ConfigError(f"topology {name!r} does not exist; {match[1]} has {known}{more}")
    return match[1], sides, int(match[3] or 1)


def generation_named(name: str) -> ChipGeneration:
    kind, dims, flops_per_cycle, link, wraps_at, gib = _GENERATIONS[name]
    return ChipGeneration(chip_named(kind), dims, flops_per_cycle, link * 1e9, wraps_at, gib)


@functools.cache
def find_topology(name: str) -> Topology:
    """The topology of this name, with devices that programs can be compiled for.

    Raises:
        ConfigError: an unknown name, a shape that the TPU compiler refuses, or no TPU compiler.
    """
    kind, sides, slices = parse_name(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(MISSING)
    prepare_environment()
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(sides) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on pods
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{'x'.join(map(str, sides))}", **options
        ).devices
    except Exception as error:  # the plug-in raises several exception types
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the TPU compiler does not know topology {name!r}: {reason}") from error
    return Topology(name, generation_named(kind), sides, slices, tuple(devices))


def prepare_environment() -> None:
    """Lets the TPU compiler start on a machine without a TPU, and while another one runs."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to wait for
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # its lock is for real devices
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # silences a warning
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
