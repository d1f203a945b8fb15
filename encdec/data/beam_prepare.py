"""Preparation on Apache Beam: the same shards and card as from ``prepare``, on any runner.

The driver reads and cuts the text into blocks and lays them down under the records directory;
workers encode, pack and write, one block an element. Shards follow from their blocks alone, so
every runner writes the same bytes, and what a killed run finished is kept as ``prepare`` keeps it.
The records directory must be a path that driver and workers share (a mounted bucket).

Beam has pins of its own that contradict this repository's constraints.txt (protobuf below 7,
pillow below 13): install the extra ``beam`` of setup.py in an environment of its own.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shlex
from collections.abc import Iterator

from encdec.data.blocks import Counts, DocumentBlock, Recipe
from encdec.data.prepare import write_noted
from encdec.data.records import Shard
from encdec.data.vocabulary import Vocabulary, VocabularySpec, load_vocabulary
from encdec.errors import ConfigError
from encdec.files import write_json
from encdec.jobs import NOTES, Notes
from encdec.packages import install_hint

SPOOL = "blocks"


class BeamWriter:
    """What ``prepare`` takes as its ``writer``: blocks to shards by a Beam pipeline.

    ``options`` are Beam's own flags in one string, e.g. "--runner=DataflowRunner --project=..."
    (default: DirectRunner, in this process). ConfigError where Beam is not installed.
    """

    def __init__(self, options: str = ""):
        try:
            import apache_beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as error:
            raise ConfigError(
                "preparing on Beam needs apache-beam, which conflicts with constraints.txt; "
                f"install it in a separate environment: {install_hint('beam', constraints=False)}"
            ) from error
        self._beam = apache_beam
        self._options = PipelineOptions(shlex.split(options))

    def __call__(
        self,
        recipe: Recipe,
        notes: Notes[Counts],
        vocabulary: Vocabulary,
        blocks: Iterator[DocumentBlock],
    ) -> Iterator[tuple[Shard | None, Counts]]:
        spool = notes.directory / NOTES / SPOOL
        spool.mkdir(exist_ok=True)
        numbers = [_lay_down(spool, block) for block in blocks]
        write = functools.partial(_write_laid_down, recipe, notes, vocabulary.spec())
        with self._beam.Pipeline(options=self._options) as pipeline:
            _ = (
                pipeline
                | "blocks" >> self._beam.Create(numbers)
                | "spread" >> self._beam.Reshuffle()
                | "write shards" >> self._beam.Map(write)
            )
        for number in numbers:
            yield notes.read(number)


def _lay_down(spool: pathlib.Path, block: DocumentBlock) -> int:
    write_json(spool / f"{block.number:06d}.json", [block.first_document, block.documents])
    return block.number


@functools.lru_cache(maxsize=1)
def _vocabulary(spec: VocabularySpec, directory: pathlib.Path) -> Vocabulary:
    return load_vocabulary(spec, directory=directory)


def _write_laid_down(
    recipe: Recipe, notes: Notes[Counts], spec: VocabularySpec, number: int
) -> int:
    path = notes.directory / NOTES / SPOOL / f"{number:06d}.json"
    first_document, documents = json.loads(path.read_text(encoding="utf-8"))
    block = DocumentBlock(number, first_document, [tuple(document) for document in documents])
    write_noted(recipe, notes, block, _vocabulary(spec, notes.directory))
    return number
