"""One block of documents to one shard of packed rows: the unit of parallel work and of restart.

A block is a run of consecutive documents, cut by the bytes of their text. Its shard depends on
the block, its number and the recipe only, so any number of processes write the same bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from encdec.data.objectives import Document, Encoded, Form, Objective, describe_objective
from encdec.data.packing import pack
from encdec.data.records import (
    DatasetCard,
    Shard,
    content_fingerprint,
    encode_row,
    token_dtype,
    write_shard,
)
from encdec.data.vocabulary import Vocabulary
from encdec.data.vocabulary_losses import Losses, count_losses
from encdec.errors import ConfigError, DataError
from encdec.jobs import Tally


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a shard's bytes, except its documents.

    ``inputs_prefix`` are ids in front of every source, within ``inputs_length``.
    """

    objective: Objective
    inputs_length: int
    targets_length: int
    packing: str = "best_fit"
    seed: int = 0
    inputs_prefix: tuple[int, ...] = ()

    def __post_init__(self):
        names: tuple[str, ...] = ("inputs_length", "targets_length")
        if not self.objective.has_source:
            names = names[1:]
            if self.inputs_length != 0:
                raise ConfigError(
                    f"inputs_length is {self.inputs_length!r}, but "
                    f"{type(self.objective).__name__} has no sources; give --inputs_length=0"
                )
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 2:
                raise ConfigError(f"{name} is {value!r}; expected an integer of 2 or more tokens")
        prefix = list(self.inputs_prefix)
        if prefix and self.inputs_length < len(prefix) + 2:
            kind = type(self.objective).__name__
            raise ConfigError(
                f"inputs_prefix is {prefix}, but "
                + (
                    f"inputs_length is {self.inputs_length}; give {len(prefix) + 2} or more"
                    if self.objective.has_source
                    else f"{kind} has no sources; leave it out"
                )
            )

    def form(self, vocabulary: Vocabulary) -> Form:
        """What the objective encodes for; the prefix takes its part of the source's length."""
        added = len(self.inputs_prefix)
        length = self.inputs_length - added
        return Form(vocabulary, length, self.targets_length, self.seed, added)


@dataclasses.dataclass(frozen=True)
class DocumentBlock:
    """Consecutive documents; ``first_document`` is the number of the first in the whole stream."""

    number: int
    first_document: int
    documents: list[Document]

    def digest(self) -> str:
        """sha256 of the documents: whether a finished shard still belongs to this block."""
        digest = hashlib.sha256(f"{self.number} {self.first_document}".encode())
        for document in self.documents:
            for text in document:
                data = text.encode("utf-8")
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
        return digest.hexdigest()


COUNTERS = ("truncated", "dropped", "fits")


