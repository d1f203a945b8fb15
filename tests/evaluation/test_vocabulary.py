"""A checkpoint whose vocabulary cannot write the task's answers is refused."""

from __future__ import annotations

import pytest

from encdec.data.vocabulary import ByteVocabulary, SentencePieceVocabulary
from encdec.errors import DataError
from encdec.evaluation.predictions import Example, check_vocabulary

CODE = [Example("x", (text,)) for text in ("if (a) { b; }", "{ }", "plain words")]


def test_bytes_write_everything():
    assert check_vocabulary(ByteVocabulary(), CODE, "code") == 0


@pytest.mark.corpora
def test_t5s_vocabulary_writes_prose_and_no_code(corpora):
    model = (corpora / "tokenizers" / "t5_spiece_32100.model").read_bytes()
    vocabulary = SentencePieceVocabulary(model)
    assert check_vocabulary(vocabulary, CODE[2:], "prose") == 0
    with pytest.raises(DataError, match="cannot express 2 of the 3 references of code"):
        check_vocabulary(vocabulary, CODE, "code")
