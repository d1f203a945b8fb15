"""The quickstart's report: a table, two figures and sample texts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from encdec.figures import new_figure
from encdec.markup import markdown_table

# Okabe and Ito's colours, distinguishable with any kind of colour vision; each line also has
# its own marker, for print in grey.
COLOURS = {
    "encoder-decoder": "#0072B2",
    "decoder-only": "#D55E00",
    "distilled encoder-decoder": "#009E73",
}
UNCACHED_COLOUR = "#999999"
PICTURES = ("loss.png", "inference.png")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Generation at one input length: medians over repeats.

    Attributes:
        inputs: source tokens.
        first_token_seconds: from the tokenized source to the first new token.
        total_seconds: to the last new token.
        tokens_per_second: of the tokens after the first.
    """

    inputs: int
    first_token_seconds: float
    total_seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """One model's figures.

    Attributes:
        title: "encoder-decoder", "decoder-only" or "distilled encoder-decoder".
        layers: as text, "4 + 2".
        parameters: number of parameters.
        training_flops: of the whole run, by formula.
        training_seconds: wall time of the training steps, compilation and evaluation left out.
        curve: (training FLOPs, held-out loss per target token) at every evaluation.
        loss: nats per held-out target token.
        bits_per_byte: of held-out target text.
        scores: by metric, over held-out functions, 0 to 100.
        shuffled: the same where each function is answered from another one.
        timings: cached generation by input length; none for a model of the same shape as a timed
            one.
        uncached: the same, reading the whole sequence again for every token.
        memory_bytes: weights and cache while generating from the longest input.
        samples: answers, in the order of ``QuickstartReport.samples``.
    """

    title: str
    layers: str
    parameters: int
    training_flops: float
    training_seconds: float
    curve: list[tuple[float, float]]
    loss: float
    bits_per_byte: float
    scores: dict[str, float]
    shuffled: dict[str, float]
    timings: list[Timing]
    uncached: list[Timing]
    memory_bytes: int
    samples: list[str]


@dataclasses.dataclass(frozen=True)
class QuickstartReport:
    """The models, their training data, and sample functions as (source, reference).

    The first two are compared at equal cost; the third is the first, distilled from the second,
    and ``teacher`` describes that.
    """

    models: list[ModelReport]
    data: dict[str, Any]
    teacher: dict[str, Any]
    samples: list[tuple[str, str]]
    machine: str
    date: str
    command: str


def metric_title(name: str) -> str:
    """A metric's name for people."""
    return {
        "exact_match": "exact match",
        "rougeL": "Rouge-L",
        "rougeL_stemmed": "Rouge-L (stemmed)",
    }.get(name, name)


def table(report: QuickstartReport, at_inputs: int) -> list[tuple[str, ...]]:
    """Rows of the comparison, header first; timings are at ``at_inputs`` tokens."""
    models = report.models
    timing = [next((t for t in m.timings if t.inputs == at_inputs), None) for m in models]
    shown = lambda text: tuple(text(t) if t else "same architecture" for t in timing)
    target_tokens = report.data["target_tokens_seen"]
    scores = lambda on, of_models: [
        (f"{metric_title(name)}, {on}", *(f"{of[name]:.1f}" for of in of_models))
        for name in of_models[0]
    ]
    return [
        ("", *(m.title for m in models)),
        ("layers", *(m.layers for m in models)),
        ("parameters", *(f"{m.parameters:,}" for m in models)),
        ("training FLOPs", *(f"{m.training_flops:.3g}" for m in models)),
        ("training time", *(f"{m.training_seconds:.0f} s" for m in models)),
        (
            "target tokens per second, training",
            *(f"{target_tokens / m.training_seconds:,.0f}" for m in models),
        ),
        ("held-out loss, nats per target token", *(f"{m.loss:.4f}" for m in models)),
        ("held-out bits per byte", *(f"{m.bits_per_byte:.4f}" for m in models)),
        *scores("held-out functions", [m.scores for m in models]),
        *scores("shuffled sources", [m.shuffled for m in models]),
        (
            f"first token, {at_inputs} input tokens",
            *shown(lambda t: f"{1e3 * t.first_token_seconds:.1f} ms"),
        ),
        ("tokens per second, cached", *shown(lambda t: f"{t.tokens_per_second:,.0f}")),
        ("weights and cache", *(f"{m.memory_bytes / 2**20:.1f} MiB" for m in models)),
    ]


def ratios(report: QuickstartReport, at_inputs: int) -> list[str]:
    """The comparison in sentences, as measured, whichever model is ahead."""
    ours, peer, distilled = report.models
    times = [next(t for t in m.timings if t.inputs == at_inputs) for m in (ours, peer)]
    metric = next(iter(ours.scores))
    scores = [model.scores[metric] for model in report.models]

    def against(name: str, a: float, b: float, lower_is_better: bool) -> str:
        ahead = "encoder-decoder" if (a < b) == lower_is_better else "decoder-only"
        ahead = "neither" if a == b else ahead
        return f"{name}: {_relative(a, b)} the decoder-only figure ({ahead} ahead)"

    return [
        against("held-out loss", ours.loss, peer.loss, True),
        against(metric_title(metric), scores[0], scores[1], False),
        against(
            "first-token latency", times[0].first_token_seconds, times[1].first_token_seconds, True
        ),
        against("tokens per second", times[0].tokens_per_second, times[1].tokens_per_second, False),
        "distilled, relative to the same model on gold targets alone: "
        f"{distilled.loss / ours.loss:.3f} "
        f"of its held-out loss, {_relative(scores[2], scores[0])} its {metric_title(metric)}, "
        f"{distilled.training_seconds / ours.training_seconds:.3f} of its training time",
    ]


