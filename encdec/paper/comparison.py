"""The comparison's tables from result rows: scores next to costs, and paired differences.

``encdec paper table FILE`` needs nothing but the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from encdec.evaluation.compare import compare_scores
from encdec.evaluation.evaluation_report import shown
from encdec.markup import markdown_table
from encdec.metrics.intervals import RESAMPLES, t_interval
from encdec.paper.result_rows import BITS, COSTS, RUN, by_row, score_of
from encdec.paper.search_tables import search_markdown

# (decoding, score, heading); "shuffled" are greedy answers to another example's source.
SCORES = (
    ("greedy", "bleu_codexglue", "BLEU"),
    ("greedy", "exact_match", "exact match"),
    ("beam", "bleu_codexglue", "BLEU, beam"),
    ("beam", "exact_match", "exact match, beam"),
    ("greedy", "syntax_match", "syntax"),
    ("greedy", "rouge1_stemmed", "Rouge-1"),
    ("greedy", "rouge2_stemmed", "Rouge-2"),
    ("greedy", "rougeL_stemmed", "Rouge-L"),
    ("beam", "rouge1_stemmed", "Rouge-1, beam"),
    ("beam", "rouge2_stemmed", "Rouge-2, beam"),
    ("beam", "rougeL_stemmed", "Rouge-L, beam"),
    ("greedy", "bits_per_byte", "bits per byte"),
    ("shuffled", "bleu_codexglue", "BLEU, shuffled sources"),
    ("shuffled", "exact_match", "exact match, shuffled sources"),
    ("shuffled", "rougeL_stemmed", "Rouge-L, shuffled sources"),
    ("shuffled", "bits_per_byte", "bits per byte, shuffled sources"),
)
# (second, first): the difference is second minus first.
PAIRS = (
    ("ED 2/3-1/3", "DEC"),
    ("ED 2/3-1/3", "DEC (parameters)"),
    ("ED 2/3-1/3+KD", "DEC+KD"),
    ("ED 2/3-1/3+SeqKD", "DEC+SeqKD"),
    ("DEC+KD", "DEC"),
    ("ED 2/3-1/3+KD", "ED 2/3-1/3"),
    ("DEC+SeqKD", "DEC"),
    ("ED 2/3-1/3+SeqKD", "ED 2/3-1/3"),
    ("teacher", "DEC"),
)
PAIRED = (
    ("greedy", "bleu_codexglue", "BLEU"),
    ("greedy", "exact_match", "exact match"),
    ("beam", "bleu_codexglue", "BLEU, beam"),
    ("greedy", "rougeL_stemmed", "Rouge-L"),
    ("beam", "rougeL_stemmed", "Rouge-L, beam"),
    ("greedy", BITS, "bits per byte"),
)
TAUGHT = ("+KD", "+SeqKD")


def comparison_markdown(rows: Sequence[Mapping[str, Any]], trials: int = 2_000) -> str:
    """All tables of the result rows, by task."""
    tasks = dict.fromkeys(row["task"] for row in rows if row["kind"] == RUN)
    parts = []
    for task in tasks:
        models = by_row(rows, task)
        parts.append(f"## {task}\n\n{score_table(models)}\n{cost_table(models, rows)}")
        if pairs := paired_table(models, trials):
            parts.append(pairs)
    if searched := search_markdown(rows):
        parts.append(searched)
    return "\n".join(parts) if parts else "No run is finished yet.\n"


def _scores_of(row: Mapping[str, Any], decoding: str) -> Mapping[str, Any]:
    return row["shuffled"] if decoding == "shuffled" else row["scores"].get(decoding, {})


def cell(of_seeds: Sequence[Mapping[str, Any]], decoding: str, score: str) -> str:
    """Mean over seeds with Student's interval, or one seed's value with its own over examples."""
    found = [_scores_of(row, decoding).get(score) for row in of_seeds]
    found = [one for one in found if one and one["value"] is not None]
    if not found:
        return "–"
    if len(found) == 1:
        return f"{shown(found[0]['value'])} [{shown(found[0]['low'])}, {shown(found[0]['high'])}]"
    mean = t_interval([one["value"] for one in found])
    return f"{mean.value:.2f} [{mean.low:.2f}, {mean.high:.2f}] (n={len(found)})"


def score_table(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line per model; a score that no model has is left out."""
    columns = [
        (decoding, score, heading)
        for decoding, score, heading in SCORES
        if any(_scores_of(row, decoding).get(score) for of in models.values() for row in of)
    ]
    head = ("model", "seeds", *(heading for *_, heading in columns))
    cells = [
        (name, str(len(of_seeds)), *(cell(of_seeds, how, score) for how, score, _ in columns))
        for name, of_seeds in models.items()
    ]
    return "\n".join(markdown_table(head, cells)) + "\n"


def cost_table(
    models: Mapping[str, Sequence[Mapping[str, Any]]], rows: Sequence[Mapping[str, Any]]
) -> str:
    """What each model cost to train and costs to run; a taught one runs as its plain one does."""
    costs = {row["row"]: row for row in rows if row["kind"] == COSTS}
    head = (
        *("model", "layers", "parameters", "training FLOPs", "training time, min"),
        *("first token, ms", "tokens/s", "memory, MiB"),
    )
    cells = []
    for name, of_seeds in models.items():
        row, plain = of_seeds[0], name
        for ending in TAUGHT:
            plain = plain.removesuffix(ending)
        cost, layers = costs.get(plain), row["layers"]
        timed = ["–"] * 4
        if cost:
            timed = [
                f"{cost['training_seconds'] / 60:.1f}",
                f"{1e3 * cost['first_token_seconds']:.1f}",
                f"{cost['tokens_per_second']:,.0f}",
                f"{cost['memory_bytes'] / 2**20:.1f}",
            ]
        shape = f"{layers[0]} + {layers[1]}" if layers[0] else str(layers[1])
        sizes = (f"{row['parameters']:,}", f"{row['training_flops']:.3g}")
        cells.append((name, shape, *sizes, *timed))
    lines = markdown_table(head, cells)
    measured = next(iter(costs.values()), None)
    if measured:
        lines += ["", f"Times: {measured['remark']}, {measured['device']}, {measured['date']}."]
    return "\n".join(lines) + "\n"


def paired_table(models: Mapping[str, Sequence[Mapping[str, Any]]], trials: int) -> str:
    """Differences of two models over the seeds that both have; empty where no pair has any."""
    columns = [
        (decoding, score, heading)
        for decoding, score, heading in PAIRED
        if any(row["parts"].get(decoding, {}).get(score) for of in models.values() for row in of)
    ]
    lines = []
    for second, first in PAIRS:
        if second not in models or first not in models:
            continue
        cells = []
        sides = [{row["seed"]: row for row in models[name]} for name in (first, second)]
        # A teacher has one seed.
        seeds = sorted(sides[0].keys() & sides[1].keys())
        for decoding, score, _ in columns:
            found = [[score_of(side[seed], decoding, score) for seed in seeds] for side in sides]
            if not seeds or any(one is None for side in found for one in side):
                cells.append("–")
                continue
            made = compare_scores(found, RESAMPLES, trials)
            cells.append(
                f"{made['difference']:+.2f} ({made['low']:.2f} to {made['high']:.2f}), "
                f"p {made['p_value']:.3f}"
            )
        lines.append((f"{second} minus {first}", str(len(seeds)), *cells))
    if not lines:
        return ""
    head = ("paired", "seeds", *(heading for *_, heading in columns))
    return "\n".join(markdown_table(head, lines)) + "\n"
