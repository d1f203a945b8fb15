"""Names and shapes of our parameters in another project's checkpoint.

A layout is a list of entries, read in either direction. Kernels are [out, in] there and [in, out]
here, with heads as an axis of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from encdec.errors import DataError
from encdec.fields import flattened
from encdec.model import ModelConfig, abstract_params, build_model

AxisChange = Literal["same", "matrix", "heads_in", "heads_out", "heads_bias"]
Flat = dict[str, np.ndarray]

SHOWN = 6  # how many tensor names a message lists per fault
MLP_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its name there, its path here (parts joined by "/"), how its axes differ."""

    theirs: str
    ours: str
    kind: AxisChange = "same"


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A nested tree from its values by path, the parts joined by "/"."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def attention_entries(
    config: ModelConfig,
    theirs: str,
    ours: str,
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> list[Entry]:
    """Projections of one attention sublayer, with the biases that ``config`` has."""
    entries = []
    for x, name in zip("qkvo", names, strict=True):
        out = x == "o"
        kind: AxisChange = "heads_out" if out else "heads_in"
        entries.append(Entry(f"{theirs}.{name}.weight", f"{ours}/{x}/kernel", kind))
        if config.attention_out_bias if out else config.qkv_bias:
            entries.append(
                Entry(f"{theirs}.{name}.bias", f"{ours}/{x}/bias", "same" if out else "heads_bias")
            )
    return entries


def mlp_entries(
    config: ModelConfig, theirs: str, ours: str, names: Mapping[str, str] = MLP_NAMES
) -> list[Entry]:
    """Matrices of one MLP; ``names`` are theirs for gate, up and down."""
    entries = []
    for x in ("gate", "up", "down") if config.mlp_gated else ("up", "down"):
        entries.append(Entry(f"{theirs}.{names[x]}.weight", f"{ours}/{x}/kernel", "matrix"))
        if config.mlp_bias:
            entries.append(Entry(f"{theirs}.{names[x]}.bias", f"{ours}/{x}/bias"))
    return entries


def qk_norm_entries(theirs: str, ours: str) -> list[Entry]:
    """Norms of one attention sublayer's queries and keys."""
    return [Entry(f"{theirs}.{x}_norm.weight", f"{ours}/{x}_norm/scale") for x in "qk"]


def layernorm_entries(theirs: str, ours: str, names: Mapping[str, str]) -> list[Entry]:
    """Norms before and after each sublayer of a layer; ``names`` are ours by theirs."""
    return [
        Entry(f"{theirs}.{when}_{name}_layernorm.weight", f"{ours}/{our_name}_{suffix}/scale")
        for name, our_name in names.items()
        for when, suffix in (("pre", "norm"), ("post", "post_norm"))
    ]


def to_theirs(layout: Iterable[Entry], params: Mapping[str, Any]) -> Flat:
    """Their tensors from our unrolled parameters; views wherever the axes allow it.

    Raises:
        KeyError: the layout names a parameter that is not there, which is a fault of the layout.
    """
    flat, tensors = flattened(params, "/"), {}
    unused = set(flat)
    for entry in layout:
        x = flat[entry.ours]
        unused.discard(entry.ours)
        if entry.kind == "matrix":
            x = x.T
        elif entry.kind == "heads_in":
            x = x.reshape(x.shape[0], -1).T
        elif entry.kind == "heads_out":
            x = x.reshape(-1, x.shape[-1]).T
        elif entry.kind == "heads_bias":
            x = x.reshape(-1)
        tensors[entry.theirs] = x
    if unused:
        raise KeyError(f"the layout has no place for {sorted(unused)[:SHOWN]}")
    return tensors


def check_tied(tensors: Mapping[str, np.ndarray], table: str, *copies: str) -> None:
    """Raises DataError where a tensor that the configuration calls the same as ``table`` differs.

    Compared by parts, so that mapped files are never held in memory as a whole.
    """
    rows = 4096
    for copy in copies:
        if table not in tensors or copy not in tensors:
            continue
        one, other = tensors[table], tensors[copy]
        if one.shape != other.shape or any(
            not np.array_equal(one[i : i + rows], other[i : i + rows])
            for i in range(0, len(one), rows)
        ):
            raise DataError(
                f"config.json says that {copy} is {table} (tie_word_embeddings), but the "
                "checkpoint has another tensor there; set tie_word_embeddings to false if the "
                "model was trained so, or download it again"
            )


def to_ours(
    layout: list[Entry],
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    ignored: Iterable[str] = (),
) -> dict[str, Any]:
    """Our unrolled parameters as views of their tensors.

    Args:
        layout: names on both sides.
        config: our model, layers unrolled.
        tensors: the checkpoint.
        ignored: names that may be there and are not read.

    Raises:
        DataError: tensors are missing, unexpected, of the wrong shape or not of floating point; the
            first of each are named.
    """
    leaves = flattened(abstract_params(build_model(config)), "/")
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    wanted = {entry.theirs: _their_shape(entry.kind, shapes[entry.ours]) for entry in layout}
    missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in tensors]
    extra = [
        f"{name} {tensors[name].shape}"
        for name in sorted(set(tensors) - set(wanted) - set(ignored))
    ]
    misshapen = [
        f"{name} {tensors[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    whole = [
        f"{name} {tensors[name].dtype}"
        for name in wanted
        if name in tensors and tensors[name].dtype.kind in "biu"
    ]
    faults = [
        f"{kind}: {', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for kind, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("wrong shape", misshapen),
            ("whole numbers, as of a quantized checkpoint", whole),
        )
        if names
    ]
    if faults:
        raise DataError(
            "the checkpoint does not fit its configuration; tensors "
            + "; ".join(faults)
            + ". Download it again, or use another checkpoint"
        )
    flat = {}
    for entry in layout:
        x, shape = tensors[entry.theirs], shapes[entry.ours]
        if entry.kind == "matrix":
            x = x.T
        elif entry.kind == "heads_in":
            x = x.reshape(*shape[1:], shape[0]).transpose(2, 0, 1)
        elif entry.kind == "heads_out":
            x = x.reshape(shape[2], *shape[:2]).transpose(1, 2, 0)
        elif entry.kind == "heads_bias":
            x = x.reshape(shape)
        flat[entry.ours] = x
    return unflatten(flat)


def _their_shape(kind: AxisChange, shape: tuple[int, ...]) -> tuple[int, ...]:
    if kind == "matrix":
        return shape[::-1]
    if kind == "heads_in":
        return (shape[1] * shape[2], shape[0])
    if kind == "heads_out":
        return (shape[2], shape[0] * shape[1])
    if kind == "heads_bias":
        return (shape[0] * shape[1],)
    return shape
