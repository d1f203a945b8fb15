"""GPU nodes under Slurm: one process per GPU; and ladders of runs as array jobs.

    python -m launch.slurm train --nodes=2 --gpus_per_node=8 --time=24:00:00 \\
        -- --config=configs/pretrain.py:1b --workdir=/shared/runs/1b ...
    python -m launch.slurm ladder --runs=48 --at_once=8 --time=12:00:00 \\
        -- --ladder=configs/scaling.py:paper --workdir=/shared/ladder ...

Both print the batch script with --dry_run and give it to sbatch without. Two minutes before the
time limit, and when Slurm preempts the job, training saves and exits with 75; the script then
requeues the job. After crashes it does so ``--max_restarts`` times, which it counts in a file next
to the output; after an error that would recur (configuration, data, checkpoint, NaN, storage) it
does not. CPU nodes, and nodes whose GPUs Slurm does not know: --gpus_per_node=0 --tasks_per_node=N.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from launch.commands import (
    FINAL_CODES,
    PREEMPTED,
    Runner,
    dry_run_option,
    environment_option,
    number_option,
    parsed,
    refuse_elsewhere,
    repeated_option,
    run_main,
    split_arguments,
    tool_option,
    train_arguments,
)

# Minutes, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, or DAYS-HOURS and what follows.
TIME = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|(?i:infinite|unlimited)"
# `encdec scaling run` ended with some failed runs: recorded, the next call tries them again.
RUNS_FAILED = 6
# How srun reports a task that ended by itself.
ENDED = "^srun: error: .*: Exited with exit code [0-9]*$"


def script(options: argparse.Namespace) -> str:
    """The batch script."""
    ladder = options.action == "ladder"
    if ladder:
        command = shlex.join([*options.encdec, "scaling", "run", *options.arguments])
        command += ' --index="$SLURM_ARRAY_TASK_ID"'
        job = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    else:
        command = shlex.join([*options.encdec, "train", *options.arguments])
        job = "$SLURM_JOB_ID"
    final = [*FINAL_CODES, *([RUNS_FAILED] if ladder else [])]
    exports = [
        f"export {name}={shlex.quote(value)}"
        for name, value in (setting.split("=", 1) for setting in options.env)
    ]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {header}" for header in _headers(options)),
        "set -uo pipefail",
        # Next to the output, as Slurm names that: relative to where sbatch was called.
        f"crashes={shlex.quote(options.logs + '/' + options.name + '-')}{job}.crashes",
        '[[ $crashes == /* ]] || crashes="$PWD/$crashes"',
        f"cd {shlex.quote(options.directory)} || exit 2",
        *exports,
        "ends=$(mktemp) || exit 1",
        "trap 'rm -f \"$ends\"' EXIT",
        "# How each task ended is read from srun's report: srun itself ends with the largest code,",
        "# which may be that of tasks it killed. Ignoring SIGTERM, the reader outlives the tasks.",
        "read_ends() (",
        "  trap '' TERM",
        f"  exec sed -u -e '/{ENDED}/{{w '\"$ends\" -e 'd' -e '}}' >&2",
        ")",
        "code=0",
        f"{{ srun {shlex.join(_srun(options))} {command} 2>&1 >&3 | read_ends; }} 3>&1 || code=$?",
        "# The code that explains the others: an error that would recur, else a planned end.",
        f"for explaining in {' '.join(map(str, [*final, PREEMPTED]))}; do",
        '  if grep -q "exit code $explaining\\$" "$ends"; then',
        "    code=$explaining",
        "    break",
        "  fi",
        "done",
        "case $code in",
        "0) ;;",
        f"{'|'.join(map(str, final))})",
        '  echo "exit code $code: it would fail again" >&2',
        "  ;;",
        f"{PREEMPTED})",
        '  echo "everything is saved; requeued"',
        f'  scontrol requeue "{job}" && exit 0',
        "  ;;",
        "*)",
        '  cat "$ends" >&2',
        '  echo "$(date) exit code $code" >>"$crashes"',
        f'  if (( $(wc -l <"$crashes") <= {options.max_restarts} )); then',
        f'    scontrol requeue "{job}" && exit 0',
        "  fi",
        "  ;;",
        "esac",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _headers(options: argparse.Namespace) -> list[str]:
    """What is asked of sbatch."""
    if options.action == "ladder":
        output = f"{options.logs}/%x-%A_%a.log"
        shape = [
            "--nodes=1",
            "--ntasks-per-node=1",
            f"--array=0-{options.runs - 1}%{options.at_once}",
        ]
    else:
        output = f"{options.logs}/%x-%j.log"
        # With GPUs one task for each: it uses the GPU of its local rank. All GPUs have to be
        # visible to every task, so they are requested per node and not per task.
        shape = [f"--nodes={options.nodes}", f"--ntasks-per-node={options.tasks_per_node}"]
    return [
        f"--job-name={options.name}",
        *shape,
        *([f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []),
        *([f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []),
        *([f"--mem={options.memory}"] if options.memory else []),
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


def _srun(options: argparse.Namespace) -> list[str]:
    """Options of srun."""
    mounts = ",".join(options.container_mount)
    return [
        # A failed process ends the others, which would otherwise wait for it forever, but not at
        # once: after a signal each process ends when it has saved, and none before the others.
        "--kill-on-bad-exit=0",
        f"--wait={options.grace_seconds}",
        "--label",
        # Since Slurm 22.05 srun does not take this over from sbatch.
        *([f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []),
        *([f"--container-image={options.container}"] if options.container else []),
        *([f"--container-mounts={mounts}"] if mounts else []),
        *options.srun,
    ]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    text = script(options)
    if options.dry_run:
        print(text, end="")
        return 0
    return Runner()(["sbatch"], stdin=text).returncode


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; ``arguments`` holds the arguments after ``--``."""
    own, given = split_arguments(argv)
    parser = _parser()
    options = parsed(parser, own)
    _check_numbers(parser, options)
    if options.container_mount and not options.container:
        parser.error("--container_mount needs --container")
    if not given:
        parser.error("expected the command's arguments after `--`")
    if options.action == "ladder":
        if not options.runs or options.runs < 1:
            parser.error(f"--runs is {options.runs}; give the plan's number of runs")
        options.arguments = train_arguments(given, alone=True)  # each run is one process
    else:
        alone = options.nodes * options.tasks_per_node == 1
        options.arguments = train_arguments(given, alone=alone)
    if options.container:
        _check_mounted(parser, options)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="After `--`: the arguments of `encdec train`, or of `encdec scaling run`.",
    )
    parser.add_argument("action", choices=("train", "ladder"))
    parser.add_argument("--name", default="encdec", help="name of the job (%(default)s)")
    number_option(parser, "--nodes", "train: number of nodes", 1)
    number_option(
        parser,
        "--gpus_per_node",
        "train: one process per GPU; ladder: GPUs of each run; 0: request none",
        1,
    )
    parser.add_argument(
        "--tasks_per_node", type=int, metavar="N", help="train: processes, if not one per GPU"
    )
    parser.add_argument(
        "--runs",
        type=int,
        metavar="N",
        help="ladder: runs of the plan, as `encdec scaling plan` counts them",
    )
    number_option(parser, "--at_once", "ladder: runs at a time", 8)
    parser.add_argument("--cpus_per_task", type=int, metavar="N")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory of each node, e.g. 200G; 0: all (default: the cluster's)",
    )
    parser.add_argument(
        "--time",
        required=True,
        help="time limit, e.g. 24:00:00; when it ends the job continues in another one",
    )
    parser.add_argument("--partition")
    parser.add_argument("--account")
    _add_cluster_flags(parser)
    return parser


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    tool_option(parser, "--sbatch", "sbatch")
    tool_option(parser, "--srun", "srun")
    parser.add_argument(
        "--container",
        metavar="IMAGE",
        help="run in this image, by pyxis: a squashfs file or REGISTRY#IMAGE:TAG",
    )
    repeated_option(
        parser,
        "--container_mount",
        "directory of the hosts inside the container (may be repeated)",
        _mount,
        "/DIR[:/DIR[:FLAGS]]",
    )
    environment_option(parser)
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
    number_option(parser, "--max_restarts", "requeues after which a crash ends the job", 10)
    number_option(
        parser, "--grace_seconds", "start saving this long before the time limit", 120, "S"
    )
    dry_run_option(parser, "print the batch script")


