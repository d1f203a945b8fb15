"""Rows from records to devices: each process reads what its devices need, one batch ahead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding

from encdec.data.batches import Batches
from encdec.data.records import Records
from encdec.errors import ConfigError
from encdec.model import ModelConfig


def host_slice(sharding: NamedSharding, rows: int) -> tuple[int, int]:
    """Which part of a global batch this process's devices hold: (index, number of parts).

    Not simply process index and count: processes whose devices differ in the tensor axis alone
    hold the same rows.

    Raises:
        ConfigError: the devices' order gives a process rows that are not adjacent.
    """
    slices = {
        index[0].indices(rows)[:2]
        for index in sharding.addressable_devices_indices_map((rows, 1)).values()
        if index is not None
    }
    start, stop = min(s[0] for s in slices), max(s[1] for s in slices)
    held = sum(stop - start for start, stop in slices)
    size = stop - start
    if held != size or start % size or rows % size:
        raise ConfigError(
            f"process {jax.process_index()} holds rows {sorted(slices)} of {rows}, which are not a "
            "contiguous equal part; order config.mesh so that data and fsdp span processes"
        )
    return start // size, rows // size


def open_batches(
    records: Records, model: ModelConfig, sharding: NamedSharding, rows: int, **options: Any
) -> Batches:
    """The batches of this process, in the layout of the model's architecture."""
    index, count = host_slice(sharding, rows)
    return Batches(
        records,
        global_batch=rows,
        layout=model.architecture,
        host_index=index,
        host_count=count,
        **options,
    )


def to_devices(batch: dict[str, Any], sharding: NamedSharding, rows: int) -> dict[str, jax.Array]:
    """This process's part of a global batch of ``rows``, as global arrays."""
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)  # all fields at once: half the host's time
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))
        for name, x in batch.items()
    }


def on_devices(
    batches: Batches, sharding: NamedSharding, start_step: int, stop_step: int
) -> Iterator[dict[str, jax.Array]]:
    """Global batches of steps ``start_step`` ... ``stop_step - 1``.

    While one is being worked on, the next is on its way to the devices and those after it are
    read by background threads.
    """
    rows = batches.global_batch
    ahead = None
    for batch in batches.iterate(start_step, stop_step):
        current, ahead = ahead, to_devices(batch, sharding, rows)
        if current is not None:
            yield current
    if ahead is not None:
        yield ahead
