"""``encdec benchmark distill``: the experiment, its table, pictures and JSON by one command."""

from __future__ import annotations

import pathlib
import time
from typing import Any

from encdec.flags import Parser
from encdec.logs import logger
from encdec.storage import local_path

_LOG = logger(__name__)


def main(argv: list[str]) -> int:
    """Trains a teacher and students on prepared records; a repeated call continues.

    Raises:
        ConfigError, DataError: settings or records that do not fit.
    """
    options = vars(_parser().parse_args(argv))
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.benchmarks.distill_experiment import DistillExperiment, run_experiment
    from encdec.benchmarks.distill_report import write_report

    work = pathlib.Path(options.pop("workdir"))
    out = pathlib.Path(options.pop("out") or work)
    options["teacher_records"] = options["teacher_records"] or options["records"]
    setting = DistillExperiment(work, **options)
    begin = time.monotonic()

    def say(text: str) -> None:
        _LOG.info(f"[{time.monotonic() - begin:,.0f} s] {text}")

    run_experiment(setting, say)
    print(write_report(setting, say, out))
    return 0


def _parser() -> Parser:
    from encdec.benchmarks.distill_experiment import DistillExperiment

    parser = Parser(
        prog="encdec benchmark distill",
        description="One decoder-only teacher, students of one size on gold targets alone, every "
        "logit, draws and top-k rows, at equal steps: loss, calibration, bytes, step time.",
    )
    parser.add("--workdir", "receives runs and results", local_path, required=True)
    parser.add("--records", "the students' records", local_path, required=True)
    parser.add("--eval_records", "held out", local_path, required=True)
    parser.add(
        "--teacher_records",
        "the teacher's records, if it has more (default: the students')",
        local_path,
    )
    parser.add("--out", "for the pictures (default: --workdir)", local_path)
    settings: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("student", "preset", {}),
        ("teacher", "decoder-only preset, 4 times the student or more", {}),
        ("teacher_layers", "instead of the preset's; 0 keeps it", {"least": 0}),
        ("steps", "steps of a student", {"least": 1}),
        ("teacher_steps", "steps of the teacher", {"least": 1}),
        ("batch_size", "rows per step", {"least": 1}),
        ("seeds", "students of each kind", {"least": 1}),
        ("alpha", "weight of the teacher", {"above": 0, "most": 1}),
        ("learning_rate", "Muon's peak learning rate", {"above": 0}),
    )
    for name, what, bounds in settings:
        default = getattr(DistillExperiment, name)
        parser.add(f"--{name}", what, type(default), default, **bounds)
    return parser
