"""``encdec benchmark serving``, small."""

from __future__ import annotations

import json

import pytest

from encdec import cli


@pytest.mark.slow
def test_both_ways_make_the_same_tokens(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert (
        cli.main(
            [
                "benchmark",
                "serving",
                "--model=micro-300k",
                "--requests=6",
                "--slots=2",
                "--repeats=1",
                "--inputs_from=4",
                "--inputs_to=15",
                "--tokens_from=2",
                "--tokens_to=8",
                f"--out={out}",
            ]
        )
        == 0
    )
    report = json.loads(out.read_text())
    first, second = report["arms"].values()
    assert first["tokens"] == second["tokens"] > 6
    assert report["throughput_ratio"] == pytest.approx(
        second["tokens_per_second"] / first["tokens_per_second"]
    )
    assert "throughput at once" in capsys.readouterr().out


def test_settings_that_cannot_be(capsys):
    for argv, message in (
        (["--slots=0"], "slots is 0; expected 1 or more"),
        (["--tokens_from=9", "--tokens_to=8"], "expected tokens_from = 9 or more"),
        (["--model=nonsense"], "unknown preset"),
    ):
        assert cli.main(["benchmark", "serving", *argv]) == 2
        assert message in capsys.readouterr().err
