"""The curves as figures, PNG and SVG."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from encdec.scaling.analysis import Analysis, Fitted
from encdec.scaling.frontier import Comparison, band
from encdec.scaling.matching import DECODER_ONLY, plain_name
from encdec.scaling.results_file import LOSSES
from encdec.scaling.series_styles import SeriesStyle, label_of, styles_of

_STYLE: Any = {  # keys of matplotlib, whose types list each by name
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "encdec",
    "axes.axisbelow": True,
}


_PANEL = (3.4, 3.0)  # inches


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure on disk, as PNG at ``path`` and as SVG next to it."""

    name: str
    title: str
    caption: str
    path: pathlib.Path

    @property
    def svg(self) -> pathlib.Path:
        return self.path.with_suffix(".svg")


# Title and caption of each figure, by the name of its file.
_TEXTS = {
    "loss-flops": (
        "Loss against training FLOPs",
        "Points: finished runs. Thin lines: a run's evaluations. Thick lines: the lowest loss that "
        "the fitted law allows at each number of FLOPs, among sizes from the smallest to the "
        "largest run, with its 95 % interval.",
    ),
    "isoflop": (
        "IsoFLOP valleys",
        "Loss against parameters at equal training FLOPs. Parabolas in log N join three sizes or "
        "more, and a cross marks their lowest point inside the sizes run: an illustration, not the "
        "fit, because parabolas are biased.",
    ),
    "contours": (
        "Loss contours and the efficient frontier",
        "Contours: loss by the fitted law. Line: the size and data that reach each loss with the "
        "fewest FLOPs; vertical where a smaller or larger size than any run would be better. "
        "Points: finished runs.",
    ),
    "comparison": (
        "Encoder-decoder against decoder-only",
        "Left: the lowest losses by FLOPs. Right: FLOPs that decoder-only models need for the same "
        "loss, relative to the encoder-decoder; above 1 the encoder-decoder is cheaper. Bands: "
        "95 % bootstrap intervals.",
    ),
    "distilled": (
        "With a teacher against gold targets alone",
        "Left: the lowest losses by the student's FLOPs. Right: FLOPs that the same series needs "
        "on gold targets alone for the same loss, relative to the student's with a teacher; above "
        "1 the teacher helps. The teacher's training and its logits are not counted. Bands: 95 % "
        "bootstrap intervals.",
    ),
}
_SCORE_CAPTION = (
    "Downstream score of the finished runs that were evaluated: means over seeds, bars of one "
    "standard deviation between seeds where there are several."
)


def draw_all(analysis: Analysis, directory: pathlib.Path) -> list[Drawn]:
    """Draws every figure that the analysis allows into ``directory``."""
    looks = styles_of(analysis.series)
    fitted = [one for one in analysis.series.values() if one.law and one.frontier]
    drawings: dict[str, Callable[[], Figure]] = {
        "loss-flops": lambda: _loss_flops(analysis, looks),
        "isoflop": lambda: _isoflop(analysis),
    }
    if fitted:
        drawings["contours"] = lambda: _contours(analysis, fitted, looks)
    if analysis.comparisons:
        peers = {
            name: name.replace(plain_name(name), DECODER_ONLY, 1) for name in analysis.comparisons
        }
        drawings["comparison"] = lambda: _comparison(
            analysis, analysis.comparisons, peers, looks, "relative FLOPs of decoder-only"
        )
    if analysis.against_plain:
        plain = {name: plain_name(name) for name in analysis.against_plain}
        drawings["distilled"] = lambda: _comparison(
            analysis, analysis.against_plain, plain, looks, "relative FLOPs without a teacher"
        )
    drawn = [_save(directory, name, *_TEXTS[name], draw) for name, draw in drawings.items()]
    for metric in analysis.scores:
        name = "score-" + "".join(c if c.isalnum() else "-" for c in metric).lower()
        draw = lambda metric=metric: _score(analysis, metric, looks)
        drawn.append(
            _save(directory, name, f"{metric} against training FLOPs", _SCORE_CAPTION, draw)
        )
    return drawn


