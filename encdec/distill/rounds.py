"""On-policy distillation in rounds: the student writes, the teacher reads, the student learns.

    WORKDIR/gold/scored                 the teacher's rows for the gold records
    WORKDIR/teacher/{written,scored}    targets that the teacher wrote, where they have a share
    WORKDIR/round-000/student           trained without targets of its own
    WORKDIR/round-001/{written,scored}  what that student wrote, and the teacher's rows for it
    WORKDIR/round-001/student           trained on all of these, from the student before
    ...

The shares of gold, teacher-written and student-written targets are GKD's mixing ratio (arXiv
2306.13649, whose lambda is the student's share). Each part resumes after a kill, so the whole does.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from encdec.data.records import open_records
from encdec.distill.rollout import Answering, check_answering, check_writer, rollout
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.distill.teacher_logits_settings import TeacherLogitsSettings
from encdec.errors import ConfigError
from encdec.logs import Say, logger
from encdec.storage import as_path
from encdec.train.job import check_place, check_teacher
from encdec.train.loop import train
from encdec.train.run_config import RunConfig, is_directory, parse_config, to_dict

_LOG = logger(__name__)


@dataclasses.dataclass(frozen=True)
class Shares:
    """Rates of the rows of each kind in training; they need not add up to anything.

    Raises:
        ConfigError: a negative rate, or none except the student's.
    """

    gold: float = 1.0
    teacher: float = 0.0
    student: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) >= 0:
                raise ConfigError(
                    f"the share of {field.name} targets is "
                    f"{getattr(self, field.name)}; expected 0 or a positive number"
                )
        if not self.gold + self.teacher:
            raise ConfigError(
                "the shares of gold and teacher targets are both 0; expected one of "
                "them, since the first student has written nothing yet"
            )
        if not self.student:
            raise ConfigError(
                "the share of student targets is 0, so there is nothing to alternate; "
                "expected a positive number, or a single run of encdec train"
            )


@dataclasses.dataclass(frozen=True)
class _Part:
    """Records and the teacher's rows for them, with their rate in training."""

    rate: float
    records: pathlib.Path
    teacher: pathlib.Path


def distill_in_rounds(
    config: RunConfig | Mapping[str, Any],
    teacher: str | pathlib.Path,
    workdir: str | pathlib.Path,
    rounds: int,
    *,
    shares: Shares = Shares(),
    answering: Answering = Answering(),
    logits: dict[str, Any] | None = None,
    say: Say = _LOG.info,
) -> list[pathlib.Path]:
    """Trains a student, and then ``rounds`` more times on its own answers too.

    Args:
        config: of every round, ``steps`` long each; its ``data.records`` are the gold ones, and its
            ``distill.teacher`` is filled in here. Round r uses its seed plus r.
        teacher: work directory of ``encdec train`` or ``encdec import``.
        workdir: receives everything; the same call continues after a stop.
        rounds: after the first student, 1 or more.
        shares: of the three kinds of targets.
        answering: how student and teacher write, and how many of the gold records' rows; round r
            draws with its seed plus r.
        logits: keywords of ``encdec.distill.teacher_logits.store_teacher_logits``; the temperature
            is the config's.
        say: takes lines of progress.

    Returns:
        The students' work directories, the last one's being the result.

    Raises:
        ConfigError: no rounds or records, a teacher that is given twice, or a setting of answers
            or logits that no round could use; nothing was written.
        DataError, CheckpointError: see ``store_teacher_logits``, ``rollout`` and ``train``.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; expected 1 or more")
    run = _with_teacher(config, teacher)
    check_place(workdir)
    workdir, gold = as_path(workdir), as_path(run.data.records)
    kept: dict[str, Any] = {"temperature": run.distill.temperature} | (logits or {})
    _check_parts(run, gold, teacher, workdir, answering, shares, kept)
    _seeded(answering, rounds)

    def taught(records: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
        say(f"the teacher reads {records}")
        store_teacher_logits(teacher=teacher, records=records, out=out, **kept)
        return out

    def written(writer: str | pathlib.Path, out: pathlib.Path, number: int) -> pathlib.Path:
        say(f"{writer} answers {gold}")
        rollout(writer, gold, out, answering=_seeded(answering, number))
        return out

    parts = []
    if shares.gold:
        parts.append(_Part(shares.gold, gold, taught(gold, workdir / "gold" / "scored")))
    if shares.teacher:
        place = workdir / "teacher"
        text = written(teacher, place / "written", 0)
        parts.append(_Part(shares.teacher, text, taught(text, place / "scored")))
    students: list[pathlib.Path] = []
    for number in range(rounds + 1):
        place = workdir / f"round-{number:03d}"
        known = list(parts)
        if students:
            text = written(students[-1], place / "written", number)
            known.append(_Part(shares.student, text, taught(text, place / "scored")))
        say(f"round {number} of {rounds}: {run.steps:,} steps")
        start = str(students[-1]) if students else run.init_from
        train(_round(run, known, start, run.seed + number), place / "student")
        students.append(place / "student")
    return students


def _with_teacher(config: RunConfig | Mapping[str, Any], teacher: str | pathlib.Path) -> RunConfig:
    """The run with the teacher, without which its other fields of ``distill`` are refused."""
    values = to_dict(config) if isinstance(config, RunConfig) else dict(config)
    given = values.get("distill", {})
    if given.get("teacher"):
        raise ConfigError(
            f"config.distill.teacher is {given['teacher']!r}; leave it out, "
            "because --teacher reads each round's records"
        )
    run = parse_config({**values, "distill": {**given, "teacher": str(teacher)}})
    if not run.data.records:
        raise ConfigError(
            "config.data.records is empty; expected the gold records: --config.data.records=DIR"
        )
    return run


def _check_parts(
    run: RunConfig,
    gold: pathlib.Path,
    teacher: str | pathlib.Path,
    workdir: pathlib.Path,
    answering: Answering,
    shares: Shares,
    logits: dict[str, Any],
) -> None:
    """What ``rollout``, ``store_teacher_logits`` and ``train`` would refuse only after hours."""
    opened = open_records(gold)
    check_answering(opened, answering)
    if shares.teacher:
        check_writer(teacher, opened)
    settings = TeacherLogitsSettings(teacher=teacher, records=gold, out=workdir, **logits)
    settings.check()
    check_teacher(run, settings.format(opened.card.vocabulary.size))


def _seeded(answering: Answering, number: int) -> Answering:
    """How round ``number`` is answered; ConfigError where its seed is too large."""
    if not answering.settings.temperature:
        return answering  # greedy answers and beams have none
    settings = dataclasses.replace(answering.settings, seed=answering.settings.seed + number)
    return dataclasses.replace(answering, settings=settings)


def _round(run: RunConfig, parts: list[_Part], init_from: str, seed: int) -> RunConfig:
    if len(parts) == 1:
        records, teachers = str(parts[0].records), str(parts[0].teacher)
    else:
        records = ",".join(f"{part.records}={part.rate:g}" for part in parts)
        teachers = ",".join(str(part.teacher) for part in parts)
    return dataclasses.replace(
        run,
        model=init_from if is_directory(run.model) else run.model,
        seed=seed,
        init_from=init_from,
        data=dataclasses.replace(run.data, records=records),
        distill=dataclasses.replace(run.distill, teacher=teachers),
    )
