"""Tasks of the paper and its pretraining corpora: prompts, official splits, where rows are.

A task reads local files below a ``data_dir``, in one of the layouts of ``find_files``, else what
tensorflow-datasets has on this machine. Nothing is ever downloaded. A row holds the data set's
own fields, or ``source`` and ``target`` with the prompt already made.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from encdec.data.objectives import Document, Objective, PrefixLM, SequenceToSequence
from encdec.data.readers import BadRows, Fault, check_fields, parse_row, read_lines, with_references
from encdec.data.text_files import ENDINGS, BrokenStream, open_lines, plain_name
from encdec.errors import DataError
from encdec.metrics.text import UNANSWERABLE

# How files spell the three splits.
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test",),
}
COMPRESSED = ("", *ENDINGS)

Row = dict[str, Any]
PAIRS = SequenceToSequence()


@dataclasses.dataclass(frozen=True)
class PaperTask:
    """A data set's official shape.

    ``fields`` are the row's own keys that ``document`` turns into a document. ``splits`` are the
    official ones with their examples (None: not fixed). ``tfds`` is its tensorflow-datasets name;
    ``pairs`` names the two parallel files of a split, "{split}" standing for its name.
    ``metrics`` are names of ``encdec.metrics.registry``. ``fine_tune_steps`` are the most that
    configs/finetune.py takes (0: no fine-tuning task).
    """

    name: str
    about: str
    fields: tuple[str, ...]
    document: Callable[[Row], Document | Fault]
    splits: Mapping[str, int | None]
    objective: Objective = PAIRS
    tfds: str | None = None
    tfds_splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pairs: tuple[str, str] | None = None
    squad_json: bool = False
    metrics: tuple[str, ...] = ()
    fine_tune_steps: int = 0

    def origin(self, data_dir: str | None) -> dict[str, Any]:
        """Where the rows come from, for the card."""
        if data_dir is None:
            return {"tensorflow_datasets": self.tfds}
        found = {split: self.find_files(data_dir, split) for split in self.splits}
        return {"files": {split: [path.name for path in paths] for split, paths in found.items()}}

    def find_files(self, data_dir: str | pathlib.Path, split: str) -> list[pathlib.Path]:
        """Files of a split below ``data_dir``, in the first layout that has any; else none.

        Layouts: TASK/SPLIT.jsonl, TASK/SPLIT-*.jsonl, SPLIT/TASK.jsonl, SPLIT/TASK[._-]*.jsonl,
        TASK-SPLIT.jsonl, each also compressed, and the data set's official files in TASK/.
        """
        root = pathlib.Path(data_dir)
        for spelled in SPLIT_NAMES[split]:
            stems = [
                f"{self.name}/{spelled}",
                f"{self.name}/{spelled}-*",
                f"{spelled}/{self.name}",
                f"{spelled}/{self.name}[._-]*",
                f"{self.name}-{spelled}",
            ]
            for stem in stems:
                if found := sorted(
                    p for end in COMPRESSED for p in root.glob(f"{stem}.jsonl{end}")
                ):
                    return found
            if self.squad_json and (
                found := sorted(
                    p
                    for end in COMPRESSED
                    for p in root.glob(f"{self.name}/{spelled}-v2.0*.json{end}")
                )
            ):
                return found
            if self.pairs:
                paths = [root / self.name / name.format(split=spelled) for name in self.pairs]
                if all(path.is_file() for path in paths):
                    return paths
        return []

    def read(self, data_dir: str | None, split: str, bad_rows: BadRows) -> Iterator[Document]:
        """Documents of a split; DataError naming what to put where if it has none."""
        if data_dir is None:
            return self._read_tfds(split)
        files = self.find_files(data_dir, split)
        if not files:
            raise DataError(
                f"no {split} split of {self.name} below {data_dir}; put it at "
                f"{self.name}/{split}.jsonl or {split}/{self.name}.jsonl (or compressed) with the "
                f"fields {', '.join(self.fields)}, or source and target"
            )
        kind = pathlib.Path(plain_name(files[0])).suffix
        if kind == ".jsonl":
            return self._read_jsonl(files, bad_rows)
        return self._read_squad(files) if kind == ".json" else self._read_pairs(files, bad_rows)

    def _read_jsonl(self, files: Sequence[pathlib.Path], bad_rows: BadRows) -> Iterator[Document]:
        for path in files:
            for number, line in read_lines(path, bad_rows):
                made = self._parse(line)
                if isinstance(made, Fault):
                    bad_rows.add(f"{path}:{number}", made.reason, made.remedy)
                else:
                    yield made

    def _parse(self, line: bytes) -> Document | Fault:
        ready = self.objective.document_fields
        row = parse_row(line, ())
        if isinstance(row, Fault):
            return row
        made = all(field in row for field in ready)
        # Answers are a list, which `document` checks.
        wanted = ready if made else [field for field in self.fields if field != "answers"]
        if fault := check_fields(row, wanted, line):
            return fault
        if not made:
            return self.document(row)
        document = tuple(row[field] for field in ready)
        if "targets" not in row:
            return document
        source, target = document
        return with_references(source, target, row["targets"])

    def _read_pairs(self, files: Sequence[pathlib.Path], bad_rows: BadRows) -> Iterator[Document]:
        lines = (read_lines(path, bad_rows) for path in files)
        for (number, first), (other, second) in itertools.zip_longest(*lines, fillvalue=(0, b"")):
            if number != other:
                raise DataError(
                    f"{files[0]} and {files[1]} have different numbers of lines "
                    f"(only one has line {number or other}); copy both again"
                )
            try:
                texts = [line.decode("utf-8").rstrip("\r\n") for line in (first, second)]
            except UnicodeDecodeError as error:
                bad_rows.add(
                    f"{files[0]}:{number}", f"invalid UTF-8: {error}", "save the files as UTF-8"
                )
            else:
                made = self.document(dict(zip(self.fields, texts)))
                if isinstance(made, Fault):
                    bad_rows.add(f"{files[0]}:{number}", made.reason, made.remedy)
                else:
                    yield made

    def _read_squad(self, files: Sequence[pathlib.Path]) -> Iterator[Document]:
        for path in files:
            try:
                articles = json.loads(b"".join(open_lines(path)))["data"]
                for article in articles:
                    for paragraph in article["paragraphs"]:
                        for question in paragraph["qas"]:
                            made = self.document({**question, "context": paragraph["context"]})
                            if isinstance(made, Fault):
                                raise ValueError(f"{made.reason}; {made.remedy}")
                            yield made
            except (ValueError, KeyError, TypeError, BrokenStream) as error:
                message = f"{path} is not in SQuAD's format ({error!r}); copy it again"
                raise DataError(message) from error

    def _read_tfds(self, split: str) -> Iterator[Document]:
        if not self.tfds:
            raise DataError(
                f"{self.name} is not in tensorflow-datasets; give its files with --data_dir=DIR "
                f"(DIR/{self.name}/{split}.jsonl with the fields {', '.join(self.fields)})"
            )
        from encdec.data.tfds_source import tfds_rows

        for row in tfds_rows(self.tfds, self.tfds_splits.get(split, split), self.name):
            made = self.document(row)
            if isinstance(made, Fault):
                raise DataError(f"{self.tfds} has a row unlike {self.name}: {made.reason}")
            yield made


def squad_document(row: Row) -> Document | Fault:
    """Question and context to the first answer, or "unanswerable" where there is none.

    All other answers follow as references.
    """
    answers = row.get("answers")
    if isinstance(answers, Mapping):
        answers = answers.get("text")
    if not isinstance(answers, Sequence | type(None)) or isinstance(answers, str):
        kind = type(answers).__name__
        return Fault(f"'answers' is {kind}, expected a list", "give a list of texts")
    texts = [a["text"] if isinstance(a, Mapping) and "text" in a else a for a in answers or ()]
    if not all(isinstance(text, str) for text in texts):
        return Fault("'answers' holds something else than texts", "give a list of texts")
    source = (
        "Answer the following question based only on the context.\n"
        f"###Question\n{row['question'].strip()}\n###Context\n{row['context'].strip()}\n###Answer\n"
    )
    return with_references(source, texts[0], texts) if texts else (source, UNANSWERABLE)


def _prompted(
    instruction: str, parts: Sequence[tuple[str, str]], answer: str, target: str
) -> Callable[[Row], Document]:
    """The published shape: an instruction, ###-headed parts, the answer's heading."""

    def document(row: Row) -> Document:
        shown = "".join(f"###{heading}\n{row[field]}\n" for heading, field in parts)
        return f"{instruction}\n{shown}###{answer}\n", row[target]

    return document


