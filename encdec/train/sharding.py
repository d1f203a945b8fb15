"""From logical axis names to places on the mesh: one small table of rules, and what follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from encdec.errors import ConfigError
from encdec.model.parameter_names import path_name
from encdec.train.run_fields import MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")
MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """For every logical axis, the mesh axes it is split over; none means a copy on each device."""

    # Activations
    batch: MeshAxes = ("data", "fsdp")
    length: MeshAxes = ()
    embed_act: MeshAxes = ()
    # Parameters; heads and mlp also name the activations between two matrices
    vocab: MeshAxes = ("tensor",)
    embed: MeshAxes = ("fsdp",)
    heads: MeshAxes = ("tensor",)
    kv_heads: MeshAxes = ("tensor",)
    head_dim: MeshAxes = ()
    mlp: MeshAxes = ("tensor",)
    layers: MeshAxes = ()

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The partition of an array whose dimensions have these logical axes.

        Raises:
            ConfigError: an unknown logical axis, or two dimensions split over one mesh axis.
        """
        places: list[Any] = []
        taken: dict[str, str | None] = {}
        for axis in axes:
            if axis is not None and axis not in _rule_names():
                raise ConfigError(
                    f"no sharding rule for the logical axis {axis!r}; "
                    f"expected one of {', '.join(_rule_names())}"
                )
            mesh_axes = getattr(self, axis) if axis is not None else ()
            for mesh_axis in mesh_axes:
                if mesh_axis in taken:
                    raise ConfigError(
                        f"sharding rules split both {taken[mesh_axis]!r} and {axis!r} of an array "
                        f"with axes {tuple(axes)} over the mesh axis {mesh_axis!r}; expected each "
                        "mesh axis at most once in an array: change one of the two rules"
                    )
                taken[mesh_axis] = axis
            places.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes or (None,))[0])
        return PartitionSpec(*places)

    def without(self, mesh_axis: str) -> ShardingRules:
        """The same rules, but nothing is split over ``mesh_axis``."""
        return ShardingRules(
            **{
                name: tuple(axis for axis in getattr(self, name) if axis != mesh_axis)
                for name in _rule_names()
            }
        )

    def parameter_spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """``spec`` of a parameter: norms' scales and the like stay whole along the model's width,
        because a collective for each would cost more than the bytes it saves."""
        if set(axes) <= {"embed", "layers"}:
            axes = [None if axis == "embed" else axis for axis in axes]
        return self.spec(axes)

    def pairs(self) -> tuple[tuple[str, Any], ...]:
        """The same rules as flax's ``logical_axis_rules`` wants them."""
        return tuple((name, getattr(self, name) or None) for name in _rule_names())

    def fitted(
        self, sizes: Mapping[str, Iterable[int]], mesh: Mesh
    ) -> tuple[ShardingRules, dict[str, str]]:
        """Drops the rules that cannot split their axis evenly on ``mesh``.

        Args:
            sizes: the lengths with which each logical axis occurs.
            mesh: the devices.

        Returns:
            The rules that fit, and for each axis left whole the reason.
        """
        changes, reasons = {}, {}
        for axis, lengths in sizes.items():
            mesh_axes = getattr(self, axis)
            shards = math.prod(mesh.shape[a] for a in mesh_axes)
            odd = sorted({n for n in lengths if n % shards})
            if odd:
                changes[axis] = ()
                reasons[axis] = (
                    f"length {odd[0]} is not divisible by {shards} ({' x '.join(mesh_axes)})"
                )
        return dataclasses.replace(self, **changes), reasons


def _rule_names() -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(ShardingRules))


@dataclasses.dataclass(frozen=True)
class Unsharded:
    """One parameter that a rule expected split but that stays whole on every device."""

    parameter: str
    axis: str
    reason: str

    def __str__(self) -> str:
        return f"{self.parameter}: axis {self.axis} is not sharded, {self.reason}"


def mesh_shape(config: MeshConfig, device_count: int) -> tuple[int, int, int]:
    """Devices along (data, fsdp, tensor), with -1 filled in.

    Raises:
        ConfigError: the mesh does not have exactly ``device_count`` devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    wanted = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes))
    if -1 in sizes:
        if device_count % known:
            raise ConfigError(
                f"config.mesh is {wanted}, but {device_count} devices are not "
                f"divisible by {known}; change config.mesh"
            )
        sizes[sizes.index(-1)] = device_count // known
    elif known != device_count:
        raise ConfigError(
            f"config.mesh is {wanted} = {known} devices, but there are "
            f"{device_count}; set one axis to -1, or change config.mesh"
        )
    data, fsdp, tensor = sizes
    return data, fsdp, tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over ``devices``, by default all of them.

    Slices of a TPU pod are joined along the data axis alone: a slice holds whole copies of the
    model, so that only the sums of gradients go over the network between slices.

    Raises:
        ConfigError: a mesh of another number of devices, or fewer copies than slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    types = (AxisType.Auto,) * 3
    # Other kinds of devices have this number, too (GPUs count nodes), but no such network.
    slices = len(
        {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    )
    if slices <= 1:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    if shape[0] % slices:
        raise ConfigError(
            f"config.mesh has {shape[0]} along data, but there are {slices} slices, each of which "
            f"holds whole copies; set config.mesh.data to a multiple of {slices} (or to -1, and "
            "config.mesh.fsdp to at most the devices of a slice)"
        )
    within = (shape[0] // slices, *shape[1:])
    places = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
    return Mesh(places, MESH_AXES, axis_types=types)


def data_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ShardingRules().batch)


def param_shardings(
    rules: ShardingRules, mesh: Mesh, abstract_params: Any, logical_axes: Any
) -> tuple[Any, ShardingRules, list[Unsharded]]:
    """Where every parameter is placed.

    Args:
        rules: the wish.
        mesh: the devices.
        abstract_params: tree with ``.shape`` at each leaf.
        logical_axes: the same tree, with a tuple of logical axis names for each leaf.

    Returns:
        The tree of NamedShardings, the rules that fit this mesh (for activations, too), and
        what could not be sharded.
    """
    is_axes = lambda x: isinstance(x, tuple)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params)
    axes = jax.tree.leaves(logical_axes, is_leaf=is_axes)
    sizes: dict[str, set[int]] = {}
    for (_, leaf), names in zip(leaves, axes, strict=True):
        for name, size in zip(names, leaf.shape, strict=True):
            if name is not None:
                sizes.setdefault(name, set()).add(size)
    fitted, reasons = rules.fitted(sizes, mesh)
    unsharded = [
        Unsharded(path_name(path), name, reasons[name])
        for (path, _), names in zip(leaves, axes)
        for name in names
        if name in reasons
    ]
    shardings = jax.tree.map(
        lambda names: NamedSharding(mesh, fitted.parameter_spec(names)),
        logical_axes,
        is_leaf=is_axes,
    )
    return shardings, fitted, unsharded


def like_params(abstract_tree: Any, abstract_params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of a tree that holds values per parameter, such as the optimizer's state.

    A leaf whose path ends in a parameter's path and that has its shape is placed where the
    parameter is; all others (step counts, Adafactor's factors) are small and are on every device.
    """
    known = {
        tuple(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract_params),
            jax.tree.leaves(shardings),
            strict=True,
        )
    }
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = known.get(tuple(path[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return everywhere

    return jax.tree_util.tree_map_with_path(place, abstract_tree)
