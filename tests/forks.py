"""Processes of tests: forks of one interpreter that has imported what they need.

Importing takes as long as all that most of these processes do. The interpreter is Python's own
fork server; it has never touched a device, so that each fork has devices of its own.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

import encdec.cli
import encdec.train.loop
import encdec.train.train_command
from launch.local import free_port

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload([__name__])


class Fork:
    """A process that calls a function of a module; what it prints is in ``log``.

    A number that the function returns is its exit code.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        log: pathlib.Path,
        devices: int = 1,
    ):
        self._log = log
        log.write_bytes(b"")
        self._process = _FORKING.Process(
            target=_call, args=(function, arguments, log, devices, dict(os.environ))
        )
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, once it has ended; a signal's number is negative."""
        return self._process.exitcode

    def wait(self, timeout: float = 600) -> int:
        """Waits for its end.

        Raises:
            TimeoutError: it has not ended; it is killed.
        """
        self._process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self.output()}")
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kills it, if it has not ended, and waits for that."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
        self._process.join()

    def output(self) -> str:
        return self._log.read_text()


def _call(function, arguments, log: pathlib.Path, devices: int, environment) -> None:
    gc.freeze()  # what was imported is there to stay
    os.environ.update(environment)  # of the test, not of the first test with a process
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    jax.config.update("jax_num_cpu_devices", devices)
    code = function(*arguments)
    atexit._run_exitfuncs()  # as an interpreter does at its end, and a fork does not
    sys.exit(code if isinstance(code, int) else 0)


def start_together(
    each: Sequence[Sequence[str]], folder: pathlib.Path, devices: int = 1
) -> list[Fork]:
    """A command in several processes that find each other, with arguments of each; what they
    print is in files of ``folder``."""
    count = len(each)
    together = [
        "--distributed",
        f"--coordinator=localhost:{free_port()}",
        f"--num_processes={count}",
    ]
    return [
        Fork(
            encdec.cli.main,
            [[*arguments, *together, f"--process_id={index}"]],
            folder / f"process-{index}-of-{count}.log",
            devices,
        )
        for index, arguments in enumerate(each)
    ]


def finish(processes: list[Fork], code: int = 0) -> list[str]:
    """What each printed; fails unless each ends with ``code``."""
    try:
        for process in processes:
            assert process.wait() == code, process.output()
    finally:
        for process in processes:
            process.kill()
    return [process.output() for process in processes]
