"""Names of parameters: by their places in the tree, and by layer where layers are stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax


def path_name(path: Sequence[Any]) -> str:
    """``a/b/c`` for a tree path."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def unrolled_names(params: Any) -> dict[str, list[str]]:
    """Each parameter's name, in the tree's order, with those of its parts: of a stack of layers
    one per layer, named as unrolled layers are; else its own."""
    names: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        pieces = name.split("/")
        names[name] = [name]
        if "layers" in pieces:
            place = pieces.index("layers")
            names[name] = [
                "/".join([*pieces[:place], f"layers_{i}", *pieces[place + 1 :]])
                for i in range(leaf.shape[0])
            ]
    return names
