"""Objectives: nothing lost or made up, lengths kept, counts right, deterministic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.data.objectives import PrefixLM, SequenceToSequence
from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import ConfigError

VOCABULARY = ByteVocabulary()
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def _encode(objective, documents, lengths=(16, 8), first=0, seed=0):
    return objective.encode(documents, first, VOCABULARY, *lengths, seed)


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
