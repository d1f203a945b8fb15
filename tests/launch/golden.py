"""Recorded dry runs, and arguments that quoting has to bring through unharmed."""

from __future__ import annotations

import os
import pathlib

FOLDER = pathlib.Path(__file__).with_suffix("")
ROOT = str(pathlib.Path(__file__).resolve().parents[2])

AWKWARD = [
    '--config.data.eval_records=/mnt/a b/c\'s "d"',
    "--config.model=$(touch /tmp/x) `id` $HOME",
    "--config.init_from=*?[a-z]{1,2}~!#;&|<>\\",
    "--config.optimizer.learning_rate=1e-3",
    "--config.distill.teacher=",
    "--config.model=größer ✓ %s %%",
]


def check_golden(name: str, text: str) -> None:
    """Compares with the recorded file; with ENCDEC_RECORD=1 in the environment, records it."""
    text = text.replace(ROOT, "CHECKOUT")
    path = FOLDER / name
    if os.environ.get("ENCDEC_RECORD"):
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; ENCDEC_RECORD=1 records it again"
