"""The embedded corpus: docstrings are out of the sources, splits share nothing, it is stable."""

from __future__ import annotations

import ast

import pytest

from encdec.data.corpora import stdlib
from encdec.errors import DataError

MODULE = '''
import os

@decorated
def first(a,
          b=1):
    """Add two numbers, e.g. 1 and 2.  The result
    is a number. And more.

    Details follow.
    """
    # a comment that stays
    return a + b


class Holder:
    async def second(self):
        \'\'\'Wait for the thing to happen\'\'\'
        await self.thing

    def only_docstring(self):
        """Nothing but these words here."""

    def one_line(self): "Shares its line with def here."; return 1

    def too_short(self):
        """Short."""
        return 2

    def no_docstring(self):
        return 3

    def text_at_the_margin(self):
        """Return a text that starts at the margin."""
        return """
left
"""
'''


def test_functions_are_cut_from_their_docstrings():
    found = {
        name: (source, target) for name, source, target in (stdlib.functions_with_summary(MODULE))
    }
    assert set(found) == {"first", "second"}
    assert found["first"] == (
        "@decorated\ndef first(a,\n          b=1):\n    # a comment that stays\n    return a + b\n",
        "Add two numbers, e.g. 1 and 2.",
    )
    assert found["second"] == (
        "async def second(self):\n    await self.thing\n",
        "Wait for the thing to happen",
    )


@pytest.mark.parametrize(
    "docstring, sentence",
    [
        ("One. Two.", "One."),
        ("Uses a.b and 3.5 units\nover lines.\n\nMore.", "Uses a.b and 3.5 units over lines."),
        ("Really? Yes.", "Really?"),
        ("No stop", "No stop"),
        ("See i.e. This one. Next.", "See i.e. This one."),
    ],
)
def test_first_sentence(docstring, sentence):
    assert stdlib.first_sentence(docstring) == sentence


@pytest.fixture(scope="module")
def splits():
    return {split: stdlib.stdlib_examples(split) for split in stdlib.SPLITS}


def test_splits_are_of_use_and_share_no_module_and_no_function(splits):
    assert len(splits["train"]) > 3000
    assert min(len(splits["validation"]), len(splits["test"])) > 50
    modules = {
        split: {example["id"].split(":")[0].split("/")[0] for example in examples}
        for split, examples in splits.items()
    }
    sources = {split: {e["source"] for e in examples} for split, examples in splits.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not modules[one] & modules[other]
        assert not sources[one] & sources[other]
    everything = [e["source"] for examples in splits.values() for e in examples]
    assert len(everything) == len(set(everything))


def test_no_source_holds_its_docstring(splits):
    for example in splits["validation"] + splits["test"]:
        function = ast.parse(example["source"]).body[0]
        assert ast.get_docstring(function) is None
        words = example["target"].split()
        assert 3 <= len(words) <= 60
        assert example["targets"] == [example["target"]]


def test_texts_are_split_as_the_functions_are():
    validation, test = set(stdlib.stdlib_text("validation")), set(stdlib.stdlib_text("test"))
    assert validation and test and not validation & test
    with pytest.raises(DataError, match=r"split is 'dev'.*train, validation, test"):
        stdlib.stdlib_text("dev")


def test_split_of_a_module_never_changes():
    """Published numbers hang on it."""
    expected = {
        "asyncio": "train",
        "json": "train",
        "ssl": "validation",
        "pdb": "validation",
        "zipfile": "test",
        "statistics": "test",
    }
    assert {name: stdlib.split_of(name) for name in expected} == expected