def _save(
    directory: pathlib.Path, name: str, title: str, caption: str, draw: Callable[[], Figure]
) -> Drawn:
    path = directory / f"{name}.png"
    with rc_context(_STYLE):
        figure = draw()
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=200)
        # No date, so that equal results give equal files.
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return Drawn(name, title, caption, path)


def _figure(columns: int, rows: int = 1, **options) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _loss_label(analysis: Analysis) -> str:
    return {
        "nats_per_token": "loss (nats per target token)",
        "bits_per_byte": "loss (bits per byte)",
    }[analysis.choices.loss]


def _tokens_label(analysis: Analysis) -> str:
    return {
        "target": "target tokens",
        "source": "source tokens",
        "both": "source and target tokens",
    }[analysis.choices.tokens]


def _size_label(analysis: Analysis) -> str:
    return {"total": "parameters", "non_embedding": "parameters without embedding"}[
        analysis.choices.parameters
    ]


def _plain_log(axis) -> None:
    """Ticks with plain numbers, also on axes shorter than a decade."""
    low, high = sorted(axis.get_view_interval())
    if high / low < 2:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    else:
        steps = (1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 4, 5, 6, 8)
        axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _powers(*several: Axis) -> None:
    """Ticks of large numbers that do not overlap, also on axes of about a decade."""
    for axis in several:
        low, high = sorted(axis.get_view_interval())
        if high / low < 40:
            axis.set_major_locator(
                LogLocator(subs=(1, 2, 5) if high / low > 4 else (1, 1.5, 2, 3, 5, 7))
            )
            axis.set_major_formatter(
                FuncFormatter(
                    lambda value, _: f"{value:.2g}".replace("e+0", "e").replace("e+", "e")
                )
            )
            axis.set_minor_formatter(NullFormatter())


def _hide(grid: np.ndarray, used: int) -> None:
    """Removes unused panels; those above them get the tick labels."""
    for axes in grid.flat[used:]:
        axes.set_axis_off()
    columns = grid.shape[1]
    for axes in grid.flat[max(0, used - columns) : used]:
        axes.tick_params(labelbottom=True)


def _curves(analysis: Analysis, name: str) -> dict[str, list]:
    loss = LOSSES[analysis.choices.loss]
    runs: dict[str, list] = {}
    for row in analysis.rows:
        if row["series"] == name and "scores" not in row:
            runs.setdefault(row["run"], []).append((row["flops"], row[loss]))
    return {run: sorted(points) for run, points in runs.items()}


def _loss_flops(analysis: Analysis, looks: dict) -> Figure:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, one in analysis.series.items():
        look = looks[name]
        for points in _curves(analysis, name).values():
            if len(points) > 1:
                axes.plot(*zip(*points), color=look.colour, linewidth=0.5, alpha=0.35)
        axes.plot(one.flops, one.runs.loss, **look.points)
        axes.plot(
            [],
            [],
            **(look.points | {"linestyle": look.line if one.frontier else "none"}),
            label=label_of(name),
        )
        if one.frontier:
            flops = np.geomspace(one.flops.min(), one.flops.max(), 200)
            ends = band(one.frontier_draws, flops) if one.draws else None
            look.draw(axes, flops, one.frontier.loss(flops), ends)
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=_loss_label(analysis))
    _powers(axes.xaxis)
    # Early evaluations would compress the relevant range.
    losses = np.concatenate([one.runs.loss for one in analysis.series.values()])
    axes.set_ylim(losses.min() / 1.04, losses.max() * 1.06)
    _plain_log(axes.yaxis)
    axes.legend(handlelength=3.2)
    return figure


