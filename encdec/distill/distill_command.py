"""``encdec distill``: rollouts by a model, and rounds of on-policy distillation."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from encdec.config_files import split_overrides
from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.inference.generation_settings import add_draft_option
from encdec.logs import logger
from encdec.storage import any_path, local_path

if TYPE_CHECKING:
    from encdec.distill.rollout import Answering

_LOG = logger(__name__)


def main(argv: list[str]) -> int:
    """``encdec distill rollout --checkpoint=DIR ...`` or ``rounds --teacher=DIR ...``.

    Raises:
        ConfigError, DataError, CheckpointError: see ``encdec.distill.rollout.rollout`` and
            ``encdec.distill.rounds.distill_in_rounds``.
    """
    if argv and argv[0] not in ("rollout", "rounds", "-h", "--help"):
        raise ConfigError(
            f"unknown part {argv[0]!r}; expected `encdec distill rollout` or `rounds`"
        )
    overrides, rest = split_overrides(argv)
    options = _parser().parse_args(rest)
    if overrides and options.function is not _rounds:
        raise ConfigError(
            f"{overrides[0]} has no effect on `encdec distill rollout`, which trains nothing"
        )
    return options.function(options, overrides)


def _rollout(options: argparse.Namespace, overrides: list[str]) -> int:
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.distill.rollout import Written, rollout

    begin = time.monotonic()

    def progress(written: Written) -> None:
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
    from encdec.train.run_config import parse_config
    from encdec.train.train_command import load_config

    shares = Shares(options.gold, options.teacher_written, options.student_written)
    run = parse_config(load_config(options.config, overrides))
    students = distill_in_rounds(
        run,
        options.teacher,
        options.workdir,
        options.rounds,
        shares=shares,
        answering=_answering(options),
        scoring={
            "method": options.method,
            "draws": options.draws,
            "k": options.k,
            "temperature": run.distill.temperature,
        },
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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="encdec distill")
    parts = parser.add_subparsers(required=True, metavar="{rollout,rounds}")
    _add_rollout(parts)
    _add_rounds(parts)
    return parser


def _add_rollout(parts: Any) -> None:
    part = parts.add_parser(
        "rollout",
        help="answer the sources of records with a model",
        description="Writes records with a model's own answers: a student's, for a teacher to "
        "score (on-policy), or a teacher's (sequence-level distillation).",
    )
    part.set_defaults(function=_rollout)
    part.add_argument(
        "--checkpoint",
        type=any_path,
        required=True,
        metavar="DIR",
        help="work directory of encdec train or encdec import",
    )
    part.add_argument(
        "--records",
        type=any_path,
        required=True,
        metavar="DIR",
        help="records whose sources are answered",
    )
    part.add_argument(
        "--out", type=any_path, required=True, metavar="DIR", help="the records to write"
    )
    part.add_argument("--step", type=int, help="the writer's checkpoint (default: the last)")
    part.add_argument("--overwrite", action="store_true", help="replace records in --out")
    _writing_options(part)


def _add_rounds(parts: Any) -> None:
    part = parts.add_parser(
        "rounds",
        help="the student writes, the teacher scores, it learns",
        description="On-policy distillation: trains a student on gold targets, and then "
        "repeatedly on a mixture with its own answers. Repeat the command to resume.",
        epilog="Example: encdec distill rounds --config=configs/distill.py:330m --rounds=3 "
        "--teacher=teacher --workdir=runs/rounds --config.data.records=data/train",
    )
    part.set_defaults(function=_rounds)
    part.add_argument(
        "--config",
        type=local_path,
        required=True,
        metavar="FILE.py[:ARG]",
        help="config file of every round's training; set any field by --config.FIELD=VALUE",
    )
    part.add_argument(
        "--teacher",
        type=any_path,
        required=True,
        metavar="DIR",
        help="work directory of encdec train or encdec import",
    )
    part.add_argument(
        "--workdir", type=any_path, required=True, metavar="DIR", help="receives everything"
    )
    part.add_argument(
        "--rounds",
        type=int,
        required=True,
        metavar="N",
        help="number of rounds after the first student",
    )
    for name, default in (("gold", 1.0), ("teacher_written", 0.0), ("student_written", 1.0)):
        part.add_argument(
            f"--{name}",
            type=float,
            default=default,
            metavar="RATE",
            help="share of such targets (default %(default)s)",
        )
    part.add_argument(
        "--method",
        choices=("sampled", "top_k", "full"),
        default="sampled",
        help="what is kept of the teacher (default %(default)s)",
    )
    part.add_argument(
        "--draws",
        type=int,
        default=50,
        help="draws per token with --method=sampled (default %(default)s)",
    )
    part.add_argument(
        "--k", type=int, default=12, help="ids per token with --method=top_k (default %(default)s)"
    )
    _writing_options(part)


def _writing_options(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "--temperature", type=float, help="sampling temperature; 0 is greedy (default 0.9)"
    )
    part.add_argument(
        "--top_k", type=int, help="sample from the k likeliest tokens; 0: all (default 128)"
    )
    part.add_argument("--top_p", type=float, help="nucleus sampling; 1: all tokens (default 1)")
    part.add_argument(
        "--beams",
        type=int,
        default=1,
        metavar="N",
        help="hypotheses of beam search, whose best is the answer; 1: sampling (default 1)",
    )
    part.add_argument("--seed", type=int, default=0, help="sampling seed (default %(default)s)")
    part.add_argument(
        "--max_tokens",
        type=int,
        metavar="N",
        help="longest answer (default: the records' targets_length)",
    )
    part.add_argument("--rows", type=int, help="answer this many rows (default: all)")
    part.add_argument(
        "--batch_rows",
        type=int,
        default=64,
        metavar="N",
        help="texts answered together (default %(default)s)",
    )
    add_draft_option(part)
