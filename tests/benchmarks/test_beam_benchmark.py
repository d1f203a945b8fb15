"""``encdec benchmark beam``: what is measured, and what is refused."""

from __future__ import annotations

import json

import pytest

from encdec.benchmarks.beam_benchmark import main
from encdec.errors import ConfigError
from tests.inference.conftest import LEARNED, encoder_decoder_run  # noqa: F401


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps({"source": source}) + "\n" for source, _ in LEARNED))
    return path


@pytest.mark.slow
def test_greedy_and_beams_are_measured_on_the_same_inputs(
    encoder_decoder_run, texts, tmp_path, capsys
):
    arguments = [f"--checkpoint={encoder_decoder_run}", f"--jsonl={texts}", "--repeats=1"]
    assert main([*arguments, "--beams=1,2", "--max_examples=2", f"--out={tmp_path}"]) == 0
    assert "CPU ratio" in capsys.readouterr().out
    greedy, beam = json.loads((tmp_path / "beam.json").read_text())["costs"]
    assert (greedy["beams"], beam["beams"]) == (1, 2)
    # The learned answers are what both decode to.
    assert greedy["inputs"] == beam["inputs"] == 2 and greedy["tokens"] == beam["tokens"] > 0
    assert min(x[name] for x in (greedy, beam) for name in ("seconds", "cpu_seconds")) > 0


def test_what_cannot_be_measured_is_refused(texts):
    for arguments, message in (
        (["--repeats=0"], "repeats is 0"),
        (["--beams=1,0"], "expected"),
        (["--max_examples=-1"], "max_examples is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            main([f"--checkpoint={texts.parent}", f"--jsonl={texts}", *arguments])