@dataclasses.dataclass
class Counts(Tally):
    """Counts of what happened to some documents."""

    documents: int = 0
    rows: int = 0
    examples: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    target_bytes: int = 0
    truncated: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    lost: Losses = dataclasses.field(default_factory=Losses)
    fits: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def tokens(self) -> int:
        return self.source_tokens + self.target_tokens

    def to_dict(self) -> dict[str, Any]:
        # dataclasses.asdict cannot rebuild a Counter.
        counters = {name: dict(getattr(self, name)) for name in COUNTERS}
        return {**vars(self), **counters, "lost": dataclasses.asdict(self.lost)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        counters = {name: collections.Counter(content.get(name, {})) for name in COUNTERS}
        return cls(**{**content, **counters, "lost": Losses(**content["lost"])})


def cut_blocks(documents: Iterable[Document], block_bytes: int) -> Iterator[DocumentBlock]:
    """Blocks of about ``block_bytes`` of UTF-8 text each, at least one document."""
    number = first = size = 0
    held: list[Document] = []
    for document in documents:
        held.append(document)
        # Characters stand in for bytes: any measure does that depends on the documents alone.
        size += sum(map(len, document))
        if size >= block_bytes:
            yield DocumentBlock(number, first, held)
            number, first, held, size = number + 1, first + len(held), [], 0
    if held:
        yield DocumentBlock(number, first, held)


def encode_block(recipe: Recipe, vocabulary: Vocabulary, block: DocumentBlock) -> Encoded:
    """The block's examples as token pairs, before packing."""
    form = recipe.form(vocabulary)
    encoded = recipe.objective.encode(block.documents, block.first_document, form)
    if recipe.inputs_prefix:
        prefix = np.array(recipe.inputs_prefix, np.int32)
        encoded.sources = [np.concatenate([prefix, source]) for source in encoded.sources]
    return encoded


def pack_rows(
    recipe: Recipe,
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    vocabulary: Vocabulary,
) -> list[bytes]:
    """Packed rows as stored, from token pairs that fit the recipe's lengths."""
    lengths = recipe.inputs_length, recipe.targets_length
    dtype = token_dtype(vocabulary.size, *lengths)
    source_lengths = np.fromiter(map(len, sources), np.int64, len(sources))
    target_lengths = np.fromiter(map(len, targets), np.int64, len(targets))
    rows = pack(source_lengths, target_lengths, *lengths, recipe.packing)
    return [encode_row([sources[i] for i in row], [targets[i] for i in row], dtype) for row in rows]


def build_block(
    recipe: Recipe, vocabulary: Vocabulary, block: DocumentBlock
) -> tuple[list[bytes], Counts]:
    """Rows of a block and the count of what became of its documents."""
    encoded = encode_block(recipe, vocabulary, block)
    rows = pack_rows(recipe, encoded.sources, encoded.targets, vocabulary)
    # Further references are no text that is learned, and ids are none.
    fields = len(recipe.objective.document_fields) if recipe.objective.reads_text else 0
    counts = Counts(
        documents=len(block.documents),
        rows=len(rows),
        examples=len(encoded.sources),
        source_tokens=sum(map(len, encoded.sources)),
        target_tokens=sum(map(len, encoded.targets)),
        target_bytes=encoded.target_bytes,
        truncated=encoded.truncated,
        dropped=encoded.dropped,
        fits=encoded.fits,
        lost=count_losses(
            vocabulary,
            [text for document in block.documents for text in document[:fields]],
            [*encoded.sources, *encoded.targets],
        ),
    )
    return rows, counts


SHARDS = "rows-*.arrayrecord"


def shard_name(number: int) -> str:
    return f"rows-{number:06d}.arrayrecord"


def write_block(
    recipe: Recipe, vocabulary: Vocabulary, block: DocumentBlock, directory: pathlib.Path
) -> tuple[Shard | None, Counts]:
    """Write a block's shard; None where none of its documents gave an example."""
    rows, counts = build_block(recipe, vocabulary, block)
    if not rows:
        return None, counts
    return write_shard(directory / shard_name(block.number), rows), counts


def make_card(
    recipe: Recipe,
    vocabulary: Vocabulary,
    shards: Sequence[Shard],
    counts: Counts,
    *,
    task: str,
    split: str,
    origin: dict[str, Any],
    decoder_start_id: int,
) -> DatasetCard:
    """The card of finished shards; DataError where they hold no row at all."""
    if not counts.rows:
        raise DataError(
            f"{task}, split {split}, gave no examples: {counts.documents} documents read, dropped "
            f"{dict(counts.dropped)}; give text with non-empty sources and targets"
        )
    spec = vocabulary.spec()
    lengths = recipe.inputs_length, recipe.targets_length
    return DatasetCard(
        task=task,
        split=split,
        origin=origin,
        vocabulary=spec,
        inputs_length=recipe.inputs_length,
        targets_length=recipe.targets_length,
        packing=recipe.packing,
        inputs_eos=recipe.objective.inputs_eos,
        objective=json.loads(json.dumps(describe_objective(recipe.objective))),
        seed=recipe.seed,
        decoder_start_id=decoder_start_id,
        token_dtype=token_dtype(vocabulary.size, *lengths),
        rows=counts.rows,
        examples=counts.examples,
        documents=counts.documents,
        source_tokens=counts.source_tokens,
        target_tokens=counts.target_tokens,
        target_bytes=counts.target_bytes,
        non_padding_share=counts.tokens / (counts.rows * sum(lengths)),
        truncated=dict(sorted(counts.truncated.items())),
        dropped=dict(sorted(counts.dropped.items())),
        lost=counts.lost.to_card(),
        fits={name: counts.fits[name] for name in counts.fits},
        shards=tuple(shards),
        fingerprint=content_fingerprint(
            shards, spec, *lengths, decoder_start_id, recipe.inputs_prefix
        ),
        inputs_prefix=recipe.inputs_prefix,
    )
