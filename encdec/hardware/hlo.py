"""Reads a compiled program as text (XLA's HLO) and counts how often each instruction runs.

Only what a prediction needs is read: the computations, their instructions in scheduled order,
the compiler's own cycle estimates, the loops' trip counts, and the source lines.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Iterator

_PACKAGE = str(pathlib.Path(__file__).resolve().parents[1])
# Other types end in their number of bits.
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(-?\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(condition|body|calls|to_apply|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One scheduled instruction.

    Attributes:
        name: unique in the module.
        opcode: as HLO spells it ("fusion", "all-reduce", "while", ...).
        shape: its type as text.
        operands: names of the instructions that it reads.
        arguments: text between the parentheses (the value, for a constant).
        attributes: text behind the operands.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of one execution, in cycles; None without an estimate."""
        match = _CYCLES.search(self.attributes)
        return max(0, int(match[1])) if match else None

    @property
    def op_name(self) -> str:
        """JAX's name of the operation, a path through the program."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> dict[str, str]:
        """Computations that it refers to, by role."""
        roles = dict(_CALLED.findall(self.attributes))
        if match := _BRANCHES.search(self.attributes):
            roles |= {f"branch_{i}": name for i, name in enumerate(_NAME.findall(match[1]))}
        return roles

    @property
    def custom_call_target(self) -> str:
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
        computations: instructions in scheduled order, by computation.
        entry: the computation that runs first.
        frames: source lines by stack frame id, innermost first, as "file:line".
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    frames: dict[int, tuple[str, ...]]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for body in self.computations.values() for i in body}

    def source(self, instruction: Instruction, package: str = _PACKAGE) -> str:
        """The innermost source line in the folder ``package``, else the innermost, else "".

        Inside the package, the path starts with the package's own name.
        """
        match = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        lines = self.frames.get(int(match[1]), ()) if match else ()
        for line in lines:
            if line.startswith(package + "/"):
                return line[package.rfind("/") + 1 :]
        return lines[0] if lines else ""

    def trip_count(self, loop: Instruction) -> int | None:
        """Trip count of a while loop: XLA's own, or the constant with which its counter is
        compared minus its start (1 if the compiler peeled off an iteration)."""
        if match := _TRIPS.search(loop.attributes):
            return int(match[1])
        condition = {i.name: i for i in self.computations.get(loop.called.get("condition", ""), ())}
        constants = {
            name: value for name, i in condition.items() if (value := _whole_number(i)) is not None
        }
        for i in condition.values():
            if i.opcode == "compare" and "direction=LT" in i.attributes:
                if i.operands[-1] in constants:
                    counter = condition.get(i.operands[0])
                    return constants[i.operands[-1]] - self._start(loop, counter)
        # The comparison may be inside a fusion; loops of scans count up to their only constant.
        return max(constants.values()) if len(constants) == 1 else None

    def _start(self, loop: Instruction, counter: Instruction | None) -> int:
        """The start value of a loop's counter, an element of the tuple that it carries."""
        index = re.search(r"index=(\d+)", counter.attributes) if counter else None
        carried = self.by_name.get(loop.operands[0]) if loop.operands else None
        if index is None or carried is None or carried.opcode != "tuple":
            return 0
        first = self.by_name.get(carried.operands[int(index[1])])
        while first is not None and first.opcode in ("copy", "bitcast"):
            first = self.by_name.get(first.operands[0])
        return (_whole_number(first) if first is not None else None) or 0


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction and how often one run of the program executes it."""

    instruction: Instruction
    times: int


def parse(text: str) -> Module:
    """Parses the text of ``jax.stages.Compiled.as_text()``.

    Raises:
        ValueError: there is no entry computation, or an estimate could not be parsed.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    tables: dict[str, list[str]] = {}
    entry = name = table = ""
    body: list[Instruction] = []
    for line in _joined(text):
        if line.startswith(("FileNames", "FunctionNames", "FileLocations", "StackFrames")):
            table = line.strip()
            tables[table] = []
        elif line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
            name, body, table = _NAME.findall(line)[0], [], ""
            entry = name if line.startswith("ENTRY") else entry
        elif line.rstrip() == "}":
            computations[name] = tuple(body)
            name = ""
        elif name:
            instruction = _instruction(line)
            if instruction:
                body.append(instruction)
        elif table and line.strip():
            tables[table].append(line)
    if entry not in computations:
        raise ValueError("the HLO text has no entry computation")
    # A lost line would make a program look faster than it is.
    written = len(_CYCLES.findall(text))
    read = sum(i.cycles is not None for body in computations.values() for i in body)
    if read != written:
        raise ValueError(
            f"read {read} of the {written} cycle estimates in the HLO text; its format is unknown"
        )
    return Module(computations, entry, _frames(tables))


