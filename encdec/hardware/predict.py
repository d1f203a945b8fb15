"""Predicted time of a compiled TPU program: cycles, kernels by roofline, collectives over ICI.

The method; docs/prediction.md states its limits:

* an instruction takes the compiler's own estimate of cycles, times how often it runs;
* a Pallas kernel has no estimate and takes its roofline, the longer of its FLOPs at the peak
  rate (times the share of the matrix unit that its head width fills) and its bytes at HBM speed;
* a collective takes the bytes that must leave a chip over the links that it can use, plus hops;
  synchronous ones add up; asynchronous ones go over the links one after another, each hidden
  behind what is scheduled between its start and its end (if that is nowhere in its computation,
  nothing hides it);
* copies between HBM and on-chip memory are asynchronous and assumed hidden.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from encdec.hardware import hlo
from encdec.hardware.topology import Topology

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
PALLAS = "tpu_custom_call"
MATRIX_UNIT_WIDTH = 128  # lanes of a vector register: narrower heads leave some of them idle
# Listed in the report if they have no estimate; custom calls by their target.
LISTED = (
    "dot",
    "convolution",
    "scatter",
    "gather",
    "sort",
    "reduce",
    "reduce-window",
    "fusion",
    "dynamic-update-slice",
)
HOP_SECONDS = 1e-6  # from chip to neighbour, and the start of a collective
DCN_BYTES_PER_SECOND = 6.25e9  # one chip's share of its host's network: 200 Gbit/s for 4 chips


@dataclasses.dataclass(frozen=True)
class InstructionCost:
    """The time of one instruction in a step."""

    name: str
    kind: str  # opcode, or "pallas"
    seconds: float  # all executions together
    times: int
    source: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction's traffic in a step.

    Attributes:
        name: in the HLO.
        kind: one of ``COLLECTIVES``.
        bytes: of the full operand or result, all executions together, on one device.
        group: devices that take part together.
        seconds: all executions, if not hidden.
        exposed_seconds: time not hidden behind computation.
        source: source line.
    """

    name: str
    kind: str
    bytes: float
    group: int
    seconds: float
    exposed_seconds: float
    source: str


@dataclasses.dataclass(frozen=True)
class TimePrediction:
    """Predicted time of one run of a program on every device of a topology.

    Attributes:
        compute_seconds: by the compiler's cycles.
        pallas_seconds: by roofline.
        collectives: every collective.
        costs: every instruction that takes time by cycles or roofline, the most expensive first.
        unknown_loops: loops counted once because their trip count could not be read.
        unestimated: opcodes other than copies without an estimate, custom calls with their
            target ("custom-call ConcatBitcast"), and how often they run.
    """

    compute_seconds: float
    pallas_seconds: float
    collectives: tuple[Collective, ...]
    costs: tuple[InstructionCost, ...]
    unknown_loops: tuple[str, ...]
    unestimated: dict[str, int]

    @property
    def collective_seconds(self) -> float:
        return sum(c.seconds for c in self.collectives)

    @property
    def exposed_seconds(self) -> float:
        return sum(c.exposed_seconds for c in self.collectives)

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.pallas_seconds + self.exposed_seconds


