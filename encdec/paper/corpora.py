"""The experiment's text: excerpts for pretraining, examples of tasks that fit, one vocabulary.

Everything is chosen by rule and counted in ``counts.json``: available, too long, taken. The tasks'
files written here are what ``encdec prepare`` and ``encdec evaluate`` read. ``data.json`` has a
fingerprint of each task's examples and of the text, as they were read: neither the work directory
nor a result row is taken for one of other data.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from encdec.data.prepare import prepare
from encdec.data.readers import BadRows, check_files, text_documents
from encdec.data.task_registry import FILE_TASKS, text_task
from encdec.data.text_tasks import jsonl_task
from encdec.data.vocabulary import CARD_FILE, Vocabulary, load_vocabulary
from encdec.data.vocabulary_training import train_vocabulary
from encdec.errors import ConfigError, DataError
from encdec.files import whole_file, write_json
from encdec.logs import Say
from encdec.paper.setting import Column, Setting
from encdec.result_lines import setting_digest
from encdec.storage import as_path

HELD_OUT = 0.05  # last training examples of a task, held out to choose a checkpoint
HELD_OUT_MOST = 64  # examples
SPLITS = ("train", "validation")
COUNTS_FILE = "counts.json"
DATA_FILE = "data.json"
TEXT = "text"  # name of the pretraining text among the fingerprints

Pair = tuple[str, tuple[str, ...]]


class Corpora:
    """Files of one experiment's text below ``work``; existing files are not made again."""

    def __init__(self, setting: Setting, work: pathlib.Path, data_dir: str, text: Sequence[str]):
        self._setting, self._work = setting, work
        self._data_dir, self._text = data_dir, list(text)
        self.vocabulary = work / "vocabulary.model"
        # As a --data_dir: train/TASK.jsonl, validation/TASK.jsonl.
        self.tasks_dir = work / "tasks"

    def records(self, name: str, part: str) -> str:
        """The records directory of a column, or of "pretrain"; part: train or held_out."""
        return str(self._work / "records" / f"{name}-{part}")

    def make(self, say: Say) -> None:
        """Writes the missing files.

        Raises:
            ConfigError: text, and no pretraining that would read it.
            DataError: text or a task's file is missing, no example of a task fits, or the files
                that exist were made of other data.
        """
        counts_path = self._work / COUNTS_FILE
        counts = json.loads(counts_path.read_text()) if counts_path.is_file() else {}
        pretrained = self._setting.pretrain.steps > 0
        if self._text and not pretrained:
            raise ConfigError(
                f"--text={self._text[0]} is for pretraining, but config.pretrain.steps is 0; "
                "leave it out, or set --config.pretrain.steps"
            )
        self._claim_data(counts)
        if pretrained and "pretrain" not in counts:
            counts["pretrain"] = self._write_excerpts()
            write_json(counts_path, counts)
        if not self.vocabulary.is_file():
            say(f"vocabulary of {self._setting.vocabulary:,} ids")
            train_vocabulary(
                self._all_text(),
                self.vocabulary,
                size=self._setting.vocabulary,
                sample_bytes=self._setting.vocabulary_bytes,
            )
        vocabulary = load_vocabulary(self.vocabulary)
        for column in self._setting.columns:
            for task in column.tasks:
                if task not in counts:
                    counts[task] = self._write_task(column, task, vocabulary)
                    write_json(counts_path, counts)
                    say(f"{task}: {counts[task]}")
        shape = self._setting.pretrain
        for part in ("train", "held_out"):
            if pretrained:
                self._prepare(
                    "pretrain",
                    part,
                    shape.inputs,
                    shape.targets,
                    say,
                    text=[str(self._work / "text" / f"{part}.jsonl")],
                )
            for column in self._setting.columns:
                self._prepare(
                    column.name,
                    part,
                    column.inputs,
                    column.targets,
                    say,
                    jsonl=[str(self.tasks_dir / part / f"{task}.jsonl") for task in column.tasks],
                )

    @property
    def data(self) -> str:
        """Fingerprint of all that was read, for result rows; the files are made."""
        return setting_digest(json.loads((self._work / DATA_FILE).read_text()))

    def _claim_data(self, counts: dict[str, Any]) -> None:
        """Writes the fingerprints of what is read, or compares them with those that are there."""
        path = self._work / DATA_FILE
        made = json.loads(path.read_text()) if path.is_file() else {}
        written = TEXT in made and "pretrain" in counts  # excerpts, so that no text is needed again
        if self._setting.pretrain.steps and not self._text and not written:
            raise DataError("no text to pretrain on; give files with --text=FILE")
        now = {
            task: fingerprint(
                (split, source, list(references))
                for split in SPLITS
                for source, references in self._examples(column, task, split)
            )
            for column in self._setting.columns
            for task in column.tasks
        }
        if self._text:
            documents = text_documents(check_files(self._text), BadRows())
            now[TEXT] = fingerprint(text for (text,) in documents)
        elif TEXT in made:
            now[TEXT] = made[TEXT]
        if made and (other := [name for name in now if made.get(name) != now[name]]):
            flag = "--text" if other[0] == TEXT else "--data_dir"
            raise DataError(
                f"{self._work} was made from other data: {other[0]} is {now[other[0]]} here and "
                f"{made.get(other[0])} there (fingerprints, {path}); give the {flag} that it was "
                "made from, or another --workdir"
            )
        if not made:
            self._check_older(counts)
            write_json(path, now)

    def _check_older(self, counts: dict[str, Any]) -> None:
        """DataError where files from before there were fingerprints are of other data."""
        for column in self._setting.columns:
            for task in (task for task in column.tasks if task in counts):
                found = {split: self._examples(column, task, split) for split in SPLITS}
                for part in (*SPLITS, "held_out"):
                    pairs = found.get(part, found["train"])
                    known = {(source, tuple(references)) for source, references in pairs}
                    path = self.tasks_dir / part / f"{task}.jsonl"
                    with open(path, encoding="utf-8") as file:
                        rows = [json.loads(line) for line in file]
                    if any((row["source"], tuple(row["targets"])) not in known for row in rows):
                        raise DataError(
                            f"{path} has examples that are not in --data_dir={self._data_dir}; "
                            "give the one that it was made from, or another --workdir"
                        )
        if self._text and "pretrain" in counts:
            documents = text_documents(check_files(self._text), BadRows())
            found_bytes = sum(len(text.encode()) for (text,) in documents)
            if found_bytes != counts["pretrain"]["bytes_found"]:
                raise DataError(
                    f"{self._work} was made from {counts['pretrain']['bytes_found']:,} bytes of "
                    f"text, --text has {found_bytes:,}; give the same text, or another --workdir"
                )

    def _prepare(
        self, name: str, part: str, inputs: int, targets: int, say: Say, **source: Any
    ) -> None:
        out = pathlib.Path(self.records(name, part))
        if (out / CARD_FILE).is_file():
            return
        card = prepare(
            out=out,
            vocabulary=self.vocabulary,
            inputs_length=inputs,
            targets_length=targets,
            workers=1,
            **source,
        )
        say(
            f"records {name}, {part}: {card.examples:,} examples in {card.rows:,} rows of "
            f"{inputs} + {targets} tokens, {card.non_padding_share:.0%} filled; cut "
            f"{dict(card.truncated) or 'nothing'}"
        )

    def _write_excerpts(self) -> dict[str, Any]:
        """Writes the beginning of every document to text/train.jsonl and text/held_out.jsonl."""
        shape = self._setting.pretrain
        taken: dict[str, list[str]] = {"train": [], "held_out": []}
        found = 0
        for number, (text,) in enumerate(text_documents(check_files(self._text), BadRows())):
            found += len(text.encode())
            excerpt = text.encode()[: shape.document_bytes].decode(errors="ignore")
            held_out = number % shape.held_out_every == shape.held_out_every - 1
            taken["held_out" if held_out else "train"].append(excerpt)
        for part, texts in taken.items():
            _write_lines(self._work / "text" / f"{part}.jsonl", ({"text": text} for text in texts))
        return {"bytes_found": found} | {
            f"{part}_{unit}": value
            for part, texts in taken.items()
            for unit, value in (
                ("documents", len(texts)),
                ("bytes", sum(len(text.encode()) for text in texts)),
            )
        }

    def _all_text(self) -> Iterator[str]:
        """Text from which the vocabulary is learned: training text only."""
        if self._setting.pretrain.steps:
            for (text,) in text_documents([self._work / "text" / "train.jsonl"], BadRows()):
                yield text
        for column in self._setting.columns:
            for task in column.tasks:
                train, _ = self._split(column, task)
                for source, references in train:
                    yield source + references[0]

    def _examples(self, column: Column, task: str, split: str) -> list[Pair]:
        if split == "train" and column.train_file:
            path = as_path(self._data_dir) / column.train_file
            return list(jsonl_task([os.fspath(path)]).examples(split, BadRows()))
        data_dir = self._data_dir if task in FILE_TASKS else None
        return list(text_task(task, data_dir).examples(split, BadRows()))

    def _split(self, column: Column, task: str) -> tuple[list[Pair], list[Pair]]:
        """Training and held-out examples; held out are the last, which rarely share texts with
        others."""
        pairs = self._examples(column, task, "train")
        held_out = min(HELD_OUT_MOST, max(1, round(HELD_OUT * len(pairs))))
        return pairs[:-held_out], pairs[-held_out:]

    def _write_task(self, column: Column, task: str, vocabulary: Vocabulary) -> dict[str, Any]:
        train, held_out = self._split(column, task)
        parts = {
            "train": (train, column.train_examples),
            "held_out": (held_out, 0),
            "validation": (self._examples(column, task, "validation"), column.validation_examples),
        }
        counts = {}
        for part, (pairs, most) in parts.items():
            fitting, long = fitting_pairs(pairs, column, vocabulary)
            # A model may read more in evaluation than in training; then nothing is left out.
            whole = column.too_long != "skip" or (part == "validation" and column.evaluated_inputs)
            chosen = evenly(pairs if whole else fitting, most)
            if not chosen:
                raise DataError(
                    f"none of the {len(pairs):,} {part} examples of {task} fit rows of "
                    f"{column.inputs} + {column.targets} tokens; raise "
                    f"config.columns.{column.name}.inputs and targets, or set too_long to 'cut'"
                )
            _write_lines(
                self.tasks_dir / part / f"{task}.jsonl",
                (
                    {"source": source, "target": references[0], "targets": list(references)}
                    for source, references in chosen
                ),
            )
            counts[part] = {"found": len(pairs), "too_long": long, "taken": len(chosen)}
        return counts


def fingerprint(rows: Iterable[Any]) -> str:
    """Names rows of plain values, in their order: the first 12 hex digits of a sha256."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()[:12]


def fitting_pairs(
    pairs: Sequence[Pair], column: Column, vocabulary: Vocabulary
) -> tuple[list[Pair], int]:
    """The examples whose source and target fit a row, EOS included, and the number of others."""
    lengths = [
        np.array([len(ids) + 1 for ids in vocabulary.encode_batch(list(texts), False)])
        for texts in ((source for source, _ in pairs), (references[0] for _, references in pairs))
    ]
    fits = (lengths[0] <= column.inputs) & (lengths[1] <= column.targets)
    return [pair for pair, fit in zip(pairs, fits) if fit], int((~fits).sum())


def evenly(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most ``most``, spread evenly; 0: all."""
    if not most or len(pairs) <= most:
        return list(pairs)
    return [pairs[index * len(pairs) // most] for index in range(most)]


def _write_lines(path: pathlib.Path, rows: Iterator[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
