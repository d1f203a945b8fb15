"""Options of the TPU compiler by chip: what differs from its defaults, each with its reason.

They reach both training on a TPU and ``encdec compile``. docs/pod.md has what each gave.
"""

from __future__ import annotations

from collections.abc import Mapping

# Where masters are split over devices, the compiler would cut each product that makes a gradient
# into as many pieces, to send one while the next is computed: 16 devices leave pieces 64 wide of a
# width of 1,024, and a matrix unit half empty. Whole products and one collective are faster.
_WHOLE_PRODUCTS = {
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
}

BY_DEVICE_KIND: Mapping[str, Mapping[str, str]] = {
    kind: _WHOLE_PRODUCTS for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")
}


def compiler_options(device_kind: str) -> dict[str, str]:
    """What ``jax.jit`` is given for programs on devices of this kind; empty where nothing is."""
    return dict(BY_DEVICE_KIND.get(device_kind, {}))