def executions(module: Module) -> Iterator[tuple[Execution, ...]]:
    """Instructions with how often they run, one tuple for each computation that is scheduled.

    Instructions inside fusions and reductions are not scheduled separately and are left out. A loop
    with unknown trip count counts once (``unknown_loops`` names those).
    """
    waiting = [(module.entry, 1)]
    while waiting:
        name, times = waiting.pop(0)
        body = module.computations.get(name, ())
        yield tuple(Execution(i, times) for i in body)
        for i in body:
            if i.opcode == "while":
                trips = module.trip_count(i)
                waiting.append((i.called["body"], times * (1 if trips is None else trips)))
            elif i.opcode == "call":
                waiting.append((i.called["to_apply"], times))
            elif i.opcode == "conditional":
                waiting += [
                    (target, times)
                    for role, target in i.called.items()
                    if role.startswith(("branch", "true", "false"))
                ]


def unknown_loops(module: Module) -> list[str]:
    """Names of the loops whose trip count could not be read."""
    return [
        e.instruction.name
        for body in executions(module)
        for e in body
        if e.instruction.opcode == "while" and module.trip_count(e.instruction) is None
    ]


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, dimensions) of every array in a type, layouts and comments ignored."""
    return [
        (kind, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
        for kind, dims in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    ]


def elements(shape: str) -> list[str]:
    """The types in a tuple type, which may be tuples themselves."""
    text, parts, depth, start = re.sub(r"/\*.*?\*/", "", shape), [], 0, 1
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (place and not depth):
            parts.append(text[start:place].strip())
            start = place + 1
            if not depth:
                break
    return parts


def shape_bytes(shape: str) -> float:
    """Bytes of all arrays in a type, without padding."""
    return sum(_element_bytes(kind) * math.prod(dims) for kind, dims in arrays(shape))


def _element_bytes(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    bits = re.match(r"[a-z]+(\d+)", kind)
    return int(bits[1]) / 8 if bits else 0


def _joined(text: str) -> Iterator[str]:
    """Lines, with instructions that span several (Pallas kernels' metadata) joined."""
    inside, pending = False, ""
    for line in text.splitlines():
        starts = re.match(r"\s+(?:ROOT )?%[\w.\-]+ = ", line)
        if inside and not starts and line.rstrip() != "}":
            pending += line
            continue
        if pending:
            yield pending
            pending = ""
        if inside and starts:
            pending = line
            continue
        if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
            inside = True
        elif line.rstrip() == "}":
            inside = False
        yield line
    if pending:
        yield pending


def _instruction(line: str) -> Instruction | None:
    head, separator, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if not separator or not head.startswith("%"):
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opcode, _, _ = rest.partition("(")
    start = len(opcode)
    stop = _closing(rest, start)
    arguments = rest[start + 1 : stop]
    operands = tuple(_NAME.findall(arguments)) if "%" in arguments else ()
    return Instruction(head[1:], opcode, shape, operands, arguments, rest[stop + 1 :])


def _whole_number(i: Instruction) -> int | None:
    """The value of an integer constant; None for anything else."""
    if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.arguments):
        return int(i.arguments)
    return None


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _frames(tables: dict[str, list[str]]) -> dict[int, tuple[str, ...]]:
    """Joins XLA's tables of files, locations and frames into source lines, innermost first."""
    files = {}
    for line in tables.get("FileNames", []):
        key, _, name = line.partition(" ")
        files[int(key)] = name.strip('"')
    places, parents = {}, {}
    for line in tables.get("FileLocations", []):
        number = int(line.split()[0])
        values = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}
        places[number] = f"{files.get(values['file_name_id'], '?')}:{values['line']}"
    for line in tables.get("StackFrames", []):
        number = int(line.split()[0])
        values = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}
        # Ids count from 1, and a parent is written as its id plus 1, so that 1 means none.
        parents[number] = (values["file_location_id"], values.get("parent_frame_id", 1) - 1)
    frames = {}
    for number in parents:
        lines: list[str] = []
        at = number
        while at in parents and len(lines) <= len(parents):
            lines.append(places.get(parents[at][0], "?"))
            at = parents[at][1]
        frames[number] = tuple(lines)
    return frames
