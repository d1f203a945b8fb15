"""``encdec score``: a teacher's distributions on records, stored beside them."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from encdec.errors import ConfigError
from encdec.storage import local_path
from encdec.train.train_command import add_process_options, join_processes

if TYPE_CHECKING:
    from encdec.data.records import Records
    from encdec.distill.scoring import Tally

REPORT_SECONDS = 10.0


def main(argv: list[str]) -> int:
    """``encdec score --teacher=DIR --records=DIR --out=DIR``.

    Raises:
        ConfigError, DataError, CheckpointError: see ``encdec.distill.scoring.score``.
    """
    options = _parser().parse_args(argv)
    # Imported late: a mistake in the command line is answered at once.
    from encdec.data.records import open_records
    from encdec.data.sparse_logits import SparseFormat
    from encdec.distill.cost import describe_cost, describe_student, scoring_cost, student_cost
    from encdec.distill.scoring import score
    from encdec.model import preset
    from encdec.train.config import MeshConfig

    if options.student and not options.dry_run:
        raise ConfigError(f"--student={options.student} is for --dry_run alone")
    join_processes(options)
    if options.dry_run:
        records = open_records(options.records)
        fmt = SparseFormat(
            options.method,
            records.card.vocabulary.size,
            options.draws,
            options.k,
            options.temperature,
            options.proposal,
        )
        print(describe_cost(scoring_cost(_forward_flops(options, records), records.card, fmt)))
        if options.student:
            print(
                describe_student(
                    options.student, student_cost(preset(options.student), records.card)
                )
            )
        return 0
    progress = ScoringProgress(options.records)
    try:
        card = score(
            options.teacher,
            options.records,
            options.out,
            method=options.method,
            draws=options.draws,
            k=options.k,
            temperature=options.temperature,
            proposal=options.proposal,
            step=options.step,
            seed=options.seed,
            batch_rows=options.batch_rows,
            shard_rows=options.shard_rows,
            mesh=MeshConfig(-1, options.fsdp, options.tensor),
            max_length=options.max_length,
            overwrite=options.overwrite,
            progress=progress,
            backend=options.backend,
            vocabulary=options.vocabulary,
        )
    finally:
        progress.close()
    import jax

    if not jax.process_index():
        print(
            f"{card.tokens:,} tokens in {card.rows:,} rows, {card.bytes_per_token:.1f} bytes a "
            f"token, {card.pairs / max(card.tokens, 1):.1f} ids a token, the teacher's entropy "
            f"{card.entropy:.4f} nats, mass left out {card.tail:.2%}{progress.rate()}; in "
            f"{options.out}"
        )
    return 0


def _forward_flops(options: argparse.Namespace, records: Records) -> float:
    if options.backend == "torch":
        from encdec.distill.torch_scorer import torch_model

        return torch_model(
            options.teacher, records, options.vocabulary, options.max_length
        ).forward_flops(records)
    from encdec.distill.scorers import scoring_model

    return scoring_model(options.teacher, records, options.step, options.max_length).forward_flops(
        records
    )


class ScoringProgress:
    """Tokens scored, rate, bytes a token and time left: a bar, or a line now and then."""

    def __init__(self, records: str):
        self._records, self._begin, self._said = records, 0.0, 0.0
        self._console, self._first, self._seen = None, None, None

    def __call__(self, tally: Tally) -> None:
        now = time.monotonic()
        if self._console is None:
            from encdec.data.records import open_records
            from encdec.train.metrics import Console

            self._rows = len(open_records(self._records))
            self._console = Console(self._rows, tally.rows, what="score")
            # The first batch took the compilation and what was there before.
            self._begin, self._first = now, (tally.rows, tally.tokens)
        self._seen = tally.rows, tally.tokens
        self._console.advance(tally.rows)
        if now - self._said > REPORT_SECONDS and sum(self._seen) > sum(self._first):
            self._said = now
            left = (now - self._begin) * (self._rows - tally.rows) / (tally.rows - self._first[0])
            self._console.say(
                f"{tally.rows:,} of {self._rows:,} rows{self.rate()}, "
                f"{tally.bytes / max(tally.tokens, 1):.1f} bytes a token, "
                f"{left:,.0f} s left"
            )

    def rate(self) -> str:
        """ ", N tokens/s" once there is something to tell."""
        seconds = time.monotonic() - self._begin
        if self._seen is None or self._seen == self._first or not seconds:
            return ""
        return f", {(self._seen[1] - self._first[1]) / seconds:,.0f} target tokens/s"

    def close(self) -> None:
        if self._console:
            self._console.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="encdec score",
        allow_abbrev=False,
        description="Reads records once with a teacher and stores what students need of its "
        "distributions: a few bytes a target token. Repeated after a kill, it goes on.",
    )
    parser.add_argument(
        "--teacher",
        type=local_path,
        required=True,
        metavar="DIR",
        help="work directory of encdec train or encdec import; with "
        "--backend=torch a Hugging Face directory",
    )
    parser.add_argument(
        "--backend",
        choices=("jax", "torch"),
        default="jax",
        help="torch runs a Hugging Face model as it is, for families that encdec "
        "import does not know (default %(default)s)",
    )
    parser.add_argument(
        "--vocabulary",
        type=local_path,
        metavar="FILE",
        help="of a torch teacher (default: the tokenizer.model or tokenizer.json in its directory)",
    )
    parser.add_argument(
        "--records",
        type=local_path,
        required=True,
        metavar="DIR",
        help="directory of encdec prepare",
    )
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", required=True, help="receives the shards"
    )
    parser.add_argument(
        "--method",
        default="sampled",
        choices=("sampled", "top_k", "full"),
        help="draws with replacement (unbiased), the likeliest ids, or everything "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--draws", type=int, default=50, metavar="N", help="draws a token (default %(default)s)"
    )
    parser.add_argument("--k", type=int, default=12, help="ids of top_k (default %(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="of the stored distribution (default %(default)s)",
    )
    parser.add_argument(
        "--proposal",
        type=float,
        default=1.0,
        metavar="POWER",
        help="draw from the distribution to this power, with importance weights "
        "(default %(default)s: from itself)",
    )
    parser.add_argument("--step", type=int, help="the teacher's checkpoint (default: the last)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    parser.add_argument(
        "--batch_rows",
        type=int,
        default=0,
        metavar="ROWS",
        help="in one forward pass (default: 8 a data shard)",
    )
    parser.add_argument(
        "--shard_rows",
        type=int,
        default=1024,
        metavar="ROWS",
        help="in a file; what a kill may lose (default %(default)s)",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="TOKENS",
        help="that the teacher may read at once (default: what it was made for)",
    )
    parser.add_argument("--fsdp", type=int, default=1, help="shards of the teacher's parameters")
    parser.add_argument("--tensor", type=int, default=1, help="shards of heads and MLP")
    parser.add_argument(
        "--dry_run", action="store_true", help="only print what it will cost: bytes, FLOPs, hours"
    )
    parser.add_argument(
        "--student",
        metavar="PRESET",
        help="with --dry_run: what the teacher adds to this student's training",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a scoring in --out")
    add_process_options(parser)
    return parser
