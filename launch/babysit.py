"""The next action for a queued resource and the training on it, as a pure function.

    queued -> provisioning -> active -> suspended or failed -> deleted -> created again

On an active slice: set up, started, running, and by the exit code finished (0), started again
(75, preempted: everything is saved; or a crash, a limited number of times), or given up
(configuration, data, checkpoint, NaN, storage, which would fail again).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from launch.commands import FINAL_CODES, PREEMPTED

UNAVAILABLE = 69  # exit code if no slice could be created or reached, from sysexits.h


class Action(enum.Enum):
    CREATE = "request the slice"
    WAIT = "wait"
    DELETE = "delete the slice"
    SET_UP = "set up"
    START = "start training"
    STOP = "stop what still runs"
    FINISH = "finish"


@dataclasses.dataclass(frozen=True)
class Seen:
    """Result of one poll of the resource.

    Attributes:
        resource: its state; None: it does not exist; "UNKNOWN": the query failed.
        workers: state of each host: "absent", "running" or "exited CODE"; None: a host could not
            be reached.
    """

    resource: str | None
    workers: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class PollState:
    """State kept between polls.

    Attributes:
        ready: the slice was set up since it was created.
        crashes: starts since training last ran for long.
        refusals: requests that failed since a slice was last active.
        replaced: slices given up because their hosts could not be reached, since hosts last
            answered.
        strange: consecutive polls in which hosts disagreed or could not be reached.
        running: consecutive polls in which all hosts ran.
    """

    ready: bool = False
    crashes: int = 0
    refusals: int = 0
    replaced: int = 0
    strange: int = 0
    running: int = 0


@dataclasses.dataclass(frozen=True)
class RestartLimits:
    crashes: int = 5  # in a row, before it is given up
    refusals: int = 5  # in a row
    replaced: int = 5  # in a row: then it is this machine's login that fails, not the slices
    strange: int = 5  # polls before hosts that run are stopped, or a slice is replaced
    settled: int = 30  # polls after which earlier crashes are forgotten


@dataclasses.dataclass(frozen=True)
class Decision:
    action: Action
    reason: str
    memory: PollState
    code: int = 0  # of the whole, with Action.FINISH


def decide(seen: Seen, memory: PollState, limits: RestartLimits = RestartLimits()) -> Decision:
    """The next action, its reason, and the state to keep."""
    update = lambda **changes: dataclasses.replace(memory, **changes)
    if seen.resource is None:
        return Decision(Action.CREATE, "the slice does not exist", update(ready=False))
    if seen.resource == "SUSPENDED":
        return Decision(Action.DELETE, "it was preempted", update(ready=False))
    if seen.resource == "FAILED":
        if memory.refusals >= limits.refusals:
            return Decision(
                Action.FINISH,
                f"{limits.refusals + 1} requests in a row failed; `status` shows why",
                memory,
                UNAVAILABLE,
            )
        return Decision(
            Action.DELETE, "the request failed", update(ready=False, refusals=memory.refusals + 1)
        )
    if seen.resource != "ACTIVE":
        return Decision(Action.WAIT, f"the slice is {seen.resource}", memory)
    memory = update(refusals=0)
    if seen.workers is None:
        return _unreachable(memory, limits)
    return _training(seen.workers, dataclasses.replace(memory, replaced=0), limits)


def _unreachable(memory: PollState, limits: RestartLimits) -> Decision:
    decision = _strange("hosts cannot be reached", Action.DELETE, memory, limits)
    if decision.action is not Action.DELETE:
        return decision
    if memory.replaced >= limits.replaced:
        return Decision(
            Action.FINISH,
            f"the hosts of {limits.replaced + 1} slices in a row could not be "
            "reached: see whether `state` can log in (SSH keys, OS Login, firewall)",
            memory,
            UNAVAILABLE,
        )
    return dataclasses.replace(
        decision, memory=dataclasses.replace(decision.memory, replaced=memory.replaced + 1)
    )


def _training(workers: Sequence[str], memory: PollState, limits: RestartLimits) -> Decision:
    update = lambda **changes: dataclasses.replace(memory, **changes)
    codes = [int(state.split()[1]) for state in workers if state.startswith("exited")]
    running = sum(state == "running" for state in workers)
    if running == len(workers):
        polls = memory.running + 1
        return Decision(
            Action.WAIT,
            "training runs",
            update(
                ready=True,
                strange=0,
                running=polls,
                crashes=0 if polls >= limits.settled else memory.crashes,
            ),
        )
    if running:
        # Where some have ended, the others will follow: by the same signal, the same error, or
        # because those are missing.
        reason = "training has ended on some hosts" if codes else "training runs on some hosts only"
        return _strange(reason, Action.STOP, memory, limits)
    memory = update(strange=0, running=0)
    start = lambda reason, **changes: Decision(
        Action.START if memory.ready else Action.SET_UP,
        reason,
        dataclasses.replace(memory, ready=True, **changes),
    )
    if len(codes) < len(workers):
        return start("training has not started yet")
    code = summary(codes)
    if code == 0:
        return Decision(Action.FINISH, "training is done", memory)
    if code in FINAL_CODES:
        return Decision(
            Action.FINISH,
            f"training ended with exit code {code} "
            f"({FINAL_CODES[code]}); it would fail again: see `logs`",
            memory,
            code,
        )
    if code == PREEMPTED:
        return start("training was preempted and has saved")
    if memory.crashes >= limits.crashes:
        return Decision(
            Action.FINISH,
            f"training crashed {limits.crashes + 1} times in a row, "
            f"last with exit code {code}: see `logs`",
            memory,
            code,
        )
    return start(f"training crashed with exit code {code}", crashes=memory.crashes + 1)


def _strange(reason: str, then: Action, memory: PollState, limits: RestartLimits) -> Decision:
    """Waits a few polls for the state to settle, then acts."""
    if memory.strange < limits.strange:
        return Decision(
            Action.WAIT, reason, dataclasses.replace(memory, strange=memory.strange + 1, running=0)
        )
    ready = memory.ready and then is not Action.DELETE
    return Decision(
        then,
        f"{reason}, {memory.strange + 1} polls in a row",
        dataclasses.replace(memory, strange=0, running=0, ready=ready),
    )


def summary(codes: Sequence[int]) -> int:
    """One exit code for all hosts: the one that explains the others.

    A host that stops for its own reason takes the others down, which then die by a signal.
    """
    for explaining in (*FINAL_CODES, PREEMPTED):
        if explaining in codes:
            return explaining
    return max(codes)
