"""Laws of the loss in model size and data, fitted to the runs of a ladder.

    total:  L = E + A / N^alpha + B / D^beta
    parts:  L = E + A / (N_e^alpha_e N_d^alpha_d) + B / D^beta

``total`` is Hoffmann et al.'s (arXiv 2203.15556, approach 3). ``parts`` replaces its size term by
the one that Ghorbani et al. found for encoder-decoders (arXiv 2109.07740), whose loss has
a separate exponent for each stack. The fit minimizes the Huber loss of log L with delta 1e-3, in
float64, by L-BFGS with the exact gradient.

For given exponents, the law is linear in E, A and B. So a grid over the exponents alone is solved
by non-negative least squares (variable projection), and the best starts are refined: fewer starts
than a grid over all constants, and all of them close.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import optimize
from threadpoolctl import ThreadpoolController

from encdec.errors import DataError

LawForm = Literal["total", "parts"]

HUBER_DELTA = 1e-3  # of log L, as in arXiv 2203.15556
MIN_DISTINCT = 3  # distinct sizes and token counts: two points do not determine a power law's floor
_SIZE_NAMES = {"total": ("alpha",), "parts": ("alpha_encoder", "alpha_decoder")}
_EXPONENT_BOUNDS = (0.0, 3.0)
_GRID = {"total": np.geomspace(0.05, 1.5, 10), "parts": np.geomspace(0.05, 1.2, 6)}
_POLISHED_STARTS = 8
_SMALLEST_TERM = np.exp(-20.0)  # relative to the mean loss; smaller terms count as 0


@dataclasses.dataclass(frozen=True)
class Observations:
    """Runs as arrays of float64, one entry per run.

    Attributes:
        parameters: N, parameters of the model.
        tokens: D, tokens trained on.
        loss: L, nats per token (or per byte) on held-out text.
        encoder_parameters: N_e; needed by the form "parts".
        decoder_parameters: N_d; needed by the form "parts".
        flops: C, training FLOPs; needed by frontiers.
    """

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    encoder_parameters: np.ndarray | None = None
    decoder_parameters: np.ndarray | None = None
    flops: np.ndarray | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if values is None:
                continue
            values = np.asarray(values, np.float64)
            if values.shape != np.shape(self.loss):
                raise DataError(
                    f"{field.name} has shape {values.shape}, loss "
                    f"{np.shape(self.loss)}; expected one value per run"
                )
            object.__setattr__(self, field.name, values)

    def __len__(self) -> int:
        return len(self.loss)

    def select(self, index: np.ndarray) -> Observations:
        """The runs selected by a mask or an array of indices."""
        chosen: dict[str, Any] = {
            name: None if values is None else values[index]
            for name, values in self._arrays().items()
        }
        return Observations(**chosen)

    def _arrays(self) -> dict[str, np.ndarray | None]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def required(self, name: str) -> np.ndarray:
        """An array that may be missing.

        Raises:
            DataError: it is.
        """
        values = getattr(self, name)
        if values is None:
            raise DataError(f"the runs have no {name}, which this needs")
        return values


@dataclasses.dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        form: "total" or "parts".
        E: irreducible loss.
        A: of the size term.
        B: of the data term.
        size_exponents: (alpha,) or (alpha_encoder, alpha_decoder).
        beta: exponent of the data term.
        objective: mean Huber loss of log L at these constants.
        bounds_hit: constants that ended on a bound: the data do not determine them.
    """

    form: LawForm
    E: float
    A: float
    B: float
    size_exponents: tuple[float, ...]
    beta: float
    objective: float = float("nan")
    bounds_hit: tuple[str, ...] = ()

    def constants(self) -> dict[str, float]:
        """All constants by name, in the order they are written."""
        sizes = dict(zip(_SIZE_NAMES[self.form], self.size_exponents))
        return {"E": self.E, "A": self.A, "B": self.B, **sizes, "beta": self.beta}

    @property
    def alpha(self) -> float:
        """Exponent of size at a fixed ratio of encoder to decoder."""
        return float(sum(self.size_exponents))

    def predict(self, runs: Observations) -> np.ndarray:
        """Loss of each run by this law; the observed loss is not used."""
        size = sum(a * np.log(n) for a, n in zip(self.size_exponents, _sizes(runs, self.form)))
        return self.E + self.A * np.exp(-size) + self.B * runs.tokens**-self.beta

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray) -> np.ndarray:
        """Loss at ``parameters`` N and ``tokens`` D, arrays that broadcast; "total" only."""
        if self.form != "total":
            raise ValueError("a law of the form 'parts' has no single N; use predict")
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta


