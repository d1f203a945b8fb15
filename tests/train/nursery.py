"""Trains in child processes and kills them: run by test_survival.py in an interpreter of its own.

    python -m tests.train.nursery RECORDS WORKDIR KILLS SEED

Everything is imported once; each attempt is a fork that has never seen a device, so that an attempt
costs what starting costs beyond imports. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import sys
import time

from encdec.train.loop import train  # with everything it needs; no device is touched
from tests.train.conftest import small_run

STEPS, EVERY = 160, 2


def config(records: str, every: int) -> dict:
    return small_run(records, steps=STEPS, checkpoint={"every": every, "keep": 2},
                     model_overrides={"scan_layers": False, "mlp_dropout": 0.1}, log_every=7)


def attempt(records: str, workdir: pathlib.Path, every: int) -> int:
    child = os.fork()
    if child:
        return child
    log = os.open(workdir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        train(config(records, every), workdir)
        code = 0
    finally:
        os._exit(code)


def committed(workdir: pathlib.Path) -> set[str]:
    folder = workdir / "checkpoints"
    return {p.name for p in folder.iterdir() if p.name.isdigit()} if folder.is_dir() else set()


def saving(workdir: pathlib.Path) -> bool:
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("tmp" in p.name for p in folder.iterdir())


def wait_until(child: int, happened) -> int | None:
    """Waits for something to happen; the child's exit code if it ends before."""
    while not happened():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    return None


def main(records: str, workdir: pathlib.Path, kills: int, seed: int) -> dict[str, int]:
    chance = random.Random(seed)
    count = {"starting": 0, "running": 0, "saving": 0}
    while True:
        child = attempt(records, workdir, EVERY if kills else 0)
        if sum(count.values()) == kills:
            _, status = os.waitpid(child, 0)
            return count | {"code": os.waitstatus_to_exitcode(status)}
        moment = chance.choices(list(count), [1, 2, 2])[0]
        before = committed(workdir)
        if moment == "starting":
            until = time.monotonic() + chance.uniform(0, 1.0)
            code = wait_until(child, lambda until=until: time.monotonic() > until)
        else:
            code = wait_until(child, lambda before=before: committed(workdir) - before)
            if code is None and moment == "saving":
                code = wait_until(child, lambda: saving(workdir))
            if code is None:
                time.sleep(chance.uniform(0, 0.05))
        if code is not None:
            return count | {"code": code}
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        count[moment] += 1


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]),
                          int(sys.argv[4]))))
