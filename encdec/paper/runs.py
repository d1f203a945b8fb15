"""All runs of the experiment in the order of ``planned``, each in its own directory.

Finished runs are not repeated, nor are those that diverged, and the table is written after every
evaluation. Several processes may work on one directory: each run is one process's.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from encdec.cost.flops import training_flops
from encdec.distill.rollout import Answering, rollout
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.evaluation.evaluate import evaluate
from encdec.evaluation.evaluation_report import REPORT_FILE, read_report
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.evaluation.examples import of_task
from encdec.evaluation.load_models import chosen_step
from encdec.evaluation.predictions import WINDOW
from encdec.evaluation.results_table import has_papers_tasks, table, table_markdown
from encdec.files import sole_process, write_json, write_text
from encdec.inference.generation_settings import GenerationSettings
from encdec.logs import Say
from encdec.paper.comparison import comparison_markdown
from encdec.paper.corpora import Corpora
from encdec.paper.divergence import Divergence, finite_curve, has_diverged, noting_divergence
from encdec.paper.result_rows import (
    COPY,
    RUN,
    SEARCH,
    Identity,
    append_results,
    copy_row,
    diverged_rows,
    done_runs,
    read_results,
    run_rows,
)
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
from encdec.train.loop import train
from encdec.train.run_config import RunConfig

DONE_FILE = "done.json"
DIVERGED_FILE = "diverged.json"  # of a pretraining: its fine-tunings are not tried
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

    def run(self) -> str:
        """Does the missing runs that no other process is at, and returns the tables."""
        self._record_copies()
        for run in self._runs:
            if self._needed(run):
                with self._claimed(run) as mine:
                    if mine:
                        self._do(run)
        return self.write_tables()

    def _needed(self, run: Run) -> bool:
        """Whether a run is missing in the results; the teacher also if a pupil's is."""
        done = done_runs(read_results(self._results))
        if self._key(run) not in done:
            teacher = done.get(self._key(Run(TEACHER, run.column)), {})
            if run.teaching and has_diverged(teacher):
                self._say(f"{self.folder(run).name}: skipped, its teacher diverged")
                return False
            return True
        if has_diverged(done[self._key(run)]):
            return False
        pupils = [one for one in self._runs if one.teaching and one.column == run.column]
        return (
            run.row == TEACHER
            and not self._finished(run)
            and any(self._key(one) not in done for one in pupils)
        )

    def _key(self, run: Run) -> Identity:
        """What names a run in the results."""
        digest = self._setting.digest(run.with_teacher)
        return Identity(digest, self._corpora.data, run.title, run.column, run.seed)

    def _record(self, run: Run, column: Column, noted: Divergence) -> None:
        """Adds the run's lines to the results, unless they are there."""
        model, shape = model_of(self._setting, run.row), self._setting.pretrain
        steps = steps_of(self._setting, run.row, column) if noted.step is None else noted.step
        flops = steps * training_flops(
            model, column.inputs, column.targets, batch_size=column.batch_size
        )
        if shape.steps:
            ended = noted.pretraining_step
            flops += (shape.steps if ended is None else ended) * training_flops(
                model, shape.inputs, shape.targets, batch_size=shape.batch_size
            )
        key, comparison = self._key(run), self._setting.digest(with_teacher=False)
        with sole_process(self._work / "locks" / "results", wait=True):
            if key in done_runs(read_results(self._results)):
                return
            if noted:
                self._say(f"{self.folder(run).name}: diverged, {noted.message}")
                rows = diverged_rows(
                    key,
                    noted,
                    comparison=comparison,
                    tasks=column.tasks,
                    model=model,
                    training_flops=flops,
                )
            else:
                folders = {
                    DECODINGS[name]: self.folder(run) / name
                    for name, _ in evaluations(self._setting)
                }
                rows = run_rows(key, comparison=comparison, training_flops=flops, folders=folders)
            append_results(self._results, rows)

    def _record_copies(self) -> None:
        """Adds the scores of answers that are the sources themselves, unless they are there."""
        setting, data = self._setting.digest(with_teacher=False), self._corpora.data
        with sole_process(self._work / "locks" / "results", wait=True):
            there = {
                (row["setting"], row["data"], row["task"])
                for row in read_results(self._results)
                if row["kind"] == COPY
            }
            for column in self._columns:
                for name in column.tasks:
                    if (setting, data, name) in there:
                        continue
                    task = of_task(name, str(self._corpora.tasks_dir), "validation")
                    row = copy_row(task, setting=setting, data=data, column=column.name)
                    append_results(self._results, [row])

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
        noted = self._pretrain(run) or self._tune(run, column)
        if not noted:
            for folder, beams in evaluations(self._setting):
                self._evaluate(run, column, folder, beams)
        self._record(run, column, noted)
        self.write_tables()

    def _pretrain(self, run: Run) -> Divergence:
        """What became of the pretraining, in terms of a fine-tuning from it."""
        folder, shape = self._pretrained(run), self._setting.pretrain
        if not folder:
            return Divergence()
        path = folder / DIVERGED_FILE
        if not path.is_file():
            noted = self._train(
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
            if not noted:
                return noted
            write_json(path, noted.fields())
        found = json.loads(path.read_text())
        return Divergence(
            f"in pretraining (to try again, remove this line and {path}): {found['diverged']}",
            step=0,
            pretraining_step=found["diverged_step"],
        )

    def _tune(self, run: Run, column: Column) -> Divergence:
        records = self._corpora.records(column.name, "train")
        if run.teaching == "answers":
            records = self._answers(column)
        return self._train(
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

    def _train(self, folder: pathlib.Path, run: RunConfig) -> Divergence:
        if (folder / DONE_FILE).is_file():
            return Divergence()
        begin, cpu = time.monotonic(), time.process_time()
        with noting_divergence() as noted:
            summary = train(run, folder)
        jax.clear_caches()  # compiled programs of finished runs
        if not finite_curve(folder, noted):
            return noted
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
        return noted

    def _draws(self, column: Column) -> str:
        """The teacher's draws on a column's training rows; returns their directory."""
        out = self._work / "teacher-rows" / column.name
        folder = self.folder(Run(TEACHER, column.name))
        with self._alone("teacher-rows"):
            card = store_teacher_logits(
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

    def write_tables(self) -> str:
        """Writes table.md, which is returned, from the results; and table.json, the paper's table,
        from this work directory's evaluations, also as Markdown if they cover its tasks."""
        models: dict[str, list[dict[str, Any]]] = {}
        for name, report in self._reports():
            models.setdefault(name, []).append(report)
        content = table(models)
        rows = self._own_rows()
        content["diverged"] = [
            {"model": row["row"], "column": row["column"], "seed": row["seed"]}
            | {"step": row["diverged_step"], "message": row["diverged"]}
            for row in rows
            if row["kind"] == RUN and has_diverged(row)
        ]
        write_json(self._work / "table.json", content)
        text = comparison_markdown(rows)
        for run in content["diverged"]:
            text += (
                f"\nDiverged, and in no figure: {run['model']} on {run['column']}, seed "
                f"{run['seed']}: {run['message']}\n"
            )
        if has_papers_tasks(content):
            text += f"\n{table_markdown(content)}"
        write_text(self._work / "table.md", text)  # other processes write it, too
        return text

    def _own_rows(self) -> list[dict[str, Any]]:
        """The lines of the results with these settings and data, without the search's."""
        settings = [self._setting.digest(with_teacher) for with_teacher in (False, True)]
        return [
            row
            for row in read_results(self._results)
            if row["kind"] != SEARCH
            and row.get("setting") in settings
            and row.get("data", self._corpora.data) == self._corpora.data
        ]