def predict(
    module: hlo.Module,
    topology: Topology,
    order: list[int] | None = None,
    causal_kernels: bool = True,
) -> TimePrediction:
    """Adds up the predicted time of a compiled program.

    Args:
        module: the program of one device.
        topology: where it runs.
        order: for each device of the program its index in ``topology.devices``; default 0, 1, ...
        causal_kernels: count attention kernels named "causal" with equally many queries and keys
            as half, since their block masks skip the other half.
    """
    order = list(range(len(topology.devices))) if order is None else order
    clock = topology.generation.clock_hz
    costs, collectives = [], []
    unestimated: dict[str, int] = {}
    for body in hlo.executions(module):
        now = 0.0  # on the schedule of this computation, waiting included
        free = 0.0  # when the links have moved all that was started
        # What is under way, by its start: when it ends, itself, how long it takes, how often.
        under_way: dict[str, tuple[float, hlo.Instruction, float, int]] = {}
        inside = [_collective_inside(module, execution.instruction) for execution in body]
        parts = _fused_parts(body, inside)
        for execution, inner in zip(body, inside):
            i, times = execution.instruction, execution.times
            seconds = 0.0
            if i.opcode == "custom-call" and i.custom_call_target == PALLAS:
                seconds = kernel_seconds(i, module, topology, causal_kernels)
                costs.append(_cost(module, i, "pallas", seconds, times))
            elif i.cycles is not None and not _is_collective(i.opcode):
                seconds = i.cycles / clock
                costs.append(_cost(module, i, i.opcode, seconds, times))
            elif i.opcode in LISTED or i.opcode == "custom-call":
                name = f"{i.opcode} {i.custom_call_target}".strip()
                unestimated[name] = unestimated.get(name, 0) + times
            now += seconds
            # A collective fused with computation is started, carried on and ended by fusions of
            # one channel; others by -start and -done.
            first, last = parts.get(i.name, ("", ""))
            ended = (
                last == i.name and first or i.opcode.endswith("-done") and "".join(i.operands[:1])
            )
            if ended in under_way:
                done, started, wire, _ = under_way.pop(ended)
                exposed = max(0.0, done - now)
                collectives.append(_traffic(module, started, wire, exposed, times, order))
                now += exposed
            elif inner is not None and not last and not i.opcode.endswith(("-start", "-done")):
                # Synchronous, after whatever is on the links; or within one fusion's computation.
                wire = collective_seconds(inner, topology, order)
                done = max(now - seconds if i.opcode == "fusion" else now, free) + wire
                exposed = max(0.0, done - now)
                collectives.append(_traffic(module, inner, wire, exposed, times, order))
                free, now = done, now + exposed
            elif inner is not None and (first == i.name or i.opcode.endswith("-start")):
                wire = collective_seconds(inner, topology, order)
                if _kind(inner.opcode) == "collective-permute":  # to one neighbour, on a link
                    under_way[i.name] = now + wire, inner, wire, times
                else:
                    free = max(now, free) + wire
                    under_way[i.name] = free, inner, wire, times
        # Its end is in another computation or unknown: counted as not hidden.
        collectives += [
            _traffic(module, started, wire, wire, times, order)
            for _, started, wire, times in under_way.values()
        ]
    costs.sort(key=lambda cost: -cost.seconds)
    pallas = sum(cost.seconds for cost in costs if cost.kind == "pallas")
    return TimePrediction(
        compute_seconds=sum(cost.seconds for cost in costs) - pallas,
        pallas_seconds=pallas,
        collectives=tuple(sorted(collectives, key=lambda c: -c.seconds)),
        costs=tuple(costs),
        unknown_loops=tuple(hlo.unknown_loops(module)),
        unestimated=unestimated,
    )


def kernel_seconds(
    i: hlo.Instruction, module: hlo.Module, topology: Topology, causal_kernels: bool = True
) -> float:
    """Roofline of one execution of a Pallas kernel.

    The kernel's own cost estimate is used if it has one; else an attention kernel's FLOPs
    follow from the shapes of its queries and keys, and for other kernels only bytes count.
    """
    chip = topology.generation.chip
    operands = [module.by_name[name].shape for name in i.operands if name in module.by_name]
    moved = hlo.shape_bytes(i.shape) + sum(map(hlo.shape_bytes, operands))
    flops, fill = 0.0, 1.0
    stated = re.search(r'"?cost_estimate"?:\{[^}]*"?flops"?:"?(\d+)', i.attributes)
    if stated:
        flops = float(stated[1])
    elif "splash" in i.op_name:
        flops, head_dim = _attention_flops(i, operands, causal_kernels)
        fill = min(1.0, head_dim / MATRIX_UNIT_WIDTH)
    return max(flops / (chip.bf16_flops * fill), moved / chip.hbm_bytes_per_second)


def _attention_flops(
    i: hlo.Instruction, operands: list[str], causal_kernels: bool
) -> tuple[float, int]:
    """(FLOPs, head width) of a splash kernel: 2 products forward, 5 in the fused backward pass."""
    blocks = [
        dims
        for shape in operands
        for kind, dims in hlo.arrays(shape)
        if kind in ("bf16", "f32") and len(dims) >= 3
    ]
    if len(blocks) < 2:
        return 0.0, MATRIX_UNIT_WIDTH
    q, k = blocks[0], blocks[1]  # [B, H, T, D] and [B, K, S, D]
    rows = math.prod(q[:-2])
    # By the operation's name alone: the kernel's metadata lists every phase's tiles.
    phase = re.search(r"splash_m[hq]a_(fwd|dkv|dq)", i.op_name)
    products = {"fwd": 2, "dkv": 5, "dq": 3}[phase[1] if phase else "fwd"]
    causal = causal_kernels and q[-2] == k[-2] and "/causal/" in i.op_name
    return 2.0 * products * rows * q[-2] * k[-2] * q[-1] * (0.5 if causal else 1.0), q[-1]


