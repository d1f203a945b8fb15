"""Fingerprints of arrays: 64 bits of their content, however they are split over devices.

A checkpoint stores the fingerprints of the arrays that were to be saved, and what is read back is
compared with them. This detects damage in the files and on the way to them, at the cost of one pass
over the arrays on their devices, and without a second read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from encdec.model.parameter_names import path_name
from encdec.processes import sum_over_processes

# Two independent sums; odd numbers, so that multiplication by them is a bijection of 32 bits.
_SEEDS = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))


def fingerprints(tree: Any) -> dict[str, str]:
    """The fingerprint of every array of a tree, 16 hexadecimal digits, by the array's path.

    Each element's bits are mixed with its position in the array (the finaliser of MurmurHash3,
    public domain, https://github.com/aappleby/smhasher) and added up modulo 2^32, twice with
    different constants. One changed element always changes both sums; any other change is missed
    with probability 2^-64.

    All processes that hold parts of the arrays must call this with the same tree.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # Each device sums its own parts without communication: dozens of small collectives are slow,
    # and on a CPU that emulates many devices they block each other.
    partial = [_by_device(leaf) for _, leaf in leaves]
    sums = np.stack([_distinct(leaf, sums) for (_, leaf), sums in zip(leaves, partial)])
    if any(not leaf.is_fully_addressable for _, leaf in leaves):
        sums = sum_over_processes(sums)
    return {
        path_name(path): "".join(f"{int(part):08x}" for part in pair)
        for (path, _), pair in zip(leaves, sums)
    }


def mismatches(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Names whose fingerprints differ, or that only one of the two has."""
    return sorted(
        name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
    )


def _by_device(leaf: jax.Array) -> jax.Array:
    """[devices, 2] uint32: each device's sums over its part, still being computed."""
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return _whole(leaf)
    return _split(sharding.mesh, sharding.spec, leaf.ndim)(leaf)


def _distinct(leaf: jax.Array, sums: jax.Array) -> np.ndarray:
    """[2]: the sum over this process's parts, each part that several devices hold taken once."""
    # A process that shares a part with another leaves it to the one that has its first copy.
    first = {shard.device for shard in leaf.addressable_shards if shard.replica_id == 0}
    total = np.zeros(2, np.uint32)
    for shard in sums.addressable_shards:
        if shard.device in first:
            total += np.asarray(shard.data, np.uint32).reshape(2)
    return total


@jax.jit
def _whole(x: jax.Array) -> jax.Array:
    return _digest(x, x.shape, (0,) * x.ndim)[None]


@functools.cache
def _split(mesh: jax.sharding.Mesh, spec: PartitionSpec, ndim: int) -> Any:
    axes = [
        () if part is None else part if isinstance(part, tuple) else (part,)
        for part in (*spec, *[None] * (ndim - len(spec)))
    ]

    def local(x: jax.Array) -> jax.Array:
        split = list(zip(x.shape, axes))
        shape = tuple(size * math.prod(mesh.shape[a] for a in names) for size, names in split)
        start = tuple(jax.lax.axis_index(names) * size if names else 0 for size, names in split)
        return _digest(x, shape, start)[None]

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=spec,
            out_specs=PartitionSpec(mesh.axis_names),
            check_vma=False,
        )
    )


def _digest(x: jax.Array, shape: tuple[int, ...], start: tuple[Any, ...]) -> jax.Array:
    """[2] uint32 sums over the part ``x``, from ``start`` on, of an array of ``shape``."""
    bits = _as_uint32(x)
    place = jnp.zeros(bits.shape, jnp.uint32)
    # Eight-byte elements have become pairs along one axis more.
    shape, start = (*shape, *bits.shape[x.ndim :]), (*start, *(0,) * (bits.ndim - x.ndim))
    stride = 1
    for axis in reversed(range(bits.ndim)):
        # Modulo 2^32: beyond that many elements places repeat, which only swaps could hide in.
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index += jnp.asarray(start[axis], jnp.uint32)
        place += index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return jnp.stack(
        [
            jnp.sum(_mixed(bits ^ (place * jnp.uint32(a)), jnp.uint32(b)), dtype=jnp.uint32)
            for a, b in _SEEDS
        ]
    )


def _mixed(x: jax.Array, salt: jax.Array) -> jax.Array:
    x = x + salt
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _as_uint32(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = min(x.dtype.itemsize, 4)  # eight bytes become two elements of four
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
