"""The notebook runs from top to bottom, as it is stored but for a smaller model and fewer steps."""

from __future__ import annotations

import nbformat
from nbclient import NotebookClient

from tests.pages import ROOT

NOTEBOOK = ROOT / "docs" / "first-model.ipynb"


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_it_runs_and_shows_curves_answers_and_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Readers see what it gave with all its steps.
    assert [cell.execution_count for cell in stored] == [*range(1, len(stored) + 1)]
    assert NOTEBOOK.stat().st_size < 200_000
    for cell in stored:
        cell.outputs = []
    # tests/quickstart trains the model itself, which compiles for longer.
    for number, shown, run in (
        (0, "STEPS = 300", "STEPS = 12"),
        (3, "pretrain.py:quickstart", "pretrain.py:test"),
    ):
        assert stored[number].source.count(shown) == 1
        stored[number].source = stored[number].source.replace(shown, run)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    text = "".join(map(printed, stored))
    assert "train: 1,520 examples" in text and "12 steps in" in text
    assert text.count("right") + text.count("wrong") == 5
    assert "exact_match" in text and "perplexity" in text
    shown = [output.get("data", {}) for cell in stored for output in cell.outputs]
    assert sum("image/png" in data for data in shown) == 1
