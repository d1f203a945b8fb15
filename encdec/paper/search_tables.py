"""A search's tables from its result rows: what was tried, what would be chosen, what it cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from encdec.markup import markdown_table
from encdec.paper.result_rows import SEARCH

# What one table compares: trials of one setting, data, task and length.
_GROUP = ("setting", "data", "column", "steps", "of_steps")
# What a table's line is: the mean over its seeds.
_CHOICE = ("row", "learning_rate", "dropout")


def search_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every search's trials, what would be chosen for each model, and the cost; empty without.

    Of a trial that is there twice, as in two files of which one continues the other, the last.
    """
    groups: dict[tuple, dict[tuple, Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == SEARCH:
            trials = groups.setdefault(tuple(row.get(name) for name in _GROUP), {})
            trials[tuple(row[name] for name in (*_CHOICE, "seed"))] = row
    return "\n".join(_section(list(trials.values())) for trials in groups.values())


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
        bits = [_bits(row) for row in of_seeds]
        shape = (f"{rate:g}{used}", f"{dropout:g}", str(len(of_seeds)))
        shown = _shown(statistics.fmean(bits))
        if 0 < (count := bits.count(math.inf)) < len(bits):
            shown += f" in {count}"
        cells.append((name, *shape, shown, f"{minutes:.1f}"))
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


def _bits(row: Mapping[str, Any]) -> float:
    """A trial's bits per byte; infinite where it diverged."""
    return math.inf if row["bits_per_byte"] is None else row["bits_per_byte"]


def _shown(bits: float) -> str:
    return "diverged" if bits == math.inf else f"{bits:.4f}"


def verdicts(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each model whether the values in use are the best tried; for all, whether it matters.

    A model's values are compared over the seeds that all of them have.

    Args:
        trials: lines of one setting, column and length.
    """
    bits: dict[str, dict[tuple[float, float], dict[int, float]]] = {}
    used: dict[str, tuple[float, float]] = {}
    for row in trials:
        choice = (row["learning_rate"], row["dropout"])
        bits.setdefault(row["row"], {}).setdefault(choice, {})[row["seed"]] = _bits(row)
        if row["in_use"]:  # a teacher may have its own dropout
            used[row["row"]] = choice
    lines: list[str] = []
    best: dict[str, float] = {}
    in_use: dict[str, float] = {}
    for name, choices in bits.items():
        seeds = set.intersection(*map(set, choices.values()))
        if not seeds:
            lines.append(f"{name}: the values tried have no seed in common yet")
            continue
        means = {
            choice: statistics.fmean(found[seed] for seed in seeds)
            for choice, found in choices.items()
        }
        best[name] = min(means.values())
        mine = used.get(name)
        if mine in means:
            in_use[name] = means[mine]
        lines.append(_choice_of(name, means, mine))
    # What has been tried with which seeds; finished, every model has the same, and so every value.
    tried = [{choice: set(found) for choice, found in choices.items()} for choices in bits.values()]
    seeds_of = [seeds for of_choice in tried for seeds in of_choice.values()]
    if any(one != tried[0] for one in tried) or any(one != seeds_of[0] for one in seeds_of):
        lines.append(
            "Not every model has tried the same values with the same seeds yet: finish the search "
            "to compare"
        )
    elif len(best) > 1 and math.inf in (*best.values(), *in_use.values()):
        lines.append("Where something diverged, the models have no order")
    elif len(best) > 1 and best.keys() == in_use.keys():
        orders = [sorted(values, key=values.__getitem__) for values in (in_use, best)]
        same = "the same" if orders[0] == orders[1] else "another"
        lines.append(
            f"Order with the values in use: {', '.join(orders[0])}; {same} with each model's best"
            + ("" if orders[0] == orders[1] else f": {', '.join(orders[1])}")
        )
    return lines


def _choice_of(
    name: str, means: Mapping[tuple[float, float], float], used: tuple[float, float] | None
) -> str:
    """What a model's bits per byte with each (learning rate, dropout) say of those in use."""
    chosen = min(means, key=means.__getitem__)
    best = means[chosen]
    if best == math.inf:
        return f"{name}: all that was tried diverged"
    text = f"{name}: learning rate {chosen[0]:g} with dropout {chosen[1]:g} "
    if len(means) == 1:
        text += f"is all that was tried ({best:.4f})"
    elif chosen == used:
        text += f"is in use and the best tried ({best:.4f})"
    elif used is not None and used in means:
        text += f"would be chosen: {best:.4f} against {_shown(means[used])} in use"
    else:
        text += f"would be chosen ({best:.4f}); the values in use were not tried"
    if edge := _edge(chosen[0], [rate for rate, _ in means]):
        text += f"; it is the {edge} learning rate tried, and one beyond may be better"
    return text


def _edge(value: float, tried: Sequence[float]) -> str:
    if len(set(tried)) < 2:
        return ""
    return {min(tried): "smallest", max(tried): "largest"}.get(value, "")
