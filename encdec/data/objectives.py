"""Objectives: documents to (source, target) token pairs, pure functions of the seed.

A document is a tuple of texts: (source, target) for supervised pairs, (text,) for raw text. An
objective is a frozen dataclass, so that the card can state it and worker processes can be sent
it. What it cuts off or leaves out it counts. Span corruption and its mixtures: ``denoising``.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar, cast

import numpy as np

from encdec.data.vocabulary import Vocabulary
from encdec.errors import ConfigError

Document = tuple[str, ...]
# Long enough for SentencePiece's batch call to pay, short enough to stay in the cache.
ENCODE_BATCH = 512
# Lengths of rows among which people choose.
FIT_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass
class Encoded:
    """Token pairs of some documents, with the text bytes of each target and what was lost.

    ``fits`` counts the examples whose source and target as given are no longer than FIT_LENGTHS, as
    "sources 256"; objectives that cut text themselves leave it empty.
    """

    sources: list[np.ndarray] = dataclasses.field(default_factory=list)
    targets: list[np.ndarray] = dataclasses.field(default_factory=list)
    target_bytes: int = 0
    truncated: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    fits: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, source: np.ndarray, target: np.ndarray, target_bytes: int) -> None:
        self.sources.append(source)
        self.targets.append(target)
        self.target_bytes += target_bytes

    def cut(self, side: str, ids: np.ndarray, length: int, end: int | None) -> np.ndarray:
        """``ids`` [length] at most, what is cut off counted; ``end``, if any, stays the last."""
        if len(ids) <= length:
            return ids
        self.truncated[f"{side}s"] += 1
        self.truncated[f"{side}_tokens"] += len(ids) - length
        return ids[:length] if end is None else np.append(ids[: length - 1], np.int32(end))


@dataclasses.dataclass(frozen=True)
class Form:
    """What documents are encoded for: vocabulary, longest source and target, seed.

    ``prefix_tokens`` are put in front of each source afterwards; ``inputs_length`` is without them.
    """

    vocabulary: Vocabulary
    inputs_length: int
    targets_length: int
    seed: int = 0
    prefix_tokens: int = 0


class Objective(abc.ABC):
    """Turns documents into token pairs no longer than the two lengths.

    ``has_source`` is False where every source is empty: such records are for decoder-only models.
    ``is_random`` is False where the same document always gives the same examples, ``reads_text``
    where documents are ids and not text.
    """

    document_fields: ClassVar[tuple[str, ...]]
    has_source: ClassVar[bool] = True
    is_random: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True
    inputs_eos: bool

    def check(self, form: Form) -> None:
        """Refuse, with ConfigError, a form that this objective cannot use."""
        return

    @abc.abstractmethod
    def encode(self, documents: Sequence[Document], first_document: int, form: Form) -> Encoded:
        """Token pairs of ``documents``, the first of which is number ``first_document``."""


# What makes each objective, by the name that flags and gin files use; `denoising` enters its own.
# gin binds its parameters by their names.
OBJECTIVES: dict[str, Callable[..., Objective]] = {}
_Maker = TypeVar("_Maker", bound=Callable[..., Objective])


def named(name: str) -> Callable[[_Maker], _Maker]:
    """Enter a class of objectives, or a function that makes one, under a name."""

    def enter(make: _Maker) -> _Maker:
        OBJECTIVES[name] = make
        return make

    return enter


def encode_texts(
    documents: Sequence[Document],
    first_document: int,
    vocabulary: Vocabulary,
    encoded: Encoded,
    add_eos: bool,
) -> Iterator[tuple[int, np.ndarray]]:
    """(document number, ids) of raw texts; empty ones are counted in ``encoded`` and left out."""
    for start in range(0, len(documents), ENCODE_BATCH):
        part = documents[start : start + ENCODE_BATCH]
        batch = vocabulary.encode_batch([document[0] for document in part], add_eos)
        for number, ids in enumerate(batch, first_document + start):
            if len(ids) > add_eos:
                yield number, ids
            else:
                encoded.dropped["empty_text"] += 1


def describe_objective(objective: Objective) -> dict[str, Any]:
    """The objective as the card states it: its name and settings."""
    return {"name": type(objective).__name__, **dataclasses.asdict(cast(Any, objective))}


@named("sequence_to_sequence")
@dataclasses.dataclass(frozen=True)
class SequenceToSequence(Objective):
    """Supervised pairs: EOS after the target and, by default as in T5, after the source.

    Too long texts lose their end, never their EOS.
    """

    inputs_eos: bool = True
    document_fields = ("source", "target")
    is_random = False

    def encode(self, documents: Sequence[Document], first_document: int, form: Form) -> Encoded:
        encoded, vocabulary = Encoded(), form.vocabulary
        eos = vocabulary.eos_id
        source_end = eos if self.inputs_eos else None
        for start in range(0, len(documents), ENCODE_BATCH):
            part = documents[start : start + ENCODE_BATCH]
            sources = vocabulary.encode_batch([pair[0] for pair in part], self.inputs_eos)
            targets = vocabulary.encode_batch([pair[1] for pair in part], add_eos=True)
            source_lengths = np.fromiter(map(len, sources), np.int64, len(part))
            target_lengths = np.fromiter(map(len, targets), np.int64, len(part))
            kept = (source_lengths > 0) & (target_lengths > 1)
            fits = (source_lengths <= form.inputs_length) & (target_lengths <= form.targets_length)
            stored = (("sources", source_lengths + form.prefix_tokens), ("targets", target_lengths))
            for side, lengths in stored:
                below = np.searchsorted(np.sort(lengths[kept]), FIT_LENGTHS, side="right")
                for length, count in zip(FIT_LENGTHS, below.tolist()):
                    encoded.fits[f"{side} {length}"] += count
            encoded.dropped["empty_target"] += int((target_lengths == 1).sum())
            encoded.dropped["empty_source"] += int((kept < (target_lengths > 1)).sum())
            # Pairs that fit are taken together: a look at each would cost much of its encoding.
            whole = itertools.compress((pair[1] for pair in part), kept & fits)
            encoded.target_bytes += len("".join(whole).encode("utf-8"))
            for i in np.flatnonzero(kept & ~fits).tolist():
                sources[i] = encoded.cut("source", sources[i], form.inputs_length, source_end)
                if len(targets[i]) > form.targets_length:
                    targets[i] = encoded.cut("target", targets[i], form.targets_length, eos)
                    encoded.target_bytes += int(vocabulary.byte_lengths[targets[i]].sum())
                else:
                    encoded.target_bytes += len(part[i][1].encode("utf-8"))
            encoded.sources += itertools.compress(sources, kept)
            encoded.targets += itertools.compress(targets, kept)
        encoded.dropped = +encoded.dropped
        return encoded


@named("prefix_lm")
@dataclasses.dataclass(frozen=True)
class PrefixLM(Objective):
    """Raw text cut into windows of S + T tokens, each a source of S and a target of T tokens.

    A share ``split`` of the windows is cut once more, at a random place and in the same proportion,
    so that the model meets short sources too while rows still fill exactly. The text of source
    and target is contiguous: no EOS between them, one where the document ends. The halves of a
    prefix LM as in Raffel et al. (2020), 3.2.1; a fixed cut as in T5Gemma (2504.06225).
    """

    split: float = 0.5
    inputs_eos = False
    document_fields = ("text",)

    def __post_init__(self):
        if not 0 <= self.split <= 1:
            raise ConfigError(f"prefix LM's split is {self.split}; expected a share from 0 to 1")

    def encode(self, documents: Sequence[Document], first_document: int, form: Form) -> Encoded:
        encoded = Encoded()
        byte_lengths = form.vocabulary.byte_lengths
        texts = encode_texts(documents, first_document, form.vocabulary, encoded, add_eos=True)
        for number, ids in texts:
            for begin, middle, end in self._pieces(len(ids), number, form):
                if middle == begin:
                    encoded.dropped["tail_of_one_token"] += 1
                    continue
                target = ids[middle:end]
                encoded.add(ids[begin:middle], target, int(byte_lengths[target].sum()))
        return encoded

    def _pieces(self, tokens: int, document: int, form: Form) -> list[tuple[int, int, int]]:
        """(begin, middle, end) of each source and target, covering all tokens in order."""
        rng = np.random.default_rng([form.seed, document])
        S, T = form.inputs_length, form.targets_length
        pieces = []
        window = S + T
        for begin in range(0, tokens, window):
            length = min(window, tokens - begin)
            if length < window:
                target = min(max(round(length * T / window), 1), max(length - 1, 1))
                pieces.append((begin, begin + length - target, begin + length))
                continue
            cuts = [(S, T)]
            if min(S, T) > 1 and rng.random() < self.split:
                share = rng.uniform(0.1, 0.9)
                source = min(max(round(share * S), 1), S - 1)
                target = min(max(round(share * T), 1), T - 1)
                cuts = [(source, target), (S - source, T - target)]
            for source, target in cuts:
                pieces.append((begin, begin + source, begin + source + target))
                begin += source + target
        return pieces


@named("causal_lm")
@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """Raw text cut into targets of T tokens, no source: next-token prediction on every token.

    For decoder-only models alone, from the same documents as the other objectives. EOS ends a
    document. With T = another objective's S + T, rows are as long as that one's.
    """

    inputs_eos = False
    has_source = False
    is_random = False
    document_fields = ("text",)

    def encode(self, documents: Sequence[Document], first_document: int, form: Form) -> Encoded:
        encoded = Encoded()
        byte_lengths, length = form.vocabulary.byte_lengths, form.targets_length
        nothing = np.zeros(0, np.int32)
        texts = encode_texts(documents, first_document, form.vocabulary, encoded, add_eos=True)
        for _, ids in texts:
            for begin in range(0, len(ids), length):
                target = ids[begin : begin + length]
                encoded.add(nothing, target, int(byte_lengths[target].sum()))
        return encoded
