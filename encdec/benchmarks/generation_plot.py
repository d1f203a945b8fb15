"""Time against input length, as PNG and SVG."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from encdec.benchmarks.generation import GenerationTiming
from encdec.figures import new_figure

# Okabe and Ito's colours, told apart by marker and line too.
_LOOKS = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "-"),
    ("#009E73", "^", "-"),
    ("#CC79A7", "D", "-"),
    ("#56B4E9", "v", "-"),
)


def draw(timings: Sequence[GenerationTiming], folder: pathlib.Path) -> list[pathlib.Path]:
    """One figure a batch and output length: first token, and the whole answer; paths of all."""
    groups = sorted({(one.batch, one.output_length) for one in timings})
    paths = []
    for batch, outputs in groups:
        found = [t for t in timings if (t.batch, t.output_length) == (batch, outputs)]
        paths += _figure(found, folder / f"inference-batch{batch}-out{outputs}.png")
    return paths


def _figure(timings: Sequence[GenerationTiming], path: pathlib.Path) -> list[pathlib.Path]:
    figure, both = new_figure((9, 4), 2)
    names = list(dict.fromkeys(one.model for one in timings))
    first = timings[0]
    panels = (
        ("first_token", "first token (seconds)"),
        ("total", f"{first.output_length} tokens (seconds)"),
    )
    for axes, (field, label) in zip(both, panels):
        for model, (colour, marker, line) in zip(names, _LOOKS):
            for cached in (True, False):
                found = [t for t in timings if (t.model, t.cached) == (model, cached)]
                if not found:
                    continue
                spreads = [getattr(one, field) for one in found]
                middle = [spread.median for spread in spreads]
                low = [spread.median - spread.low for spread in spreads]
                high = [spread.high - spread.median for spread in spreads]
                axes.errorbar(
                    [one.input_length for one in found],
                    middle,
                    yerr=[low, high],
                    color=colour,
                    marker=marker,
                    linestyle=line if cached else ":",
                    capsize=2,
                    label=model if cached else f"{model}, no cache",
                )
        axes.set(xlabel="input tokens", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(sorted({one.input_length for one in timings}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Greedy generation, batch {first.batch}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)
    figure.savefig(path.with_suffix(".svg"))
    return [path, path.with_suffix(".svg")]
