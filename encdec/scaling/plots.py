"""The curves as figures, PNG and SVG: told apart by colour, marker and line, so in print too.

Colours are Okabe and Ito's, which the common kinds of colour blindness keep apart.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from encdec.scaling.analysis import Analysis, Fitted
from encdec.scaling.frontier import band
from encdec.scaling.results import LOSSES

_STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "encdec", "axes.axisbelow": True,
}
_LOOKS = [  # colour, marker, line
    ("#0072B2", "o", "-"), ("#009E73", "s", "--"), ("#CC79A7", "^", "-."), ("#E69F00", "v", ":"),
    ("#56B4E9", "P", (0, (5, 1))),
]
_DECODER_LOOK = ("#D55E00", "D", (0, (3, 1, 1, 1)))
_PANEL = (3.4, 3.0)  # inches


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure on disk, as PNG at ``path`` and as SVG beside it."""

    name: str
    title: str
    caption: str
    path: pathlib.Path

    @property
    def svg(self) -> pathlib.Path:
        return self.path.with_suffix(".svg")


def draw_all(analysis: Analysis, directory: pathlib.Path) -> list[Drawn]:
    """Draws every figure that the analysis allows into ``directory``."""
    looks = _looks(analysis)
    fitted = [one for one in analysis.series.values() if one.frontier]
    drawn = [_save(
        directory, "loss-flops", "Loss against training FLOPs",
        "Points: finished runs. Thin lines: a run's evaluations. Thick lines: the lowest loss "
        "that the fitted law allows at each number of FLOPs, among sizes from the smallest to the "
        "largest run, with its 95 % interval.",
        lambda: _loss_flops(analysis, looks))]
    drawn.append(_save(
        directory, "isoflop", "IsoFLOP valleys",
        "Loss against parameters at equal training FLOPs. Parabolas in log N join three sizes "
        "or more, and a cross marks their lowest point inside the sizes run: a picture, not the "
        "fit, because parabolas are biased.",
        lambda: _isoflop(analysis)))
    if fitted:
        drawn.append(_save(
            directory, "contours", "Loss contours and the efficient frontier",
            "Contours: loss by the fitted law. Line: the size and data that reach each loss with "
            "the fewest FLOPs; vertical where a smaller or larger size than any run would be "
            "better. Points: finished runs.",
            lambda: _contours(analysis, fitted, looks)))
    if analysis.comparisons:
        drawn.append(_save(
            directory, "comparison", "Encoder-decoder against decoder-only",
            "Left: the lowest losses by FLOPs. Right: FLOPs that decoder-only models need for the "
            "same loss, relative to the encoder-decoder; above 1 the encoder-decoder is cheaper. "
            "Bands: 95 % bootstrap intervals.",
            lambda: _comparison(analysis, looks)))
    for metric in sorted({name for row in analysis.rows for name in row.get("scores", {})}):
        name = "score-" + "".join(c if c.isalnum() else "-" for c in metric).lower()
        drawn.append(_save(
            directory, name, f"{metric} against training FLOPs",
            "Downstream score of each finished run that was evaluated.",
            lambda metric=metric: _score(analysis, metric, looks)))
    return drawn


def _looks(analysis: Analysis) -> dict[str, tuple]:
    paired = [name for name in analysis.series if name.startswith("ed-")]
    looks = {name: _LOOKS[i % len(_LOOKS)] for i, name in enumerate(paired)}
    return looks | {name: _DECODER_LOOK for name in analysis.series if name not in looks}


def label_of(name: str) -> str:
    """``ed-2of3`` for people: encoder-decoder 2/3-1/3."""
    if not name.startswith("ed-"):
        return "decoder-only" if name == "dec" else name
    above, _, below = name.removeprefix("ed-").partition("of")
    return f"encoder-decoder {above}/{below}-{int(below) - int(above)}/{below}"


def _save(
    directory: pathlib.Path, name: str, title: str, caption: str, draw: Callable[[], Figure]
) -> Drawn:
    path = directory / f"{name}.png"
    with rc_context(_STYLE):
        figure = draw()
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=200)
        # Without a date the same results give the same file.
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return Drawn(name, title, caption, path)


