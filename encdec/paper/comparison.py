"""The comparison's tables from result rows: scores next to costs, and paired differences.

``encdec paper table FILE …`` needs nothing but the files. Runs of other settings or on other data
have tables of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from encdec.evaluation.compare import compare_scores
from encdec.evaluation.evaluation_report import shown
from encdec.markup import markdown_table
from encdec.metrics.intervals import RESAMPLES, t_interval
from encdec.paper.divergence import has_diverged
from encdec.paper.result_rows import BITS, COPY, COSTS, RUN, by_row, score_of
from encdec.paper.search_tables import search_markdown
from encdec.paper.setting import TEACHER, TEACHING

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
TAUGHT = tuple(ending for ending in TEACHING.values() if ending)
COPIED = "the source, copied"

ResultRows = Sequence[Mapping[str, Any]]


class Section(NamedTuple):
    """What one set of tables holds: the runs of one task, comparison, teacher and data.

    Attributes:
        task: that the runs are scored on.
        comparison: digest of the settings of students without a teacher.
        setting: digest of the teacher's and its pupils' settings.
        data: fingerprint of the data; "" in lines from before it was recorded.
    """

    task: str
    comparison: str
    setting: str
    data: str

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a run's row is one of its runs: a plain student is part of every teacher's."""
        found = section_of(row)
        plain = found._replace(setting=self.setting) if not _with_teacher(row) else found
        return self == plain


def _with_teacher(row: Mapping[str, Any]) -> bool:
    return row["row"] == TEACHER or row["row"].endswith(TAUGHT)


def _rank(name: str) -> int:
    """Order of the tables: students without a teacher, the teacher, its pupils."""
    return 2 if name.endswith(TAUGHT) else int(name == TEACHER)


def section_of(row: Mapping[str, Any]) -> Section:
    """Of a run's row."""
    setting = row.get("setting", "")
    return Section(row["task"], row.get("comparison", setting), setting, row.get("data", ""))


def sections(rows: ResultRows) -> dict[Section, list[Mapping[str, Any]]]:
    """The run rows by section; one without a teacher only where its students have none."""
    runs = [row for row in rows if row["kind"] == RUN]
    found = dict.fromkeys(section_of(row) for row in runs)
    taught = {section_of(row) for row in runs if _with_teacher(row)}
    chosen = [
        one
        for one in found
        if one in taught or all(other._replace(setting=one.setting) != one for other in taught)
    ]
    return {one: [row for row in runs if one.holds(row)] for one in chosen}


def comparison_markdown(rows: ResultRows, trials: int = 2_000) -> str:
    """All tables of the result rows, by task."""
    parts = []
    found = sections(rows)
    tasks = [section.task for section in found]
    for section, runs in found.items():
        models = by_row(sorted(runs, key=lambda row: _rank(row["row"])))
        title = section.task
        if tasks.count(section.task) > 1:
            title += f" (setting {section.setting}, data {section.data or 'not recorded'})"
        copied = [
            row
            for row in rows
            if row["kind"] == COPY
            and (row["task"], row["setting"], row["data"])
            == (section.task, section.comparison, section.data)
        ]
        costs = [
            row
            for row in rows
            if row["kind"] == COSTS
            and row["column"] == runs[0]["column"]
            and row.get("setting")
            == (section.setting if _with_teacher(row) else section.comparison)
        ]
        parts.append(f"## {title}\n\n{score_table(models, copied)}\n{cost_table(models, costs)}")
        if pairs := paired_table(models, trials):
            parts.append(pairs)
    if searched := search_markdown(rows):
        parts.append(searched)
    return "\n".join(parts) if parts else "No run is finished yet.\n"


def _scores_of(row: Mapping[str, Any], decoding: str) -> Mapping[str, Any]:
    return row.get("shuffled", {}) if decoding == "shuffled" else row["scores"].get(decoding, {})


def cell(of_seeds: ResultRows, decoding: str, score: str) -> str:
    """Mean over seeds with Student's interval, or one seed's value with its own over examples.

    Seeds that diverged are in no mean, and counted.
    """
    finite = [row for row in of_seeds if not has_diverged(row)]
    lost = len(of_seeds) - len(finite)
    if not finite:
        return "diverged" if lost else "–"
    text = _cell(finite, decoding, score)
    return f"{text}; {lost} diverged" if lost else text


