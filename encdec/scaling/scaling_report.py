"""The report of a ladder: tables on the terminal, JSON, and one self-contained HTML file."""

from __future__ import annotations

import base64
import dataclasses
import html
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from encdec.markup import html_page, html_table
from encdec.metrics.intervals import Interval
from encdec.scaling.analysis import Analysis, Distillation, Fitted
from encdec.scaling.distillation import DistillationLaw
from encdec.scaling.fit import Law
from encdec.scaling.frontier import Comparison
from encdec.scaling.plan_table import short
from encdec.scaling.plots import Drawn
from encdec.scaling.results_file import json_value
from encdec.scaling.rungs import Rung, RungResult
from encdec.scaling.series_styles import label_of

_TOKENS = {"target": "target tokens", "source": "source tokens", "both": "source + target tokens"}


@dataclasses.dataclass(frozen=True)
class ReportSection:
    """A table with title, header and a remark below."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remark: str = ""


def sections(analysis: Analysis) -> list[ReportSection]:
    """Everything the report says, as tables of text."""
    found = [_laws(analysis)]
    if analysis.parts:
        found.append(_parts(analysis.parts))
    found += [
        _held_out(analysis),
        _comparisons(analysis),
        _against_plain(analysis),
        *(_distillation(one) for one in analysis.distillation.values()),
        _rungs("Held-out loss on each rung", analysis.rungs, analysis, 4),
        *(
            _rungs(f"{metric} on each rung", rungs, analysis, 2)
            for metric, rungs in analysis.scores.items()
        ),
        _largest_residuals(analysis),
        _runs(analysis),
    ]
    return [section for section in found if section.rows or section.remark]


def _bounds_hit(law: Law | DistillationLaw) -> str:
    if not law.bounds_hit:
        return ""
    return f"{', '.join(law.bounds_hit)} ended on a bound, so these runs do not determine it."


def _root_mean_square(residuals: np.ndarray | None) -> str:
    if residuals is None:
        return "-"
    return f"{np.sqrt(np.mean(residuals**2)):.2%}"


def _number(value: float, interval: Interval | None = None) -> str:
    if math.isnan(value):
        return "-"
    text = f"{value:.4g}"
    if interval and not math.isnan(interval.low):
        text += f" [{interval.low:.3g}, {interval.high:.3g}]"
    return text


def _laws(analysis: Analysis) -> ReportSection:
    choices = analysis.choices
    rows, reasons = [], []
    for name, one in analysis.series.items():
        if one.reason:
            reasons.append(f"{label_of(name)}: {one.reason}.")
        if not one.law:
            continue
        constants = one.law.constants()
        cells = [
            _number(constants[key], one.intervals.get(key))
            for key in ("E", "A", "alpha", "B", "beta")
        ]
        spread = _root_mean_square(one.residuals)
        exponent = _number(one.frontier.size_exponent if one.frontier else math.nan)
        rows.append((label_of(name), str(len(one.runs)), *cells, spread, exponent))
        if hit := _bounds_hit(one.law):
            reasons.append(f"{label_of(name)}: {hit}")
    noise, freedom = analysis.seed_noise
    remark = (
        f"L in {choices.loss.replace('_', ' ')}; N: {choices.parameters.replace('_', ' ')} "
        f"parameters; D: {_TOKENS[choices.tokens]}. "
    )
    if choices.draws:
        remark += f"In brackets 95 % intervals of {choices.draws} bootstrap draws of runs. "
    if freedom:
        remark += f"Between seeds the loss differs by {noise:.2%} (standard deviation). "
    if analysis.unfinished:
        reasons.append(f"{len(analysis.unfinished)} runs are not finished and left out.")
    return ReportSection(
        "Laws: L = E + A / N^alpha + B / D^beta",
        ("series", "runs", "E", "A", "alpha", "B", "beta", "residual (rms)", "best N ~ C^a, a"),
        tuple(rows),
        remark + " ".join(reasons),
    )


def _parts(one: Fitted) -> ReportSection:
    title = "All encoder-decoders: L = E + A / (N_e^alpha_e N_d^alpha_d) + B / D^beta"
    remark = (
        "N_e and N_d are the parameters of the encoder's and the decoder's blocks, without "
        "the embedding."
    )
    if not one.law:
        return ReportSection(title, (), (), f"{remark} Not fitted: {one.reason}.")
    constants = one.law.constants()
    cells = tuple(_number(value, one.intervals.get(key)) for key, value in constants.items())
    row = (str(len(one.runs)), *cells)
    return ReportSection(title, ("runs", *constants), (row,), f"{remark} {_bounds_hit(one.law)}")


def _held_out(analysis: Analysis) -> ReportSection:
    rows = []
    reasons: dict[str, list[str]] = {}
    for one in filter(None, [*analysis.series.values(), analysis.parts]):
        name = label_of(one.name) if one.name != "ed" else "all encoder-decoders"
        if one.held_out is None:
            if one.law:
                reasons.setdefault(one.held_out_reason, []).append(name)
            continue
        errors = one.held_out.errors
        worst = errors[np.abs(errors).argmax()]
        rows.append(
            (
                name,
                short(one.held_out.parameters),
                str(len(errors)),
                f"{one.held_out.mean_absolute_error:.2%}",
                f"{worst:+.2%}",
            )
        )
    return ReportSection(
        "Extrapolation to the largest size, held out of the fit",
        ("series", "N", "runs", "mean error", "worst"),
        tuple(rows),
        "Predicted over observed loss, less one. "
        + " ".join(f"{', '.join(names)}: {why}." for why, names in reasons.items()),
    )


def _comparisons(analysis: Analysis) -> ReportSection:
    reasons = " ".join(f"{label_of(name)}: {why}." for name, why in analysis.not_compared.items())
    return _compared(
        "Encoder-decoder against decoder-only, along the frontiers",
        "decoder-only's",
        analysis.comparisons,
        "The ratio is the FLOPs of decoder-only over those of the encoder-decoder at equal loss; "
        "above 1 the encoder-decoder is cheaper.",
        reasons,
    )


def _against_plain(analysis: Analysis) -> ReportSection:
    return _compared(
        "With a teacher against gold targets alone, along the frontiers",
        "without",
        analysis.against_plain,
        "The ratio is the FLOPs on gold targets alone over the student's with a teacher at equal "
        "loss; above 1 the teacher helps. The teacher's training and its logits are not counted.",
    )


def _distillation(one: Distillation) -> ReportSection:
    title = f"{label_of(one.name)} + KD, over all teachers"
    remark = (
        "L = L_T + L_T^-c0 (1 + (L_T / (d1 L~))^(1/f1))^(-c1 f1) "
        "(A / N^alpha + B / D^beta)^gamma (arXiv 2502.08606); L_T: the teacher's loss; L~: "
        "the student's on gold targets alone, by its law."
    )
    if not one.law:
        return ReportSection(title, (), (), f"{remark} Not fitted: {one.reason}.")
    overtaken = "; ".join(
        f"at N = {short(n)} " + ("nowhere" if d is None else f"from D = {short(d)}")
        for n, d in one.overtaken_at.items()
    )
    if hit := _bounds_hit(one.law):
        remark += f" {hit}"
    remark += (
        " Compared with the best teacher, gold targets alone are better, up to 100 times the "
        f"tokens run, {overtaken}."
    )
    counts = (str(len(one.runs)), str(len(np.unique(one.teacher_loss))))
    constants = (f"{value:.4g}" for value in one.law.constants.values())
    return ReportSection(
        title,
        ("runs", "teachers", *one.law.constants, "residual (rms)"),
        ((*counts, *constants, _root_mean_square(one.residuals)),),
        remark,
    )


def _rungs(title: str, rungs: Sequence[Rung], analysis: Analysis, digits: int) -> ReportSection:
    names = [name for name in analysis.series if any(name in rung.cells for rung in rungs)]
    rows = []
    for rung in rungs:
        cells = [f"{rung.size} at {rung.budget:.3g}"]
        for name in names:
            cell = rung.cells.get(name)
            cells.append("-" if cell is None else _cell(cell, digits))
        rows.append(tuple(cells))
    remark = (
        "Means over seeds, ± one standard deviation between seeds. In parentheses how far "
        "the series is ahead of decoder-only (below 0: behind), the mean over seeds that "
        "both have; in brackets its 95 % interval by Student's t over these seeds. "
        if rows
        else ""
    )
    return ReportSection(title, ("rung", *map(label_of, names)), tuple(rows), remark)


def _cell(cell: RungResult, digits: int) -> str:
    text = f"{cell.mean:.{digits}f}"
    if not math.isnan(cell.deviation):
        text += f" ± {cell.deviation:.{digits}f}"
    if not math.isnan(cell.ahead):
        text += f" ({cell.ahead:+.{digits}f}"
        if not math.isnan(cell.interval.low):
            text += f" [{cell.interval.low:+.{digits}f}, {cell.interval.high:+.{digits}f}]"
        text += ")"
    return text


def _compared(
    title: str, other: str, comparisons: Mapping[str, Comparison], ratio: str, reasons: str = ""
) -> ReportSection:
    """Comparisons with ``other``; the remark explains the ``ratio`` if there are any."""
    rows = []
    for name, found in comparisons.items():
        gain, loss = "-", "-"
        if found.losses.size:
            gain = _number(found.ratio[-1], Interval(*found.ratio_band[:, -1]))
            loss = f"{found.losses[-1]:.3f}"
        crossing = found.crossing
        where = "none within two orders of magnitude"
        if crossing.flops is not None:
            where = _number(crossing.flops, crossing.interval)
            where += " (extrapolated)" * crossing.extrapolated
        if not math.isnan(crossing.share):
            where += f"; {crossing.share:.0%} of draws cross"
        ahead = "-" if math.isnan(found.share_first_ahead) else f"{found.share_first_ahead:.0%}"
        rows.append(
            (
                label_of(name),
                f"{found.first_loss[-1]:.4f}",
                f"{found.second_loss[-1]:.4f}",
                ahead,
                gain,
                loss,
                where,
            )
        )
    flops = ("ahead in draws", "FLOPs ratio", "at loss", "frontiers cross at FLOPs")
    remark = f"At the largest FLOPs at which both were run. {ratio} " if rows else ""
    return ReportSection(
        title, ("series", "its loss", other, *flops), tuple(rows), remark + reasons
    )


def _largest_residuals(analysis: Analysis) -> ReportSection:
    entries = [
        (abs(residual), residual, row["run"])
        for one in analysis.series.values()
        if one.residuals is not None
        for residual, row in zip(one.residuals, one.rows)
    ]
    entries.sort(reverse=True)
    return ReportSection(
        "Runs furthest from their law",
        ("run", "observed over predicted"),
        tuple((run, f"{math.expm1(residual):+.2%}") for _, residual, run in entries[:5]),
    )


def _runs(analysis: Analysis) -> ReportSection:
    rows = []
    for one in analysis.series.values():
        for i in np.argsort(one.flops, kind="stable"):
            row = one.rows[i]
            residual = "" if one.residuals is None else f"{math.expm1(one.residuals[i]):+.2%}"
            rows.append(
                (
                    row["run"],
                    short(row["parameters"]),
                    short(row["source_tokens"]),
                    short(row["target_tokens"]),
                    short(row["flops"]),
                    f"{one.runs.loss[i]:.4f}",
                    residual,
                )
            )
    return ReportSection(
        "Finished runs",
        ("run", "parameters", "source tokens", "target tokens", "FLOPs", "loss", "from its law"),
        tuple(rows),
    )


def show(analysis: Analysis, console: Console) -> None:
    """Prints all sections but the list of runs."""
    for section in sections(analysis)[:-1]:
        console.print(f"[bold]{escape(section.title)}[/bold]")
        if section.rows:
            table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
            for name in section.header:
                table.add_column(escape(name))
            for row in section.rows:
                table.add_row(*map(escape, row))
            console.print(table)
        if section.remark:
            console.print(escape(section.remark.strip()), style="dim")
        console.print()


def as_json(analysis: Analysis) -> dict[str, Any]:
    """All numbers; intervals as [low, high], NaN and infinity as null."""
    content = {
        "choices": dataclasses.asdict(analysis.choices),
        "seed_noise": analysis.seed_noise[0],
        "unfinished": analysis.unfinished,
        "series": {name: _fitted_as_json(one) for name, one in analysis.series.items()},
        "parts": _fitted_as_json(analysis.parts) if analysis.parts else None,
        "comparisons": _comparisons_as_json(analysis.comparisons),
        "against_plain": _comparisons_as_json(analysis.against_plain),
        "distillation": {
            name: {
                "runs": len(one.runs),
                "reason": one.reason or None,
                "law": one.law.constants if one.law else None,
                "bounds_hit": one.law.bounds_hit if one.law else [],
                "residuals": one.residuals,
                "overtaken_at": list(one.overtaken_at.items()),
            }
            for name, one in analysis.distillation.items()
        },
        "rungs": _rungs_as_json(analysis.rungs),
        "scores": {name: _rungs_as_json(rungs) for name, rungs in analysis.scores.items()},
        "not_compared": analysis.not_compared,
    }
    return json_value(content)


def _fitted_as_json(one: Fitted) -> dict[str, Any]:
    held = one.held_out
    return {
        "runs": [row["run"] for row in one.rows],
        "reason": one.reason or None,
        "law": one.law.constants() if one.law else None,
        "bounds_hit": one.law.bounds_hit if one.law else [],
        "intervals": one.intervals,
        "residuals": one.residuals,
        "held_out": {"parameters": held.parameters, "errors": held.errors} if held else None,
        "held_out_reason": one.held_out_reason or None,
        "cost": dataclasses.asdict(one.cost) if one.cost else None,
    }


def _comparisons_as_json(comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    return {
        name: {
            "flops": found.flops,
            "first_loss": found.first_loss,
            "second_loss": found.second_loss,
            "losses": found.losses,
            "ratio": found.ratio,
            "ratio_low": found.ratio_band[0],
            "ratio_high": found.ratio_band[1],
            "crossing": vars(found.crossing),
            "share_first_ahead": found.share_first_ahead,
        }
        for name, found in comparisons.items()
    }


def _rungs_as_json(rungs: Sequence[Rung]) -> list[dict[str, Any]]:
    return [
        {
            "size": rung.size,
            "budget": rung.budget,
            "flops": rung.flops,
            "series": {
                name: {
                    "values": cell.values,
                    "ahead_of_decoder_only": cell.ahead,
                    "interval": cell.interval,
                }
                for name, cell in rung.cells.items()
            },
        }
        for rung in rungs
    ]


_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff; }
figure { margin: 2em 0; } img { max-width: 100%; } figcaption, .remark { color: #555; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: left; padding: 0.25em 1em 0.25em 0; border-bottom: 1px solid #ddd; }
.wide { overflow-x: auto; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""


def write_html(analysis: Analysis, figures: Sequence[Drawn], path: pathlib.Path) -> pathlib.Path:
    """One page with all figures and tables in it; it needs no other file, script or address."""
    parts = []
    for figure in figures:
        # As an image, so that the ids of two drawings cannot collide.
        content = base64.b64encode(figure.svg.read_bytes()).decode()
        parts.append(
            f"<figure><h2>{html.escape(figure.title)}</h2><img alt='{html.escape(figure.title)}' "
            f"src='data:image/svg+xml;base64,{content}'>"
            f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
        )
    for section in sections(analysis):
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.rows:
            table = html_table(section.header, section.rows)
            parts.append(f"<div class='wide'>{table}</div>")
        if section.remark:
            parts.append(f"<p class='remark'>{html.escape(section.remark.strip())}</p>")
    path.write_text(html_page("Scaling curves", _CSS, parts), encoding="utf-8")
    return path