def _figure(columns: int, rows: int = 1, **options) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _loss_label(analysis: Analysis) -> str:
    return {"nats_per_token": "loss (nats per target token)",
            "bits_per_byte": "loss (bits per byte)"}[analysis.choices.loss]


def _tokens_label(analysis: Analysis) -> str:
    return {"target": "target tokens", "source": "source tokens",
            "both": "source and target tokens"}[analysis.choices.tokens]


def _size_label(analysis: Analysis) -> str:
    return {"total": "parameters", "non_embedding": "parameters without embedding"}[
        analysis.choices.parameters]


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
        colour, marker, line = looks[name]
        for points in _curves(analysis, name).values():
            if len(points) > 1:
                axes.plot(*zip(*points), color=colour, linewidth=0.5, alpha=0.35)
        axes.plot(one.runs.flops, one.runs.loss, marker, color=colour, markersize=4,
                  markerfacecolor="white", markeredgewidth=1.1, linestyle="none",
                  label=label_of(name))
        if one.frontier:
            flops = np.geomspace(one.runs.flops.min(), one.runs.flops.max(), 200)
            axes.plot(flops, one.frontier.loss(flops), color=colour, linestyle=line, linewidth=1.8)
            if one.draws:
                axes.fill_between(flops, *band(one.frontier_draws, flops), color=colour,
                                  alpha=0.13, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=_loss_label(analysis))
    # Early evaluations would squeeze what the figure is about.
    losses = np.concatenate([one.runs.loss for one in analysis.series.values()])
    axes.set_ylim(losses.min() / 1.04, losses.max() * 1.06)
    _plain_log(axes.yaxis)
    axes.legend()
    return figure


