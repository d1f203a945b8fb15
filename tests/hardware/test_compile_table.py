"""Saved reports side by side, and the curve made of them."""

from __future__ import annotations

import json

import pytest

from encdec.errors import ConfigError, DataError
from encdec.hardware.compile_command import main
from encdec.hardware.compile_table import markdown, weak_scaling


def report(
    topology: str,
    devices: int,
    seconds: float,
    model: str = "330m-tpu",
    rows: int = 16,
    accumulation: int = 1,
):
    tokens = rows * devices * 1280
    return {
        "model": model,
        "topology": topology,
        "devices": devices,
        "batch_size": rows * devices,
        "accumulation": accumulation,
        "inputs": 1024,
        "targets": 256,
        "scan_layers": True,
        "remat": "dots",
        "model_overrides": {"scan_layers": True},
        "memory_bytes": {"peak": 8 * 2**30, "limit": 16 * 2**30},
        "step_seconds": seconds,
        "pallas_roofline_seconds": 0.01,
        "collective_exposed_seconds": 0.02,
        "mfu": 0.5,
        "mfu_if_pallas_at_half_roofline": 0.48,
        "tokens_per_second": tokens / seconds,
        "token_budget": 100 * tokens,
        "chip_hours": 100 * devices * seconds / 3600,
    }


def test_a_table_of_several_files(tmp_path, capsys):
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    small.write_text(json.dumps([report("v5e:4x4", 16, 0.25)]))
    large.write_text(json.dumps([report("v5e:16x16", 256, 0.26)]))
    picture = tmp_path / "weak.png"
    assert main(["table", str(small), str(large), f"--plot={picture}"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len({line.count("|") for line in lines}) == 1  # a table: as many cells in every line
    assert lines[2].startswith("| 330m-tpu | v5e:4x4 | 16 | scanned | dots | 8.0 of 16.0 | 250.0 |")
    # 16 rows of 1,280 tokens in 0.25 s of a chip: a billion tokens are 3.39 hours of one chip.
    assert lines[2].endswith(f"| {1e9 / (16 * 1280 / 0.25) / 3600:.1f} |")
    assert picture.stat().st_size > 1000


def test_weak_scaling_compares_equal_rows_of_equal_settings():
    other = report("v5e:16x16", 256, 0.5, rows=32)
    curves = weak_scaling(
        [
            report("v5e:16x16", 256, 0.26),
            report("v5e:4x4", 16, 0.25),
            other,
            report("v6e:16x16", 256, 0.1),
            report("v5e:16x16*2", 512, 0.28),
            report("v5e:4x4", 16, 0.3, model="1b-tpu"),
        ]
    )
    assert not weak_scaling(
        [report("v5e:4x4", 16, 0.25), report("v5e:16x16", 256, 0.26, accumulation=4)]
    )
    ((name, points),) = curves.items()
    assert name == "330m-tpu, v5e, 16 rows of 1024 + 256 tokens per device"
    assert [n for n, _ in points] == [16, 256, 512]
    assert [share for _, share in points] == pytest.approx([1, 0.25 / 0.26, 0.25 / 0.28])


def test_micro_batches_show_in_the_rows():
    line = markdown([report("v6e:4x4", 16, 0.25, rows=64, accumulation=8)]).splitlines()[2]
    assert line.startswith("| 330m-tpu | v6e:4x4 | 8 x 8 | scanned |")


def test_what_is_no_report_is_refused(tmp_path):
    file = tmp_path / "one.json"
    with pytest.raises(DataError, match="cannot be read"):
        main(["table", str(file)])
    file.write_text('[{"topology": "v5e:4x4", "ms": 3}]')
    with pytest.raises(DataError, match="no reports of training steps"):
        main(["table", str(file)])
    file.write_text(json.dumps([report("v5e:4x4", 16, 0.25)]))
    with pytest.raises(ConfigError, match="two slice sizes of one chip type"):
        main(["table", str(file), f"--plot={tmp_path / 'x.png'}"])


def test_markdown_keeps_the_order_given():
    lines = markdown([report("v6e:4x4", 16, 0.2), report("v5e:4x4", 16, 0.1)]).splitlines()
    assert ["v6e" in lines[2], "v5e" in lines[3]] == [True, True]
