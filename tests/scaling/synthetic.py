"""Ladders whose law is known."""

from __future__ import annotations

import numpy as np

from encdec.scaling.fit import Law, Observations


def ladder(
    law: Law, noise: float = 0.0, seed: int = 0, sizes: int = 5, budgets: int = 5,
    shares: tuple[float, ...] = (0.6,), flops_factor: float = 6.0,
) -> Observations:
    """A grid of sizes and budgets; each of ``shares`` is an encoder's part of the parameters."""
    n, d, share = (x.ravel() for x in np.meshgrid(
        np.geomspace(3e5, 3e7, sizes), np.geomspace(1e6, 1e9, budgets), np.array(shares)))
    random = np.random.default_rng(seed)
    runs = Observations(n, d, np.ones_like(n), share * n, (1 - share) * n, flops_factor * n * d)
    loss = law.predict(runs) * np.exp(noise * random.standard_normal(len(runs)))
    return runs.replace_loss(loss)


def random_law(seed: int) -> Law:
    """Exponents and floors as published laws have them; both terms matter in the ladder."""
    random = np.random.default_rng(seed)
    alpha, beta = random.uniform(0.25, 0.5, 2)
    a, b = random.uniform(0.5, 2.0, 2)
    return Law("total", random.uniform(1.5, 2.2), a * 3e6**alpha, b * 3e7**beta, (alpha,), beta)
