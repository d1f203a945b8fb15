"""The law of a distilled student's loss in its teacher's loss, its own size and its data.

The form of Busbridge et al. (arXiv 2502.08606, equation 8), with L_T the teacher's held-out loss,
N and D the student's parameters and tokens, and L~ the loss of the same student on gold targets
alone, by the law fitted to the ladder's plain runs:

    L = L_T + L_T^-c0 (1 + (L_T / (d1 L~))^(1/f1))^(-c1 f1) (A / N^alpha + B / D^beta)^gamma

The middle factor is a broken power law: once the teacher's lead over the student reaches d1,
the effect of a still better teacher changes, and may become harmful. With a single teacher L_T does
not vary and these constants cannot be fitted; such runs are refused here and have their own law of
size and data (``fit``).
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
from scipy import optimize

from encdec.errors import DataError
from encdec.scaling.fit import HUBER_DELTA, MIN_DISTINCT, Law, Observations

NAMES = ("c0", "c1", "d1", "f1", "A", "alpha", "B", "beta", "gamma")
# theta: c0, log c1, log d1, log f1, log A', alpha, log B', beta, log gamma, with A' and B' the
# terms at the geometric means of N and D. The bounds are wider than any published constants.
_LOW = np.array([-10.0, -7.0, -2.0, -4.0, -12.0, 0.0, -12.0, 0.0, -3.0])
_HIGH = np.array([10.0, 8.0, 2.0, 1.5, 12.0, 3.0, 12.0, 3.0, 3.0])
_STARTS = {"c0": (0.0, 2.5), "c1 f1": (0.5, 5.0), "d1": (0.8, 1.3), "f1": (0.1, 0.5)}


@dataclasses.dataclass(frozen=True)
class DistillationLaw:
    """A fitted law; constants are named as in the module's docstring.

    Attributes:
        supervised: the law of the same students on gold targets alone, which gives L~.
        constants: by name.
        bounds_hit: constants that ended on a bound: the runs do not determine them.
    """

    supervised: Law
    constants: dict[str, float]
    bounds_hit: tuple[str, ...] = ()

    def loss(
        self, parameters: np.ndarray | float, tokens: np.ndarray, teacher_loss: np.ndarray | float
    ) -> np.ndarray:
        """Predicted loss of students with ``parameters`` after ``tokens``; arrays that
        broadcast."""
        c = self.constants
        teacher_loss = np.asarray(teacher_loss, np.float64)
        alone = self.supervised.loss(parameters, tokens)
        with np.errstate(over="ignore"):
            bend = np.logaddexp(0.0, np.log(teacher_loss / (c["d1"] * alone)) / c["f1"])
        own = c["A"] * parameters ** -c["alpha"] + c["B"] * tokens ** -c["beta"]
        return teacher_loss + np.exp(
            -c["c0"] * np.log(teacher_loss) - c["c1"] * c["f1"] * bend + c["gamma"] * np.log(own)
        )

    def overtaken_at(
        self, parameters: float, teacher_loss: float, tokens: tuple[float, float]
    ) -> float | None:
        """D from which gold targets alone give the lower loss.

        Args:
            parameters: of the student.
            teacher_loss: of its teacher.
            tokens: smallest and largest D to search.

        Returns:
            That D; the smallest one searched if the teacher never helps; None if it still helps
            at the largest.
        """
        grid = np.geomspace(*tokens, 400)
        gain = self.supervised.loss(parameters, grid) - self.loss(parameters, grid, teacher_loss)
        if gain[-1] > 0:
            return None
        helps = np.flatnonzero(gain > 0)
        if not helps.size:
            return float(grid[0])
        i = int(helps[-1])
        share = gain[i] / (gain[i] - gain[i + 1])
        return float(grid[i] * (grid[i + 1] / grid[i]) ** share)


def fit_distillation(
    runs: Observations, teacher_loss: np.ndarray, supervised: Law
) -> DistillationLaw:
    """Fits the law by the Huber loss of log L, delta 1e-3, from a grid of starts.

    Args:
        runs: distilled students, of one architecture and split.
        teacher_loss: of each one's teacher; same unit as the loss.
        supervised: the law of the same architecture's plain runs, form "total".

    Raises:
        DataError: the runs do not determine the law; the message gives the reason.
    """
    teacher_loss = np.asarray(teacher_loss, np.float64)
    check_distilled(runs, teacher_loss)
    problem = _Problem(runs, teacher_loss, supervised)
    found = [
        optimize.least_squares(
            problem.residuals,
            start,
            bounds=(_LOW, _HIGH),
            loss="huber",
            f_scale=HUBER_DELTA,
            x_scale="jac",
            max_nfev=400,
        )
        for start in problem.starts()
    ]
    return problem.to_law(min(found, key=lambda result: result.cost).x)


def check_distilled(runs: Observations, teacher_loss: np.ndarray) -> None:
    """Raises DataError, with the reason, if the runs do not determine the law."""
    if len(teacher_loss) != len(runs):
        raise DataError(f"{len(teacher_loss)} teachers' losses for {len(runs)} runs")
    unknown = int(np.sum(~(np.isfinite(teacher_loss) & (teacher_loss > 0))))
    if unknown:
        raise DataError(
            f"the teacher's loss of {unknown} of {len(runs)} distilled runs is "
            "unknown; set ladder.distilled.teachers.NAME.loss"
        )
    for name, values in (
        ("loss", runs.loss),
        ("parameters", runs.parameters),
        ("tokens", runs.tokens),
    ):
        if not (np.isfinite(values) & (values > 0)).all():
            raise DataError(
                f"{name} is not a positive finite number in every distilled run; leave "
                "out the others"
            )
    for what, values, remedy in (
        ("teacher loss{}", teacher_loss, "distil from more teachers"),
        ("student size{}", runs.parameters, "distil more sizes of the ladder"),
        ("token count{}", runs.tokens, "distil at more token budgets"),
    ):
        count = len(np.unique(np.round(np.log(values), 6)))
        if count < MIN_DISTINCT:
            plural = "" if count == 1 else "es" if "loss" in what else "s"
            raise DataError(
                f"{count} {what.format(plural)}; the distillation law needs at least "
                f"{MIN_DISTINCT}: {remedy}"
            )
    if len(runs) <= len(NAMES):
        raise DataError(
            f"{len(runs)} distilled runs; the {len(NAMES)} constants of the "
            f"distillation law need at least {len(NAMES) + 1}"
        )
    below = int(np.sum(runs.loss <= teacher_loss))
    if below:
        raise DataError(
            f"{below} of {len(runs)} students have a lower loss than their teacher, "
            "which this law cannot describe; leave them out with --skip=RUN, or distil "
            "from a better teacher"
        )


class _Problem:
    """Residuals of log L over theta, with sizes and tokens relative to their geometric means."""

    def __init__(self, runs: Observations, teacher_loss: np.ndarray, supervised: Law):
        self.supervised = supervised
        self._log_sizes, self._log_tokens = np.log(runs.parameters), np.log(runs.tokens)
        self._centres = self._log_sizes.mean(), self._log_tokens.mean()
        self._teacher, self._log_teacher = teacher_loss, np.log(teacher_loss)
        self._ahead = self._log_teacher - np.log(supervised.predict(runs))
        self._log_loss = np.log(runs.loss)
        self._excess = np.log(runs.loss - teacher_loss)

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        return np.log(self._teacher + np.exp(self._log_excess(theta))) - self._log_loss

    def _log_excess(self, theta: np.ndarray) -> np.ndarray:
        c0, c1, d1, f1, a, alpha, b, beta, gamma = theta
        bend = np.logaddexp(0.0, (self._ahead - d1) / np.exp(f1))
        own = np.logaddexp(
            a - alpha * (self._log_sizes - self._centres[0]),
            b - beta * (self._log_tokens - self._centres[1]),
        )
        return -c0 * self._log_teacher - np.exp(c1 + f1) * bend + np.exp(gamma) * own

    def starts(self) -> list[np.ndarray]:
        """A grid over the teacher's constants; both of the student's terms start equal."""
        alpha, beta = self.supervised.alpha, self.supervised.beta
        found = []
        for c0, product, d1, f1 in itertools.product(*_STARTS.values()):
            theta = np.array(
                [c0, math.log(product / f1), math.log(d1), math.log(f1), 0.0, alpha, 0.0, beta, 0.0]
            )
            # The level at which the mean excess loss is right.
            theta[[4, 6]] += np.mean(self._excess - self._log_excess(theta))
            found.append(np.clip(theta, _LOW + 1e-6, _HIGH - 1e-6))
        return found

    def to_law(self, theta: np.ndarray) -> DistillationLaw:
        hit = tuple(
            name
            for name, value, low, high in zip(NAMES, theta, _LOW, _HIGH)
            if min(value - low, high - value) < 1e-3
        )
        c0, c1, d1, f1, a, alpha, b, beta, gamma = (float(x) for x in theta)
        values = (
            c0,
            math.exp(c1),
            math.exp(d1),
            math.exp(f1),
            math.exp(a + alpha * self._centres[0]),
            alpha,
            math.exp(b + beta * self._centres[1]),
            beta,
            math.exp(gamma),
        )
        return DistillationLaw(self.supervised, dict(zip(NAMES, values)), hit)
