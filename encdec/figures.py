"""Figures in one style, drawn without a display."""

from __future__ import annotations

from typing import Any


def new_figure(inches: tuple[float, float], panels: int = 1) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its panels, side by side: a light grid, no box around them."""
    # Imported late: it takes most of a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
