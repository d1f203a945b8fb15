"""Preparation on Apache Beam: the very shards and card of `prepare`, on any runner.

The driver reads and cuts the text into blocks and lays them down under the records directory;
workers encode, pack and write, one block an element. Shards follow from their blocks alone, so
every runner writes the same bytes, and what a killed run finished is kept as `prepare` keeps it.
The records directory must be a path that driver and workers share (a mounted bucket).

Beam has pins of its own that contradict this repository's constraints.txt (protobuf below 7,
pillow below 13): install the extra ``beam`` of setup.py in an environment of its own.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shlex
from collections.abc import Iterator

from encdec.data.blocks import Block, Counts, Recipe
from encdec.data.prepare import NOTES, read_note, write_noted
from encdec.data.records import Shard
from encdec.data.vocabulary import Vocabulary, VocabularySpec, load_vocabulary
from encdec.errors import ConfigError
from encdec.packages import install_hint

SPOOL = "blocks"


class BeamWriter:
    """What `prepare` takes as its `writer`: blocks to shards by a Beam pipeline.

    `options` are Beam's own flags in one string, e.g. "--runner=DataflowRunner --project=..."
    (default: DirectRunner, in this process). ConfigError where Beam is not installed.
    """

    def __init__(self, options: str = ""):
        try:
            import apache_beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as error:
            raise ConfigError(
                "preparing on Beam needs apache-beam, whose pins contradict constraints.txt; in an "
                f"environment of its own: {install_hint('beam', constraints=False)}"
            ) from error
        self._beam = apache_beam
        self._options = PipelineOptions(shlex.split(options))

    def __call__(
        self,
        recipe: Recipe,
        directory: pathlib.Path,
        vocabulary: Vocabulary,
        blocks: Iterator[Block],
    ) -> Iterator[tuple[Shard | None, Counts]]:
        spool = directory / NOTES / SPOOL
        spool.mkdir(exist_ok=True)
        numbers = [_lay_down(spool, block) for block in blocks]
        write = functools.partial(_write_laid_down, recipe, str(directory), vocabulary.spec())
        with self._beam.Pipeline(options=self._options) as pipeline:
            _ = (
                pipeline
                | "blocks" >> self._beam.Create(numbers)
                | "spread" >> self._beam.Reshuffle()
                | "write shards" >> self._beam.Map(write)
            )
        for number in numbers:
            yield read_note(directory, number)


def _lay_down(spool: pathlib.Path, block: Block) -> int:
    path = spool / f"{block.number:06d}.json"
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump([block.first_document, block.documents], file)
    os.replace(partial, path)
    return block.number


@functools.lru_cache(maxsize=1)
def _vocabulary(spec: VocabularySpec, directory: str) -> Vocabulary:
    return load_vocabulary(spec, directory=directory)


def _write_laid_down(recipe: Recipe, directory: str, spec: VocabularySpec, number: int) -> int:
    root = pathlib.Path(directory)
    with open(root / NOTES / SPOOL / f"{number:06d}.json", encoding="utf-8") as file:
        first_document, documents = json.load(file)
    block = Block(number, first_document, [tuple(document) for document in documents])
    write_noted(recipe, root, block, _vocabulary(spec, directory))
    return number