def _isoflop(analysis: Analysis) -> Figure:
    names = list(analysis.series)
    columns = min(len(names), 2)
    figure, grid = _figure(columns, -(-len(names) // columns), sharex=True, sharey=True)
    budgets = flops_groups(np.concatenate([one.flops for one in analysis.series.values()]))
    # From light to dark with the budget: readable without colour.
    shades = {
        budget: (
            0.75 * (1 - (i + 1) / len(budgets)),
            0.55 * (1 - (i + 1) / len(budgets)) + 0.1,
            0.75 - 0.35 * (i + 1) / len(budgets),
        )
        for i, budget in enumerate(budgets)
    }
    for axes, name in zip(grid.flat, names):
        one = analysis.series[name]
        runs = one.runs
        for i, budget in enumerate(budgets):
            low, high = budget
            mine = (low <= one.flops) & (one.flops <= high)
            if mine.any():
                _valley(
                    axes,
                    runs.parameters[mine],
                    runs.loss[mine],
                    shades[budget],
                    "osD^vP*X"[i % 8],
                    f"{np.sqrt(low * high):.1e}",
                )
        axes.set_title(label_of(name))
        axes.set(xscale="log", yscale="log")
    _hide(grid, len(names))
    _plain_log(grid.flat[0].yaxis)
    _powers(grid.flat[0].xaxis)
    handles: dict[str, Artist] = {}
    for axes in grid.flat[: len(names)]:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    order = sorted(handles, key=float)
    figure.legend(
        handles=[handles[label] for label in order],
        labels=order,
        loc="outside right center",
        title="training\nFLOPs",
    )
    figure.supxlabel(_size_label(analysis), fontsize=9)
    figure.supylabel(_loss_label(analysis), fontsize=9)
    return figure


def flops_groups(flops: np.ndarray) -> list[tuple[float, float]]:
    """The least and the most of those FLOPs that count as equal, ascending: runs of one budget
    differ by whole steps and by their match, a percent each; groups are more than 5 % apart."""
    ordered = np.unique(flops)
    apart = np.flatnonzero(ordered[1:] > 1.05 * ordered[:-1]) + 1
    return [(float(group[0]), float(group[-1])) for group in np.split(ordered, apart)]


def _valley(axes: Axes, sizes, losses, colour, marker: str, label: str) -> None:
    unique = np.unique(sizes)
    means = np.array([np.exp(np.log(losses[sizes == size]).mean()) for size in unique])
    axes.plot(sizes, losses, marker, color=colour, markersize=4.5, label=label, linestyle="none")
    if len(unique) < 3:
        axes.plot(unique, means, color=colour, linewidth=1, linestyle=":")
        return
    x = np.log(unique)
    parabola = np.polyfit(x - x.mean(), np.log(means), 2)
    grid = np.linspace(x[0], x[-1], 100)
    axes.plot(
        np.exp(grid), np.exp(np.polyval(parabola, grid - x.mean())), color=colour, linewidth=1.2
    )
    if parabola[0] > 0:
        lowest = x.mean() - parabola[1] / (2 * parabola[0])
        if x[0] < lowest < x[-1]:
            axes.plot(
                np.exp(lowest),
                np.exp(np.polyval(parabola, lowest - x.mean())),
                "x",
                color="black",
                markersize=7,
                markeredgewidth=1.6,
            )


def _contours(analysis: Analysis, fitted: list[Fitted], looks: dict) -> Figure:
    columns = min(len(fitted), 2)
    figure, grid = _figure(columns, -(-len(fitted) // columns), sharex=True, sharey=True)
    runs = [one.runs for one in fitted]
    sizes = np.geomspace(
        min(r.parameters.min() for r in runs) / 1.6,
        max(r.parameters.max() for r in runs) * 1.6,
        120,
    )
    tokens = np.geomspace(
        min(r.tokens.min() for r in runs) / 1.6, max(r.tokens.max() for r in runs) * 1.6, 120
    )
    surfaces = [one.law.loss(sizes[None], tokens[:, None]) for one in fitted if one.law]
    levels = np.geomspace(min(s.min() for s in surfaces), max(s.max() for s in surfaces), 14)[1:-1]
    for axes, one, surface in zip(grid.flat, fitted, surfaces):
        look = looks[one.name]
        lines = axes.contour(
            sizes, tokens, surface, levels=levels, colors="#777777", linewidths=0.7
        )
        axes.clabel(lines, levels[::2], fmt="%.2f", fontsize=7)
        axes.plot(one.runs.parameters, one.runs.tokens, **look.points)
        if one.frontier:
            flops = np.geomspace(one.flops.min() / 100, one.flops.max() * 100, 400)
            best = one.frontier.parameters(flops), one.frontier.tokens(flops)
            look.draw(axes, *best, linestyle="-")
        axes.set(
            xscale="log", yscale="log", xlim=(sizes[0], sizes[-1]), ylim=(tokens[0], tokens[-1])
        )
        axes.grid(False)
        axes.set_title(label_of(one.name))
    _hide(grid, len(fitted))
    _powers(grid.flat[0].xaxis, grid.flat[0].yaxis)
    figure.supxlabel(_size_label(analysis), fontsize=9)
    figure.supylabel(_tokens_label(analysis), fontsize=9)
    return figure


def _comparison(
    analysis: Analysis,
    comparisons: Mapping[str, Comparison],
    others: Mapping[str, str],
    looks: dict[str, SeriesStyle],
    ratio_label: str,
) -> Figure:
    """Frontiers on the left, FLOPs at equal loss on the right; ``others`` names the compared
    series."""
    figure, grid = _figure(2)
    left, right = grid[0]
    drawn: dict[str, tuple[np.ndarray, ...]] = {}
    for name, found in comparisons.items():
        drawn.setdefault(others[name], (found.flops, found.second_loss, found.second_band))
        drawn.setdefault(name, (found.flops, found.first_loss, found.first_band))
        ends = np.clip(found.ratio_band, 1e-3, 1e3)
        looks[name].draw(right, found.losses, found.ratio, ends)
    for name, curve in drawn.items():
        looks[name].draw(left, *curve, label=label_of(name))
    left.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=_loss_label(analysis))
    low, high = left.get_ylim()
    left.set_ylim(low, high * (high / low) ** (0.06 * (1 + len(drawn))))  # space for the legend
    _plain_log(left.yaxis)
    _powers(left.xaxis)
    left.legend(fontsize=7.5, handlelength=3.2)
    right.axhline(1, color="black", linewidth=0.8)
    right.set(yscale="log", xlabel=_loss_label(analysis), ylabel=ratio_label)
    ratios = np.concatenate([found.ratio for found in comparisons.values()])
    ratios = ratios[np.isfinite(ratios)]
    if ratios.size:
        right.set_ylim(min(ratios.min() / 2, 0.5), max(ratios.max() * 2, 2))
    right.invert_xaxis()
    _plain_log(right.yaxis)
    return figure


def _score(analysis: Analysis, metric: str, looks: dict[str, SeriesStyle]) -> Figure:
    """One panel per size: means over seeds, bars of a standard deviation."""
    rungs = analysis.scores[metric]
    sizes = list(dict.fromkeys(rung.size for rung in rungs))
    columns = min(len(sizes), 4)
    figure, grid = _figure(columns, -(-len(sizes) // columns), sharey=True)
    if len(sizes) == 1:
        figure.set_size_inches(5.2, 3.8)
    for axes, size in zip(grid.flat, sizes):
        mine = [rung for rung in rungs if rung.size == size]
        for i, name in enumerate(analysis.series):
            cells = [(rung.flops, rung.cells[name]) for rung in mine if name in rung.cells]
            if not cells:
                continue
            look = looks[name]
            # Side by side, so that bars do not hide each other.
            flops = np.array([f for f, _ in cells]) * 1.04 ** (i - (len(looks) - 1) / 2)
            axes.errorbar(
                flops,
                [cell.mean for _, cell in cells],
                yerr=[0 if np.isnan(cell.deviation) else cell.deviation for _, cell in cells],
                **(look.points | {"linestyle": look.line}),
                linewidth=1.2,
                elinewidth=1,
                capsize=2,
                label=label_of(name),
            )
        axes.set(xscale="log", title=size)
        _powers(axes.xaxis)
    _hide(grid, len(sizes))
    handles, labels = grid.flat[0].get_legend_handles_labels()
    if len(sizes) == 1:
        grid.flat[0].legend(handles, labels, handlelength=3.2)
    else:
        figure.legend(handles, labels, loc="outside upper center", ncols=2, handlelength=3.2)
    figure.supxlabel("training FLOPs", fontsize=9)
    figure.supylabel(metric, fontsize=9)
    return figure
