"""``encdec compile table``: reports of several compilations as one table and a scaling curve."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from encdec.errors import ConfigError, DataError
from encdec.figures import new_figure
from encdec.flags import Parser
from encdec.markup import markdown_table
from encdec.storage import local_path

GIB = 2**30
COLUMNS = (
    "model",
    "topology",
    "rows per device",
    "layers",
    "remat",
    "peak GiB per device",
    "step ms",
    "kernels ms",
    "collectives not hidden ms",
    "MFU %",
    "MFU %, kernels at half roofline",
    "tokens/s",
    "chip-hours per billion tokens",
)
# Okabe and Ito's colours; markers differ too.
_LOOKS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
)


def main(argv: list[str]) -> int:
    """``encdec compile table REPORT.json ... [--plot=FILE.png]``.

    Raises:
        DataError: a file was not written by ``encdec compile --out`` for a training step.
        ConfigError: there is nothing to plot.
    """
    options = _parser().parse_args(argv)
    reports = [report for file in options.reports for report in read_reports(file)]
    print(markdown(reports))
    if options.plot:
        curves = weak_scaling(reports)
        if not curves:
            raise ConfigError(
                "--plot: no model was compiled for two slice sizes of one chip type with the same "
                "rows per device; add reports (encdec compile --rows=N "
                "--topology=v5e:4x4,v5e:16x16 --out=FILE)"
            )
        plot(curves, pathlib.Path(options.plot))
    return 0


def read_reports(file: str) -> list[dict[str, Any]]:
    """The reports in a file that ``encdec compile --out`` wrote.

    Raises:
        DataError: the file does not exist or is not such a file.
    """
    try:
        reports = json.loads(pathlib.Path(file).read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} cannot be read as a report: {error}; give a file written by encdec compile "
            "--out=FILE"
        ) from error
    wanted = {"topology", "devices", "model", "mfu", "step_seconds", "token_budget"}
    if not isinstance(reports, list) or any(
        not isinstance(one, dict) or not wanted <= one.keys() for one in reports
    ):
        raise DataError(
            f"{file} holds no reports of training steps; give a file written by encdec compile "
            "--out=FILE (without --what)"
        )
    return reports


def markdown(reports: Sequence[dict[str, Any]]) -> str:
    """One line per report, in the order given."""
    rows = []
    for one in reports:
        memory = one["memory_bytes"]
        cells = (
            one["model"],
            one["topology"],
            _rows(one),
            "scanned" if one["scan_layers"] else "unrolled",
            one["remat"],
            f"{memory['peak'] / GIB:.1f} of {memory['limit'] / GIB:.1f}",
            f"{1e3 * one['step_seconds']:.1f}",
            f"{1e3 * one['pallas_roofline_seconds']:.1f}",
            f"{1e3 * one['collective_exposed_seconds']:.1f}",
            f"{100 * one['mfu']:.1f}",
            f"{100 * one['mfu_if_pallas_at_half_roofline']:.1f}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['chip_hours'] / one['token_budget'] * 1e9:.1f}",
        )
        rows.append(cells)
    return "\n".join(markdown_table(COLUMNS, rows, left=2))


def _rows(report: dict[str, Any]) -> str:
    """Rows of a device in a step: "16", or "8 x 4" for eight micro-batches of four."""
    rows, pieces = report["batch_size"] / report["devices"], report.get("accumulation", 1)
    return f"{rows:g}" if pieces == 1 else f"{pieces} x {rows / pieces:g}"


def weak_scaling(reports: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Weak scaling: rate per device as slices grow with constant rows per device.

    Returns:
        By model, kind of chip and rows per device, all settings but the mesh equal: (devices,
        tokens/s of a device relative to the fewest devices), ascending; only with at least
        two sizes. Of several meshes, as after a search, the fastest counts.
    """
    groups: dict[tuple, dict[int, float]] = {}
    for one in reports:
        devices = one["devices"]
        kind, rows = one["topology"].split(":")[0], _rows(one)
        changes = json.dumps(one["model_overrides"], sort_keys=True)
        key = (one["model"], kind, rows, one["inputs"], one["targets"], changes)
        rates = groups.setdefault(key, {})
        rates[devices] = max(rates.get(devices, 0.0), one["tokens_per_second"] / devices)
    curves: dict[str, list[tuple[int, float]]] = {}
    for (model, kind, rows, inputs, targets, changes), rates in groups.items():
        if len(rates) < 2:
            continue
        name = f"{model}, {kind}, {rows} rows of {inputs} + {targets} tokens per device"
        if name in curves:
            name += f", {changes}"
        curves[name] = [(n, rates[n] / rates[min(rates)]) for n in sorted(rates)]
    return curves


def plot(curves: dict[str, list[tuple[int, float]]], path: pathlib.Path) -> None:
    """Draws ``weak_scaling``'s curves."""
    figure, (axes,) = new_figure((7.5, 4))
    for place, (name, points) in enumerate(curves.items()):
        colour, marker = _LOOKS[place % len(_LOOKS)]
        devices, rates = zip(*points)
        axes.plot(devices, 100 * np.array(rates), color=colour, marker=marker, label=name)
    sizes = sorted({n for points in curves.values() for n, _ in points})
    axes.set(
        xlabel="devices", ylabel="tokens/s of a device, % of the smallest slice's", xscale="log"
    )
    axes.set_xticks(sizes, [str(n) for n in sizes], minor=False)
    axes.set_xticks([], minor=True)
    shares = [100 * share for points in curves.values() for _, share in points]
    axes.set_ylim(min(90, min(shares) - 2), max(102, max(shares) + 1))
    axes.axhline(95, color="0.6", linestyle=":", linewidth=1)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    figure.suptitle("Weak scaling by prediction", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)


def _parser() -> Parser:
    parser = Parser(
        prog="encdec compile table",
        description="Reports of training steps (encdec compile --out=FILE) as one Markdown table, "
        "and the rate per device as slices grow.",
    )
    parser.add_argument("reports", type=local_path, nargs="+", metavar="REPORT.json")
    parser.add("--plot", "draw the weak scaling curves", local_path, metavar="FILE.png")
    return parser