def _cell(of_seeds: ResultRows, decoding: str, score: str) -> str:
    scores = (_scores_of(row, decoding).get(score) for row in of_seeds)
    found = [one for one in scores if one and one["value"] is not None]
    if not found:
        return "–"
    if len(found) == 1:
        value, low, high = (shown(found[0][name], score) for name in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"
    mean = t_interval([one["value"] for one in found])
    value, low, high = (shown(one, score) for one in (mean.value, mean.low, mean.high))
    return f"{value} [{low}, {high}] (n={len(found)})"


def score_table(models: Mapping[str, ResultRows], copied: ResultRows = ()) -> str:
    """One line per model; a score that no model has is left out.

    Args:
        models: run rows by the model's name.
        copied: at most one row of scores of the sources themselves, or its repetitions.
    """
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
    if copied:
        scores = (cell(copied[-1:], how, score) for how, score, _ in columns)
        cells.append((COPIED, "–", *scores))
    return "\n".join(markdown_table(head, cells)) + "\n"


def cost_table(models: Mapping[str, ResultRows], rows: ResultRows) -> str:
    """What each model cost to train and costs to run; a taught one runs as its plain one does, but
    one that learns from draws trains by another step, which is not timed.

    Args:
        models: run rows by the model's name.
        rows: of costs, of these settings.
    """
    costs = {row["row"]: row for row in rows}
    head = (
        *("model", "layers", "parameters", "training FLOPs", "training time, min"),
        *("first token, ms", "tokens/s", "memory, MiB"),
    )
    cells = []
    for name, of_seeds in models.items():
        row, plain = min(of_seeds, key=has_diverged), name  # one that ended, if any did
        for ending in TAUGHT:
            plain = plain.removesuffix(ending)
        cost, layers = costs.get(plain), row["layers"]
        by_draws = name.endswith(TEACHING["draws"])
        timed = ["–"] * 4
        if cost:
            timed = [
                "–" if by_draws else f"{cost['training_seconds'] / 60:.1f}",
                f"{1e3 * cost['first_token_seconds']:.1f}",
                f"{cost['tokens_per_second']:,.0f}",
                f"{cost['memory_bytes'] / 2**20:.1f}",
            ]
        shape = f"{layers[0]} + {layers[1]}" if layers[0] else str(layers[1])
        sizes = (f"{row['parameters']:,}", f"{row['training_flops']:.3g}")
        cells.append((name, shape, *sizes, *timed))
    lines = markdown_table(head, cells)
    measured = dict.fromkeys(
        ", ".join(filter(None, (row["remark"], row["device"], row["date"])))
        for row in costs.values()
    )
    if measured:
        lines += ["", f"Times: {'; '.join(measured)}."]
    return "\n".join(lines) + "\n"


def _difference(made: Mapping[str, float | None], score: str) -> str:
    if made["difference"] is None or made["p_value"] is None:
        return "–"
    p_value = "p < 0.001" if made["p_value"] < 0.001 else f"p {made['p_value']:.3f}"
    low, high = shown(made["low"], score), shown(made["high"], score)
    return f"{shown(made['difference'], score, '+')} ({low} to {high}), {p_value}"


def paired_table(models: Mapping[str, ResultRows], trials: int) -> str:
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
        both = sorted(sides[0].keys() & sides[1].keys())
        seeds = [seed for seed in both if not any(has_diverged(side[seed]) for side in sides)]
        count = str(len(seeds))
        if lost := len(both) - len(seeds):
            count += f"; {lost} diverged"
        for decoding, score, _ in columns:
            found = [
                [one for seed in seeds if (one := score_of(side[seed], decoding, score))]
                for side in sides
            ]
            if not seeds or any(len(side) < len(seeds) for side in found):
                cells.append("–")
                continue
            cells.append(_difference(compare_scores(found, RESAMPLES, trials), score))
        lines.append((f"{second} minus {first}", count, *cells))
    if not lines:
        return ""
    head = ("paired", "seeds", *(heading for *_, heading in columns))
    return "\n".join(markdown_table(head, lines)) + "\n"
