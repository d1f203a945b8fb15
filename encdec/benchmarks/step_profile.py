"""Where the time of a compiled step goes, by part of the model: the profiler's events of the
program's own operations, put to parts by the names that the operations were traced under."""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

# The first that a name contains; see ``part_of``.
_PARTS = (
    ("head and loss", ("logits",)),
    ("norms", ("norm",)),
    ("attention", ("attention",)),
    ("MLP", ("/mlp",)),
    ("embedding", ("embedder",)),
)
OPTIMIZER, OTHER, LOSS = "optimizer", "other", "head and loss"
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


def part_of(op_name: str) -> str:
    """ "attention", "MLP", ..., with ", backward" where it is the gradient's; "optimizer" of all
    that no differentiated function has traced.

    Norms inside attention (of queries and keys) count as norms.
    """
    if "jvp(" not in op_name:
        return OPTIMIZER if op_name else OTHER
    part = next((name for name, words in _PARTS if any(w in op_name for w in words)), None)
    if part is None:
        part = LOSS if "hidden" not in op_name else "residuals and masks"
    return part + (", backward" if "transpose(" in op_name else "")


def parts_of_program(hlo_text: str) -> dict[str, str]:
    """The part of every instruction of a compiled program.

    An instruction without a name of its own (a fusion that the compiler made) belongs to the part
    of most of the instructions within it.
    """
    inside: dict[str, list[str]] = collections.defaultdict(list)
    found: dict[str, tuple[str, str]] = {}
    computation = ""
    for line in hlo_text.splitlines():
        if begins := _COMPUTATION.match(line):
            computation = begins[1]
        elif instruction := _INSTRUCTION.match(line):
            name, calls = _NAME.search(line), _CALLS.search(line)
            found[instruction[1]] = (name[1] if name else "", calls[1] if calls else "")
            if name and "jit(" in name[1]:
                inside[computation].append(part_of(name[1]))

    def part(name: str, calls: str) -> str:
        if "jit(" in name:
            return part_of(name)
        votes = collections.Counter(inside.get(calls, ()))
        return votes.most_common(1)[0][0] if votes else OTHER

    return {instruction: part(*told) for instruction, told in found.items()}


def seconds_by_part(run: Callable[[], Any], hlo_text: str, steps: int) -> dict[str, float]:
    """Seconds a step of each part, from a profile of ``run`` called ``steps`` times; of several
    devices, which all run the program, the mean.

    On a CPU the operations of a step follow each other, so that parts add up to the step but for
    what is between operations. Parts in order of their time.
    """
    from jax.profiler import ProfileData

    parts = parts_of_program(hlo_text)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                jax.block_until_ready(run())
        files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        events = list(_events(ProfileData.from_file(str(file)) for file in files))
    sums: dict[str, float] = collections.defaultdict(float)
    for name, nanoseconds in events:
        if name in parts:
            sums[parts[name]] += nanoseconds / 1e9 / steps / jax.device_count()
    return dict(sorted(sums.items(), key=lambda part: -part[1]))


def _events(profiles: Iterable[Any]) -> Iterator[tuple[str, float]]:
    for profile in profiles:
        for plane in profile.planes:
            for line in plane.lines:
                for event in line.events:
                    yield event.name, event.duration_ns
