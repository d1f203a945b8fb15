"""Trains with several processes on this machine, like a pod with one process per host.

    python -m launch.local --processes=2 -- --config=configs/pretrain.py:330m --workdir=runs/330m

Arguments after ``--`` are those of ``encdec train``. Process 0 coordinates, on a free port of
the loopback address. Each line of output is marked with its process. If one process fails, the
others are stopped; an interrupt or a termination request is passed on to all, so that they can
save. The exit code is that of the first process that failed.

--dry_run prints the commands, to be run by hand or by another launcher, and starts nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from launch.commands import dry_run_option, former_option, parsed, run_main

GRACE_SECONDS = 60.0  # time that processes have to save and exit before they are killed
POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Command:
    """One process: its arguments and additional environment variables."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.arguments)])


def commands(
    train: Sequence[str], processes: int, port: int, *, cpu_devices: int = 0, gpus: int = 0
) -> list[Command]:
    """The commands of a run.

    Args:
        train: arguments of ``encdec train``.
        processes: how many.
        port: of the coordinator, on the loopback address.
        cpu_devices: if not 0, run on the CPU with this many JAX devices per process.
        gpus: if not 0, GPUs per process, of those that CUDA_VISIBLE_DEVICES names where it is set.

    Raises:
        SystemExit: it names too few.
    """
    result, named = [], os.environ.get("CUDA_VISIBLE_DEVICES")
    every = ",".join(map(str, range(processes * gpus)))
    usable = [gpu for gpu in (every if named is None else named).split(",") if gpu]
    if len(usable) < processes * gpus:
        raise SystemExit(
            f"CUDA_VISIBLE_DEVICES is {named!r}; expected {processes * gpus} GPUs, --processes "
            "times --gpus"
        )
    for index in range(processes):
        environment = {}
        if cpu_devices:
            environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(cpu_devices)}
        if gpus:
            visible = usable[index * gpus : (index + 1) * gpus]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        result.append(
            Command(
                (
                    sys.executable,
                    "-m",
                    "encdec",
                    "train",
                    *train,
                    "--distributed",
                    f"--coordinator=127.0.0.1:{port}",
                    f"--num_processes={processes}",
                    f"--process_id={index}",
                ),
                environment,
            )
        )
    return result


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def supervise(started: Sequence[Command], grace_seconds: float = GRACE_SECONDS) -> int:
    """Runs all commands to their end; returns 0, or the exit code of the first that failed."""
    processes: list[subprocess.Popen] = []
    stopping = threading.Event()

    def stop(number: int = signal.SIGTERM, _frame: object = None) -> None:
        stopping.set()
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        readers = []
        for index, command in enumerate(started):
            # Its own session: the terminal's interrupt reaches it only through stop(), once.
            process = subprocess.Popen(
                command.arguments,
                env=os.environ | dict(command.environment),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            processes.append(process)
            readers.append(threading.Thread(target=_relay, args=(index, process), daemon=True))
            readers[-1].start()
        code = _wait(processes, stop, stopping, grace_seconds)
        for reader in readers:
            reader.join(timeout=5)
        return code
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(
    processes: Sequence[subprocess.Popen],
    stop: Callable[[], None],
    stopping: threading.Event,
    grace_seconds: float,
) -> int:
    """Waits for all; stops the rest when one fails, and kills those that exceed the grace
    period."""
    failure, deadline = 0, None
    while True:
        codes = [process.poll() for process in processes]
        failure = failure or next((code for code in codes if code), 0)
        if None not in codes:
            return failure if failure >= 0 else 128 - failure  # as shells report a signal
        if failure and not stopping.is_set():
            stop()
        if stopping.is_set():
            deadline = deadline or time.monotonic() + grace_seconds
            if time.monotonic() > deadline:
                for process in processes:
                    if process.poll() is None:
                        process.kill()
        time.sleep(POLL_SECONDS)


def _relay(index: int, process: subprocess.Popen) -> None:
    assert process.stdout is not None  # it was started with a pipe
    for line in process.stdout:
        print(f"[{index}] {line}", end="", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument(
        "--cpu_devices",
        type=int,
        default=0,
        metavar="N",
        help="run on the CPU, with N JAX devices per process",
    )
    former_option(devices, "--cpu-devices", dest="cpu_devices", type=int)
    devices.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs per process")
    parser.add_argument(
        "--port", type=int, default=0, help="port of the coordinator; 0: a free one"
    )
    dry_run_option(parser, "print the commands, start nothing")
    parser.add_argument(
        "train", nargs="+", metavar="ARGUMENT", help="after `--`: the arguments of `encdec train`"
    )
    options = parsed(parser, argv)
    if options.port > 65535:
        parser.error(f"--port is {options.port}; expected 0 to 65535")
    if options.processes < 1:
        parser.error(f"--processes is {options.processes}; expected 1 or more")
    run = commands(
        options.train,
        options.processes,
        options.port or free_port(),
        cpu_devices=options.cpu_devices,
        gpus=options.gpus,
    )
    if options.dry_run:
        print("\n".join(map(str, run)))
        return 0
    return supervise(run)


if __name__ == "__main__":
    sys.exit(run_main(main))
