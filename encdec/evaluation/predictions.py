"""Predictions of a checkpoint on a task's examples: made once, a window at a time, kept as JSONL.

A window is a run of consecutive examples. Processes divide the windows (``--shard=I/N``) and write
one file each; earlier files are used, whatever number of processes wrote them.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from encdec.data.vocabulary import Vocabulary
from encdec.errors import DataError
from encdec.evaluation.evaluation_settings import TooLong
from encdec.evaluation.examples import Example
from encdec.evaluation.share_files import REMEDY, ShareFiles
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.generator import TextGenerator
from encdec.inference.text_io import PromptFormat
from encdec.jobs import claim_settings
from encdec.storage import make_directory

# Independent of the batch size, so that windows and sampled answers do not change with it.
WINDOW = 128
SETTINGS_FILE = "settings.json"

OnBatch = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An answer to one example.

    Attributes:
        text: the answer; empty if the example was skipped.
        tokens: how many the model wrote.
        finish: "eos", "stop", "length", or "skipped" if the source was too long or empty.
        cut: whether the end of the source was cut.
    """

    text: str
    tokens: int
    finish: str
    cut: bool


SKIPPED = Prediction("", 0, "skipped", False)


class PredictionFiles:
    """The predictions of one task in one directory.

    Args:
        directory: created if missing.
        identity: settings that existing predictions must share; plain JSON values.
        examples: of the task, in order.
    """

    def __init__(
        self, directory: pathlib.Path, identity: dict[str, Any], examples: Sequence[Example]
    ):
        self.directory, self._examples = directory, examples
        self._shares = _shares(directory)
        self.writing = self._shares.writing
        make_directory(directory)
        claim_settings(
            directory / SETTINGS_FILE,
            identity,
            holder=directory,
            remedy="give another --out, or delete the directory to start over",
        )

    def read(self) -> dict[int, Prediction]:
        """All stored predictions, by the example's index; an unfinished last line is left out.

        Raises:
            DataError: a malformed line, or an answer to another source.
        """
        found = {}
        for where, index, example, prediction in read_answers(self.directory):
            if not 0 <= index < len(self._examples) or (
                example.source != self._examples[index].source
            ):
                raise DataError(f"{where} answers another source than example {index}; {REMEDY}")
            found[index] = prediction
        return found

    def append(self, shard: int, made: Mapping[int, Prediction]) -> None:
        """Appends predictions by the example's index; they are on disk on return."""
        self._shares.append(
            shard,
            (
                {
                    "index": index,
                    "source": self._examples[index].source,
                    "prediction": one.text,
                    "references": list(self._examples[index].references),
                    "tokens": one.tokens,
                    "finish": one.finish,
                    "source_cut": one.cut,
                }
                for index, one in made.items()
            ),
        )


def _shares(directory: pathlib.Path) -> ShareFiles:
    return ShareFiles(directory, "predictions", "a prediction of this command")


def read_answers(directory: pathlib.Path) -> Iterator[tuple[str, int, Example, Prediction]]:
    """(file and line, the example's index, the example, its prediction) of a task's directory.

    An unfinished last line is left out.

    Raises:
        DataError: a malformed line.
    """

    def answer(row: Mapping[str, Any]) -> tuple[int, Example, Prediction]:
        return (
            int(row["index"]),
            Example(row["source"], tuple(row["references"])),
            Prediction(row["prediction"], row["tokens"], row["finish"], row["source_cut"]),
        )

    for where, row in _shares(directory).read(answer):
        yield where, *row


def read_texts(directory: pathlib.Path) -> list[str]:
    """A task's answers in the order of its examples."""
    answers = {index: prediction.text for _, index, _, prediction in read_answers(directory)}
    return [answers[index] for index in sorted(answers)]


def open_windows(count: int, done: set[int], shard: int, shards: int) -> list[range]:
    """This process's windows with missing predictions."""
    windows = [range(begin, min(begin + WINDOW, count)) for begin in range(0, count, WINDOW)]
    return [window for window in windows[shard::shards] if not done.issuperset(window)]


