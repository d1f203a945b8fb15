"""Objectives: nothing lost or made up, lengths kept, counts right, deterministic."""

from __future__ import annotations

import json
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.data import denoising  # noqa: F401 (enters its objectives)
from encdec.data.objectives import (
    OBJECTIVES,
    Form,
    PrefixLM,
    SequenceToSequence,
    describe_objective,
)
from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import ConfigError

VOCABULARY = ByteVocabulary()
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def _encode(objective, documents, lengths=(16, 8), first=0, seed=0):
    return objective.encode(documents, first, Form(VOCABULARY, *lengths, seed))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_keeps_the_contract(name):
    """Whatever is entered under a name: what preparing, its cards and its workers count on."""
    objective, vocabulary = OBJECTIVES[name](), ByteVocabulary(extra_ids=200)
    inputs, targets = (96, 96) if objective.has_source else (0, 96)
    objective.check(Form(vocabulary, inputs, targets))
    parts = len(objective.document_fields)
    documents = [(f"{i} words of text " * (5 * i),) * parts for i in range(1, 5)]

    def encode(documents, first=0, seed=0):
        found = objective.encode(documents, first, Form(vocabulary, inputs, targets, seed))
        return [(*map(tuple, pair),) for pair in zip(found.sources, found.targets)]

    pairs = encode(documents)
    assert pairs and all(len(s) <= inputs and 0 < len(t) <= targets for s, t in pairs)
    assert any(s for s, _ in pairs) == objective.has_source
    # A document's examples follow from its number and the seed, whatever block it is in.
    assert encode(documents[:3]) + encode(documents[3:], first=3) == pairs
    assert (encode(documents, seed=1) != pairs) == objective.is_random
    json.dumps(describe_objective(objective))
    assert pickle.loads(pickle.dumps(objective)) == objective
    docs = pathlib.Path(__file__).resolve().parents[2] / "docs" / "data.md"
    assert f"| `{name}`" in docs.read_text(encoding="utf-8"), f"{name} has no row in docs/data.md"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), max_size=8), st.booleans())
def test_pairs_keep_their_text_up_to_the_length(pairs, inputs_eos):
    encoded = _encode(SequenceToSequence(inputs_eos=inputs_eos), pairs)
    kept = [(s, t) for s, t in pairs if t and (s or inputs_eos)]
    assert sum(encoded.dropped.values()) == len(pairs) - len(kept)
    assert len(encoded.sources) == len(encoded.targets) == len(kept)
    target_bytes = cut = 0
    for (source, target), ids, target_ids in zip(kept, encoded.sources, encoded.targets):
        wanted = VOCABULARY.encode(source)[: 16 - inputs_eos] + [1] * inputs_eos
        assert ids.tolist() == wanted
        wanted = VOCABULARY.encode(target)[:7]
        assert target_ids.tolist() == wanted + [1]
        target_bytes += len(wanted)
        cut += len(VOCABULARY.encode(source)) > 16 - inputs_eos
    assert encoded.target_bytes == target_bytes
    assert encoded.truncated["sources"] == cut


def test_truncation_is_counted_in_examples_and_tokens():
    encoded = _encode(SequenceToSequence(), [("a" * 20, "b" * 10), ("a", "b")])
    assert dict(encoded.truncated) == {
        "sources": 1,
        "source_tokens": 5,
        "targets": 1,
        "target_tokens": 3,
    }


@settings(max_examples=60, deadline=None)
@given(
    st.lists(texts, max_size=6),
    st.floats(0, 1),
    st.integers(0, 2**32),
    st.tuples(st.integers(2, 20), st.integers(2, 12)),
)
def test_prefix_lm_gives_every_document_back_in_order(documents, split, seed, lengths):
    encoded = _encode(PrefixLM(split=split), [(text,) for text in documents], lengths, seed=seed)
    for source, target in zip(encoded.sources, encoded.targets):
        assert 1 <= len(source) <= lengths[0] and 1 <= len(target) <= lengths[1]
    rebuilt = [
        token
        for source, target in zip(encoded.sources, encoded.targets)
        for token in [*source, *target]
    ]
    expected = [token for text in documents if text for token in [*VOCABULARY.encode(text), 1]]
    if not encoded.dropped["tail_of_one_token"]:
        assert rebuilt == expected
    assert len(rebuilt) == len(expected) - encoded.dropped["tail_of_one_token"]
    targets = np.concatenate([np.zeros(0, int), *encoded.targets])
    assert encoded.target_bytes == np.count_nonzero(targets > 2)
    assert encoded.dropped["empty_text"] == sum(not text for text in documents)


def test_prefix_lm_depends_on_seed_and_document_number_only():
    documents = [(f"document {number} " * 40,) for number in range(8)]

    def lengths(first, part, seed):
        encoded = _encode(PrefixLM(), part, (64, 16), first, seed)
        return [len(source) for source in encoded.sources]

    whole = lengths(0, documents, 1)
    assert whole == lengths(0, documents[:3], 1) + lengths(3, documents[3:], 1)
    assert whole != lengths(0, documents, 2)
    assert len(set(whole)) > 5


def test_prefix_lm_without_split_cuts_at_one_place():
    encoded = _encode(PrefixLM(split=0), [("x" * 200,)], (16, 8))
    assert {len(source) for source in encoded.sources[:-1]} == {16}
    with pytest.raises(ConfigError, match=r"split is 1.5"):
        PrefixLM(split=1.5)
