"""GPU nodes under Slurm: one process per GPU; and ladders of runs as array jobs.

    python -m launch.slurm train --nodes=2 --gpus_per_node=8 --time=24:00:00 \
        -- --config=configs/pretrain.py:1b --workdir=/shared/runs/1b ...
    python -m launch.slurm ladder --runs=72 --at_once=8 --time=12:00:00 \
        -- --ladder=configs/scaling.py:paper --workdir=/shared/ladder ...

Both print the batch script with --dry-run and give it to sbatch without. Two minutes before the
time limit, and when Slurm preempts the job, training saves and exits with 75; the script then
requeues the job. After crashes it does so ``--max_restarts`` times; after an error that would
recur (configuration, data, checkpoint, NaN) it does not.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from launch.commands import FINAL_CODES, PREEMPTED, Runner, setting_option, train_arguments

# `encdec scaling run` ended with some failed runs: recorded, the next call tries them again.
RUNS_FAILED = 6


def script(options: argparse.Namespace) -> str:
    """The batch script."""
    ladder = options.action == "ladder"
    if ladder:
        command = shlex.join([*options.encdec, "scaling", "run", *options.arguments])
        command += ' --index="$SLURM_ARRAY_TASK_ID"'
        job = '"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"'
        output = f"{options.logs}/%x-%A_%a.log"
        shape = [
            "--nodes=1",
            "--ntasks-per-node=1",
            f"--gpus-per-node={options.gpus_per_node}",
            f"--array=0-{options.runs - 1}%{options.at_once}",
        ]
    else:
        command = shlex.join([*options.encdec, "train", *options.arguments])
        job = '"$SLURM_JOB_ID"'
        output = f"{options.logs}/%x-%j.log"
        # One task per GPU: each uses the GPU of its local rank. All GPUs have to be visible to
        # every task, so they are requested per node and not per task.
        shape = [
            f"--nodes={options.nodes}",
            f"--ntasks-per-node={options.gpus_per_node}",
            f"--gpus-per-node={options.gpus_per_node}",
        ]
    headers = [
        f"--job-name={options.name}",
        *shape,
        *([f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []),
        f"--time={options.time}",
        *([f"--partition={options.partition}"] if options.partition else []),
        *([f"--account={options.account}"] if options.account else []),
        # Signal only the processes, not this script, which has to see how they end.
        f"--signal=TERM@{options.grace_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={output}",
        *options.sbatch,
    ]
    final = "|".join(map(str, [*FINAL_CODES, *([RUNS_FAILED] if ladder else [])]))
    exports = [
        f"export {name}={shlex.quote(value)}"
        for name, value in (setting.split("=", 1) for setting in options.env)
    ]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {header}" for header in headers),
        "set -uo pipefail",
        f"cd {shlex.quote(options.directory)} || exit 2",
        *exports,
        "code=0",
        "# A failed process ends the others, which would otherwise wait for it forever.",
        f"srun --kill-on-bad-exit=1 --label {command} || code=$?",
        "case $code in",
        "0) ;;",
        f'{final}) echo "exit code $code: it would fail again" ;;',
        f"{PREEMPTED}) scontrol requeue {job} && exit 0 ;;",
        "*)",
        f"  if (( ${{SLURM_RESTART_COUNT:-0}} < {options.max_restarts} )); then",
        f"    scontrol requeue {job} && exit 0",
        "  fi",
        "  ;;",
        "esac",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    text = script(options)
    if options.dry_run:
        print(text, end="")
        return 0
    return Runner()(["sbatch"], stdin=text).returncode


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; ``arguments`` holds the arguments after ``--``."""
    own, given = list(argv), []
    if "--" in own:
        own, given = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="After `--`: the arguments of `encdec train`, or of `encdec scaling run`.",
    )
    parser.add_argument("action", choices=("train", "ladder"))
    parser.add_argument("--name", default="encdec", help="name of the job (%(default)s)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="train: (%(default)s)")
    parser.add_argument(
        "--gpus_per_node",
        type=int,
        default=1,
        metavar="N",
        help="train: one process per GPU; ladder: GPUs of each run (%(default)s)",
    )
    parser.add_argument(
        "--runs",
        type=int,
        metavar="N",
        help="ladder: runs of the plan, as `encdec scaling plan` counts them",
    )
    parser.add_argument(
        "--at_once", type=int, default=8, metavar="N", help="ladder: runs at a time (%(default)s)"
    )
    parser.add_argument("--cpus_per_task", type=int, metavar="N")
    parser.add_argument(
        "--time",
        required=True,
        help="time limit, e.g. 24:00:00; when it ends the job continues in another one",
    )
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="--OPTION=VALUE",
        help="any other option of sbatch (may be repeated)",
    )
    parser.add_argument(
        "--env", action="append", default=[], type=setting_option, metavar="NAME=VALUE"
    )
    parser.add_argument(
        "--directory",
        default=".",
        help="working directory; relative to where sbatch is called (%(default)s)",
    )
    parser.add_argument(
        "--logs", default=".", metavar="DIR", help="directory of the output (%(default)s)"
    )
    parser.add_argument(
        "--encdec",
        type=shlex.split,
        default=["encdec"],
        metavar="COMMAND",
        help="command that runs encdec, e.g. '/shared/venv/bin/encdec'",
    )
    parser.add_argument(
        "--max_restarts",
        type=int,
        default=10,
        metavar="N",
        help="requeues after which a crash ends the job (%(default)s)",
    )
    parser.add_argument(
        "--grace_seconds",
        type=int,
        default=120,
        metavar="S",
        help="start saving this long before the time limit (%(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script")
    options = parser.parse_args(own)
    for name in ("nodes", "gpus_per_node", "at_once", "grace_seconds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected 1 or more")
    if not given:
        parser.error("expected the command's arguments after `--`")
    if options.action == "ladder":
        if not options.runs or options.runs < 1:
            parser.error(f"--runs is {options.runs}; give the plan's number of runs")
        options.arguments = train_arguments(given)[:-1]  # each run is one process
    else:
        options.arguments = train_arguments(given)
        if options.nodes * options.gpus_per_node == 1:
            options.arguments.remove("--distributed")
    return options


if __name__ == "__main__":
    sys.exit(main())
