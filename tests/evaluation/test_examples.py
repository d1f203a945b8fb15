"""Sources shuffled among examples: who gets whose, and that nothing else changes."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.errors import DataError
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.evaluation.examples import Example, load_examples, with_shuffled_sources


@pytest.mark.parametrize("path", [".", "..", "../rows"])
def test_files_of_a_folder_without_a_name_have_its_own(tmp_path, monkeypatch, path):
    """Else predictions would go to --out itself, or to the folder above it."""
    (tmp_path / "rows" / "in").mkdir(parents=True)
    (tmp_path / "rows" / "a.jsonl").write_text('{"source": "a", "target": "b"}\n')
    monkeypatch.chdir(tmp_path / "rows" / ("in" if path == ".." else ""))
    [found] = load_examples(EvaluationSettings("c", "o", jsonl=(path,)))
    assert found.name == "rows"


def examples_of(sources):
    return [Example(source, (f"answer {index}",)) for index, source in enumerate(sources)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=12), st.integers(0, 5))
def test_no_example_keeps_its_source_where_that_can_be(sources, seed):
    examples = examples_of(sources)
    if len(set(sources)) == 1:
        with pytest.raises(DataError, match=f"there are 1 in {len(sources)} examples"):
            with_shuffled_sources(examples, seed)
        return
    found = with_shuffled_sources(examples, seed)
    assert found == with_shuffled_sources(examples, seed)
    # The same sources, so the same lengths; the references stay where they were.
    assert sorted(one.source for one in found) == sorted(sources)
    assert [one.references for one in found] == [one.references for one in examples]
    # Of a text that more than half of them have, the surplus has nowhere else to go.
    most = max(collections.Counter(sources).values())
    kept = sum(one.source == source for one, source in zip(found, sources))
    assert kept == max(0, 2 * most - len(sources))


def test_the_seed_and_nothing_else_decides():
    examples = examples_of([f"source {i}" * (i % 7) + str(i) for i in range(200)])
    first, second = (with_shuffled_sources(examples, seed) for seed in (0, 1))
    assert first != second
    # A draw, no rotation: neighbours are torn apart.
    place = {example.source: index for index, example in enumerate(examples)}
    moved = {(place[one.source] - index) % 200 for index, one in enumerate(first)}
    assert len(moved) > 80