def _text(row: Row) -> Document:
    return (row["text"],)


_REFINE = _prompted(
    "Fix the bug in the following Java method.", [("Buggy", "buggy")], "Fixed", "fixed"
)
_ESSAY = [("Task", "task"), ("Essay", "essay")]
_CODE = ("bleu", "bleu_codexglue", "chrf", "exact_match", "rouge")

PAPER_TASKS: dict[str, PaperTask] = {
    task.name: task
    for task in (
        PaperTask(
            "c4",
            "English web pages, for pretraining",
            ("text",),
            _text,
            {"train": 364_868_892, "validation": 364_608},
            PrefixLM(),
            tfds="c4/en",
        ),
        PaperTask(
            "wikipedia",
            "English Wikipedia, for pretraining",
            ("text",),
            _text,
            {"train": None},
            PrefixLM(),
            tfds="wikipedia/20230601.en",
        ),
        PaperTask(
            "squad_v2",
            "SQuAD 2.0: question and context to an answer or 'unanswerable'",
            ("question", "context", "answers"),
            squad_document,
            {"train": 130_319, "validation": 11_873},
            tfds="squad/v2.0",
            squad_json=True,
            fine_tune_steps=3_000,
            metrics=("squad_v2", "rouge"),
        ),
        PaperTask(
            "xsum",
            "XSum: a BBC article to one sentence",
            ("document", "summary"),
            _prompted(
                "Summarize the following text in one sentence.",
                [("Text", "document")],
                "Summary",
                "summary",
            ),
            {"train": 204_045, "validation": 11_332, "test": 11_334},
            tfds="xsum",
            fine_tune_steps=4_000,
            metrics=("rouge", "rouge_stemmed"),
        ),
        PaperTask(
            "dialogsum",
            "DialogSum: a dialogue to its summary",
            ("dialogue", "summary"),
            _prompted(
                "Summarize the following dialogue.",
                [("Dialogue", "dialogue")],
                "Summary",
                "summary",
            ),
            {"train": 12_460, "validation": 500, "test": 1_500},
            fine_tune_steps=1_000,
            metrics=("rouge", "rouge_stemmed"),
        ),
        PaperTask(
            "code_java2cs",
            "CodeXGLUE code translation: Java to C#",
            ("java", "cs"),
            _prompted("Translate the following Java method to C#.", [("Java", "java")], "C#", "cs"),
            {"train": 10_300, "validation": 500, "test": 1_000},
            pairs=("{split}.java-cs.txt.java", "{split}.java-cs.txt.cs"),
            fine_tune_steps=1_000,
            metrics=(*_CODE, "syntax_c_sharp"),
        ),
        PaperTask(
            "code_refine_small",
            "CodeXGLUE code refinement: Java methods up to 50 tokens",
            ("buggy", "fixed"),
            _REFINE,
            {"train": 46_680, "validation": 5_835, "test": 5_835},
            pairs=("{split}.buggy-fixed.buggy", "{split}.buggy-fixed.fixed"),
            fine_tune_steps=1_500,
            metrics=(*_CODE, "syntax_java"),
        ),
        PaperTask(
            "code_refine_medium",
            "CodeXGLUE code refinement: Java methods of 50 to 100 tokens",
            ("buggy", "fixed"),
            _REFINE,
            {"train": 52_364, "validation": 6_545, "test": 6_545},
            pairs=("{split}.buggy-fixed.buggy", "{split}.buggy-fixed.fixed"),
            fine_tune_steps=1_500,
            metrics=(*_CODE, "syntax_java"),
        ),
        PaperTask(
            "ielts_band",
            "IELTS essay to its band",
            ("task", "essay", "band"),
            _prompted("Give the IELTS band of the following essay.", _ESSAY, "Band", "band"),
            {"train": None, "validation": None},
            fine_tune_steps=300,
            metrics=("bands", "exact_match"),
        ),
        PaperTask(
            "ielts_feedback",
            "IELTS essay to an examiner's comment",
            ("task", "essay", "comment"),
            _prompted(
                "Comment as an IELTS examiner on the following essay.", _ESSAY, "Comment", "comment"
            ),
            {"train": None, "validation": None},
            fine_tune_steps=300,
            metrics=("rouge",),
        ),
    )
}