def fit_law(
    runs: Observations,
    form: LawForm = "total",
    *,
    starts: Sequence[Law] | None = None,
    rounds: int = 5,
) -> Law:
    """Fits a law by the Huber loss of log L.

    Args:
        runs: the ladder's runs.
        form: see the module.
        starts: laws to start from; by default a grid of exponents.
        rounds: maximum number of L-BFGS restarts from where it stopped.

    Raises:
        DataError: the runs do not determine the law (``check``); the message gives the reason.
    """
    check(runs, form)
    problem = _Problem(runs, form)
    # Threads cost a hundred times what they save on matrices this small.
    with _linear_algebra().limit(limits=1, user_api="blas"):
        thetas = [problem.from_law(law) for law in starts] if starts else problem.grid_starts()
        found = [problem.polish(theta, rounds) for theta in thetas]
    return problem.to_law(min(found, key=lambda result: result.fun))


def residuals(law: Law, runs: Observations) -> np.ndarray:
    """log of observed over predicted loss: 0.01 is a run one percent worse than the law
    predicts."""
    return np.log(runs.loss) - np.log(law.predict(runs))


def constants_of(form: LawForm) -> int:
    """Number of constants of a law."""
    return 4 + len(_SIZE_NAMES[form])


def check(runs: Observations, form: LawForm) -> None:
    """Raises DataError, with the reason, if the runs do not determine a law."""
    if form not in _SIZE_NAMES:
        raise DataError(f"form is {form!r}; expected 'total' or 'parts'")
    for name, values in runs._arrays().items():
        if values is None:
            continue
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size and name not in _unused(form):
            shown = ", ".join(f"row {i}: {values[i]}" for i in bad[:5])
            raise DataError(
                f"{name} is not a positive finite number in {bad.size} of {len(runs)} rows "
                f"({shown}); leave these runs out or run them again"
            )
    wanted = constants_of(form) + 1
    if len(runs) < wanted:
        raise DataError(
            f"{len(runs)} runs; the {constants_of(form)} constants of the form "
            f"{form!r} need at least {wanted}: run more of the ladder"
        )
    sizes = len(np.unique(runs.parameters))
    if sizes < MIN_DISTINCT:
        raise DataError(
            f"{sizes} model size{'s' * (sizes > 1)}; an exponent of size needs at "
            f"least {MIN_DISTINCT}: run more sizes of the ladder"
        )
    budgets = len(np.unique(runs.tokens))
    if budgets < MIN_DISTINCT:
        raise DataError(
            f"{budgets} token count{'s' * (budgets > 1)}; an exponent of data needs "
            f"at least {MIN_DISTINCT}: run more token budgets of the ladder"
        )
    if form == "parts" and (runs.encoder_parameters is None or runs.decoder_parameters is None):
        raise DataError("the form 'parts' needs the encoder and decoder parameters of each run")
    logs = [np.log(n) for n in _sizes(runs, form)] + [np.log(runs.tokens)]
    # Above this correlation the two exponents cannot be separated.
    columns = [(x - x.mean()) / max(x.std(), 1e-12) for x in logs]
    smallest = np.linalg.svd(np.stack(columns, 1), compute_uv=False)[-1] / np.sqrt(len(runs))
    if smallest < 0.02:
        what = "encoder and decoder sizes or tokens" if form == "parts" else "size and tokens"
        remedy = (
            "other splits or token budgets"
            if form == "parts"
            else "several token budgets at each size"
        )
        raise DataError(
            f"{what} grow in a fixed proportion over all runs, so their "
            f"exponents cannot be separated: add {remedy}"
        )


def _unused(form: LawForm) -> tuple[str, ...]:
    return ("flops",) if form == "parts" else ("flops", "encoder_parameters", "decoder_parameters")


def _sizes(runs: Observations, form: LawForm) -> list[np.ndarray]:
    if form == "total":
        return [runs.parameters]
    return [runs.required("encoder_parameters"), runs.required("decoder_parameters")]


@functools.cache
def _linear_algebra() -> ThreadpoolController:
    return ThreadpoolController()  # scans the loaded libraries, which takes milliseconds


