"""The loop's benchmark measures both sides and prints their ratio."""

from __future__ import annotations

import json

import pytest

from encdec.cli import main


@pytest.mark.slow
def test_the_ratio_is_of_the_two_step_times(capsys):
    arguments = [
        "--model=test",
        "--inputs_length=24",
        "--targets_length=12",
        "--batch_size=8",
        "--window=5",
        "--repeats=3",
        "--json",
    ]
    # The preset's vocabulary is smaller than the bytes that are trained on.
    assert main(["benchmark", "loop", *arguments]) == 3
    arguments[0] = "--model=micro-300k"
    assert main(["benchmark", "loop", *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == 15 and len(result["ratios"]) == 3
    assert 0 < result["bare_step_seconds"] and 0 < result["loop_step_seconds"]
    assert sorted(result["ratios"])[1] == pytest.approx(result["ratio"], abs=1e-3)
