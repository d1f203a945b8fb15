"""All runs of the experiment in the order of ``planned``, each in its own directory.

Finished runs are not repeated, and the table is written after every evaluation. Several processes
may work on one directory: each run is one process's.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from encdec.cost.flops import training_flops
from encdec.distill.rollout import Answering, rollout
from encdec.distill.scoring import score
from encdec.evaluation.evaluate import evaluate
from encdec.evaluation.evaluation_report import REPORT_FILE, read_report
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.evaluation.load_models import chosen_step
from encdec.evaluation.predictions import WINDOW
from encdec.evaluation.results_table import table, table_markdown
from encdec.files import sole_process, write_json
from encdec.inference.generation_settings import GenerationSettings
from encdec.paper.corpora import Corpora, Say
from encdec.paper.result_rows import append_results, done_runs, read_results, run_rows
from encdec.paper.setting import (
    TEACHER,
    Column,
    Run,
    Setting,
    model_of,
    planned,
    run_config,
    slug,
    steps_of,
    table_rows,
)
from encdec.result_lines import setting_digest
from encdec.train.loop import train
from encdec.train.run_config import RunConfig

DONE_FILE = "done.json"
GREEDY = "evaluation"  # folders of a run's evaluations
BEAM = "evaluation-beam"
DECODINGS = {GREEDY: "greedy", BEAM: "beam"}  # as result rows name them


def evaluations(setting: Setting) -> list[tuple[str, int]]:
    """(folder, beams) of each evaluation of a run."""
    return [(GREEDY, 1)] + [(BEAM, setting.beams)] * (setting.beams > 1)


class Experiment:
    """The runs below ``work``.

    Args:
        setting: what is run.
        work: receives everything.
        corpora: already made.
        results: receives a line of every run; runs that it has are done.
        columns: names of the columns to work on; empty: all.
        rows: names of the students to work on; empty: all.
        say: takes lines of progress.
    """

    def __init__(
        self,
        setting: Setting,
        work: pathlib.Path,
        corpora: Corpora,
        results: pathlib.Path | epath.Path,
        columns: Sequence[str],
        rows: Sequence[str],
        say: Say,
    ):
        self._setting, self._work, self._corpora, self._say = setting, work, corpora, say
        self._results = results
        self._columns = [c for c in setting.columns if not columns or c.name in columns]
        self._rows = [row for row in table_rows(setting) if not rows or row in rows]

    def run(self) -> dict[str, Any]:
        """Does the missing runs that no other process is at, and returns the table's content."""
        for run in self._runs:
            if self._needed(run):
                with self._claimed(run) as mine:
                    if mine:
                        self._do(run)
        return self.write_table()

    def _needed(self, run: Run) -> bool:
        """Whether a run is missing in the results; the teacher also if a pupil's is."""
        done = done_runs(read_results(self._results))
        if self._key(run) not in done:
            return True
        pupils = [one for one in self._runs if one.teaching and one.column == run.column]
        return (
            run.row == TEACHER
            and not self._finished(run)
            and any(self._key(one) not in done for one in pupils)
        )

    def _key(self, run: Run) -> tuple[str, str, str, int]:
        """What names a run in the results."""
        digest = setting_digest(self._setting.identity(run.with_teacher))
        return digest, run.title, run.column, run.seed

    def _record(self, run: Run, column: Column) -> None:
        """Adds the run's line to the results, unless it is there."""
        model, shape = model_of(self._setting, run.row), self._setting.pretrain
        flops = steps_of(self._setting, run.row, column) * training_flops(
            model, column.inputs, column.targets, batch_size=column.batch_size
        )
        if shape.steps:
            flops += shape.steps * training_flops(
                model, shape.inputs, shape.targets, batch_size=shape.batch_size
            )
        with sole_process(self._work / "locks" / "results", wait=True):
            key = self._key(run)
            if key in done_runs(read_results(self._results)):
                return
            append_results(
                self._results,
                run_rows(
                    digest=key[0],
                    title=run.title,
                    column=run.column,
                    seed=run.seed,
                    training_flops=flops,
                    folders={
                        DECODINGS[name]: self.folder(run) / name
                        for name, _ in evaluations(self._setting)
                    },
                ),
            )

    @property
    def _runs(self) -> list[Run]:
        return [
            run
            for run in planned(self._setting)
            if run.column in {column.name for column in self._columns}
            and run.row in (*self._rows, TEACHER)
        ]

    @contextlib.contextmanager
    def _claimed(self, run: Run) -> Iterator[bool]:
        """Whether this process may do a run: no other is at it, and what it needs is there."""
        if run.teaching and not self._finished(Run(TEACHER, run.column)):
            self._say(
                f"{self.folder(run).name}: skipped, another process is working on the teacher"
            )
            yield False
            return
        folders, before = [self.folder(run)], self._pretrained(run)
        if before and not (before / DONE_FILE).is_file():
            folders.append(before)
        with contextlib.ExitStack() as held:
            free = [
                held.enter_context(sole_process(self._work / "locks" / folder.name))
                for folder in folders
            ]
            if not all(free):
                self._say(f"{self.folder(run).name}: skipped, another process is working on it")
            yield all(free)

    def folder(self, run: Run) -> pathlib.Path:
        """The work directory of a fine-tuning."""
        kind = {"": "", "draws": "-kd", "answers": "-seqkd"}[run.teaching]
        return self._work / "runs" / f"{slug(run.row)}-{run.column}{kind}-{run.seed}"

    def _pretrained(self, run: Run) -> pathlib.Path | None:
        """The work directory of the pretraining that a run starts from; None without any."""
        if not self._setting.pretrain.steps:
            return None
        return self._work / "runs" / f"{slug(run.row)}-pretrain"

    def _finished(self, run: Run) -> bool:
        return all(
            (self.folder(run) / folder / REPORT_FILE).is_file()
            for folder, _ in evaluations(self._setting)
        )

    def _do(self, run: Run) -> None:
        [column] = [one for one in self._columns if one.name == run.column]
        self._pretrain(run)
        self._tune(run, column)
        for folder, beams in evaluations(self._setting):
            self._evaluate(run, column, folder, beams)
        self._record(run, column)
        self.write_table()

    def _pretrain(self, run: Run) -> None:
        folder, shape = self._pretrained(run), self._setting.pretrain
        if folder:
            self._train(
                folder,
                run_config(
                    self._setting,
                    run.row,
                    records=self._corpora.records("pretrain", "train"),
                    eval_records=self._corpora.records("pretrain", "held_out"),
                    batch_size=shape.batch_size,
                    steps=shape.steps,
                    seed=0,
                ),
            )

    def _tune(self, run: Run, column: Column) -> None:
        records = self._corpora.records(column.name, "train")
        if run.teaching == "answers":
            records = self._answers(column)
        self._train(
            self.folder(run),
            run_config(
                self._setting,
                run.row,
                records=records,
                eval_records=self._corpora.records(column.name, "held_out"),
                batch_size=column.batch_size,
                steps=steps_of(self._setting, run.row, column),
                seed=run.seed,
                init_from=str(self._pretrained(run) or ""),
                teacher=self._draws(column) if run.teaching == "draws" else "",
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

    def _draws(self, column: Column) -> str:
        """The teacher's draws on a column's training rows; returns their directory."""
        out = self._work / "teacher-rows" / column.name
        folder = self.folder(Run(TEACHER, column.name))
        with self._alone("teacher-rows"):
            card = score(
                teacher=folder,
                records=self._corpora.records(column.name, "train"),
                out=out,
                draws=self._setting.distill.draws,
                step=chosen_step(folder, "best"),
            )
        self._say(
            f"teacher on {column.name}: {card.tokens:,} tokens, "
            f"{card.bytes_per_token:.1f} bytes per token"
        )
        return str(out)

    def _answers(self, column: Column) -> str:
        """Records of a column's training sources with the teacher's own answers."""
        out = self._work / "teacher-answers" / column.name
        folder = self.folder(Run(TEACHER, column.name))
        with self._alone("teacher-answers"):
            card = rollout(
                folder,
                self._corpora.records(column.name, "train"),
                out,
                answering=Answering(GenerationSettings(beams=self._setting.beams)),
                step=chosen_step(folder, "best"),
            )
        self._say(f"teacher's answers on {column.name}: {card.target_tokens:,} tokens")
        return str(out)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Makes something that several runs need: once, while others wait."""
        (self._work / name).mkdir(exist_ok=True)
        with sole_process(self._work / "locks" / name, wait=True):
            yield
        jax.clear_caches()

    def _evaluate(self, run: Run, column: Column, name: str, beams: int) -> None:
        folder = self.folder(run)
        out = folder / name
        if (out / REPORT_FILE).is_file():
            return
        whole = bool(column.evaluated_inputs)
        evaluate(
            EvaluationSettings(
                checkpoint=str(folder),
                step="best",
                tasks=column.tasks,
                data_dir=str(self._corpora.tasks_dir),
                out=str(out),
                batch_rows=WINDOW,
                too_long="cut" if whole else column.too_long,
                max_input_tokens=column.evaluated_inputs or None,
                generation=GenerationSettings(
                    max_tokens=column.evaluated_targets or None, beams=beams
                ),
                # Both tell about the model, so that once is enough.
                shuffle_sources=0 if beams == 1 else None,
                likelihood=beams == 1,
            )
        )
        jax.clear_caches()

    def _reports(self) -> Iterator[tuple[str, dict[str, Any]]]:
        runs = planned(self._setting)
        order = [*table_rows(self._setting), TEACHER]
        for run in sorted(runs, key=lambda run: order.index(run.row)):
            if (self.folder(run) / GREEDY / REPORT_FILE).is_file():
                yield run.title, read_report(self.folder(run) / GREEDY)

    def write_table(self) -> dict[str, Any]:
        """Writes table.md and table.json from all finished evaluations."""
        models: dict[str, list[dict[str, Any]]] = {}
        for name, report in self._reports():
            models.setdefault(name, []).append(report)
        content = table(models)
        write_json(self._work / "table.json", content)
        (self._work / "table.md").write_text(table_markdown(content))
        return content
