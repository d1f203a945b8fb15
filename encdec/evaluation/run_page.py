"""``encdec report RUN ...``: runs side by side as one HTML file that needs nothing else.

Curves of the losses, throughput and goodput as SVG, what differs between the configurations, and
answers of the evaluations in the runs' directories.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from encdec.cost.flops import count_parameters
from encdec.errors import ConfigError, DataError
from encdec.evaluation.evaluation_report import REPORT_FILE, read_report
from encdec.evaluation.predictions import read_answers
from encdec.fields import differing_fields, flattened
from encdec.files import whole_lines, write_text
from encdec.flags import Parser
from encdec.markup import html_page, html_table
from encdec.saved.saved_config import model_config_of, origin
from encdec.storage import absolute, any_path, as_path, file_names, make_directory, path_ends

# (title, number of metrics.jsonl, what a unit is)
CHARTS = (
    ("Training loss", "train/loss", "nats per target token"),
    ("Held-out loss", "eval/loss", "nats per target token"),
    ("Held-out bits per byte", "eval/bits_per_byte", "bits"),
    ("Throughput", "train/target_tokens_per_second", "target tokens per second"),
    ("Goodput", "goodput/share", "share of time in kept steps"),
    ("Learning rate", "train/learning_rate", ""),
    ("Gradient norm", "train/gradient_norm", ""),
)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
DASHES = ("", "6 3", "2 3")  # of the runs after all colours
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 230, 62, 30, 10  # of a chart, its axes, in pixels
MOST_POINTS = 600  # of a curve; more are not seen at this width
SAMPLES = 5  # of each task
TEXT_CHARACTERS = 600
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;
color:#222;background:#fff}
svg{background:#fafafa;margin:0 8px 8px 0;max-width:100%}svg text{font-size:11px;fill:#444}
figure{display:inline-block;margin:0}figcaption{font-weight:600}
table{border-collapse:collapse;margin:.5em 0}td,th{border:1px solid #ccc;padding:3px 8px;
text-align:left;vertical-align:top}td{white-space:pre-wrap;overflow-wrap:anywhere}
.key{display:inline-block;margin-right:1.5em}.note{color:#666}
"""


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """A run: its name on the page, the lines of its metrics, its configuration."""

    name: str
    directory: pathlib.Path | epath.Path
    metrics: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]

    def curve(self, number: str) -> list[tuple[float, float]]:
        """(step, value) where the number was reported and is finite."""
        points = [(line["step"], line.get(number)) for line in self.metrics]
        return [(x, y) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]


def main(argv: list[str]) -> int:
    """``encdec report RUN ... --out=FILE.html``.

    Raises:
        ConfigError: the file exists already, or a run is given twice.
        DataError: a directory holds no run.
    """
    parser = Parser(
        prog="encdec report",
        description="Writes runs side by side as one HTML file: curves, configurations, answers.",
        epilog="Example: encdec report runs/a runs/b --out=runs/a-b.html",
    )
    parser.add("runs", "work directory of `encdec train`", any_path, nargs="+", metavar="RUN")
    parser.add("--out", "receives the page", any_path, required=True, metavar="FILE.html")
    parser.add("--overwrite", "replace the file", default=False)
    options = parser.parse_args(argv)
    out = as_path(options.out)
    if out.exists() and not options.overwrite:
        raise ConfigError(f"--out={out} exists; give another file, or --overwrite")
    places = [os.fspath(absolute(path)) for path in options.runs]
    if len(set(places)) < len(places):
        raise ConfigError(f"a run is given twice: {', '.join(options.runs)}")
    runs = [
        read_run(path, name) for path, name in zip(options.runs, path_ends(places), strict=True)
    ]
    make_directory(out.parent)
    content = page(runs)
    write_text(out, content)
    print(f"{out}: {len(runs)} runs, {len(content.encode()):,} bytes")
    return 0


def read_run(directory: str, name: str) -> LoggedRun:
    """A run's files; DataError where there are none."""
    path = as_path(directory)
    try:
        config = json.loads((path / "config.json").read_text())
        lines = [line.decode() for _, line in whole_lines(path / "metrics.jsonl")]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory} holds no run with metrics ({error}); give a --workdir of `encdec train`"
        ) from error
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except ValueError:
            continue  # cut short when its process was killed
    return LoggedRun(name, path, tuple(metrics), config)


def page(runs: Sequence[LoggedRun]) -> str:
    """The whole file."""
    charts = [
        chart(title, unit, [run.curve(number) for run in runs])
        for title, number, unit in CHARTS
        if any(run.curve(number) for run in runs)
    ]
    keys = "".join(
        f'<span class="key"><svg width="34" height="10" style="margin:0"><line x1="0" y1="5" '
        f'x2="30" y2="5" {_stroke(place)}/></svg> {html.escape(run.name)}</span>'
        for place, run in enumerate(runs)
    )
    parts = [
        f"<p>{keys}</p>",
        _totals(runs),
        "".join(charts) or '<p class="note">No line of metrics yet.</p>',
        _configurations(runs),
        _evaluations(runs),
    ]
    return html_page(", ".join(run.name for run in runs), STYLE, parts)


def _stroke(place: int) -> str:
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    return (
        f'fill="none" stroke="{COLOURS[place % len(COLOURS)]}" stroke-width="1.8" '
        f'stroke-dasharray="{dash}"'
    )


