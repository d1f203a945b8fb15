"""Trains in child processes and kills them: run by test_survival.py in an interpreter of its own.

    python -m tests.train.nursery RECORDS FOLDER PROCESSES MOMENT...

Each MOMENT of a kill is starting, running or saving. Trains FOLDER/killed, which is killed, and
then FOLDER/straight, which is not. Everything is imported once; each attempt is a fork for each
process that has never seen a device, so that an attempt costs what starting costs beyond imports.
Of several processes one is killed; the others are told to leave and insisted upon, as launchers do.
Prints one line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import random
import signal
import sys
import time
import traceback
from typing import Any

import jax

from encdec.train.loop import train  # with everything it needs; no device is touched
from launch.local import free_port
from tests.train.conftest import ONE_LAYER, small_run

STEPS, EVERY = 24, 2


def config(records: str, processes: int, every: int) -> dict:
    several = processes > 1
    return small_run(
        records,
        steps=STEPS,
        checkpoint={"every": every, "keep": 2},
        model_overrides=ONE_LAYER | {"mlp_dropout": 0.1},
        log_every=1 if several else 3,
        mesh={"data": -1, "fsdp": 2} if several else {},
    )


def attempt(records: str, workdir: pathlib.Path, processes: int, every: int) -> list[int]:
    """Starts the processes of one run; their ids."""
    port, children = free_port(), []
    for index in range(processes):
        child = os.fork()
        if not child:
            _train(config(records, processes, every), workdir, port, processes, index)
        children.append(child)
    return children


def _train(run: dict, workdir: pathlib.Path, port: int, processes: int, index: int) -> None:
    log = os.open(workdir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        if processes > 1:
            jax.distributed.initialize(f"localhost:{port}", processes, index)
        train(run, workdir)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def committed(workdir: pathlib.Path) -> set[str]:
    folder = workdir / "checkpoints"
    return {p.name for p in folder.iterdir() if p.name.isdigit()} if folder.is_dir() else set()


def saving(workdir: pathlib.Path) -> bool:
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("tmp" in p.name for p in folder.iterdir())


def wait_until(children: list[int], happened) -> int | None:
    """Waits for something to happen; the exit code of a child that ends before."""
    while not happened():
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            children.remove(done)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    return None


def code_of(children: list[int]) -> int:
    """Waits for all; the first exit code that is not 0."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next((code for code in codes if code), 0)


def end(children: list[int], grace_seconds: float) -> None:
    """Tells processes to leave and kills those that are still there a little later."""
    for child in children:
        os.kill(child, signal.SIGTERM)
    time.sleep(grace_seconds)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main(records: str, workdir: pathlib.Path, processes: int, moments: list[str]) -> dict[str, Any]:
    chance, killed = random.Random(processes), []
    for moment in moments:
        children = attempt(records, workdir, processes, EVERY)
        before = committed(workdir)
        if moment == "starting":
            until = time.monotonic() + chance.uniform(0, 1.0)
            code = wait_until(children, lambda until=until: time.monotonic() > until)
        else:
            code = wait_until(children, lambda before=before: committed(workdir) - before)
            if code is None and moment == "saving":
                code = wait_until(children, lambda: saving(workdir))
            if code is None:
                time.sleep(chance.uniform(0, 0.05))
        if code is not None:
            end(children, 0)
            return {"killed": killed, "code": code}
        victim = chance.choice(children) if processes > 1 else children[0]
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        children.remove(victim)
        if children:
            end(children, chance.uniform(0, 1.0))
        killed.append(moment)
    return {"killed": killed, "code": code_of(attempt(records, workdir, processes, EVERY))}


if __name__ == "__main__":
    data, folder, workers = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
    gc.freeze()  # what was imported is there to stay
    outcome = main(data, folder / "killed", workers, sys.argv[4:])
    if not outcome["code"]:
        outcome["straight"] = code_of(attempt(data, folder / "straight", workers, 0))
    print(json.dumps(outcome))