def collective_seconds(i: hlo.Instruction, topology: Topology, order: list[int]) -> float:
    """Time of one execution on otherwise idle links.

    A ring moves (n-1)/n of the full array out of every chip to gather or scatter it, and
    twice that for an all-reduce. Traffic between slices uses the data-centre network.
    """
    group = [order[p] for p in replica_group(i.attributes, len(order))]
    count = len(group)
    if count < 2:
        return 0.0
    kind, size = _kind(i.opcode), _full_bytes(i, len(order))
    share = {
        "all-reduce": 2 * (count - 1) / count,
        "all-gather": (count - 1) / count,
        "reduce-scatter": (count - 1) / count,
        "all-to-all": (count - 1) / count / 2,
        "collective-permute": 1.0,
    }[kind]
    links = 1 if kind == "collective-permute" else topology.links(group)
    wire = size * share / (links * topology.generation.link_bytes_per_second)
    hops = HOP_SECONDS * (1 if kind == "collective-permute" else sum(topology.sides))
    if topology.crosses_slices(group):
        # Reduced inside each slice first, so that each chip sends its own part across.
        inside = max(1, count // topology.slices)
        wire += size / inside * 2 / DCN_BYTES_PER_SECOND
    return wire + hops


def replica_group(attributes: str, devices: int) -> list[int]:
    """The first group of a collective: positions in the program's order of devices.

    HLO writes groups as lists ({{0,1},{2,3}}), as a reshaped and transposed iota
    ([2,8]<=[4,4]T(1,0)), as axes of a mesh (mesh['a'=4,'b'=4] {'a'}), or not at all for all.
    """
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = [int(n) for n in re.findall(r"'[^']*'=(\d+)", match[1])]
        names = re.findall(r"'([^']*)'=", match[1])
        chosen = re.findall(r"'([^']*)'", match[2])
        strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
        group = [0]
        for name, size, stride in zip(names, sizes, strides):
            if name in chosen:
                group = [place + n * stride for place in group for n in range(size)]
        return group
    if match := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        per_group, dims = int(match[2]), [int(n) for n in match[3].split(",")]
        axes = [int(n) for n in match[4].split(",")] if match[4] else list(range(len(dims)))
        strides = [math.prod(dims[k + 1 :]) for k in range(len(dims))]
        places = [0]
        for axis in axes:
            places = [p + n * strides[axis] for p in places for n in range(dims[axis])]
        return places[:per_group]
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return [int(n) for n in match[1].split(",")]
    return list(range(devices))


def _fused_parts(
    body: Sequence[hlo.Execution], inside: Sequence[hlo.Instruction | None]
) -> dict[str, tuple[str, str]]:
    """First and last of the fusions that together run one collective, by the name of each."""
    names: dict[str, list[str]] = {}
    for execution, inner in zip(body, inside):
        if inner is not None and execution.instruction.opcode == "fusion" and _channel(inner):
            names.setdefault(_channel(inner), []).append(execution.instruction.name)
    return {
        name: (found[0], found[-1]) for found in names.values() if len(found) > 1 for name in found
    }


def _channel(i: hlo.Instruction) -> str:
    match = re.search(r"channel_id=(\d+)", i.attributes)
    return match[1] if match else ""


def _is_collective(opcode: str) -> bool:
    return _kind(opcode) in COLLECTIVES


def _kind(opcode: str) -> str:
    return opcode.removesuffix("-start").removesuffix("-done")


def _collective_inside(module: hlo.Module, i: hlo.Instruction) -> hlo.Instruction | None:
    """The collective that an instruction is, starts, or contains in its fusion."""
    if _is_collective(i.opcode):
        return i
    if i.opcode in ("async-start", "fusion"):
        for inner in module.computations.get(i.called.get("calls", ""), ()):
            found = _collective_inside(module, inner)
            if found is not None:
                return found
    return None


def _full_bytes(i: hlo.Instruction, devices: int) -> float:
    """Bytes of the whole arrays that a collective handles, on one device.

    A start's type is that of its results alone, as an all-reduce's is, or it holds operands,
    results and counters: ``(operand, result, u32[])`` for one array, ``((operand, ...),
    (result, ...))`` for several that the compiler combined: the full arrays are the larger half.
    """
    if i.opcode.endswith("-start") and i.shape.startswith("("):
        parts, count = hlo.elements(i.shape), max(1, len(i.operands))
        if parts[0].startswith("("):
            return max(map(hlo.shape_bytes, parts[:2]))
        halves = parts[:count], parts[count : 2 * count]
        return max(sum(map(hlo.shape_bytes, half)) for half in halves)
    size = hlo.shape_bytes(i.shape)
    if _kind(i.opcode) == "reduce-scatter":
        size *= len(replica_group(i.attributes, devices))
    return size


def _traffic(
    module: hlo.Module,
    i: hlo.Instruction,
    wire: float,
    exposed: float,
    times: int,
    order: list[int],
) -> Collective:
    return Collective(
        i.name,
        _kind(i.opcode),
        _full_bytes(i, len(order)) * times,
        len(replica_group(i.attributes, len(order))),
        wire * times,
        exposed * times,
        module.source(i),
    )


def _cost(
    module: hlo.Module, i: hlo.Instruction, kind: str, seconds: float, times: int
) -> InstructionCost:
    return InstructionCost(i.name, kind, seconds * times, times, module.source(i), i.op_name)
