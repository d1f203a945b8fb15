"""Ladders whose law is known."""

from __future__ import annotations

import dataclasses

import numpy as np

from encdec.scaling.fit import Law, Observations
from encdec.scaling.planned_runs import Plan
from encdec.scaling.results_file import describe


def ladder(
    law: Law,
    noise: float = 0.0,
    seed: int = 0,
    sizes: int = 5,
    budgets: int = 5,
    shares: tuple[float, ...] = (0.6,),
    flops_factor: float = 6.0,
) -> Observations:
    """A grid of sizes and budgets; each of ``shares`` is an encoder's part of the parameters."""
    n, d, share = (
        x.ravel()
        for x in np.meshgrid(
            np.geomspace(3e5, 3e7, sizes), np.geomspace(1e6, 1e9, budgets), np.array(shares)
        )
    )
    random = np.random.default_rng(seed)
    runs = Observations(n, d, np.ones_like(n), share * n, (1 - share) * n, flops_factor * n * d)
    loss = law.predict(runs) * np.exp(noise * random.standard_normal(len(runs)))
    return dataclasses.replace(runs, loss=loss)


def random_law(seed: int) -> Law:
    """Exponents and floors as published laws have them; both terms matter in the ladder."""
    random = np.random.default_rng(seed)
    alpha, beta = random.uniform(0.25, 0.5, 2)
    a, b = random.uniform(0.5, 2.0, 2)
    return Law("total", random.uniform(1.5, 2.2), a * 3e6**alpha, b * 3e7**beta, (alpha,), beta)


def planned_rows(plan: Plan, laws: dict[str, Law], noise: float = 0.004) -> list[dict]:
    """Result rows as a plan's runs would leave them if ``laws``, by series, were true."""
    random = np.random.default_rng(0)
    rows = []
    for run in plan.runs:
        law = laws[run.series]
        shift = noise * random.standard_normal()
        for done in (0.5, 1.0):
            step = round(done * run.steps)
            count = run.parameters.total
            loss = law.loss(count, run.target_tokens * done) * np.exp(shift)
            loss *= 1.03 if done < 1 else 1.0  # the schedule has not ended yet
            rows.append(
                describe(run)
                | {
                    "step": step,
                    "final": step == run.steps,
                    "flops": run.flops * done,
                    "source_tokens": run.source_tokens * done,
                    "target_tokens": run.target_tokens * done,
                    "loss": float(loss),
                    "bits_per_byte": float(loss) / 2,
                }
            )
    return rows
