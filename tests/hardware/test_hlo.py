"""Reading a recorded program: a scanned step, data parallel on four v5e chips.

``step.hlo.txt`` is the gradient of ``sum(scan(lambda h: tanh(h @ w), x, length=5))`` by the
256 x 256 matrix w, compiled for v5e:2x2 with 512 rows split over the chips.
"""

from __future__ import annotations

import pathlib
import re

import pytest

from encdec.hardware import hlo
from encdec.hardware.predict import collective_seconds, predict, replica_group
from encdec.hardware.topology import Topology, generation_named
from launch.slices import CHIPS

TEXT = (pathlib.Path(__file__).parent / "step.hlo.txt").read_text()


class Chip:
    """Where a device is; all that the prediction asks of one."""

    def __init__(self, *coords, slice_index=0):
        self.coords, self.slice_index = coords, slice_index


def topology(sides=(2, 2), kind="v5e", slices=1):
    chips = [
        Chip(x, y, 0, slice_index=s)
        for s in range(slices)
        for y in range(sides[1])
        for x in range(sides[0])
    ]
    return Topology("test", generation_named(kind), sides, slices, tuple(chips))


@pytest.fixture(scope="module")
def module():
    return hlo.parse(TEXT)


def test_loops_count_by_their_trips(module):
    """Cycles of the text's lines, those in the two loop bodies five times, added up by hand."""
    loops = [line for line in TEXT.splitlines() if " while(" in line]
    bodies = [re.search(r"body=%([\w.\-]+)", line)[1] for line in loops]
    assert len(bodies) == 2 and not hlo.unknown_loops(module)
    wanted, name = 0, ""
    for line in TEXT.splitlines():
        header = re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line)
        name = header[1] if header else name
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        if cycles and name in (*bodies, module.entry):
            wanted += int(cycles[1]) * (5 if name in bodies else 1)
    prediction = predict(module, topology())
    assert prediction.compute_seconds * topology().generation.clock_hz == pytest.approx(wanted)
    assert {cost.times for cost in prediction.costs} == {1, 5}


def test_collectives_by_bytes_links_and_group(module):
    prediction = predict(module, topology())
    (reduced,) = prediction.collectives
    assert (reduced.kind, reduced.group, reduced.bytes) == ("all-reduce", 4, 256 * 256 * 2)
    # Two open sides: one link each way out of a corner; three quarters leave, twice; four hops.
    wanted = 256 * 256 * 2 * 1.5 / (2 * 45e9) + 4e-6
    assert reduced.seconds == reduced.exposed_seconds == pytest.approx(wanted)
    assert prediction.step_seconds == pytest.approx(prediction.compute_seconds + reduced.seconds)


def test_source_lines_prefer_the_package(module):
    products = [
        i
        for body in module.computations.values()
        for i in body
        if i.opcode == "fusion" and "dot_general" in i.op_name
    ]
    assert products
    for i in products:
        assert module.source(i, "/src/prog") in ("prog/fixture.py:10", "prog/fixture.py:11")
        assert module.source(i, "/elsewhere").startswith("/src/prog/")


def line(shape, opcode, rest, name="x"):
    return f"  %{name} = {shape} {opcode}({rest}"


def program(*lines):
    return hlo.parse("\n".join(["ENTRY %main (p: f32[]) -> f32[] {", *lines, "}"]))


def test_asynchronous_collectives_hide_behind_what_lies_between():
    cycles = 150_300_000  # 0.1 s of the 1.503 GHz clock
    work = line("f32[8]{0}", "fusion", f'%p), backend_config={{"estimated_cycles":"{cycles}"}}')
    start = line(
        "(f32[1000000000]{0}, f32[1000000000]{0})",
        "all-reduce-start",
        "%p), replica_groups={{0,1,2,3}}",
        "start",
    )
    done = line("f32[1000000000]{0}", "all-reduce-done", "%start), metadata={}", "done")
    hidden = predict(program(start, work, done), topology())
    (reduced,) = hidden.collectives
    assert reduced.bytes == 4e9
    assert reduced.seconds == pytest.approx(4e9 * 1.5 / 90e9, rel=1e-3)
    assert reduced.exposed_seconds == 0.0
    one = cycles / generation_named("v5e").clock_hz
    assert hidden.step_seconds == pytest.approx(one)
    apart = predict(program(start, done, work), topology())
    assert apart.step_seconds == pytest.approx(one + reduced.seconds)


