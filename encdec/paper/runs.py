"""All runs of the experiment, the most informative first, each in its own directory.

First one seed of every student on every task, then the teacher and its distilled
students, then further seeds. Finished runs are not repeated, and the table is written after every
evaluation.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from encdec.distill.scoring import score
from encdec.evaluation.evaluate import evaluate
from encdec.evaluation.evaluation_report import REPORT_FILE, read_report
from encdec.evaluation.loading import chosen_step
from encdec.evaluation.predictions import WINDOW
from encdec.evaluation.results_table import table, table_markdown
from encdec.evaluation.settings import EvaluationSettings
from encdec.files import write_json
from encdec.paper.corpora import Corpora, Say
from encdec.paper.setting import TEACHER, Column, Setting, run_config, slug, table_rows
from encdec.train.config import RunConfig
from encdec.train.loop import train

DONE_FILE = "done.json"
DISTILLED = "+KD"


class Experiment:
    """The runs below ``work``.

    Args:
        setting: what is run.
        work: receives everything.
        corpora: already made.
        columns: names of the columns to work on; empty: all. Several processes may divide columns
            and rows once the pretraining is done.
        rows: names of the students to work on; empty: all.
        say: takes lines of progress.
    """

    def __init__(
        self,
        setting: Setting,
        work: pathlib.Path,
        corpora: Corpora,
        columns: Sequence[str],
        rows: Sequence[str],
        say: Say,
    ):
        self._setting, self._work, self._corpora, self._say = setting, work, corpora, say
        self._columns = [c for c in setting.columns if not columns or c.name in columns]
        self._rows = [row for row in table_rows(setting) if not rows or row in rows]

    def run(self) -> dict[str, Any]:
        """Does the missing runs and returns the table's content."""
        distilled = [row for row in self._setting.distilled if row in self._rows]
        for row in self._rows:
            self._pretrain(row)
        for seed in range(self._setting.seeds):
            for column in self._columns:
                for row in self._rows:
                    self._student(row, column, seed)
            if not distilled:
                continue
            self._pretrain(TEACHER)
            for column in self._columns:
                self._tune(TEACHER, column, 0)
                self._evaluate(TEACHER, column, 0)
                teacher = self._score(column)
                for row in distilled:
                    self._student(row, column, seed, teacher)
        return self.write_table()

    def _student(self, row: str, column: Column, seed: int, teacher: str = "") -> None:
        self._tune(row, column, seed, teacher)
        self._evaluate(row, column, seed, bool(teacher))

    def folder(
        self, row: str, column: str = "", seed: int = 0, distilled: bool = False
    ) -> pathlib.Path:
        """The work directory of a pretraining, or of a fine-tuning on a column."""
        if not column:
            return self._work / "runs" / f"{slug(row)}-pretrain"
        kind = "-kd" if distilled else ""
        return self._work / "runs" / f"{slug(row)}-{column}{kind}-{seed}"

    def _pretrain(self, row: str) -> None:
        shape = self._setting.pretrain
        self._train(
            self.folder(row),
            run_config(
                self._setting,
                row,
                records=self._corpora.records("pretrain", "train"),
                eval_records=self._corpora.records("pretrain", "held_out"),
                batch_size=shape.batch_size,
                steps=shape.steps,
                seed=0,
            ),
        )

    def _tune(self, row: str, column: Column, seed: int, teacher: str = "") -> None:
        self._train(
            self.folder(row, column.name, seed, bool(teacher)),
            run_config(
                self._setting,
                row,
                records=self._corpora.records(column.name, "train"),
                eval_records=self._corpora.records(column.name, "held_out"),
                batch_size=column.batch_size,
                steps=column.steps,
                seed=seed,
                init_from=str(self.folder(row)),
                teacher=teacher,
            ),
        )

    def _train(self, folder: pathlib.Path, run: RunConfig) -> None:
        if (folder / DONE_FILE).is_file():
            return
        begin, cpu = time.monotonic(), time.process_time()
        summary = train(run, folder)
        jax.clear_caches()  # compiled programs of finished runs
        write_json(
            folder / DONE_FILE,
            {
                **summary.train,
                **summary.eval,
                "seconds": time.monotonic() - begin,
                "cpu_seconds": time.process_time() - cpu,
            },
        )
        self._say(
            f"{folder.name}: held-out loss {summary.eval['eval/loss']:.4f}, "
            f"{time.monotonic() - begin:,.0f} s"
        )

    def _score(self, column: Column) -> str:
        """The teacher's draws on a column's training rows; returns their directory."""
        out = self._work / "teacher-rows" / column.name
        out.parent.mkdir(exist_ok=True)
        if not (out / "teacher.json").is_file():
            folder = self.folder(TEACHER, column.name)
            card = score(
                teacher=folder,
                records=self._corpora.records(column.name, "train"),
                out=out,
                draws=self._setting.distill.draws,
                step=chosen_step(folder, "best"),
            )
            jax.clear_caches()
            self._say(
                f"teacher on {column.name}: {card.tokens:,} tokens, "
                f"{card.bytes_per_token:.1f} bytes a token"
            )
        return str(out)

    def _evaluate(self, row: str, column: Column, seed: int, distilled: bool = False) -> None:
        folder = self.folder(row, column.name, seed, distilled)
        out = folder / "evaluation"
        if (out / REPORT_FILE).is_file():
            return
        evaluate(
            EvaluationSettings(
                checkpoint=str(folder),
                step="best",
                tasks=column.tasks,
                data_dir=str(self._corpora.tasks_dir),
                out=str(out),
                batch_rows=WINDOW,
                too_long=column.too_long,
            )
        )
        jax.clear_caches()
        self.write_table()

    def _reports(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in [*table_rows(self._setting), TEACHER]:
            for column in self._setting.columns:
                for seed in range(self._setting.seeds):
                    for distilled in (False, True):
                        out = self.folder(row, column.name, seed, distilled) / "evaluation"
                        if (out / REPORT_FILE).is_file():
                            yield row + DISTILLED * distilled, read_report(out)

    def write_table(self) -> dict[str, Any]:
        """Writes table.md and table.json from all finished evaluations."""
        models: dict[str, list[dict[str, Any]]] = {}
        for name, report in self._reports():
            models.setdefault(name, []).append(report)
        content = table(models)
        write_json(self._work / "table.json", content)
        (self._work / "table.md").write_text(table_markdown(content))
        return content
