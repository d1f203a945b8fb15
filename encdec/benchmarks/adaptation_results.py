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
from encdec.metrics.intervals import t_interval

KIND = "adaptation"
SOURCE_FLOPS_TOO = ", source's FLOPs too"  # ends the name of a row with this larger budget
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
    """The tables as Markdown, how many steps from scratch one adapted step equals, and where the
    curves cross.

    Losses have Student's 95 % interval over seeds where there are several; differences are of the
    seeds that both rows have.
    """
    rows = []
    for name, runs in results.items():
        curve = mean_curve(runs)
        rows.append(
            (
                name,
                f"{runs[0]['parameters']:,}",
                f"{curve[-1, 0]:,.0f}",
                f"{curve[-1, 1]:.3g}",
                _teachers(name, runs),
                f"{curve[-1, 1] + (taught(name, runs) or 0) + before(name, runs):.3g}",
                f"{curve[0, 2]:.3f}",
                _with_interval([run["loss"] for run in runs], ".3f"),
                str(len(runs)),
            )
        )
    head: tuple[str, ...] = ("model", "parameters", "steps", "training FLOPs", "teacher's FLOPs")
    head += ("with these and the source's", "loss at the start", "held-out loss", "seeds")
    lines = markdown_table(head, rows)
    if differences := _differences(results):
        lines += ["", *markdown_table(("difference", "nats per token", "seeds"), differences)]
    for shape in ("2/3-1/3", "all-all", "all-all, UL2"):
        for ending in ("", SOURCE_FLOPS_TOO):
            adapted, fresh = paired(results, f"adapted {shape}", f"scratch {shape}{ending}")
            if not adapted:
                continue
            ours, theirs = mean_curve(adapted), mean_curve(fresh)
            if ending:  # Both axes then start where nothing has been trained.
                ours = ours + [0, before(f"adapted {shape}", adapted), 0]
            lines += ["", f"{shape}{ending and ', scratch with the'}{ending.strip(',')}: "]
            lines[-1] += _compared(ours, theirs)
    return "\n".join(lines)


def _differences(results: Runs) -> list[tuple[str, str, str]]:
    """Adapted minus other rows, over the seeds that both have."""
    pairs = []
    for shape in ("all-all", "2/3-1/3"):
        first = f"adapted {shape}"
        pairs += [
            (first, other)
            for other in (
                "decoder-only, trained on",
                f"scratch {shape}",
                f"scratch {shape}{SOURCE_FLOPS_TOO}",
            )
        ]
    varied = [name for name in results if name.startswith("adapted all-all, ")]
    pairs += [(name, "adapted all-all") for name in varied]
    pairs.append(("adapted all-all, UL2", "scratch all-all, UL2"))
    lines = []
    for first, second in pairs:
        ours, theirs = paired(results, first, second)
        if ours:
            gaps = [a["loss"] - b["loss"] for a, b in zip(ours, theirs, strict=True)]
            lines.append((f"{first} minus {second}", _with_interval(gaps, "+.3f"), str(len(gaps))))
    return lines


def _with_interval(values: Sequence[float], form: str) -> str:
    mean = t_interval(values)
    bounds = f" [{mean.low:{form}}, {mean.high:{form}}]" if len(values) > 1 else ""
    return f"{mean.value:{form}}{bounds}"


def paired(results: Runs, first: str, second: str) -> tuple[list[Any], list[Any]]:
    """The runs of two rows of the seeds that both have, in the order of the seeds."""
    sides = [{run["seed"]: run for run in results.get(name, ())} for name in (first, second)]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    return [sides[0][seed] for seed in seeds], [sides[1][seed] for seed in seeds]


def before(name: str, runs: Sequence[Mapping[str, Any]]) -> float:
    """FLOPs that made the parameters from which a row starts."""
    return 0.0 if name.startswith("scratch") else runs[0]["source_flops"]


def taught(name: str, runs: Sequence[Mapping[str, Any]]) -> float | None:
    """FLOPs of the source's reading the records for its child, a mean over the seeds; 0 of rows
    that are not distilled, None of distilled ones from versions that did not count them."""
    counts = [run.get("teacher_flops", None if "distilled" in name else 0.0) for run in runs]
    return None if None in counts else float(np.mean(counts))


