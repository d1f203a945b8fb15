"""A search's tables from its result rows: what was tried, what would be chosen, what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from encdec.markup import markdown_table
from encdec.paper.result_rows import SEARCH

# What one table compares: trials of one setting, task and length.
_GROUP = ("setting", "column", "steps", "of_steps")
# What a table's line is: the mean over its seeds.
_CHOICE = ("row", "learning_rate", "dropout")


def search_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every search's trials, what would be chosen for each model, and the cost; empty without."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == SEARCH:
            groups.setdefault(tuple(row[name] for name in _GROUP), []).append(row)
    return "\n".join(_section(trials) for trials in groups.values())


def _section(trials: Sequence[Mapping[str, Any]]) -> str:
    first = trials[0]
    head = ("model", "learning rate", "dropout", "seeds", "bits per byte, held out", "CPU, min")
    tried: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in trials:
        tried.setdefault(tuple(row[name] for name in _CHOICE), []).append(row)
    cells = []
    for (name, rate, dropout), of_seeds in sorted(tried.items()):
        used = " (in use)" if of_seeds[0]["in_use"] else ""
        minutes = sum(row["cpu_seconds"] for row in of_seeds) / 60
        bits = statistics.fmean(row["bits_per_byte"] for row in of_seeds)
        shape = (f"{rate:g}{used}", f"{dropout:g}", str(len(of_seeds)))
        cells.append((name, *shape, f"{bits:.4f}", f"{minutes:.1f}"))
    flops = sum(row["training_flops"] for row in trials)
    hours = [sum(row[name] for row in trials) / 3600 for name in ("cpu_seconds", "seconds")]
    return "\n".join(
        [
            f"## Search on {first['column']}: {first['steps']:,} of {first['of_steps']:,} steps\n",
            *markdown_table(head, cells),
            "",
            *(f"- {line}" for line in verdicts(trials)),
            f"- Cost: {len(trials)} trials, {flops:.3g} FLOPs, {hours[0]:.2f} hours of processor "
            f"time, {hours[1]:.2f} of wall time; {first['device']}, {first['date']}.",
            "",
        ]
    )


def verdicts(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each model whether the values in use are the best tried; for all, whether it matters.

    Args:
        trials: lines of one setting, column and length.
    """
    bits: dict[str, dict[tuple[float, float], list[float]]] = {}
    used = None
    for row in trials:
        choice = (row["learning_rate"], row["dropout"])
        bits.setdefault(row["row"], {}).setdefault(choice, []).append(row["bits_per_byte"])
        used = choice if row["in_use"] else used
    lines, best, in_use = [], {}, {}
    for name, choices in bits.items():
        means = {choice: statistics.fmean(values) for choice, values in choices.items()}
        chosen = min(means, key=means.get)
        best[name] = means[chosen]
        text = f"{name}: learning rate {chosen[0]:g} with dropout {chosen[1]:g} "
        if used in means:
            in_use[name] = means[used]
        if len(means) == 1:
            text += f"is all that was tried ({best[name]:.4f})"
        elif chosen == used:
            text += f"is in use and the best tried ({best[name]:.4f})"
        elif name in in_use:
            text += f"would be chosen: {best[name]:.4f} against {in_use[name]:.4f} in use"
        else:
            text += f"would be chosen ({best[name]:.4f}); the values in use were not tried"
        if edge := _edge(chosen[0], [rate for rate, _ in means]):
            text += f"; it is the {edge} learning rate tried, and one beyond may be better"
        lines.append(text)
    if any(choices.keys() != next(iter(bits.values())).keys() for choices in bits.values()):
        lines.append("Not every model has tried the same values yet: finish the search to compare")
    elif len(best) > 1 and best.keys() == in_use.keys():
        orders = [sorted(values, key=values.get) for values in (in_use, best)]
        same = "the same" if orders[0] == orders[1] else "another"
        lines.append(
            f"Order with the values in use: {', '.join(orders[0])}; {same} with each model's best"
            + ("" if orders[0] == orders[1] else f": {', '.join(orders[1])}")
        )
    return lines


def _edge(value: float, tried: Sequence[float]) -> str:
    if len(set(tried)) < 2:
        return ""
    return {min(tried): "smallest", max(tried): "largest"}.get(value, "")
