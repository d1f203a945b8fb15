"""The report of a ladder: tables on the terminal, JSON, and one self-contained HTML file."""

from __future__ import annotations

import base64
import dataclasses
import html
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from encdec.markup import html_page, html_table
from encdec.metrics.intervals import Interval
from encdec.scaling.analysis import Analysis, Distillation, Fitted
from encdec.scaling.frontier import Comparison
from encdec.scaling.plan_table import short
from encdec.scaling.plots import Drawn, label_of
from encdec.scaling.rungs import Cell, Rung

_TOKENS = {"target": "target tokens", "source": "source tokens", "both": "source + target tokens"}


@dataclasses.dataclass(frozen=True)
class Section:
    """A table with title, header and a remark below."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remark: str = ""


def sections(analysis: Analysis) -> list[Section]:
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


def _groups(analysis: Analysis) -> list[Fitted]:
    return [*analysis.series.values(), *([analysis.parts] if analysis.parts else [])]


def _number(value: float, interval: Interval | None = None) -> str:
    if value is None or math.isnan(value):
        return "-"
    text = f"{value:.4g}"
    if interval and not math.isnan(interval.low):
        text += f" [{interval.low:.3g}, {interval.high:.3g}]"
    return text


def _laws(analysis: Analysis) -> Section:
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
        spread = float(np.sqrt(np.mean(one.residuals**2)))
        rows.append(
            (
                label_of(name),
                str(len(one.runs)),
                *cells,
                f"{spread:.2%}",
                _number(one.frontier.size_exponent),
            )
        )
        if one.law.bounds_hit:
            reasons.append(
                f"{label_of(name)}: {', '.join(one.law.bounds_hit)} ended on a bound, "
                "so these runs do not determine it."
            )
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
    return Section(
        "Laws: L = E + A / N^alpha + B / D^beta",
        ("series", "runs", "E", "A", "alpha", "B", "beta", "residual (rms)", "best N ~ C^a, a"),
        tuple(rows),
        remark + " ".join(reasons),
    )


def _parts(one: Fitted) -> Section:
    title = "All encoder-decoders: L = E + A / (N_e^alpha_e N_d^alpha_d) + B / D^beta"
    remark = (
        "N_e and N_d are the parameters of the encoder's and the decoder's blocks, without "
        "the embedding."
    )
    if not one.law:
        return Section(title, (), (), f"{remark} Not fitted: {one.reason}.")
    constants = one.law.constants()
    if one.law.bounds_hit:
        remark += (
            f" {', '.join(one.law.bounds_hit)} ended on a bound, so these runs do not determine it."
        )
    cells = tuple(_number(value, one.intervals.get(key)) for key, value in constants.items())
    return Section(title, ("runs", *constants), ((str(len(one.runs)), *cells),), remark)


def _held_out(analysis: Analysis) -> Section:
    rows, reasons = [], {}
    for one in _groups(analysis):
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
    return Section(
        "Extrapolation to the largest size, held out of the fit",
        ("series", "N", "runs", "mean error", "worst"),
        tuple(rows),
        "Predicted over observed loss, less one. "
        + " ".join(f"{', '.join(names)}: {why}." for why, names in reasons.items()),
    )


def _comparisons(analysis: Analysis) -> Section:
    reasons = " ".join(f"{label_of(name)}: {why}." for name, why in analysis.not_compared.items())
    remark = (
        "At the largest FLOPs at which both were run. The ratio is the FLOPs of decoder-only "
        "over those of the encoder-decoder at equal loss; above 1 the encoder-decoder is "
        "cheaper. "
        if analysis.comparisons
        else ""
    )
    return Section(
        "Encoder-decoder against decoder-only, along the frontiers",
        (
            "series",
            "its loss",
            "decoder-only's",
            "ahead in draws",
            "FLOPs ratio",
            "at loss",
            "frontiers cross at FLOPs",
        ),
        _compared(analysis.comparisons),
        remark + reasons,
    )


def _against_plain(analysis: Analysis) -> Section:
    remark = (
        "At the largest FLOPs at which both were run. The ratio is the FLOPs on gold targets "
        "alone over the student's with a teacher at equal loss; above 1 the teacher helps. "
        "The teacher's training and scoring are not counted. "
        if analysis.against_plain
        else ""
    )
    return Section(
        "With a teacher against gold targets alone, along the frontiers",
        (
            "series",
            "its loss",
            "without",
            "ahead in draws",
            "FLOPs ratio",
            "at loss",
            "frontiers cross at FLOPs",
        ),
        _compared(analysis.against_plain),
        remark,
    )


def _distillation(one: Distillation) -> Section:
    title = f"{label_of(one.name)} + KD, over all teachers"
    remark = (
        "L = L_T + L_T^-c0 (1 + (L_T / (d1 L~))^(1/f1))^(-c1 f1) "
        "(A / N^alpha + B / D^beta)^gamma (arXiv 2502.08606); L_T: the teacher's loss; L~: "
        "the student's on gold targets alone, by its law."
    )
    if not one.law:
        return Section(title, (), (), f"{remark} Not fitted: {one.reason}.")
    spread = float(np.sqrt(np.mean(one.residuals**2)))
    if one.law.bounds_hit:
        remark += (
            f" {', '.join(one.law.bounds_hit)} ended on a bound, so these runs do not determine it."
        )
    overtaken = "; ".join(
        f"at N = {short(n)} " + ("nowhere" if d is None else f"from D = {short(d)}")
        for n, d in one.overtaken_at.items()
    )
    remark += (
        " Compared with the best teacher, gold targets alone are better, up to 100 times the "
        f"tokens run, {overtaken}."
    )
    teachers = len(np.unique(one.teacher_loss))
    return Section(
        title,
        ("runs", "teachers", *one.law.constants, "residual (rms)"),
        (
            (
                str(len(one.runs)),
                str(teachers),
                *(f"{value:.4g}" for value in one.law.constants.values()),
                f"{spread:.2%}",
            ),
        ),
        remark,
    )


def _rungs(title: str, rungs: Sequence[Rung], analysis: Analysis, digits: int) -> Section:
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
    return Section(title, ("rung", *map(label_of, names)), tuple(rows), remark)


def _cell(cell: Cell, digits: int) -> str:
    text = f"{cell.mean:.{digits}f}"
    if not math.isnan(cell.deviation):
        text += f" ± {cell.deviation:.{digits}f}"
    if not math.isnan(cell.ahead):
        text += f" ({cell.ahead:+.{digits}f}"
        if not math.isnan(cell.interval.low):
            text += f" [{cell.interval.low:+.{digits}f}, {cell.interval.high:+.{digits}f}]"
        text += ")"
    return text


def _compared(comparisons: Mapping[str, Comparison]) -> tuple[tuple[str, ...], ...]:
    rows = []
    for name, found in comparisons.items():
        last = -1
        gain = (
            Interval(*(float(x) for x in found.ratio_band[:, last]))
            if found.losses.size
            else (None)
        )
        ratio = float(found.ratio[last]) if found.losses.size else math.nan
        loss = f"{found.losses[last]:.3f}" if found.losses.size else "-"
        crossing = found.crossing
        where = (
            "none within two orders of magnitude"
            if crossing.flops is None
            else (
                _number(crossing.flops, crossing.interval)
                + (" (extrapolated)" if crossing.extrapolated else "")
            )
        )
        if not math.isnan(crossing.share):
            where += f"; {crossing.share:.0%} of draws cross"
        ahead = "-" if math.isnan(found.share_first_ahead) else f"{found.share_first_ahead:.0%}"
        rows.append(
            (
                label_of(name),
                f"{found.first_loss[-1]:.4f}",
                f"{found.second_loss[-1]:.4f}",
                ahead,
                _number(ratio, gain),
                loss,
                where,
            )
        )
    return tuple(rows)


def _largest_residuals(analysis: Analysis) -> Section:
    entries = [
        (abs(residual), residual, row["run"])
        for one in analysis.series.values()
        if one.law
        for residual, row in zip(one.residuals, one.rows)
    ]
    entries.sort(reverse=True)
    return Section(
        "Runs furthest from their law",
        ("run", "observed over predicted"),
        tuple((run, f"{math.expm1(residual):+.2%}") for _, residual, run in entries[:5]),
    )


def _runs(analysis: Analysis) -> Section:
    rows = []
    for one in analysis.series.values():
        for i in np.argsort(one.runs.flops, kind="stable"):
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
    return Section(
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

    return {
        "choices": dataclasses.asdict(analysis.choices),
        "seed_noise": _finite(analysis.seed_noise[0]),
        "unfinished": list(analysis.unfinished),
        "series": {name: _fitted_as_json(one) for name, one in analysis.series.items()},
        "parts": _fitted_as_json(analysis.parts) if analysis.parts else None,
        "comparisons": _comparisons_as_json(analysis.comparisons),
        "against_plain": _comparisons_as_json(analysis.against_plain),
        "distillation": {
            name: {
                "runs": len(one.runs),
                "reason": one.reason or None,
                "law": one.law.constants if one.law else None,
                "bounds_hit": list(one.law.bounds_hit) if one.law else [],
                "residuals": one.residuals.tolist() if one.residuals is not None else None,
                "overtaken_at": [[n, d] for n, d in one.overtaken_at.items()],
            }
            for name, one in analysis.distillation.items()
        },
        "rungs": _rungs_as_json(analysis.rungs),
        "scores": {name: _rungs_as_json(rungs) for name, rungs in analysis.scores.items()},
        "not_compared": analysis.not_compared,
    }


def _fitted_as_json(one: Fitted) -> dict[str, Any]:
    held = one.held_out
    return {
        "runs": [row["run"] for row in one.rows],
        "reason": one.reason or None,
        "law": one.law.constants() if one.law else None,
        "bounds_hit": list(one.law.bounds_hit) if one.law else [],
        "intervals": {name: _interval(value) for name, value in one.intervals.items()},
        "residuals": one.residuals.tolist() if one.residuals is not None else None,
        "held_out": {"parameters": held.parameters, "errors": held.errors.tolist()}
        if held
        else None,
        "held_out_reason": one.held_out_reason or None,
        "cost": dataclasses.asdict(one.cost) if one.cost else None,
    }


def _comparisons_as_json(comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    return {
        name: {
            "flops": _list(found.flops),
            "first_loss": _list(found.first_loss),
            "second_loss": _list(found.second_loss),
            "losses": _list(found.losses),
            "ratio": _list(found.ratio),
            "ratio_low": _list(found.ratio_band[0]),
            "ratio_high": _list(found.ratio_band[1]),
            "crossing": {
                "flops": found.crossing.flops,
                "interval": _interval(found.crossing.interval),
                "share": _finite(found.crossing.share),
                "extrapolated": found.crossing.extrapolated,
            },
            "share_first_ahead": _finite(found.share_first_ahead),
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
                    "values": list(cell.values),
                    "ahead_of_decoder_only": _finite(cell.ahead),
                    "interval": _interval(cell.interval),
                }
                for name, cell in rung.cells.items()
            },
        }
        for rung in rungs
    ]


def _interval(one: Interval) -> list[float | None]:
    return [_finite(one.low), _finite(one.high)]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _list(values: Iterable[float]) -> list[float | None]:
    return [_finite(value) for value in values]


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
