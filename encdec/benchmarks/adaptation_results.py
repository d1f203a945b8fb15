"""Result rows of the adaptation experiment, and what is read off them: table, crossings, figure.

A line of JSON per run, from which everything is rebuilt: a run whose line is there is done.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from encdec.errors import DataError
from encdec.figures import new_figure
from encdec.files import whole_lines
from encdec.markup import markdown_table

KIND = "adaptation"
Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # by the row's name, a run for each seed

# Okabe and Ito's colours: one a shape; the line tells where a model starts from.
_COLOURS = {"decoder-only": "#000000", "2/3-1/3": "#0072B2", "all-all": "#D55E00"}
_LINES = {"adapted": ("o", "-"), "scratch": ("s", "--"), "decoder-only,": ("D", ":")}


def read_lines(path: pathlib.Path, setting: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Runs with these settings by row and seed, the last where one is there twice.

    Raises:
        DataError: a line that is not a result row.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in whole_lines(path) if path.is_file() else ():
        try:
            row = json.loads(line)
            assert row["kind"] == KIND
            if row["setting"] == setting:
                found.setdefault(row["row"], {})[row["seed"]] = row
        except (ValueError, TypeError, KeyError, AssertionError):
            raise DataError(f"{path}:{number} is not a result row; remove the line") from None
    return found


def summary(results: Runs) -> str:
    """The table as Markdown, and where the curves of models adapted and from scratch cross."""
    rows = []
    for name, runs in results.items():
        losses = np.array([run["loss"] for run in runs])
        spread = f" ± {losses.std(ddof=1):.3f}" if len(losses) > 1 else ""
        curve = mean_curve(runs)
        sizes = (f"{runs[0]['parameters']:,}", f"{curve[-1, 0]:,.0f}", f"{curve[0, 2]:.3f}")
        rows.append((name, *sizes, f"{losses.mean():.3f}{spread}", str(len(runs))))
    head = ("model", "parameters", "steps", "loss at the start", "held-out loss", "seeds")
    lines = markdown_table(head, rows)
    for shape in ("2/3-1/3", "all-all", "all-all, UL2"):
        adapted, fresh = results.get(f"adapted {shape}"), results.get(f"scratch {shape}")
        if adapted and fresh:
            lines += ["", _compared(shape, mean_curve(adapted), mean_curve(fresh))]
    return "\n".join(lines)


def mean_curve(runs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[points, 3]: step, FLOPs and the loss, a mean over the seeds."""
    return np.mean([run["curve"] for run in runs], axis=0)


def _compared(shape: str, adapted: np.ndarray, fresh: np.ndarray) -> str:
    words = []
    # The start, common to both, is not due to any step.
    if worth := steps_worth(adapted[adapted[:, 0] > 0], fresh):
        words.append(
            f"after {worth[0]:,.0f} steps the adapted model matches {worth[1]:,.0f} from scratch"
        )
    else:
        words.append("training from scratch reaches no loss of the adapted model's evaluations")
    if (early := np.flatnonzero(adapted[:, 2] <= fresh[-1, 2])).size:
        words.append(
            f"the loss of all {fresh[-1, 0]:,.0f} steps from scratch is reached by the adapted "
            f"model's evaluation after {adapted[early[0], 0]:,.0f} steps"
        )
    cross = crossing(adapted, fresh)
    ahead = "the adapted model" if adapted[-1, 2] <= fresh[-1, 2] else "the model from scratch"
    words.append(
        f"the curves cross at {cross:.3g} FLOPs"
        if cross
        else f"the curves do not cross: {ahead} is ahead at the end"
    )
    return f"{shape}: {'; '.join(words)}"


def steps_worth(adapted: np.ndarray, fresh: np.ndarray) -> tuple[float, float] | None:
    """A step of the adapted model, the earliest evaluated whose loss the fresh model reaches, and
    the step at which that does."""
    for step, _, loss in adapted:
        reached = first_step_at(fresh, loss)
        if reached is not None:
            return float(step), reached
    return None


def first_step_at(curve: np.ndarray, loss: float) -> float | None:
    """The step at which a curve reaches a loss, between two evaluations by a straight line; the
    first evaluation's where that is below it already, None where it is never reached."""
    below = np.flatnonzero(curve[:, 2] <= loss)
    if not below.size:
        return None
    place = int(below[0])
    if not place:
        return float(curve[0, 0])
    (a, _, high), (b, _, low) = curve[place - 1], curve[place]
    return float(a + (b - a) * (high - loss) / (high - low))


def crossing(adapted: np.ndarray, fresh: np.ndarray) -> float | None:
    """FLOPs at which the better one becomes the worse, by straight lines between evaluations; None
    where it stays the better. Read off the data: nothing is fitted or extended."""
    flops = np.union1d(adapted[:, 1], fresh[:, 1])
    flops = flops[
        (flops >= max(adapted[0, 1], fresh[0, 1])) & (flops <= min(adapted[-1, 1], fresh[-1, 1]))
    ]
    gap = np.interp(flops, adapted[:, 1], adapted[:, 2]) - np.interp(
        flops, fresh[:, 1], fresh[:, 2]
    )
    changes = np.flatnonzero(np.sign(gap[:-1]) * np.sign(gap[1:]) < 0)
    if not changes.size:
        return None
    i = int(changes[-1])
    return float(flops[i] + (flops[i + 1] - flops[i]) * gap[i] / (gap[i] - gap[i + 1]))


def draw(results: Runs, path: pathlib.Path) -> None:
    """Held-out loss against further FLOPs, as PNG: the headline rows, and next to them what was
    changed in the adapted all-all model."""
    figure, both = new_figure((10, 4), 2)
    shown = (
        [name for name in results if "," not in name or name.startswith("decoder")],
        [name for name in results if "all-all" in name],
    )
    for axes, names in zip(both, shown):
        for number, name in enumerate(names):
            curve = mean_curve(results[name])
            marker, line = _LINES[name.split()[0]]
            colour = next((c for shape, c in _COLOURS.items() if name.endswith(shape)), "")
            if name.startswith("decoder-only"):
                colour = _COLOURS["decoder-only"]
            axes.plot(
                curve[:, 1],
                curve[:, 2],
                color=colour or f"C{number}",
                marker=marker,
                linestyle=line,
                markersize=3,
                linewidth=1.3,
                label=name,
            )
        axes.set(xlabel="FLOPs after the source's training", ylabel="held-out loss (nats/token)")
        # Losses before the first steps are far above all others: the curves' ends must be told
        # apart.
        if ends := [mean_curve(results[name])[1:, 2] for name in names]:
            axes.set_ylim(min(map(np.min, ends)) - 0.05, np.quantile(np.concatenate(ends), 0.97))
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
