"""Options of the TPU compiler by chip: what differs from its defaults, each with its reason.

They reach training on a TPU and ``encdec compile`` alike. docs/pod.md has what each gave.
"""

from __future__ import annotations

from collections.abc import Mapping

BY_DEVICE_KIND: Mapping[str, Mapping[str, str]] = {}


def compiler_options(device_kind: str) -> dict[str, str]:
    """What ``jax.jit`` is given for programs on devices of this kind; empty where nothing is."""
    return dict(BY_DEVICE_KIND.get(device_kind, {}))
