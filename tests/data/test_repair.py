"""Faults put into functions: what each kind does, and that nothing else changes."""

from __future__ import annotations

import difflib
import random

import pytest

from encdec.data.corpora import repair
from encdec.errors import DataError

MODULE = '''
import os

@wraps
def total(items, start):
    """Add them."""
    found = start is not None and start or 0
    for item in items:
        found += item
    return found

class A:
    def one_line(self): return 1
    def documented(self):
        """Nothing else."""
    async def twice(self, x):
        return self.f(x) == 2
'''


def test_short_functions_come_without_docstring_and_decorator():
    found = list(repair.short_functions(MODULE))
    assert [text.split("(")[0] for text in found] == ["def total", "async def twice"]
    assert "Add them" not in found[0] and "@" not in found[0]
    assert found[1] == "async def twice(self, x):\n    return self.f(x) == 2\n"
    assert list(repair.short_functions("def f(:")) == []


@pytest.mark.parametrize("fault", dict.fromkeys(repair.KINDS))
def test_a_fault_changes_a_little(fault):
    text = next(repair.short_functions(MODULE))
    for seed in range(20):
        made = fault(text, random.Random(seed))
        assert made != text and made == fault(text, random.Random(seed))
        assert difflib.SequenceMatcher(None, text, made, autojunk=False).ratio() > 0.9
    assert fault("1 + 1\n", random.Random(0)) is None


def test_every_example_has_a_fault_that_its_text_decides():
    text = "def f(a, b):\n    return None\n"
    versions = [repair.with_faults(text, version) for version in range(40)]
    assert text not in versions and len(set(versions)) > 10
    assert versions[3] == repair.with_faults(text, 3)


def test_splits_share_no_function(monkeypatch):
    functions = tuple(
        (split, f"def f{i}(a):\n    return {i} == a\n")
        for i, split in enumerate(["train", "train", "test"])
    )
    monkeypatch.setattr(repair, "_all_functions", lambda: functions)
    train, test = (repair.repair_examples(split) for split in ("train", "test"))
    assert len(train) == 2 * repair.VERSIONS["train"] and len(test) == 1
    assert not {target for _, target in train} & {target for _, target in test}
    with pytest.raises(DataError, match="split is 'dev'"):
        repair.repair_examples("dev")
