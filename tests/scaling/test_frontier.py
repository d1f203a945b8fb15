"""Frontiers against brute force, and crossings of planted laws."""

from __future__ import annotations

import numpy as np
import pytest

from encdec.errors import DataError
from encdec.scaling.fit import Law, fit_law
from encdec.scaling.frontier import CostLaw, Frontier, _root, band, compare, fit_cost
from encdec.scaling.law_uncertainty import refitted_draws
from tests.scaling.synthetic import ladder

LAW = Law("total", 1.7, 400.0, 410.0, (0.34,), 0.28)
RANGE = (1e13, 1e17)


@pytest.mark.parametrize("exponent", [1.0, 0.85])
def test_frontier_is_the_best_of_all_sizes(exponent):
    frontier = Frontier(LAW, CostLaw(6.0, exponent))
    for flops in (1e14, 1e18):
        sizes = np.geomspace(1e4, 1e12, 200_001)
        losses = LAW.loss(sizes, frontier.cost.tokens(sizes, flops))
        assert frontier.loss(flops) == pytest.approx(losses.min(), rel=1e-9)
        assert frontier.parameters(flops) == pytest.approx(sizes[losses.argmin()], rel=1e-3)
        assert frontier.flops(frontier.loss(flops)) == pytest.approx(flops, rel=1e-9)
    growth = np.log(frontier.parameters(1e18) / frontier.parameters(1e14)) / np.log(1e4)
    assert growth == pytest.approx(frontier.size_exponent)


def test_frontier_within_the_sizes_run():
    bounded = Frontier(LAW, CostLaw(6.0, 0.9), (3e6, 3e7))
    for flops in (1e12, 1e16, 1e22):  # best at the smallest, between, at the largest
        sizes = np.geomspace(3e6, 3e7, 100_001)
        losses = LAW.loss(sizes, bounded.cost.tokens(sizes, flops))
        assert bounded.loss(flops) == pytest.approx(losses.min(), rel=1e-8)
        assert bounded.flops(bounded.loss(flops)) == pytest.approx(flops, rel=1e-6)
    assert bounded.parameters(1e12) == 3e6 and bounded.parameters(1e22) == 3e7
    # Below what the largest size can reach with all data of the world.
    assert np.isinf(bounded.flops(np.array([1.7 + 400 * 3e7**-0.34 - 1e-6])))


def test_no_flops_reach_the_floor():
    assert np.isinf(Frontier(LAW, CostLaw(6.0, 1.0)).flops(np.array([1.7, 1.0]))).all()


def test_exponents_at_their_bound_of_zero():
    """Bootstrap draws of few runs end there: the smallest size is best, or tokens do not count."""
    cost, sizes, losses = CostLaw(6.0, 0.9), (3e6, 3e7), np.array([9.0, 4.0, 3.0])
    no_size = Frontier(Law("total", 1.7, 0.2, 410.0, (0.0,), 0.28), cost, sizes)
    assert no_size.parameters(1e15) == 3e6
    assert no_size.flops(no_size.loss(np.array([1e15]))) == pytest.approx(1e15)
    no_tokens = Frontier(Law("total", 1.7, 400.0, 0.5, (0.34,), 0.0), cost, sizes)
    assert no_tokens.parameters(1e15) == 3e7
    assert list(no_tokens.flops(losses)) == [0.0, 0.0, np.inf]
    draws = [no_size, no_tokens, Frontier(Law("total", 1.7, 1.0, 0.5, (0.0,), 0.0), cost, sizes)]
    compare(no_size, Frontier(LAW, cost, sizes), RANGE, draws, draws[::-1])


def test_cost_is_fitted_with_its_error():
    runs = ladder(LAW, flops_factor=4.0)
    cost = fit_cost(runs)
    assert (cost.factor, cost.exponent) == (pytest.approx(4.0), pytest.approx(1.0))
    assert cost.largest_error < 1e-9


def test_ratio_of_equal_laws_is_that_of_their_prices():
    found = compare(Frontier(LAW, CostLaw(4.0, 1.0)), Frontier(LAW, CostLaw(6.0, 1.0)), RANGE)
    assert found.ratio == pytest.approx(np.full(50, 1.5))
    assert found.crossing.flops is None and np.isnan(found.crossing.share)


def test_crossing_is_found_inside_and_outside_the_range():
    # Steeper in data but behind at first.
    steep = Frontier(Law("total", 1.7, 400.0, 900.0, (0.34,), 0.32), CostLaw(6.0, 1.0))
    flat = Frontier(LAW, CostLaw(6.0, 1.0))
    found = compare(steep, flat, RANGE).crossing
    assert not found.extrapolated
    assert steep.loss(found.flops) == pytest.approx(flat.loss(found.flops), rel=1e-6)
    beyond = compare(steep, flat, (1e13, found.flops / 3)).crossing
    assert beyond.extrapolated and beyond.flops == pytest.approx(found.flops, rel=1e-3)


def test_draws_say_how_sure_the_comparison_is():
    def fitted(law, seed):
        runs = ladder(law, noise=0.003, seed=seed)
        best = fit_law(runs)
        cost = fit_cost(runs)
        draws = [Frontier(draw, cost) for draw in refitted_draws(runs, best, 40, seed)]
        return Frontier(best, cost), draws

    better = Law("total", 1.7, 340.0, 350.0, (0.34,), 0.28)
    (first, firsts), (second, seconds) = fitted(better, 1), fitted(LAW, 2)
    found = compare(first, second, RANGE, firsts, seconds)
    assert found.share_first_ahead > 0.95
    assert (found.ratio_band[0] <= found.ratio).all() and (found.ratio <= found.ratio_band[1]).all()
    true = Frontier(LAW, CostLaw(6.0, 1.0)).flops(found.losses) / (
        Frontier(better, CostLaw(6.0, 1.0)).flops(found.losses)
    )
    inside = (found.ratio_band[0] <= true) & (true <= found.ratio_band[1])
    assert inside.mean() > 0.8
    assert (band(firsts, found.flops)[0] <= found.first_loss).all()


def test_refuses_disjoint_ranges():
    frontier = Frontier(LAW, CostLaw(6.0, 1.0))
    with pytest.raises(DataError, match="share no range"):
        compare(frontier, frontier, (1e15, 1e14))


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_frontiers_that_meet_on_a_point_of_the_grid_cross(shift):
    class Line:
        def __init__(self, slope):
            self.slope = slope

        def loss(self, flops):
            return self.slope * (np.round(np.log10(flops), 9) - shift)

    grid = np.linspace(-1, 1, 5)
    assert _root(Line(1.0), Line(0.0), grid, 0.0) == pytest.approx(shift)
    assert _root(Line(1.0), Line(1.0), grid, 0.0) is None
