"""``encdec score``: a teacher's distributions on records, stored next to them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from encdec.distill.scoring_settings import ScoringSettings
from encdec.flags import Parser, add_process_options, join_processes

if TYPE_CHECKING:
    from encdec.data.records import Records


def main(argv: list[str]) -> int:
    """``encdec score --teacher=DIR --records=DIR --out=DIR``.

    Raises:
        ConfigError, DataError, CheckpointError: see ``encdec.distill.scoring.score``.
    """
    given = vars(_parser().parse_args(argv))
    fields = {field.name for field in dataclasses.fields(ScoringSettings)}
    settings = ScoringSettings(**{name: given[name] for name in fields})
    options = argparse.Namespace(**{name: given[name] for name in given.keys() - fields})
    settings.check(writes=not options.dry_run)
    join_processes(options)
    if options.dry_run:
        _dry_run(settings, options.student)
        return 0
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.distill.scoring import score
    from encdec.distill.scoring_progress import ScoringProgress

    progress = ScoringProgress(str(settings.records))
    try:
        card = score(settings, progress=progress)
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


def _dry_run(settings: ScoringSettings, student: str | None) -> None:
    """Prints what scoring will cost, and what the teacher adds to a student's training."""
    from encdec.data.records import open_records
    from encdec.distill.cost import describe_cost, describe_student, scoring_cost, student_cost
    from encdec.model import preset

    records = open_records(settings.records)
    fmt = settings.format(records.card.vocabulary.size)
    print(describe_cost(scoring_cost(_forward_flops(settings, records), records.card, fmt)))
    if student:
        print(describe_student(student, student_cost(preset(student), records.card)))


def _forward_flops(settings: ScoringSettings, records: Records) -> float:
    if settings.backend == "torch":
        from encdec.distill.torch_scorer import torch_model

        theirs = torch_model(settings.teacher, records, settings.vocabulary, settings.max_length)
        return theirs.forward_flops(records)
    from encdec.distill.scorers import scoring_model

    ours = scoring_model(settings.teacher, records, settings.step, settings.max_length)
    return ours.forward_flops(records)


def _parser() -> Parser:
    parser = Parser(
        prog="encdec score",
        description="Reads records once with a teacher and stores its distributions for "
        "students, in a few bytes per target token. Repeat the command to resume.",
    )
    ScoringSettings.add_flags(parser)
    parser.add("--dry_run", "only print what it will cost: bytes, FLOPs, hours", default=False)
    parser.add(
        "--student",
        "what the teacher adds to this student's training",
        needs="--dry_run",
        metavar="PRESET",
    )
    add_process_options(parser)
    return parser