GATHER = """%part.{n} (p: f32[8]) -> f32[8] {{
  %inner.{n} = f32[1000000000]{{0}} all-gather(%p), channel_id={channel}, replica_groups=[1,4]<=[4]
}}

"""


def fused_program(*channels, cycles=75_150_000):
    """Each channel's all-gather in turn: started by a fusion, carried by one that computes for
    0.05 s, ended by a third, as the TPU compiler writes collectives fused with computation."""
    bodies, lines = "", []
    for channel in channels:
        for phase in ("start", "carry", "done"):
            bodies += GATHER.format(n=f"{phase}.{channel}", channel=channel)
            estimate = f', backend_config={{"estimated_cycles":"{cycles}"}}'
            lines.append(
                line(
                    "f32[8]{0}",
                    "fusion",
                    f"%p), kind=kCustom, calls=%part.{phase}."
                    f"{channel}{estimate if phase == 'carry' else ''}",
                    phase + channel,
                )
            )
    return hlo.parse(bodies + "\n".join(["ENTRY %main (p: f32[]) -> f32[] {", *lines, "}"]))


def test_collectives_fused_with_computation_count_once_and_wait_for_the_links():
    wire = 4e9 * 0.75 / 90e9 + 4e-6
    one = predict(fused_program("1"), topology())
    (gathered,) = one.collectives
    assert (gathered.kind, gathered.bytes, gathered.group) == ("all-gather", 4e9, 4)
    assert gathered.seconds == pytest.approx(wire)
    assert gathered.exposed_seconds == 0 and one.compute_seconds == pytest.approx(0.05, rel=1e-2)
    # With half the computation the rest of each shows.
    two = predict(fused_program("1", "2", cycles=37_575_000), topology())
    assert [c.exposed_seconds for c in two.collectives] == pytest.approx(
        [wire - 0.025] * 2, rel=1e-2
    )
    assert two.step_seconds == pytest.approx(2 * wire, rel=1e-2)


def test_asynchronous_collectives_share_the_links():
    """Two started together: the second waits for the first, behind 0.1 s of computation."""
    work = line("f32[8]{0}", "fusion", '%p), backend_config={"estimated_cycles":"150300000"}')
    pair = lambda n: (
        line(
            "(f32[1000000000]{0}, f32[1000000000]{0})",
            "all-reduce-start",
            "%p), replica_groups={{0,1,2,3}}",
            f"s{n}",
        ),
        line("f32[1000000000]{0}", "all-reduce-done", f"%s{n}), metadata={{}}", f"d{n}"),
    )
    (start_1, done_1), (start_2, done_2) = pair(1), pair(2)
    wire = 4e9 * 1.5 / 90e9 + 4e-6
    together = predict(program(start_1, start_2, work, done_1, done_2), topology())
    assert together.step_seconds == pytest.approx(2 * wire, rel=1e-2)
    assert together.exposed_seconds == pytest.approx(2 * wire - 0.1, rel=1e-2)


