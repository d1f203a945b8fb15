"""Analysis of a ladder's results: laws, intervals, held-out errors, comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from encdec.errors import DataError
from encdec.metrics.intervals import Interval
from encdec.scaling.distillation import DistillationLaw, fit_distillation
from encdec.scaling.fit import Law, LawForm, Observations, fit_law, residuals
from encdec.scaling.frontier import Comparison, CostLaw, Frontier, compare, fit_cost
from encdec.scaling.law_uncertainty import (
    HeldOut,
    constant_intervals,
    hold_out_largest,
    refitted_draws,
)
from encdec.scaling.matching import DECODER_ONLY, is_distilled, plain_name
from encdec.scaling.results_file import (
    LOSSES,
    Choices,
    Row,
    final_rows,
    metrics_of,
    observations,
    seed_noise,
)
from encdec.scaling.rungs import Rung, loss_rungs, score_rungs

ENCODER_DECODER = "ed"  # all splits together, with the form "parts"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """One group of runs, and the law fitted to it.

    Attributes:
        name: of the series, or "ed".
        runs: their arrays.
        rows: their rows, in the same order.
        law: None if they do not determine one.
        reason: why not; "" if they do.
        intervals: of the law's constants; empty without draws.
        residuals: log of observed over predicted loss.
        held_out: extrapolation to the largest size; None if impossible.
        held_out_reason: why not.
        cost: FLOPs as a function of size and tokens; None without a law of the form "total".
        draws: bootstrap laws.
    """

    name: str
    runs: Observations
    rows: tuple[Row, ...]
    law: Law | None = None
    reason: str = ""
    intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
    residuals: np.ndarray | None = None
    held_out: HeldOut | None = None
    held_out_reason: str = ""
    cost: CostLaw | None = None
    draws: tuple[Law, ...] = ()

    @property
    def flops(self) -> np.ndarray:
        """Training FLOPs of the runs."""
        return self.runs.required("flops")

    @property
    def frontier(self) -> Frontier | None:
        """The frontier over the sizes that were run; it says nothing about others."""
        return Frontier(self.law, self.cost, self._sizes) if self.law and self.cost else None

    @property
    def _sizes(self) -> tuple[float, float]:
        return float(self.runs.parameters.min()), float(self.runs.parameters.max())

    @property
    def frontier_draws(self) -> list[Frontier]:
        return [Frontier(law, self.cost, self._sizes) for law in self.draws] if self.cost else []


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The distilled runs of one series, over all of its teachers, and the law fitted to them.

    Attributes:
        name: of the plain series.
        runs: arrays of all of its distilled runs.
        teacher_loss: of each run's teacher; 0 if unknown.
        law: None if they do not determine one.
        reason: why not; "" if they do.
        residuals: log of observed over predicted loss.
        overtaken_at: by parameters, with the best teacher: tokens from which gold targets alone
            are better, up to two decades beyond the runs; None if the teacher still helps
            there.
    """

    name: str
    runs: Observations
    teacher_loss: np.ndarray
    law: DistillationLaw | None = None
    reason: str = ""
    residuals: np.ndarray | None = None
    overtaken_at: dict[float, float | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Everything about one results file.

    Attributes:
        choices: what is counted as N, D and L.
        rows: all rows, of unfinished runs too.
        series: one law per architecture and split.
        parts: one law of the form "parts" for all encoder-decoders; None if there is one split.
        comparisons: encoder-decoder series against decoder-only, by series; with a teacher, both
            have it.
        against_plain: distilled series against the same series on gold targets alone.
        not_compared: series and the reason.
        distillation: by plain series, where distilled runs exist.
        rungs: losses side by side, without a law.
        scores: the same for each downstream metric.
        seed_noise: standard deviation of log loss between seeds, and degrees of freedom.
        unfinished: runs with evaluations but none after their last step.
    """

    choices: Choices
    rows: tuple[Row, ...]
    series: dict[str, Fitted]
    parts: Fitted | None
    comparisons: dict[str, Comparison]
    against_plain: dict[str, Comparison]
    not_compared: dict[str, str]
    distillation: dict[str, Distillation]
    rungs: tuple[Rung, ...]
    scores: dict[str, tuple[Rung, ...]]
    seed_noise: tuple[float, int]
    unfinished: tuple[str, ...]


def analyse(rows: Sequence[Row], choices: Choices = Choices()) -> Analysis:
    """Fits and compares as far as the rows allow, and gives the reason for everything left out.

    Raises:
        DataError: no finished run, or rows that are not numbers.
    """
    final = final_rows(rows)
    if not final:
        raise DataError(
            f"{len(rows)} rows, but no finished run; run the ladder first: encdec scaling run"
        )
    _require_numbers(final, choices)
    names = sorted({row["series"] for row in final}, key=_order)
    series = {
        name: fitted(name, [row for row in final if row["series"] == name], choices)
        for name in names
    }
    paired = [
        row
        for row in final
        if row["architecture"] == "encoder_decoder" and not is_distilled(row["series"])
    ]
    splits = {row["series"] for row in paired}
    parts = fitted(ENCODER_DECODER, paired, choices, "parts") if len(splits) > 1 else None
    comparisons: dict[str, Comparison] = {}
    against_plain: dict[str, Comparison] = {}
    not_compared: dict[str, str] = {}
    for name in names:
        plain = plain_name(name)
        pairs = []
        if plain != DECODER_ONLY:
            pairs.append((comparisons, name.replace(plain, DECODER_ONLY, 1)))
        if is_distilled(name):
            pairs.append((against_plain, plain))
        for found, other in pairs:
            if other in series:
                try:
                    found[name] = _compare(series[name], series[other])
                except DataError as error:
                    not_compared[name] = str(error)
    finished = {row["run"] for row in final}
    unfinished = sorted({row["run"] for row in rows} - finished)
    return Analysis(
        choices,
        tuple(rows),
        series,
        parts,
        comparisons,
        against_plain,
        not_compared,
        _distillation(series, final, choices),
        tuple(loss_rungs(final, choices.loss)),
        {metric: tuple(score_rungs(rows, metric)) for metric in metrics_of(rows)},
        seed_noise(final, choices.loss),
        tuple(unfinished),
    )


def _distillation(
    series: dict[str, Fitted], final: list[Row], choices: Choices
) -> dict[str, Distillation]:
    found = {}
    for plain in dict.fromkeys(plain_name(name) for name in series if is_distilled(name)):
        rows = [row for row in final if row["series"].startswith(f"{plain}+")]
        teachers = np.array([float(row.get("teacher_loss", 0.0)) for row in rows])
        one = Distillation(plain, observations(rows, choices), teachers)
        found[plain] = _distilled_law(one, series.get(plain), choices)
    return found


def _distilled_law(one: Distillation, plain: Fitted | None, choices: Choices) -> Distillation:
    if choices.loss != "nats_per_token":
        return dataclasses.replace(
            one, reason="teachers' losses are in nats per token; fit with --loss=nats_per_token"
        )
    if plain is None or plain.law is None:
        why = plain.reason if plain else "none were run"
        return dataclasses.replace(one, reason=f"the plain runs of {one.name} have no law: {why}")
    try:
        law = fit_distillation(one.runs, one.teacher_loss, plain.law)
    except DataError as error:
        return dataclasses.replace(one, reason=str(error))
    runs, best = one.runs, float(one.teacher_loss.min())
    predicted = law.loss(runs.parameters, runs.tokens, one.teacher_loss)
    span = float(runs.tokens.min()), float(runs.tokens.max()) * 100
    return dataclasses.replace(
        one,
        law=law,
        residuals=np.log(runs.loss) - np.log(predicted),
        overtaken_at={
            float(n): law.overtaken_at(float(n), best, span) for n in np.unique(runs.parameters)
        },
    )


def fitted(name: str, rows: list[Row], choices: Choices, form: LawForm = "total") -> Fitted:
    """One group of finished runs, fitted as far as possible."""
    runs = observations(rows, choices)
    found = Fitted(name, runs, tuple(rows))
    try:
        law = fit_law(runs, form)
    except DataError as error:
        return dataclasses.replace(found, reason=str(error), held_out_reason=str(error))
    held_out, why_not = None, ""
    try:
        held_out = hold_out_largest(runs, form)
    except DataError as error:
        why_not = str(error)
    draws, reason = [], ""
    if choices.draws:
        try:
            draws = refitted_draws(runs, law, choices.draws)
        except DataError as error:
            reason = f"no intervals: {error}"
    return dataclasses.replace(
        found,
        law=law,
        reason=reason,
        intervals=constant_intervals(draws),
        residuals=residuals(law, runs),
        held_out=held_out,
        held_out_reason=why_not,
        cost=fit_cost(runs) if form == "total" else None,
        draws=tuple(draws),
    )


def _compare(first: Fitted, second: Fitted) -> Comparison:
    frontiers = []
    for one in (first, second):
        if one.frontier is None:
            raise DataError(f"{one.name} has no law: {one.reason}")
        frontiers.append(one.frontier)
    low = max(one.flops.min() for one in (first, second))
    high = min(one.flops.max() for one in (first, second))
    return compare(
        frontiers[0],
        frontiers[1],
        (float(low), float(high)),
        first.frontier_draws,
        second.frontier_draws,
    )


def _require_numbers(rows: list[Row], choices: Choices) -> None:
    name = LOSSES[choices.loss]
    bad = [
        row["run"]
        for row in rows
        if not isinstance(row.get(name), (int, float)) or not np.isfinite(row[name])
    ]
    if bad:
        raise DataError(
            f"the loss is not a finite number in {len(bad)} runs: "
            f"{', '.join(bad[:5])}; leave them out with --skip=RUN, or run them again"
        )


def _order(name: str) -> tuple[bool, float, str]:
    """Encoder-decoders by decreasing encoder share, then others; each followed by its distilled
    ones."""
    if not name.startswith("ed-"):
        return True, 0.0, name
    above, _, below = plain_name(name).removeprefix("ed-").partition("of")
    return False, -int(above) / int(below), name