@dataclasses.dataclass(frozen=True)
class UnreadableSources:
    """Sources that the model cannot read unchanged, as indices of examples.

    Attributes:
        long: longer than the model's longest input.
        empty: without a token; these are skipped, with an empty answer.
    """

    long: tuple[int, ...]
    empty: tuple[int, ...]


def check_sources(
    prompts: PromptFormat, examples: Sequence[Example], too_long: TooLong
) -> UnreadableSources:
    """The sources that are too long or empty.

    Raises:
        DataError: some are too long, and ``too_long`` is "refuse".
    """
    kinds = [kind_of_source(prompts, example.source) for example in examples]
    found = UnreadableSources(
        *(
            tuple(index for index, one in enumerate(kinds) if one == kind)
            for kind in ("long", "empty")
        )
    )
    if found.long and too_long == "refuse":
        raise DataError(
            f"{len(found.long):,} of {len(examples):,} sources are longer than the "
            f"{prompts.max_input_tokens:,} tokens that the model reads; cut their end "
            "with --too_long=cut, count them as empty answers with --too_long=skip, or allow "
            "more than in training with --max_input_tokens"
        )
    return found


def kind_of_source(prompts: PromptFormat, source: str) -> Literal["fits", "long", "empty"]:
    """Whether a source fits, is too long, or is empty."""
    if not source.strip() or not (ids := prompts.vocabulary.encode(prompts.framed(source))):
        return "empty"
    return "long" if prompts.fit(ids, truncate=True)[1] else "fits"


def is_skipped(prompts: PromptFormat, source: str, too_long: TooLong) -> bool:
    """Whether a source gets an empty answer without being read."""
    kind = kind_of_source(prompts, source)
    return kind == "empty" or kind == "long" and too_long == "skip"


def check_vocabulary(vocabulary: Vocabulary, examples: Sequence[Example], task: str) -> int:
    """How many first references the vocabulary cannot express, ignoring white space.

    Raises:
        DataError: more than half of them: the task was made for another vocabulary.
    """
    texts = [example.references[0] for example in examples]
    lost = sum(vocabulary.decode(vocabulary.encode(text)).split() != text.split() for text in texts)
    if 2 * lost > len(texts):
        raise DataError(
            f"the checkpoint's vocabulary cannot express {lost:,} of the {len(texts):,} references "
            f"of {task}; train a model on a vocabulary with byte fallback (encdec vocab)"
        )
    return lost


def predict(
    generator: TextGenerator,
    files: PredictionFiles,
    examples: Sequence[Example],
    settings: GenerationSettings,
    *,
    too_long: TooLong = "cut",
    shard: int = 0,
    shards: int = 1,
    on_batch: OnBatch | None = None,
) -> None:
    """Makes and writes the missing predictions of this process's windows.

    Args:
        generator: of the checkpoint.
        files: receive the predictions; existing ones are kept.
        examples: of the task, all of them.
        settings: of generation; the first answer counts.
        too_long: "cut" the end of long sources, or "skip" them with an empty answer, like empty
            sources.
        shard: this process, from 0.
        shards: number of processes that divide the windows.
        on_batch: called with numbers of examples and of new tokens.

    Raises:
        InUseError: another process writes this share.
    """
    with files.writing(shard):
        done = set(files.read())
        for window in open_windows(len(examples), done, shard, shards):
            texts = [examples[index].source for index in window]
            skipped = [is_skipped(generator.prompts, text, too_long) for text in texts]
            # Skipped sources keep their positions: the indices of others do not depend on them.
            asked = ["." if skip else text for text, skip in zip(texts, skipped)]
            answers = generator.generate(
                asked, settings, truncate=True, first_number=window.start, on_batch=on_batch
            )
            made = [
                SKIPPED
                if skip
                else Prediction(one.text.strip(), len(one.tokens), one.finish, one.truncated)
                for (one, *_), skip in zip(answers, skipped)
            ]
            files.append(
                shard, {index: one for index, one in zip(window, made) if index not in done}
            )
