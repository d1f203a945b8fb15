"""What the guard against slower and larger steps says, and the recorded steps it guards.

``recorded.json`` was written by ``python -m tests.hardware.record`` with the TPU compiler that it
names; another compiler's figures are no one's fault here.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import os

import pytest

from tests.hardware.guard import growth
from tests.hardware.record import FILE, STEPS, compiled_report, read_recorded

# Two minutes of one core, a seventh of all other tests together: `make guard` compiles it.
LONG = pytest.mark.skipif(
    not os.environ.get("ENCDEC_GUARD_ALL"), reason="takes two minutes: make guard"
)

RECORDED = read_recorded() if FILE.exists() else {}
REPORT = {
    "topology": "v5e:4x4",
    "model": "330m",
    "batch_size": 128,
    "inputs": 1024,
    "targets": 256,
    "step_seconds": 0.2,
    "compute_seconds": 0.15,
    "pallas_roofline_seconds": 0.02,
    "collective_exposed_seconds": 0.03,
    "memory_bytes": {
        "peak": 8 << 30,
        "parameters": 1 << 30,
        "optimizer": 2 << 30,
        "batch": 0,
        "temporary": 5 << 30,
        "outputs": 0,
        "code": 0,
    },
}


def changed(**changes):
    report = copy.deepcopy(REPORT)
    report["memory_bytes"] |= changes.pop("memory_bytes", {})
    return report | changes


def test_small_changes_and_improvements_pass():
    assert not growth(REPORT, REPORT)
    assert not growth(changed(step_seconds=0.2058), REPORT)
    assert not growth(changed(step_seconds=0.1, memory_bytes={"peak": 4 << 30}), REPORT)


def test_what_grew_is_named_most_first():
    (slower,) = growth(
        changed(step_seconds=0.208, compute_seconds=0.151, collective_exposed_seconds=0.037), REPORT
    )
    assert slower.startswith("slower: the step takes 208.000 ms instead of 200.000, +4.0 %")
    assert slower.index("collective_exposed_seconds 37") < slower.index("compute_seconds 151")
    assert "pallas" not in slower
    (larger,) = growth(changed(memory_bytes={"peak": 9 << 30, "temporary": 6 << 30}), REPORT)
    assert (
        "peak memory grew: it is 9216.000 MiB instead of 8192.000, +12.5 %; temporary 6144"
        in larger
    )


def test_different_steps_are_not_compared():
    with pytest.raises(ValueError, match="batch_size is 64, but 128 was recorded"):
        growth(changed(batch_size=64), REPORT)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=LONG if name == "330m" else ()) for name in STEPS]
)
def test_no_step_is_slower_or_larger_than_recorded(name):
    compiler = importlib.metadata.version("libtpu")
    if compiler != RECORDED["compiler"]:
        pytest.skip(
            f"recorded with libtpu {RECORDED['compiler']}, this is {compiler}; record "
            "again: python -m tests.hardware.record"
        )
    grown = growth(compiled_report(name), RECORDED["steps"][name])
    assert not grown, f"{name}: {' '.join(grown)} (if it must be: python -m tests.hardware.record)"
