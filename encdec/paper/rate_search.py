"""Learning rate and dropout chosen on held-out text, the same way for every architecture.

A trial is a short run of its own: the whole schedule, from warm-up to zero, in a fraction of the
comparison's steps, on its records. What counts is its best evaluation in held-out bits per byte,
because the comparison scores a run's best checkpoint. Each trial is a line of the results, also one
that diverges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import jax
from etils import epath

from encdec.cost.flops import count_parameters, training_flops
from encdec.errors import ConfigError
from encdec.files import sole_process, write_json
from encdec.logs import Say
from encdec.paper.corpora import Corpora
from encdec.paper.divergence import finite_curve, noting_divergence
from encdec.paper.result_rows import SEARCH, append_results, read_results
from encdec.paper.setting import TEACHER, Column, Setting, model_of, run_config, slug, steps_of
from encdec.result_lines import where_and_when
from encdec.train.loop import train

SPENT_FILE = "spent.json"


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is tried: every learning rate with every dropout, for each row and seed.

    Attributes:
        rows: names of models, students or the teacher.
        learning_rates: above 0.
        dropouts: from 0 up to, but not, 1.
        fraction: of a column's steps, above 0 and up to 1.
        seeds: of each combination, 1 or more.

    Raises:
        ConfigError: a value is out of its range, or there is none.
    """

    rows: tuple[str, ...]
    learning_rates: tuple[float, ...]
    dropouts: tuple[float, ...]
    fraction: Fraction
    seeds: int = 1

    def __post_init__(self):
        for flag, values, fits, expected in (
            ("learning_rates", self.learning_rates, lambda rate: 0 < rate < 1e3, "above 0"),
            ("dropouts", self.dropouts, lambda share: 0 <= share < 1, "from 0 up to 1"),
            ("fraction", (self.fraction,), lambda part: 0 < part <= 1, "above 0, 1 at most"),
            ("seeds", (self.seeds,), lambda count: count >= 1, "1 or more"),
        ):
            if wrong := [value for value in values if not fits(value)]:
                raise ConfigError(f"--{flag} has {wrong[0]}; expected numbers {expected}")
        for flag in ("rows", "learning_rates", "dropouts"):
            values = getattr(self, flag)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"--{flag} is empty or names {values} twice; expected each once")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One short run; ``steps`` are its own."""

    row: str
    column: str
    learning_rate: float
    dropout: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        rates = f"{self.learning_rate:g}-{self.dropout:g}"
        return f"{slug(self.row)}-{self.column}-{rates}-{self.steps}-{self.seed}"


def planned_trials(setting: Setting, grid: Grid, columns: Sequence[Column]) -> list[Trial]:
    """All trials; the models take turns, so that an interrupted search has tried the same for each.

    The dropout in use comes first, then the learning rate in use.
    """
    dropouts = sorted(grid.dropouts, key=lambda share: share != setting.dropout)
    rates = sorted(grid.learning_rates, key=lambda rate: rate != setting.optimizer.learning_rate)
    return [
        Trial(
            row,
            column.name,
            rate,
            dropout,
            max(1, round(grid.fraction * steps_of(setting, row, column))),
            seed,
        )
        for column, seed, dropout, rate, row in itertools.product(
            columns, range(grid.seeds), dropouts, rates, grid.rows
        )
    ]


def setting_of(setting: Setting, trial: Trial) -> Setting:
    """The comparison's setting with the trial's learning rate and dropout.

    The dropout is the teacher's own where it has one.
    """
    own = trial.row == TEACHER and setting.teacher_dropout >= 0
    changes: dict[str, Any] = {"teacher_dropout" if own else "dropout": trial.dropout}
    optimizer = dataclasses.replace(setting.optimizer, learning_rate=trial.learning_rate)
    return dataclasses.replace(setting, optimizer=optimizer, **changes)


class Search:
    """The trials below ``work / "search"``; several processes may divide them.

    Args:
        setting: of the comparison; ``check`` accepts it.
        work: receives everything.
        corpora: already made.
        results: receives a line of every trial; those that it has are not run again.
        say: takes lines of progress.
    """

    def __init__(
        self,
        setting: Setting,
        work: pathlib.Path,
        corpora: Corpora,
        results: pathlib.Path | epath.Path,
        say: Say,
    ):
        self._setting, self._work, self._corpora = setting, work, corpora
        self._results, self._say = results, say

    @staticmethod
    def check(setting: Setting) -> None:
        """Raises ConfigError for a comparison that pretrains, which trials do not."""
        if setting.pretrain.steps:
            raise ConfigError(
                f"config.pretrain.steps is {setting.pretrain.steps}, but a search's trials begin "
                "with drawn parameters; search with --config.pretrain.steps=0"
            )

    def run(self, grid: Grid, columns: Sequence[Column]) -> list[dict[str, Any]]:
        """Does the missing trials that no other process is at; returns the lines of the grid's."""
        trials = planned_trials(self._setting, grid, columns)
        for trial in trials:
            if trial in self._done():
                continue
            with sole_process(self._work / "locks" / f"search-{trial.name}") as mine:
                if not mine:
                    self._say(f"{trial.name}: skipped, another process is working on it")
                elif trial not in self._done():  # another process may have just ended it
                    [column] = [one for one in columns if one.name == trial.column]
                    self._try(trial, column)
        done = self._done()
        return [done[trial] for trial in trials if trial in done]

    def _done(self) -> dict[Trial, dict[str, Any]]:
        names = [field.name for field in dataclasses.fields(Trial)]
        return {
            Trial(**{name: line[name] for name in names}): line
            for line in read_results(self._results)
            if line["kind"] == SEARCH
            and line["setting"] == self._digest(line["row"])
            and line["data"] == self._corpora.data
        }

    def _digest(self, row: str) -> str:
        """Names the settings that decide a row's trials."""
        return self._setting.digest(with_teacher=row == TEACHER)

    def _try(self, trial: Trial, column: Column) -> None:
        folder = self._work / "search" / trial.name
        altered = setting_of(self._setting, trial)
        model = model_of(altered, trial.row)
        run = run_config(
            altered,
            trial.row,
            records=self._corpora.records(column.name, "train"),
            eval_records=self._corpora.records(column.name, "held_out"),
            batch_size=column.batch_size,
            steps=trial.steps,
            seed=trial.seed,
        )
        with spending(folder / SPENT_FILE), noting_divergence() as noted:
            train(run, folder)
        jax.clear_caches()
        curve = finite_curve(folder, noted)
        steps = trial.steps if noted.step is None else noted.step
        best_step, best = min(curve, key=lambda point: point[1], default=(None, None))
        flops = training_flops(model, column.inputs, column.targets, batch_size=column.batch_size)
        line = dataclasses.asdict(trial) | {
            "kind": SEARCH,
            "setting": self._digest(trial.row),
            "data": self._corpora.data,
            "of_steps": steps_of(self._setting, trial.row, column),
            "in_use": altered == self._setting,
            "bits_per_byte": best,
            "best_step": best_step,
            **noted.fields(),
            "curve": curve,
            "parameters": count_parameters(model).total,
            "training_flops": steps * flops,
        }
        line |= json.loads((folder / SPENT_FILE).read_text()) | where_and_when()
        with sole_process(self._work / "locks" / "results", wait=True):
            append_results(self._results, [line])
        ended = f"diverged: {noted.message}" if noted else f"{best:.4f} bits per byte"
        self._say(f"{trial.name}: {ended}, {line['cpu_seconds']:,.0f} CPU seconds")


@contextlib.contextmanager
def spending(path: pathlib.Path) -> Iterator[None]:
    """Adds the body's wall and processor time to those in a file, also if it is interrupted."""
    spent = {"seconds": 0.0, "cpu_seconds": 0.0}
    if path.is_file():
        spent = json.loads(path.read_text())
    begin, cpu = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        spent["seconds"] += time.monotonic() - begin
        spent["cpu_seconds"] += time.process_time() - cpu
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, spent)
