"""TPU slices as ``encdec compile`` writes them (``v5e:4x4``, ``v5p:4x4x4*2``), in Google's terms.

Names of accelerator types, runtimes and node labels: https://cloud.google.com/tpu/docs and
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
"""

from __future__ import annotations

import dataclasses
import math
import re

CHIPS_PER_NODE = 4  # of every machine type below


@dataclasses.dataclass(frozen=True)
class _Chip:
    sides: int  # of its topologies
    type_prefix: str  # of accelerator types, and the type of gcloud and xpk
    units: int  # units per chip in the accelerator type: TensorCores, or the chip itself
    runtime: str | None  # image of a TPU VM; None: only on GKE
    node_label: str  # cloud.google.com/gke-tpu-accelerator
    machine: str  # of a GKE node with four chips
    largest: int  # chips of the largest slice


CHIPS = {
    "v4": _Chip(3, "v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-4t", 4096),
    "v5e": _Chip(
        2, "v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", 256
    ),
    "v5p": _Chip(3, "v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-4t", 6144),
    "v6e": _Chip(2, "v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-4t", 256),
    "tpu7x": _Chip(3, "tpu7x", 2, None, "tpu7x", "tpu7x-standard-4t", 9216),
}

# The slices that exist: https://cloud.google.com/tpu/docs/v5e and v6e list these for two sides, and
# for three https://cloud.google.com/tpu/docs/types-topologies says that sides ascend and are
# multiples of 4, but for the small ones. The largest are in .../docs/v4, v5p and tpu7x.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_COMPACT_UP_TO = 6144  # chips: of larger slices each has a shape of its own


@dataclasses.dataclass(frozen=True)
class Slices:
    """One or more equal slices.

    Attributes:
        chip: key of ``CHIPS``.
        sides: chips along each axis of a slice.
        count: slices.
    """

    chip: str
    sides: tuple[int, ...]
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Slices:
        """Reads ``CHIP:AxB[xC][*N]``.

        Raises:
            ValueError: anything else.
        """
        match = re.fullmatch(r"([a-z0-9]+):([0-9]+(?:x[0-9]+)*)(?:\*([0-9]+))?", text)
        chip = CHIPS.get(match[1]) if match else None
        if match is None or chip is None:
            raise ValueError(
                f"{text!r} is not a slice; expected one of {', '.join(CHIPS)} with its "
                "sides, e.g. v5e:4x4, or v5e:16x16*2 for two slices"
            )
        sides = tuple(int(side) for side in match[2].split("x"))
        small = _FLAT if chip.sides == 2 else _SMALL + ((1, 1, 1),) * (match[1] == "tpu7x")
        cubes = chip.sides == 3 and not any(side % 4 for side in sides) and 0 not in sides
        cubes = cubes and list(sides) == sorted(sides) and math.prod(sides) <= chip.largest
        if len(sides) != chip.sides or not (sides in small or cubes):
            shapes = ", ".join("x".join(map(str, one)) for one in small)
            more = f", or ascending multiples of 4 with up to {chip.largest:,} chips"
            raise ValueError(
                f"{text!r} does not exist; {match[1]} slices are {shapes}{more * (chip.sides == 3)}"
            )
        count = int(match[3] or 1)
        if not count:
            raise ValueError(f"{text!r} has no slice; expected *1 or more")
        return cls(match[1], sides, count)

    @property
    def topology(self) -> str:
        return "x".join(map(str, self.sides))

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(self.sides)

    @property
    def nodes(self) -> int:
        """GKE nodes of one slice, with four chips each."""
        return max(1, self.chips // CHIPS_PER_NODE)

    @property
    def vms(self) -> int:
        """Virtual machines of one slice outside GKE.

        As many as GKE's nodes, except that v5litepod-8 and v6e-8 are one machine with all eight
        chips (https://cloud.google.com/tpu/docs/v6e and v5e: 2x4 on two is for GKE alone).
        """
        return 1 if self.chip in ("v5e", "v6e") and self.chips == 8 else self.nodes

    @property
    def accelerator_type(self) -> str:
        """Of one slice, as the TPU API names it: by its size alone, whatever its shape."""
        chip = CHIPS[self.chip]
        return f"{chip.type_prefix}-{self.chips * chip.units}"

    @property
    def xpk_type(self) -> str:
        """Of one slice, as xpk names it with its shape (``v5p-4x4x12``)."""
        return f"{CHIPS[self.chip].type_prefix}-{self.topology}"

    @property
    def default_shape(self) -> bool:
        """Whether the accelerator type alone means this shape.

        Of several shapes of one size it means the most compact one, up to the largest v5p slice
        (https://cloud.google.com/tpu/docs/v5p, https://cloud.google.com/tpu/docs/v6e).
        """
        if len(self.sides) == 2 or self.sides[0] % 4:
            return True  # the only one
        return self.chips <= _COMPACT_UP_TO and self.sides == _most_compact(self.chips // 64)


def _most_compact(cubes: int) -> tuple[int, ...]:
    """Sides, ascending, of the box of so many cubes of 4x4x4 chips with the least sum of sides."""
    divisors = [side for side in range(1, cubes + 1) if cubes % side == 0]
    boxes = [
        (first, second, cubes // (first * second))
        for first in divisors
        for second in divisors
        if first <= second and cubes % (first * second) == 0 and second <= cubes // (first * second)
    ]
    return tuple(4 * side for side in min(boxes, key=sum))
