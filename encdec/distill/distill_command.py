"""``encdec distill``: a teacher's logits, rollouts by a model, rounds of on-policy distillation."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from encdec.config_files import split_overrides
from encdec.distill.teacher_logits_settings import TeacherLogitsSettings
from encdec.errors import ConfigError
from encdec.flags import Parser, add_process_options, join_processes
from encdec.inference.generation_settings import add_draft_option
from encdec.logs import logger
from encdec.storage import any_path, local_path

if TYPE_CHECKING:
    from encdec.data.records import Records
    from encdec.distill.rollout import Answering

_LOG = logger(__name__)


def main(argv: list[str]) -> int:
    """``encdec distill logits``, ``encdec distill rollout`` or ``encdec distill rounds``.

    Raises:
        ConfigError, DataError, CheckpointError: see
            ``encdec.distill.teacher_logits.store_teacher_logits``,
            ``encdec.distill.rollout.rollout`` and ``encdec.distill.rounds.distill_in_rounds``.
    """
    if argv and argv[0] not in ("logits", "rollout", "rounds", "-h", "--help"):
        raise ConfigError(
            f"unknown part {argv[0]!r}; expected `encdec distill logits`, `rollout` or `rounds`"
        )
    overrides, rest = split_overrides(argv)
    options = _parser().parse_args(rest)
    if overrides and options.function is not _rounds:
        raise ConfigError(
            f"{overrides[0]} has no effect on `encdec distill {argv[0]}`, which trains nothing"
        )
    return options.function(options, overrides)


def _logits(options: argparse.Namespace, overrides: list[str]) -> int:
    given = vars(options)
    fields = {field.name for field in dataclasses.fields(TeacherLogitsSettings)}
    settings = TeacherLogitsSettings(**{name: given[name] for name in fields})
    settings.check(writes=not options.dry_run)
    join_processes(options)
    if options.dry_run:
        _dry_run(settings, options.student)
        return 0
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.distill.logits_progress import LogitsProgress
    from encdec.distill.teacher_logits import store_teacher_logits

    progress = LogitsProgress(str(settings.records))
    try:
        card = store_teacher_logits(settings, progress=progress)
    finally:
        progress.close()
    import jax

    if not jax.process_index():
        print(
            f"{card.tokens:,} tokens in {card.rows:,} rows, {card.bytes_per_token:.1f} bytes per "
            f"token, {card.pairs / max(card.tokens, 1):.1f} ids per token, the teacher's entropy "
            f"{card.entropy:.4f} nats, mass left out {card.tail:.2%}{progress.rate()}; in "
            f"{settings.out}"
        )
    return 0


def _dry_run(settings: TeacherLogitsSettings, student: str | None) -> None:
    """Prints what it will cost, and what the teacher adds to a student's training."""
    from encdec.data.records import open_records
    from encdec.distill.cost import describe_cost, describe_student, student_cost, teacher_cost
    from encdec.model import preset

    records = open_records(settings.records)
    fmt = settings.format(records.card.vocabulary.size)
    print(describe_cost(teacher_cost(_forward_flops(settings, records), records.card, fmt)))
    if student:
        print(describe_student(student, student_cost(preset(student), records.card)))


def _forward_flops(settings: TeacherLogitsSettings, records: Records) -> float:
    if settings.backend == "torch":
        from encdec.distill.torch_teacher import torch_model

        theirs = torch_model(settings.teacher, records, settings.vocabulary, settings.max_length)
        return theirs.forward_flops(records)
    from encdec.distill.teachers import teacher_model

    ours = teacher_model(settings.teacher, records, settings.step, settings.max_length)
    return ours.forward_flops(records)


def _rollout(options: argparse.Namespace, overrides: list[str]) -> int:
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.distill.rollout import RolloutTally, rollout

    begin = time.monotonic()

    def progress(written: RolloutTally) -> None:
        rate = written.target_tokens / (time.monotonic() - begin)
        _LOG.info(f"{written.rows:,} rows, {written.examples:,} answers, {rate:,.0f} tokens/s")

    card = rollout(
        options.checkpoint,
        options.records,
        options.out,
        answering=_answering(options),
        step=options.step,
        overwrite=options.overwrite,
        progress=progress,
    )
    unfinished = card.truncated.get("answers_without_eos", 0)
    print(
        f"{card.examples:,} answers in {card.rows:,} rows, {card.target_tokens:,} target tokens, "
        f"{unfinished:,} of them cut at their length, in {options.out}"
    )
    return 0


def _rounds(options: argparse.Namespace, overrides: list[str]) -> int:
    from encdec.distill.rounds import Shares, distill_in_rounds
    from encdec.train.run_config import load_config

    shares = Shares(options.gold, options.teacher_written, options.student_written)
    students = distill_in_rounds(
        load_config(options.config, overrides).to_dict(),
        options.teacher,
        options.workdir,
        options.rounds,
        shares=shares,
        answering=_answering(options),
        logits={"method": options.method, "draws": options.draws, "k": options.k},
    )
    print(f"the student of the last round: {students[-1]}")
    return 0


