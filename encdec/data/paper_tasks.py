"""Tasks of the paper and its pretraining corpora: prompts, official splits, metrics.

A row holds the data set's own fields, or ``source`` and ``target`` with the prompt already made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from encdec.data.file_tasks import FileTask, Row
from encdec.data.objectives import Document, PrefixLM
from encdec.data.readers import Fault, with_references
from encdec.metrics.text_metrics import UNANSWERABLE


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
        return Fault("'answers' holds something other than texts", "give a list of texts")
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


_ESSAY = [("Task", "task"), ("Essay", "essay")]
_CODE = ("bleu", "bleu_codexglue", "chrf", "exact_match", "rouge")


def _refine(size: str, tokens: str, splits: Mapping[str, int]) -> FileTask:
    return FileTask(
        f"code_refine_{size}",
        f"CodeXGLUE code refinement: Java methods {tokens} tokens",
        ("buggy", "fixed"),
        _prompted(
            "Fix the bug in the following Java method.", [("Buggy", "buggy")], "Fixed", "fixed"
        ),
        splits,
        pairs=("{split}.buggy-fixed.buggy", "{split}.buggy-fixed.fixed"),
        lengths=(512, 512),
        fine_tune_steps=1_500,
        metrics=(*_CODE, "syntax_java"),
    )


PAPER_TASKS: dict[str, FileTask] = {
    task.name: task
    for task in (
        FileTask(
            "c4",
            "English web pages, for pretraining",
            ("text",),
            _text,
            {"train": 364_868_892, "validation": 364_608},
            PrefixLM(),
            tfds="c4/en",
        ),
        FileTask(
            "wikipedia",
            "English Wikipedia, for pretraining",
            ("text",),
            _text,
            {"train": None},
            PrefixLM(),
            tfds="wikipedia/20230601.en",
        ),
        FileTask(
            "squad_v2",
            "SQuAD 2.0: question and context to an answer or 'unanswerable'",
            ("question", "context", "answers"),
            squad_document,
            {"train": 130_319, "validation": 11_873},
            tfds="squad/v2.0",
            squad_json=True,
            lengths=(1024, 64),
            fine_tune_steps=3_000,
            metrics=("squad_v2", "rouge"),
        ),
        FileTask(
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
            lengths=(1024, 96),
            fine_tune_steps=4_000,
            metrics=("rouge", "rouge_stemmed"),
        ),
        FileTask(
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
            lengths=(1024, 96),
            fine_tune_steps=1_000,
            metrics=("rouge", "rouge_stemmed"),
        ),
        FileTask(
            "code_java2cs",
            "CodeXGLUE code translation: Java to C#",
            ("java", "cs"),
            _prompted("Translate the following Java method to C#.", [("Java", "java")], "C#", "cs"),
            {"train": 10_300, "validation": 500, "test": 1_000},
            pairs=("{split}.java-cs.txt.java", "{split}.java-cs.txt.cs"),
            lengths=(512, 512),
            fine_tune_steps=1_000,
            metrics=(*_CODE, "syntax_c_sharp"),
        ),
        _refine("small", "up to 50", {"train": 46_680, "validation": 5_835, "test": 5_835}),
        _refine("medium", "of 50 to 100", {"train": 52_364, "validation": 6_545, "test": 6_545}),
        FileTask(
            "ielts_band",
            "IELTS essay to its band",
            ("task", "essay", "band"),
            _prompted("Give the IELTS band of the following essay.", _ESSAY, "Band", "band"),
            {"train": None, "validation": None},
            lengths=(1024, 16),
            fine_tune_steps=300,
            metrics=("bands", "exact_match"),
        ),
        FileTask(
            "ielts_feedback",
            "IELTS essay to an examiner's comment",
            ("task", "essay", "comment"),
            _prompted(
                "Comment as an IELTS examiner on the following essay.", _ESSAY, "Comment", "comment"
            ),
            {"train": None, "validation": None},
            lengths=(1024, 512),
            fine_tune_steps=300,
            metrics=("rouge",),
        ),
    )
}
