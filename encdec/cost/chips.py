"""Peak rates of accelerators by the name that JAX gives them, for MFU and predicted step times.

All figures are the manufacturers' and dense: NVIDIA's data sheets print bfloat16 rates with 2:4
sparsity, which is twice what a dense matrix product can reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from encdec.errors import ConfigError
from encdec.fields import did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates and memory of one JAX device of this kind.

    Attributes:
        name: common name.
        device_kinds: values of ``jax.Device.device_kind``.
        bf16_flops: dense bfloat16 FLOP/s with float32 accumulation.
        hbm_bytes: nominal memory; the runtime reserves a part of it.
        hbm_bytes_per_second: memory bandwidth.
        link_bytes_per_second: all ICI or NVLink links together, both directions; PCIe without.
        source: the manufacturer's publication.
        devices: JAX devices of a chip.
    """

    name: str
    device_kinds: tuple[str, ...]
    bf16_flops: float
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    source: str
    devices: int = 1


_TPU = "cloud.google.com/tpu/docs/"
_SHEET = "NVIDIA data sheet, "

# name, kinds, bfloat16 TFLOP/s, memory in GiB, its GB/s, the links' GB/s, source
_TABLE: tuple[tuple[str, tuple[str, ...], float, int, float, float, str], ...] = (
    # One device is a whole chip (its two cores fused, where it has two) ...
    ("TPU v4", ("TPU v4",), 275, 32, 1228, 600, _TPU + "v4; links: six of 50 GB/s each way"),
    ("TPU v5e", ("TPU v5 lite", "TPU v5e"), 197, 16, 819, 400, _TPU + "v5e"),
    ("TPU v5p", ("TPU v5", "TPU v5p"), 459, 95, 2765, 1200, _TPU + "v5p"),
    ("TPU v6e", ("TPU v6 lite", "TPU v6e"), 918, 32, 1638, 800, _TPU + "tpu7x (comparison)"),
    # ... except here: each of the two chiplets is a device, so these are half of the chip's
    # 2,307 TFLOP/s, 192 GiB, 7,380 GB/s and 1,200 GB/s.
    ("TPU7x", ("TPU7x",), 2307 / 2, 96, 7380 / 2, 600, _TPU + "tpu7x; halved per device"),
    ("A100 40GB", ("NVIDIA A100-SXM4-40GB",), 312, 40, 1555, 600, _SHEET + "A100"),
    ("A100 80GB", ("NVIDIA A100-SXM4-80GB",), 312, 80, 2039, 600, _SHEET + "A100"),
    ("A100 PCIe 40GB", ("NVIDIA A100-PCIE-40GB",), 312, 40, 1555, 64, _SHEET + "A100"),
    ("A100 PCIe 80GB", ("NVIDIA A100 80GB PCIe",), 312, 80, 1935, 64, _SHEET + "A100"),
    ("H100 SXM", ("NVIDIA H100 80GB HBM3",), 989.4, 80, 3350, 900, _SHEET + "H100"),
    ("H100 PCIe", ("NVIDIA H100 PCIe",), 756, 80, 2000, 128, _SHEET + "H100"),
    ("H100 NVL", ("NVIDIA H100 NVL",), 835, 94, 3900, 600, _SHEET + "H100"),
    ("H200", ("NVIDIA H200",), 989.4, 141, 4800, 900, _SHEET + "H200"),
    ("H200 NVL", ("NVIDIA H200 NVL",), 835, 141, 4800, 900, _SHEET + "H200"),
    ("B200", ("NVIDIA B200",), 2250, 180, 7700, 1800, _SHEET + "HGX B200"),
    ("L4", ("NVIDIA L4",), 121, 24, 300, 64, _SHEET + "L4"),
    ("L40S", ("NVIDIA L40S",), 362, 48, 864, 64, _SHEET + "L40S"),
)

CHIPS = tuple(
    Chip(
        *(name, kinds, 1e12 * tflops, gib * 2**30, 1e9 * memory, 1e9 * links, source),
        devices=2 if name == "TPU7x" else 1,
    )
    for name, kinds, tflops, gib, memory, links, source in _TABLE
)
_BY_KIND = {kind: chip for chip in CHIPS for kind in chip.device_kinds}


def find_chip(device_kind: str) -> Chip | None:
    """The chip behind a ``jax.Device.device_kind``; None if its peak is unknown (a CPU)."""
    return _BY_KIND.get(device_kind)


def chip_named(name: str) -> Chip:
    """The chip called ``name`` ("TPU v5e", "v5e", "h200") or of that device kind.

    Raises:
        ConfigError: unknown chip; the message lists the known ones.
    """
    wanted = name.lower().removeprefix("tpu").removeprefix("nvidia").strip()
    names = {chip.name.lower().removeprefix("tpu").strip(): chip for chip in CHIPS}
    chip = find_chip(name) or names.get(wanted)
    if chip is None:
        known = [chip.name for chip in CHIPS]
        raise ConfigError(
            f"unknown chip {name!r}{did_you_mean(wanted, known)} (known: {', '.join(known)})"
        )
    return chip


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Dense bfloat16 FLOP/s of all ``devices`` (``jax.devices()``); None if one is unknown."""
    found = [find_chip(device.device_kind) for device in devices]
    chips = [chip for chip in found if chip is not None]
    if not chips or len(chips) < len(found):
        return None
    return sum(chip.bf16_flops for chip in chips)