def _check_numbers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name, least in {"nodes": 1, "gpus_per_node": 0, "at_once": 1, "grace_seconds": 1}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}; expected {least} or more")
    places = {("train",): ("nodes", "tasks_per_node"), ("ladder",): ("runs", "at_once")}
    refuse_elsewhere(parser, options, places)
    if not re.fullmatch(TIME, options.time):
        parser.error(f"--time is {options.time!r}; expected HH:MM:SS, D-HH:MM:SS or minutes")
    if options.tasks_per_node is None:
        options.tasks_per_node = options.gpus_per_node or 1
    if options.tasks_per_node < 1:
        parser.error(f"--tasks_per_node is {options.tasks_per_node}; expected 1 or more")


def _mount(text: str) -> str:
    """``/DIR[:/DIR[:FLAGS]]``, with both sides as pyxis wants them."""
    parts = text.split(":")
    if len(parts) > 3 or not all(part.startswith("/") for part in parts[:2]) or "," in text:
        raise argparse.ArgumentTypeError(f"{text!r}; expected /DIR, /DIR:/DIR or /DIR:/DIR:FLAGS")
    return text if len(parts) > 1 else f"{text}:{text}"


def _check_mounted(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """A work directory that is not mounted would be lost with the container."""
    workdir = [a.split("=", 1)[1] for a in options.arguments if a.startswith("--workdir=")][-1]
    mounted = [pathlib.PurePosixPath(mount.split(":")[1]) for mount in options.container_mount]
    if "://" in workdir:  # in a bucket
        return
    if not any(pathlib.PurePosixPath(workdir).is_relative_to(place) for place in mounted):
        parser.error(
            f"--workdir={workdir} is not mounted in the container and would be lost with it; "
            "expected a --container_mount that holds it"
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
