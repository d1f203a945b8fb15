"""The list of ``tests/mutants.py`` is true: every text is there once, every test exists."""

from __future__ import annotations

import ast

import pytest

from tests import mutants
from tests.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_every_mutant_fits_the_code_as_it_is(mutant):
    changed = mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))
    ast.parse(changed)
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), test


@pytest.mark.parametrize("text", ["nothing of it", "a = 1; a = 1"])
def test_a_text_that_is_not_there_once_is_an_error(text):
    with pytest.raises(ValueError, match="rewrite the mutant"):
        Mutant("a fault", "encdec/x.py", "a = 1", "a = 2", ()).apply(text)


def test_killed_survived_and_neither_are_told_apart(tmp_path, monkeypatch, capsys):
    """On a tree of one file: a fault that its test sees, one that no test sees, and one that
    does not run."""
    root = tmp_path / "root"
    (root / "encdec" / "sums").mkdir(parents=True)
    for folder in ("encdec", "encdec/sums"):
        (root / folder / "__init__.py").touch()
    (root / "encdec/sums/add.py").write_text("def add(a, b):\n    return a + b + 0\n")
    (root / "tests").mkdir()
    (root / "tests/test_add.py").write_text(
        "from encdec.sums.add import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    )
    own = [
        Mutant(after, "encdec/sums/add.py", "a + b + 0", after, ("tests/test_add.py",))
        for after in ("a - b + 0", "b + a + 0", "a + ")
    ]
    monkeypatch.setattr(mutants, "ROOT", root)
    monkeypatch.setattr(mutants, "COPIED", ("encdec", "tests"))
    monkeypatch.setattr(mutants, "MUTANTS", own)
    assert mutants.main(["--package=sums"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told if "add.py" in line][:2] == ["killed", "survived"]
    assert "[tests/test_add.py::test_add]" in told[0]
    assert told[2].startswith("error") and told[-1] == "1 of 3 mutants killed"
    assert (root / "encdec/sums/add.py").read_text().count("a + b + 0") == 1
