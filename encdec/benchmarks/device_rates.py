"""Measured rates of this machine's device: bytes read and FLOPs per second."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from encdec.inference.huge_pages import arrays_onto_huge_pages
from encdec.machine import available_cores

# Far beyond any cache of a CPU.
_READ_BYTES = 512 * 2**20
_SIDE = 2048


@dataclasses.dataclass(frozen=True)
class DeviceRates:
    """Best of several tries, of all cores together.

    Attributes:
        bytes_per_second: of a matrix-vector product, which reads its matrix once, as a decoding
            step reads its weights; the better of one product and of one for each core at a time.
        flops_per_second: of a square matrix product.
    """

    bytes_per_second: float
    flops_per_second: float


def measure_rates(dtype: str = "float32", tries: int = 5) -> DeviceRates:
    """Measures the default device; takes a second or two and half a GiB on a CPU.

    bfloat16 numbers are added up in float32. Their reading is measured on accelerators alone: no
    CPU program of ours reads them one row at a time.
    """
    read = 0.0
    if not (jax.default_backend() == "cpu" and dtype == "bfloat16"):
        read = ReadRate(dtype).best(tries)
    square = jnp.ones((_SIDE, _SIDE), dtype)
    multiply = best_seconds(lambda: _square(square, square), tries)
    return DeviceRates(read, 2 * _SIDE**3 / multiply)


def all_devices(rate: float) -> float:
    """What all devices do at one device's rate; those of a CPU share its cores."""
    return rate * (1 if jax.default_backend() == "cpu" else jax.device_count())


class ReadRate:
    """Bytes per second of matrix-vector products; keeps their matrices, half a GiB each way."""

    def __init__(self, dtype: str = "float32") -> None:
        on_cpu, width = jax.default_backend() == "cpu", 4096
        self._vector = jnp.ones(width, dtype)
        rows = _READ_BYTES // self._vector.itemsize // width
        self._ways = []
        # One product is spread over the cores or not, by its size and XLA's version; several run
        # at the same time.
        for parts in {1, available_cores()} if on_cpu else {1}:
            pieces = [jnp.ones((rows // parts, width), dtype) for _ in range(parts)]
            if on_cpu:  # as decoding lays its weights
                arrays_onto_huge_pages(jax.block_until_ready(pieces))
            self._ways.append(pieces)
        self.best(1)  # compiles

    def best(self, tries: int) -> float:
        """The best rate of this many tries."""
        return max(
            sum(piece.nbytes for piece in pieces)
            / best_seconds(functools.partial(_products, pieces, self._vector), tries)
            for pieces in self._ways
        )


@jax.jit
def _products(pieces: Sequence[jax.Array], vector: jax.Array) -> list[jax.Array]:
    return [piece @ vector for piece in pieces]


@jax.jit
def _square(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def best_seconds(work: Callable[[], Any], tries: int = 5) -> float:
    """The shortest of some calls, after one that compiles."""
    jax.block_until_ready(work())
    taken = []
    for _ in range(tries):
        begin = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - begin)
    return min(taken)


def peak_memory() -> int:
    """The most physical memory that this process has held, in bytes.

    Linux counts it from zero in every new program (``VmHWM``). ``ru_maxrss``, taken where there is
    no such count, lasts through fork and exec there: a child of a large process reports
    the size of its parent.
    """
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class OthersLoad:
    """How much of the machine other processes take, from when it is made (Linux; else nothing)."""

    def __init__(self) -> None:
        self._begin = self._now()

    def _now(self) -> tuple[float, float, float]:
        """Seconds since some time: of all cores busy, of all cores, of this process."""
        try:
            fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return 0.0, 0.0, 0.0
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields[:8]]
        idle = ticks[3] + ticks[4]
        return sum(ticks) - idle, sum(ticks), time.process_time()

    def others(self) -> float:
        """Their share of all cores' time until now, 0 to 1."""
        busy, total, own = (b - a for a, b in zip(self._begin, self._now()))
        return max(0.0, busy - own) / total if total else 0.0