def _answering(options: argparse.Namespace) -> Answering:
    from encdec.distill.rollout import ON_POLICY, Answering
    from encdec.inference.generation_settings import GenerationSettings

    given = {
        name: getattr(options, name)
        for name in ("temperature", "top_k", "top_p")
        if getattr(options, name) is not None
    }
    if options.beams == 1:  # beam search has none of these, and refuses them where they are given
        given = {"temperature": ON_POLICY.temperature} | given
        if given["temperature"] > 0:  # greedy answers have no top_k
            given = {"top_k": ON_POLICY.top_k} | given
    settings = GenerationSettings(
        beams=options.beams, seed=options.seed, max_tokens=options.max_tokens, **given
    )
    return Answering(
        settings, rows=options.rows, batch_rows=options.batch_rows, draft=options.draft
    )


def _parser() -> Parser:
    parser = Parser(prog="encdec distill")
    parts = parser.add_subparsers(required=True, metavar="{logits,rollout,rounds}")
    _add_logits(parts)
    _add_rollout(parts)
    _add_rounds(parts)
    return parser


def _add_logits(parts: Any) -> None:
    part = parts.add_parser(
        "logits",
        help="a teacher's distributions on records, for students",
        description="Reads records once with a teacher and stores its distributions for "
        "students, in a few bytes per target token. Repeat the command to resume.",
    )
    part.set_defaults(function=_logits)
    TeacherLogitsSettings.add_flags(part)
    part.add("--dry_run", "only print what it will cost: bytes, FLOPs, hours", default=False)
    part.add(
        "--student",
        "what the teacher adds to this student's training",
        needs="--dry_run",
        metavar="PRESET",
    )
    add_process_options(part)


def _add_rollout(parts: Any) -> None:
    part = parts.add_parser(
        "rollout",
        help="answer the sources of records with a model",
        description="Writes records with a model's own answers: a student's, for a teacher to "
        "read (on-policy), or a teacher's (sequence-level distillation).",
    )
    part.set_defaults(function=_rollout)
    part.add(
        "--checkpoint", "work directory of encdec train or encdec import", any_path, required=True
    )
    part.add("--records", "records whose sources are answered", any_path, required=True)
    part.add("--out", "the records to write", any_path, required=True)
    part.add("--step", "the writer's checkpoint (default: the last)", int, least=0)
    part.add("--overwrite", "replace records in --out", default=False)
    _writing_options(part)


def _add_rounds(parts: Any) -> None:
    part = parts.add_parser(
        "rounds",
        help="the student writes, the teacher reads, it learns",
        description="On-policy distillation: trains a student on gold targets, and then "
        "repeatedly on a mixture with its own answers. Repeat the command to resume.",
        epilog="Example: encdec distill rounds --config=configs/distill.py:330m --rounds=3 "
        "--teacher=teacher --workdir=runs/rounds --config.data.records=data/train",
    )
    part.set_defaults(function=_rounds)
    part.add(
        "--config",
        "config file of every round's training; set any field by --config.FIELD=VALUE",
        local_path,
        required=True,
        metavar="FILE.py[:ARG]",
    )
    part.add(
        "--teacher", "work directory of encdec train or encdec import", any_path, required=True
    )
    part.add("--workdir", "receives everything", any_path, required=True)
    part.add("--rounds", "rounds after the first student", int, least=1, required=True)
    for name, default in (("gold", 1.0), ("teacher_written", 0.0), ("student_written", 1.0)):
        part.add(f"--{name}", "share of such targets", float, default, least=0, metavar="RATE")
    part.add(
        "--method",
        "what is kept of the teacher",
        default="sampled",
        choices=("sampled", "top_k", "full"),
    )
    part.add("--draws", "draws per token", int, 50, least=1, needs="--method=sampled")
    part.add("--k", "ids per token", int, 12, least=1, needs="--method=top_k")
    _writing_options(part)


def _writing_options(part: Parser) -> None:
    part.add("--temperature", "sampling temperature; 0 is greedy (default 0.9)", float)
    part.add("--top_k", "sample from the k likeliest tokens; 0: all (default 128)", int)
    part.add("--top_p", "nucleus sampling; 1: all tokens (default 1)", float)
    part.add(
        "--beams",
        "hypotheses of beam search, whose best is the answer; 1: sampling (default 1)",
        int,
        1,
    )
    part.add("--seed", "sampling seed", int, 0)
    part.add("--max_tokens", "longest answer (default: the records' targets_length)", int)
    part.add("--rows", "answer this many rows (default: all)", int, least=1)
    part.add("--batch_rows", "texts answered together", int, 64, least=1)
    add_draft_option(part)
