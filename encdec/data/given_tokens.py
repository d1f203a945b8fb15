"""Examples tokenized by another pipeline, whose vocabulary must be that of the records.

A document is then not text but the ids of each side in decimal, with spaces between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from encdec.data.objectives import FIT_LENGTHS, Document, Encoded, Form, Objective
from encdec.errors import ConfigError, DataError


def as_document(*sides: Iterable[int]) -> Document:
    """The document of an example's ids."""
    return tuple(" ".join(map(str, ids)) for ids in sides)


def ids_of(text: str) -> np.ndarray:
    """The ids of one side of a document, int32."""
    return np.array(text.split(), np.int32)


def ends_with(ids: np.ndarray, token: int) -> bool:
    """Whether a token is the last of these; False where there are none."""
    return len(ids) > 0 and bool(ids[-1] == token)


@dataclasses.dataclass(frozen=True)
class GivenTokens(Objective):
    """Pairs of ids, taken as they are; too long ones lose their end, but not an EOS there.

    Attributes:
        task: whose ids they are.
        flags: how a command names their vocabulary.
        fingerprint: of that vocabulary; "" where its ids have no text.
        size: its ids.
        inputs_eos: whether sources end with EOS.
    """

    task: str
    flags: str
    fingerprint: str
    size: int
    inputs_eos: bool = True
    document_fields: ClassVar[tuple[str, ...]] = ("ids of sources", "ids of targets")
    is_random = False
    reads_text = False

    def check(self, form: Form) -> None:
        """ConfigError where the records' vocabulary is not that of the ids."""
        vocabulary = form.vocabulary
        same = self.fingerprint or vocabulary.size == self.size
        if same and self.fingerprint in ("", vocabulary.fingerprint):
            return
        raise ConfigError(
            f"{self.task} uses its own vocabulary of {self.size:,} ids, but the records' is "
            f"another, of {vocabulary.size:,} ids; give {self.flags}, or register the task with "
            "only the preprocessors before tokenization"
        )

    def encode(self, documents: Sequence[Document], first_document: int, form: Form) -> Encoded:
        encoded, vocabulary = Encoded(), form.vocabulary
        for number, document in enumerate(documents, first_document):
            sides = [ids_of(text) for text in document]
            for ids in sides:
                if len(ids) and not 0 < ids.min() <= ids.max() < vocabulary.size:
                    raise DataError(
                        f"{self.task}, example {number}: ids from {ids.min()} to {ids.max()}; "
                        f"expected 1 to {vocabulary.size - 1} (0 is padding)"
                    )
            *sources, target = sides
            source = sources[0] if self.has_source else np.zeros(0, np.int32)
            if not len(target) or (self.has_source and not len(source)):
                encoded.dropped["empty_source" if len(target) else "empty_target"] += 1
                continue
            stored = {"sources": len(source) + form.prefix_tokens, "targets": len(target)}
            for side, tokens in stored.items():
                for length in FIT_LENGTHS:
                    encoded.fits[f"{side} {length}"] += tokens <= length
            end_of = lambda ids: vocabulary.eos_id if ends_with(ids, vocabulary.eos_id) else None
            source = encoded.cut("source", source, form.inputs_length, end_of(source))
            target = encoded.cut("target", target, form.targets_length, end_of(target))
            encoded.add(source, target, int(vocabulary.byte_lengths[target].sum()))
        return encoded


@dataclasses.dataclass(frozen=True)
class GivenTargets(GivenTokens):
    """The same of tasks without sources, for decoder-only models alone."""

    inputs_eos: bool = False
    document_fields: ClassVar[tuple[str, ...]] = ("ids of targets",)
    has_source = False
