"""The Python calls, as docs/python.md shows them."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from encdec import api
from encdec.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_page_s_example_runs_as_it_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("configs").symlink_to(ROOT / "configs")
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(example, "docs/python.md", "exec"), names)
    assert names["card"].examples == 36
    assert names["summary"].step == 60 and names["losses"][-1] < names["losses"][0]
    written = json.loads(pathlib.Path("scores/report.json").read_text(encoding="utf-8"))
    assert names["report"] == written
    first = names["model"].generate(["moon tide"])[0][0]
    # Through transformers' format and back: the same model, so the same answer.
    again = api.load("again").generate(["moon tide"])[0][0]
    assert again.tokens == first.tokens
    assert again.log_probs == pytest.approx(first.log_probs, abs=1e-4)
    with pytest.raises(ConfigError, match="no field 'stepps'; did you mean 'steps'"):
        api.train("configs/pretrain.py:test", "other", {"stepps": 3})
    with pytest.raises(ConfigError, match="not empty"):
        api.export_model("run", "shipped")
    assert not pathlib.Path("other").exists()


def test_fields_in_place_of_a_file_take_no_overrides(tmp_path):
    with pytest.raises(ConfigError, match="overrides"):
        api.train({"model": "test"}, tmp_path / "run", {"steps": 3})
    assert not (tmp_path / "run").exists()