@pytest.mark.parametrize(
    "shape, opcode, operands, wanted",
    [
        ("f32[1000]{0:T(1024)}", "all-reduce", "%p", 4000),
        ("(f32[1000]{0:T(1024)}, /*index=1*/f32[500]{0})", "all-reduce", "%p, %p", 6000),
        ("(f32[1000]{0}, f32[500]{0})", "all-reduce-start", "%p, %p", 6000),
        ("(bf16[100]{0}, bf16[400]{0})", "all-gather-start", "%p", 800),
        (
            "((bf16[100]{0:T(8,128)(2,1)}, f32[10]{0}), (bf16[400]{0}, f32[40]{0}), u32[], u32[])",
            "all-gather-start",
            "%p, %p",
            960,
        ),
        (
            "(bf16[100]{0}, f32[10,2]{1,0}, bf16[400]{0}, f32[40,2]{1,0})",
            "all-gather-start",
            "%p, %p",
            1120,
        ),
        (
            "((f32[400]{0}, f32[40]{0}), (f32[100]{0}, f32[10]{0}))",
            "reduce-scatter-start",
            "%p, %p",
            1760,
        ),
        ("f32[100]{0}", "reduce-scatter", "%p", 1600),
        (
            "(f32[100]{0}, f32[100]{0}, u32[]{:S(2)}, u32[]{:S(2)})",
            "collective-permute-start",
            "%p",
            400,
        ),
    ],
)
def test_a_collective_handles_all_its_arrays(shape, opcode, operands, wanted):
    start = line(shape, opcode, f"{operands}), channel_id=1", "start")
    done = line("f32[1]{0}", opcode.replace("start", "done"), "%start), metadata={}", "done")
    lines = (start, done) if opcode.endswith("-start") else (start,)
    (moved,) = predict(program(*lines), topology()).collectives
    assert moved.bytes == wanted


def test_a_collective_whose_end_lies_elsewhere_is_not_hidden():
    """The loop's body starts what the next turn, or nobody, waits for."""
    work = line("f32[8]{0}", "fusion", '%p), backend_config={"estimated_cycles":"150300000"}')
    start = line(
        "(f32[1000000000]{0}, f32[1000000000]{0})",
        "all-reduce-start",
        "%p), replica_groups={{0,1,2,3}}",
        "start",
    )
    loop = line(
        "f32[8]{0}",
        "while",
        '%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}',
        "loop",
    )
    body = "\n".join(["%body (p: f32[8]) -> f32[8] {", start, work, "}", ""])
    prediction = predict(
        hlo.parse(body + "\n".join(["ENTRY %main (p: f32[]) -> f32[] {", loop, "}"])), topology()
    )
    (reduced,) = prediction.collectives
    assert reduced.bytes == 3 * 4e9
    assert (
        reduced.exposed_seconds == reduced.seconds == pytest.approx(3 * 4e9 * 1.5 / 90e9, rel=1e-3)
    )


@pytest.mark.parametrize("start, turns", [(0, 20), (1, 19)])
def test_a_loop_with_a_turn_peeled_off_runs_once_less(start, turns):
    text = "\n".join(
        [
            "%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {",
            line("f32[8]{0}", "fusion", '%b), backend_config={"estimated_cycles":"1503"}', "work"),
            "}",
            "",
            "%c (q: (s32[], f32[8])) -> pred[] {",
            "  %q = (s32[], f32[8]) parameter(0)",
            "  %limit = s32[] constant(20)",
            "  %i = s32[] get-tuple-element(%q), index=0",
            "  ROOT %less = pred[] compare(%i, %limit), direction=LT",
            "}",
            "",
            "ENTRY %main (p: f32[8]) -> f32[8] {",
            "  %p = f32[8] parameter(0)",
            f"  %first = s32[] constant({start})",
            "  %begin = s32[] copy(%first)",
            "  %carried = (s32[], f32[8]) tuple(%begin, %p)",
            "  %loop = (s32[], f32[8]) while(%carried), condition=%c, body=%body",
            "}",
        ]
    )
    prediction = predict(hlo.parse(text), topology())
    assert prediction.compute_seconds == pytest.approx(turns * 1e-6, rel=1e-2)


def test_what_has_no_estimate_is_listed():
    target = lambda name: f'%p), custom_call_target="{name}", api_version=API'
    prediction = predict(
        program(
            line("f32[8]{0}", "custom-call", target("Eigh"), "a"),
            line("f32[8]{0}", "custom-call", target("Eigh"), "b"),
            line(
                "f32[8]{0}",
                "custom-call",
                target("Timed") + ', backend_config={"estimated_cycles":"1503"}',
                "c",
            ),
            line("f32[8]{0}", "sort", "%p), dimensions={0}", "d"),
            line("f32[8]{0}", "copy", "%p), metadata={}", "e"),
        ),
        topology(),
    )
    assert prediction.unestimated == {"custom-call Eigh": 2, "sort": 1}
    assert prediction.compute_seconds == pytest.approx(1e-6, rel=1e-2)


