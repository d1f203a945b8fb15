"""Compares a compiled step's figures with recorded ones, and reports what grew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOLERANCE = (
    0.03  # the compiler's figures for one program are exact; this tolerates small changes of ours
)

# Parts that explain a growth, by the figure that grew.
_TIME = ("compute_seconds", "pallas_roofline_seconds", "collective_exposed_seconds")
_SPACE = ("parameters", "optimizer", "batch", "temporary", "outputs", "code")
# Reports that differ in these cannot be compared.
_IDENTITY = ("topology", "model", "batch_size", "inputs", "targets")


def growth(
    report: Mapping[str, Any], recorded: Mapping[str, Any], tolerance: float = TOLERANCE
) -> list[str]:
    """Sentences on figures more than ``tolerance`` slower or larger than recorded; usually none.

    Args:
        report: of a step, from ``encdec.hardware.compile_report.as_json``.
        recorded: an earlier one of the same model, rows and topology.
        tolerance: as a fraction of the recorded figure.

    Raises:
        ValueError: the two are not of the same model, rows and topology.
    """
    for name in _IDENTITY:
        if report[name] != recorded[name]:
            raise ValueError(
                f"the step's {name} is {report[name]!r}, but {recorded[name]!r} was "
                "recorded: they cannot be compared"
            )
    found = []
    if report["step_seconds"] > (1 + tolerance) * recorded["step_seconds"]:
        found.append(
            "slower: the step takes "
            + _change(report["step_seconds"], recorded["step_seconds"], 1e3, "ms")
            + _parts(report, recorded, _TIME, 1e3, "ms")
        )
    new, old = report["memory_bytes"], recorded["memory_bytes"]
    if new["peak"] > (1 + tolerance) * old["peak"]:
        found.append(
            "peak memory grew: it is "
            + _change(new["peak"], old["peak"], 2**-20, "MiB")
            + _parts(new, old, _SPACE, 2**-20, "MiB")
        )
    return found


def _parts(
    new: Mapping[str, Any], old: Mapping[str, Any], names: tuple[str, ...], unit: float, symbol: str
) -> str:
    """The parts that grew, largest first."""
    grown = sorted(
        (name for name in names if new[name] > old[name]), key=lambda name: old[name] - new[name]
    )
    return "".join(f"; {name} {_change(new[name], old[name], unit, symbol)}" for name in grown)


def _change(new: float, old: float, unit: float, symbol: str) -> str:
    share = f", {100 * (new / old - 1):+.1f} %" if old else ""
    return f"{new * unit:.3f} {symbol} instead of {old * unit:.3f}{share}"