def _teachers(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    count = taught(name, runs)
    return "not counted" if count is None else f"{count:.3g}"


def mean_curve(runs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[points, 3]: step, FLOPs and the loss, a mean over the seeds.

    Raises:
        DataError: runs of other steps, from versions with other budgets.
    """
    if len({tuple(point[0] for point in run["curve"]) for run in runs}) > 1:
        ends = sorted({run["curve"][-1][0] for run in runs})
        raise DataError(
            f"the runs of {runs[0].get('row')!r} were evaluated after other steps (they end at "
            f"{', '.join(f'{end:,.0f}' for end in ends)}); remove the lines of one kind"
        )
    return np.mean([run["curve"] for run in runs], axis=0)


def _compared(adapted: np.ndarray, fresh: np.ndarray) -> str:
    # The start, common to both, is not due to any step.
    steps, last = adapted[adapted[:, 0] > 0], fresh[-1]
    worth = steps_worth(steps, fresh)
    words = [
        f"after {ours:,.0f} steps the adapted model matches {theirs:,.0f} from scratch, "
        f"{theirs / ours:.3g} for each"
        for ours, theirs in dict.fromkeys(worth[:1] + worth[-1:])
    ]
    for one in steps[~np.isin(steps[:, 0], [ours for ours, _ in worth])][:1]:
        words.append(
            f"the adapted model's loss after {one[0]:,.0f} steps, {one[2]:.3f}, is beyond the "
            f"measured range: {last[0]:,.0f} steps from scratch reach {last[2]:.3f}"
        )
    if (early := np.flatnonzero(adapted[:, 2] <= last[2])).size:
        words.append(
            f"the loss of all {last[0]:,.0f} steps from scratch is reached by the adapted "
            f"model's evaluation after {adapted[early[0], 0]:,.0f} steps"
        )
    ahead = "the adapted model" if adapted[-1, 2] <= last[2] else "the model from scratch"
    cross = crossing(adapted, fresh)
    where = f"cross at {cross:.3g} FLOPs" if cross else "do not cross"
    words.append(f"the curves {where}: {ahead} is ahead at the end")
    return "; ".join(words)


def steps_worth(adapted: np.ndarray, fresh: np.ndarray) -> list[tuple[float, float]]:
    """Steps of the adapted model's evaluations whose loss the fresh model reaches too, each with
    the step at which that does."""
    reached = [(float(step), first_step_at(fresh, loss)) for step, _, loss in adapted]
    return [(ours, theirs) for ours, theirs in reached if theirs is not None]


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
    unequal = np.flatnonzero(gap)  # where the curves meet, neither is the better
    changes = np.flatnonzero(np.diff(np.sign(gap[unequal])))
    if not changes.size:
        return None
    i = int(unequal[changes[-1]])
    return float(flops[i] + (flops[i + 1] - flops[i]) * gap[i] / (gap[i] - gap[i + 1]))


def draw(results: Runs, path: pathlib.Path) -> None:
    """Held-out loss against FLOPs, as PNG: the headline rows from the source's end on, what was
    changed in the adapted all-all model, and, where there are rows with the source's FLOPs, these
    and the headline rows from nothing on."""
    larger = [name for name in results if name.endswith(SOURCE_FLOPS_TOO)]
    headline = [name for name in results if "," not in name or name.startswith("decoder")]
    varied = [name for name in results if name.startswith("adapted all-all")]
    after, total = "FLOPs after the source's training", "FLOPs, the source's training included"
    panels = [(headline, after), (varied, after), ([*headline, *larger], total)]
    panels = panels[: 2 + bool(larger)]
    figure, every = new_figure((5 * len(panels), 4), len(panels))
    for axes, (names, label) in zip(every, panels, strict=True):
        for number, name in enumerate(names):
            curve = mean_curve(results[name])
            curve[:, 1] += taught(name, results[name]) or 0.0
            if label == total:
                curve[:, 1] += before(name, results[name])
            axes.plot(
                curve[:, 1],
                curve[:, 2],
                markersize=3,
                linewidth=1.3,
                label=name,
                **_style(name, number),
            )
        axes.set(xlabel=label, ylabel="held-out loss (nats/token)")
        # Losses before the first steps are far above all others: the curves' ends must be told
        # apart.
        if ends := [mean_curve(results[name])[1:, 2] for name in names]:
            axes.set_ylim(min(map(np.min, ends)) - 0.05, np.quantile(np.concatenate(ends), 0.97))
            axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


def _style(name: str, number: int) -> dict[str, Any]:
    """Colour, marker and line of a row, the ``number``-th of its panel."""
    marker, line = _LINES[name.split()[0]]
    shape = name.removesuffix(SOURCE_FLOPS_TOO).split(" ", 1)[1]
    if name.startswith("decoder-only"):
        shape = "decoder-only"
    if name.endswith(SOURCE_FLOPS_TOO):
        marker, line = "^", "-."
    return {"color": _COLOURS.get(shape, f"C{number}"), "marker": marker, "linestyle": line}