def test_kernels_take_the_longer_of_flops_and_bytes():
    q, k = "bf16[16,6,1024,128]{3,2,1,0}", "bf16[16,3,1024,128]{3,2,1,0}"
    operands = [line(q, "parameter", "0)", "q"), line(k, "parameter", "1)", "k")]
    call = line(
        q,
        "custom-call",
        '%q, %k), custom_call_target="tpu_custom_call", '
        'metadata={op_name="encoder/full/splash_mha_fwd_segmented"}, '
        'frontend_attributes={kernel_metadata={"block_q_dkv": 512}}',
    )
    prediction = predict(program(*operands, call), topology())
    flops = 4 * 16 * 6 * 1024 * 1024 * 128
    assert prediction.pallas_seconds == pytest.approx(flops / 197e12)
    causal = predict(program(*operands, call.replace("full", "causal")), topology())
    assert causal.pallas_seconds == pytest.approx(flops / 2 / 197e12)
    backward = predict(program(*operands, call.replace("_fwd_", "_dkv_")), topology())
    assert backward.pallas_seconds == pytest.approx(2.5 * flops / 197e12)
    # Heads 64 wide fill half of the matrix unit: half the FLOPs take as long.
    narrow = predict(
        program(*(text.replace(",128]", ",64]") for text in (*operands, call))), topology()
    )
    assert narrow.pallas_seconds == pytest.approx(flops / 197e12)
    other = predict(program(*operands, call.replace("splash_mha_fwd", "other")), topology())
    moved = (2 * 16 * 6 + 16 * 3) * 1024 * 128 * 2
    assert other.pallas_seconds == pytest.approx(moved / 819e9)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,2]<=[4]", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ("source_target_pairs={{0,1},{1,0}}", [0, 1]),
        ("channel_id=1", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_replica_groups(text, wanted):
    assert replica_group(text, 8) == wanted


def test_the_launchers_know_the_same_kinds_of_slices():
    """launch/ imports nothing of encdec, so it has a table of its own."""
    for name, chip in CHIPS.items():
        assert generation_named(name).chip_dims == chip.sides, name


def test_links_and_slices():
    ring = topology((16, 16))
    everyone = range(256)
    assert ring.links(everyone) == 4  # both sides close at 16
    assert topology((4, 4)).links(range(16)) == 2
    assert topology((4, 4)).links(range(4)) == 1  # along one side only
    i = program(line("f32[1000]{0}", "all-gather", "%p), channel_id=1")).by_name["x"]
    alone = collective_seconds(i, topology((4, 4)), list(range(16)))
    assert collective_seconds(i, topology((4, 4), slices=2), list(range(32))) > alone


def test_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        hlo.parse("HloModule nothing")


def test_instructions_over_several_lines_lose_nothing():
    """Pallas metadata goes over lines that start like the end of a computation."""
    work = line("f32[8]{0}", "fusion", '%p), backend_config={"estimated_cycles":"1503"}', "after")
    kernel = line(
        "bf16[4,8,1024,128]{3,2,1,0}",
        "custom-call",
        '%q, %q), custom_call_target="tpu_custom_call", frontend_attributes='
        '{kernel_metadata={\n"xprof_metadata":"{}"\n}}, '
        'metadata={op_name="full/splash_mha_fwd"}',
        "kernel",
    )
    q = line("bf16[4,8,1024,128]{3,2,1,0}", "parameter", "0)", "q")
    module = program(q, kernel, work)
    assert module.by_name["kernel"].op_name == "full/splash_mha_fwd"
    prediction = predict(module, topology())
    assert prediction.compute_seconds == pytest.approx(1e-6, rel=1e-2)
    assert prediction.pallas_seconds > 0


def test_estimates_that_are_not_understood_are_refused():
    text = TEXT.replace("ENTRY %", "ELSE %", 1) + "\nENTRY %main () -> f32[] {\n}\n"
    with pytest.raises(ValueError, match="cycle estimates"):
        hlo.parse(text)