def chart(title: str, unit: str, curves: Sequence[Sequence[tuple[float, float]]]) -> str:
    """Curves over the step, a colour each, as a figure."""
    points = [point for curve in curves for point in curve]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    if left == right:
        left, right = left - 1, right + 1
    x_of = lambda x: LEFT + (x - left) / (right - left) * (WIDTH - LEFT - 12)
    y_of = lambda y: TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
    shapes = []
    for place in range(5):
        y = low + (high - low) * place / 4
        shapes.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}" '
            f'stroke="#ddd"/><text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" '
            f'text-anchor="end">{y:.3g}</text>'
        )
    for tick in sorted({round(left + (right - left) * place / 4) for place in range(5)}):
        shapes.append(
            f'<text x="{x_of(tick):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{tick:,.0f}</text>'
        )
    for place, curve in enumerate(curves):
        kept = curve[:: max(1, -(-len(curve) // MOST_POINTS))]
        kept = [*kept, *curve[-1:]]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in kept)
        if len(set(kept)) == 1:
            x, y = kept[0]
            colour = COLOURS[place % len(COLOURS)]
            shapes.append(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour}"/>')
        elif kept:
            shapes.append(f'<polyline points="{path}" {_stroke(place)}/>')
    note = f' <span class="note">{html.escape(unit)}</span>' if unit else ""
    return (
        f"<figure><figcaption>{html.escape(title)}{note}</figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"{''.join(shapes)}</svg></figure>"
    )


def _totals(runs: Sequence[LoggedRun]) -> str:
    def last(run: LoggedRun, number: str, form: str = "{:.4f}") -> str:
        curve = run.curve(number)
        return form.format(curve[-1][1]) if curve else "–"

    def best(run: LoggedRun) -> str:
        curve = run.curve("eval/loss")
        if not curve:
            return "–"
        step, loss = min(curve, key=lambda point: point[1])
        return f"{loss:.4f} (step {step:,})"

    def steps(run: LoggedRun) -> str:
        done = run.metrics[-1]["step"] if run.metrics else 0
        return f"{done:,} of {run.config['run']['steps']:,}"

    rows = [
        (
            run.name,
            f"{count_parameters(model_config_of(run.config)).total:,}",
            origin(run.config) or "–",
            steps(run),
            last(run, "train/loss"),
            last(run, "eval/loss"),
            best(run),
            last(run, "train/target_tokens_per_second", "{:,.0f}"),
            last(run, "goodput/share", "{:.0%}"),
        )
        for run in runs
    ]
    head = (
        *("run", "parameters", "made from", "steps", "loss", "held-out", "best held-out"),
        *("target tokens/s", "goodput"),
    )
    return html_table(head, rows)


def _configurations(runs: Sequence[LoggedRun]) -> str:
    contents = [
        {**{k: run.config.get(k, {}) for k in ("run", "model")}, "data": _data(run.config)}
        for run in runs
    ]
    names: list[str] = []
    for other in contents[1:]:
        names += [name for name in differing_fields(contents[0], other) if name not in names]
    if len(runs) == 1:
        return "<h2>Configuration</h2>" + html_table(
            ("field", runs[0].name), sorted(flattened(contents[0]).items())
        )
    if not names:
        return '<h2>Configurations</h2><p class="note">They are the same.</p>'
    flat = [flattened(content) for content in contents]
    rows = [
        [name, *("–" if (value := one.get(name)) is None else value for one in flat)]
        for name in sorted(names)
    ]
    return "<h2>Configurations: what differs</h2>" + html_table(
        ("field", *(run.name for run in runs)), rows
    )


def _data(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("task", "fingerprint", "inputs_length", "targets_length")
    return {key: config.get("data", {}).get(key) for key in keys}


def _evaluations(runs: Sequence[LoggedRun]) -> str:
    """Scores and first answers of every evaluation below the runs' directories."""
    scores, answers = [], []
    for run in runs:
        for inner in file_names(run.directory, REPORT_FILE):
            folder = (run.directory / inner).parent
            place = f"{run.name}, {os.path.dirname(inner) or '.'}"
            for task, one in read_report(folder).get("tasks", {}).items():
                for name, score in one["scores"].items():
                    scores.append((place, task, name, _interval(score)))
                kept = itertools.islice(read_answers(folder / task), SAMPLES)
                for _, _, example, prediction in kept:
                    texts = (example.source, example.references[0], prediction.text)
                    answers.append((place, task, *map(_shortened, texts)))
    if not scores:
        return ""
    return (
        "<h2>Evaluations</h2>"
        + html_table(("run", "task", "score", "value, 95 % interval"), _together(scores, 3))
        + "<h2>Answers</h2>"
        + html_table(("run", "task", "source", "reference", "answer"), _together(answers, 4))
    )


def _together(rows: Sequence[tuple[str, ...]], end: int) -> list[tuple[str, ...]]:
    """The runs' rows about the same, row[1:end], one below the other."""
    places: dict[tuple[str, ...], int] = {}
    for row in rows:
        places.setdefault(row[1:end], len(places))
    return sorted(rows, key=lambda row: places[row[1:end]])


def _interval(score: Mapping[str, Any]) -> str:
    value, low, high = (score.get(name) for name in ("value", "low", "high"))
    if value is None:
        return "–"
    return f"{value:.4g}" if low is None else f"{value:.4g} ({low:.4g} to {high:.4g})"


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS] + " …"