def _isoflop(analysis: Analysis) -> Figure:
    names = list(analysis.series)
    columns = min(len(names), 2)
    figure, grid = _figure(columns, -(-len(names) // columns), sharex=True, sharey=True)
    budgets = sorted({_budget(flops) for one in analysis.series.values()
                      for flops in one.runs.flops})
    # From light to dark with the budget: readable without colour.
    shades = {budget: (0.75 * (1 - (i + 1) / len(budgets)), 0.55 * (1 - (i + 1) / len(budgets)) +
                       0.1, 0.75 - 0.35 * (i + 1) / len(budgets))
              for i, budget in enumerate(budgets)}
    for axes, name in zip(grid.flat, names):
        runs = analysis.series[name].runs
        for i, budget in enumerate(budgets):
            mine = np.array([_budget(flops) == budget for flops in runs.flops])
            if mine.any():
                _valley(axes, runs.parameters[mine], runs.loss[mine], shades[budget],
                        "osD^vP*X"[i % 8], f"{10**budget:.1e}")
        axes.set_title(label_of(name))
        axes.set(xscale="log", yscale="log")
    for axes in grid.flat[len(names):]:
        axes.set_axis_off()
    _plain_log(grid.flat[0].yaxis)
    handles = {}
    for axes in grid.flat[: len(names)]:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    order = sorted(handles, key=float)
    figure.legend([handles[label] for label in order], order, loc="outside right center",
                  title="training\nFLOPs")
    figure.supxlabel(_size_label(analysis), fontsize=9)
    figure.supylabel(_loss_label(analysis), fontsize=9)
    return figure


def _budget(flops: float) -> float:
    """log10 of FLOPs in steps of a twentieth: matched runs differ by a percent."""
    return round(20 * np.log10(flops)) / 20


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
    axes.plot(np.exp(grid), np.exp(np.polyval(parabola, grid - x.mean())), color=colour,
              linewidth=1.2)
    if parabola[0] > 0:
        lowest = x.mean() - parabola[1] / (2 * parabola[0])
        if x[0] < lowest < x[-1]:
            axes.plot(np.exp(lowest), np.exp(np.polyval(parabola, lowest - x.mean())), "x",
                      color="black", markersize=7, markeredgewidth=1.6)


def _contours(analysis: Analysis, fitted: list[Fitted], looks: dict) -> Figure:
    columns = min(len(fitted), 2)
    figure, grid = _figure(columns, -(-len(fitted) // columns), sharex=True, sharey=True)
    runs = [one.runs for one in fitted]
    sizes = np.geomspace(min(r.parameters.min() for r in runs) / 1.6,
                         max(r.parameters.max() for r in runs) * 1.6, 120)
    tokens = np.geomspace(min(r.tokens.min() for r in runs) / 1.6,
                          max(r.tokens.max() for r in runs) * 1.6, 120)
    surfaces = [one.law.loss(sizes[None], tokens[:, None]) for one in fitted]
    levels = np.geomspace(min(s.min() for s in surfaces), max(s.max() for s in surfaces), 14)[1:-1]
    for axes, one, surface in zip(grid.flat, fitted, surfaces):
        colour, marker, _ = looks[one.name]
        lines = axes.contour(sizes, tokens, surface, levels=levels, colors="#777777",
                             linewidths=0.7)
        axes.clabel(lines, levels[::2], fmt="%.2f", fontsize=7)
        axes.plot(one.runs.parameters, one.runs.tokens, marker, color=colour, markersize=4,
                  markerfacecolor="white", linestyle="none")
        flops = np.geomspace(one.runs.flops.min() / 100, one.runs.flops.max() * 100, 400)
        axes.plot(one.frontier.parameters(flops), one.frontier.tokens(flops), color=colour,
                  linewidth=1.8)
        axes.set(xscale="log", yscale="log", xlim=(sizes[0], sizes[-1]),
                 ylim=(tokens[0], tokens[-1]))
        axes.grid(False)
        axes.set_title(label_of(one.name))
    for axes in grid.flat[len(fitted):]:
        axes.set_axis_off()
    figure.supxlabel(_size_label(analysis), fontsize=9)
    figure.supylabel(_tokens_label(analysis), fontsize=9)
    return figure


def _comparison(analysis: Analysis, looks: dict) -> Figure:
    figure, grid = _figure(2)
    left, right = grid[0]
    for i, (name, found) in enumerate(analysis.comparisons.items()):
        colour, _, line = looks[name]
        if not i:
            other, _, other_line = _DECODER_LOOK
            left.plot(found.flops, found.second_loss, color=other, linestyle=other_line,
                      linewidth=1.8, label=label_of("dec"))
            left.fill_between(found.flops, *found.second_band, color=other, alpha=0.13,
                              linewidth=0)
        left.plot(found.flops, found.first_loss, color=colour, linestyle=line, linewidth=1.8,
                  label=label_of(name))
        left.fill_between(found.flops, *found.first_band, color=colour, alpha=0.13, linewidth=0)
        right.plot(found.losses, found.ratio, color=colour, linestyle=line, linewidth=1.8)
        right.fill_between(found.losses, *np.clip(found.ratio_band, 1e-3, 1e3), color=colour,
                           alpha=0.13, linewidth=0)
    left.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=_loss_label(analysis))
    _plain_log(left.yaxis)
    left.legend(fontsize=7.5)
    right.axhline(1, color="black", linewidth=0.8)
    right.set(yscale="log", xlabel=_loss_label(analysis),
              ylabel="relative FLOPs of decoder-only")
    ratios = np.concatenate([found.ratio for found in analysis.comparisons.values()])
    ratios = ratios[np.isfinite(ratios)]
    if ratios.size:
        right.set_ylim(min(ratios.min() / 2, 0.5), max(ratios.max() * 2, 2))
    right.invert_xaxis()
    _plain_log(right.yaxis)
    return figure


def _score(analysis: Analysis, metric: str, looks: dict) -> Figure:
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for name in analysis.series:
        colour, marker, _ = looks[name]
        points = [(row["flops"], row["scores"][metric]) for row in analysis.rows
                  if row["series"] == name and metric in row.get("scores", {})]
        if points:
            axes.plot(*zip(*sorted(points)), marker, color=colour, markersize=4.5,
                      markerfacecolor="white", linestyle="none", label=label_of(name))
    axes.set(xscale="log", xlabel="training FLOPs", ylabel=metric)
    axes.legend()
    return figure