class _Problem:
    """The objective over theta = (log E, log A', exponents of size, log B', beta).

    Sizes and tokens are divided by their geometric means, and the loss by its own (A' and B' are
    the terms' values there): constants of very different magnitude would slow L-BFGS down.
    """

    def __init__(self, runs: Observations, form: LawForm):
        self.form = form
        sizes = np.stack([np.log(n) for n in _sizes(runs, form)])
        self._size_centres = sizes.mean(1)
        self._sizes = sizes - self._size_centres[:, None]
        tokens = np.log(runs.tokens)
        self._token_centre = tokens.mean()
        self._tokens = tokens - self._token_centre
        log_loss = np.log(runs.loss)
        self._loss_centre = log_loss.mean()
        self._log_loss = log_loss - self._loss_centre
        self._count = len(sizes)

    def _split(self, theta: np.ndarray) -> tuple[float, float, np.ndarray, float, float]:
        k = self._count
        return theta[0], theta[1], theta[2 : 2 + k], theta[2 + k], theta[3 + k]

    def objective(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean Huber loss of log L over delta^2, and its gradient."""
        e, a, alphas, b, beta = self._split(theta)
        terms = np.empty((3, len(self._tokens)))
        terms[0], terms[1], terms[2] = e, a - alphas @ self._sizes, b - beta * self._tokens
        predicted = np.logaddexp.reduce(terms)
        residual = (predicted - self._log_loss) / HUBER_DELTA
        slope = np.clip(residual, -1.0, 1.0)
        # Huber's loss is slope * residual - slope^2 / 2 in both of its branches.
        value = np.mean(slope * residual - slope**2 / 2)
        shares = np.exp(terms - predicted) * slope
        gradient = (
            np.concatenate(
                [
                    [shares[0].mean(), shares[1].mean()],
                    -(self._sizes * shares[1]).mean(1),
                    [shares[2].mean(), -(self._tokens * shares[2]).mean()],
                ]
            )
            / HUBER_DELTA
        )
        return float(value), gradient

    def grid_starts(self) -> list[np.ndarray]:
        """The best starts of a grid of exponents, their constants by least squares."""
        found = []
        scale = np.exp(-self._log_loss)  # residuals relative to the loss, as in its log
        for exponents in itertools.product(_GRID[self.form], repeat=self._count + 1):
            alphas, beta = np.array(exponents[:-1]), exponents[-1]
            columns = np.stack(
                [np.ones_like(scale), np.exp(-alphas @ self._sizes), np.exp(-beta * self._tokens)],
                1,
            )
            constants, _ = optimize.nnls(columns * scale[:, None], np.ones_like(scale))
            logs = np.log(np.maximum(constants, 1e-3))
            theta = np.concatenate([logs[:2], alphas, [logs[2], beta]])
            found.append((self.objective(theta)[0], theta))
        found.sort(key=lambda entry: entry[0])
        return [theta for _, theta in found[:_POLISHED_STARTS]]

    def polish(self, theta: np.ndarray, rounds: int) -> optimize.OptimizeResult:
        """L-BFGS from ``theta``.

        Near its optimum the Huber loss with so small a delta is nearly non-smooth, so a line search
        may stop early; a restart with a fresh Hessian continues from there.
        """
        low, high = np.log(_SMALLEST_TERM), 3.0
        bounds = [
            (low, high),
            (low, high),
            *[_EXPONENT_BOUNDS] * self._count,
            (low, high),
            _EXPONENT_BOUNDS,
        ]
        found = None
        for _ in range(rounds):
            last = found
            found = optimize.minimize(
                self.objective,
                theta if last is None else last.x,
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                options={
                    "maxiter": 2000,
                    "maxfun": 4000,
                    "ftol": 1e-12,
                    "gtol": 1e-9,
                    "maxcor": 10,
                },
            )
            if last is not None and last.fun - found.fun <= 1e-6 * abs(found.fun):
                break
        return found

    def to_law(self, found: optimize.OptimizeResult) -> Law:
        e, a, alphas, b, beta = self._split(found.x)
        low = np.log(_SMALLEST_TERM)
        names = ("E", "A", *_SIZE_NAMES[self.form], "B", "beta")
        bounds = [(low,), (low,), *[_EXPONENT_BOUNDS] * self._count, (low,), _EXPONENT_BOUNDS]
        hit = tuple(
            name
            for name, value, edges in zip(names, found.x, bounds)
            if any(abs(value - edge) < 1e-6 for edge in edges)
        )
        scale = self._loss_centre
        return Law(
            self.form,
            float(np.exp(e + scale)),
            float(np.exp(a + scale + alphas @ self._size_centres)),
            float(np.exp(b + scale + beta * self._token_centre)),
            tuple(float(x) for x in alphas),
            float(beta),
            float(found.fun) * HUBER_DELTA**2,
            hit,
        )

    def from_law(self, law: Law) -> np.ndarray:
        alphas = np.array(law.size_exponents)
        logs = np.log(np.maximum([law.E, law.A, law.B], 1e-300)) - self._loss_centre
        a = logs[1] - alphas @ self._size_centres
        b = logs[2] - law.beta * self._token_centre
        low = np.log(_SMALLEST_TERM)
        return np.concatenate([[max(logs[0], low), max(a, low)], alphas, [max(b, low), law.beta]])