def _relative(value: float, base: float) -> str:
    """A share of a base, which may be 0."""
    return f"{value / base:.3f} of" if base else f"{value:.1f} against the 0.0 of"


def teaching(report: QuickstartReport) -> str:
    """A paragraph on the distilled model's training."""
    teacher = report.teacher
    return (
        f"The distilled model differs from the first only in its loss: {teacher['alpha']:g} x the "
        f"divergence from the {teacher['name']} model, of which {teacher['draws']} draws per token "
        f"were stored ({teacher['tokens']:,} tokens, {teacher['ids_per_token']:.1f} ids and "
        f"{teacher['bytes_per_token']:.1f} bytes per token), and {1 - teacher['alpha']:g} x the "
        "cross entropy of gold targets. A useful teacher is larger than its student and was "
        "trained on more data; see docs/distillation.md."
    )


def write(report: QuickstartReport, folder: pathlib.Path, at_inputs: int) -> list[pathlib.Path]:
    """Writes report.json, report.md, samples.txt and both figures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("report.md", "report.json", "samples.txt", *PICTURES)]
    paths[0].write_text(markdown(report, at_inputs))
    paths[1].write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    paths[2].write_text(samples_text(report))
    draw_loss(report, paths[3])
    draw_inference(report, paths[4])
    return paths


def markdown(report: QuickstartReport, at_inputs: int) -> str:
    """The report as Markdown: table, ratios, figures, samples."""
    header, *rows = table(report, at_inputs)
    lines = [
        "# Quickstart: an encoder-decoder, its decoder-only peer at equal training FLOPs, and a "
        "distilled student",
        "",
        f"`{report.command}`, {report.machine}, {report.date}.",
        "",
        f"Task: {report.data['task']}; {report.data['train_examples']:,} functions to learn from, "
        f"{report.data['held_out_examples']:,} held out (other modules). One run each, one seed: "
        "read small differences as noise.",
        "",
        *markdown_table(header, rows),
        "",
        *(f"- {line}" for line in ratios(report, at_inputs)),
        "",
        teaching(report),
        "",
        *(f"![{name}]({name})" for name in PICTURES),
        "",
        "```",
        samples_text(report).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def samples_text(report: QuickstartReport) -> str:
    """Held-out functions as the models read them, as their author wrote them, and the answers.

    Of an answer of several lines, those are shown that differ from the source.
    """
    parts = []
    for number, (source, reference) in enumerate(report.samples):
        parts.append(source.rstrip() + "\n")
        parts.append(_answer("written by its author", source, reference))
        for model in report.models:
            text = model.samples[number]
            right = " (right)" if text.strip() == reference.strip() else ""
            parts.append(_answer(model.title + right, source, text))
        parts.append("\n")
    return "".join(parts)


def _answer(title: str, source: str, text: str) -> str:
    """One answer, below its title where it has several lines."""
    lines = text.strip().splitlines()
    if len(lines) < 2:
        return f"  {title:>34}: {text.strip()}\n"
    before = set(source.splitlines())
    changed = [line for line in lines if line not in before] or ["(nothing changed)"]
    return "".join(
        f"  {title if not place else '':>34}{':' if not place else ' '} {line}\n"
        for place, line in enumerate(changed)
    )


def _axes(xlabel: str, ylabel: str, title: str):
    figure, (axes,) = new_figure((7, 4.5))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    return figure, axes


def draw_loss(report: QuickstartReport, path: pathlib.Path) -> None:
    """Held-out loss against training FLOPs; for the distilled model, the teacher's FLOPs are not
    included."""
    figure, axes = _axes(
        "training FLOPs (model FLOPs, by formula)",
        "held-out loss (nats per target token)",
        "Loss against training compute",
    )
    for model, marker in zip(report.models, "osD"):
        axes.plot(
            *zip(*model.curve),
            marker=marker,
            color=COLOURS[model.title],
            label=f"{model.title}, {model.parameters / 1e6:.1f}M parameters",
        )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def draw_inference(report: QuickstartReport, path: pathlib.Path) -> None:
    """Time of a whole answer against input length; decoder-only with and without a cache."""
    figure, axes = _axes(
        "input length (tokens)",
        f"seconds for {report.data['timed_new_tokens']} new tokens, batch 1",
        "Inference time against input length",
    )
    for model, marker in zip([m for m in report.models if m.timings], "os"):
        colour = COLOURS[model.title]
        axes.plot(
            [t.inputs for t in model.timings],
            [t.total_seconds for t in model.timings],
            marker=marker,
            color=colour,
            label=f"{model.title}, cached",
        )
        if model.uncached:
            axes.plot(
                [t.inputs for t in model.uncached],
                [t.total_seconds for t in model.uncached],
                marker="^",
                linestyle="--",
                color=UNCACHED_COLOUR,
                label=f"{model.title}, without a cache",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([t.inputs for t in report.models[0].timings])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
