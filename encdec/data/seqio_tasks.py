"""Tasks and mixtures of seqio's registry as text tasks, where a user's module registered some.

seqio is never imported here: a module of the user's own that registers tasks with it has done so.
Text is taken where the task's preprocessors turn it into tokens, and tokenized by the vocabulary
that ``encdec prepare`` is given. A task that changes its tokens is read to its end, as ids.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from encdec.data.given_tokens import GivenTargets, GivenTokens, as_document, ends_with, ids_of
from encdec.data.objectives import Document, Objective, PrefixLM, SequenceToSequence
from encdec.data.readers import BadRows
from encdec.data.text_tasks import TextTask
from encdec.data.vocabulary import Vocabulary, load_vocabulary
from encdec.errors import DataError
from encdec.metrics.metric_registry import METRICS, register
from encdec.metrics.score import Metric, Score, mean_score

# Steps of a seqio task that do with tokens what preparation does itself.
TOKEN_STEPS = (
    *("tokenize", "tokenize_and_append_eos", "append_eos", "append_eos_after_trim"),
    *("CacheDatasetPlaceholder", "trim_dataset"),
)


def seqio_task_names() -> list[str]:
    """Names of the tasks that seqio's registry holds; none where seqio is not imported."""
    return sorted(sys.modules["seqio"].TaskRegistry.names()) if "seqio" in sys.modules else []


def seqio_mixture_names() -> list[str]:
    """Names of the mixtures that seqio's registry holds; none where seqio is not imported."""
    return sorted(sys.modules["seqio"].MixtureRegistry.names()) if "seqio" in sys.modules else []


def seqio_mixture(name: str) -> tuple[tuple[str, ...], tuple[float, ...]] | None:
    """(tasks, rates) of a mixture of seqio's; None where it has none of that name."""
    if name not in seqio_mixture_names():
        return None
    mixture = sys.modules["seqio"].MixtureRegistry.get(name)
    return (
        tuple(task.name for task in mixture.tasks),
        tuple(float(mixture.get_rate(task)) for task in mixture.tasks),
    )


def seqio_task(name: str, as_ids: bool = False) -> TextTask | None:
    """A task of seqio's registry; None where it has none of that name.

    A task with ``inputs`` is one of pairs, with ``targets`` alone one of raw text. Where its tokens
    are those of its text, the text is taken; where steps change the tokens, or the source holds
    ids, and always with ``as_ids``, the ids of its own pipeline are, in its own vocabulary. Its
    metric functions are registered as metrics called TASK.FUNCTION.

    Raises:
        DataError: ids of a vocabulary that is none of ours.
    """
    if name not in seqio_task_names():
        return None
    task = sys.modules["seqio"].TaskRegistry.get(name)
    steps = list(task.preprocessors)
    places = [place for place, step in enumerate(steps) if _name(step).startswith("tokenize")]
    after = steps[places[0] :] if places else []
    as_ids = as_ids or any(_name(step) not in TOKEN_STEPS for step in after)
    is_pair = "inputs" in task.output_features
    fields = ("inputs", "targets") if is_pair else ("targets",)
    if as_ids or (not places and _holds_ids(task, fields)):
        return _task_of_ids(task, fields)
    steps = [step for step in steps[: len(steps) - len(after)] if _name(step) not in TOKEN_STEPS]
    objective: Objective = SequenceToSequence() if is_pair else PrefixLM()
    return TextTask(
        name,
        lambda split, bad_rows: _documents(task, steps, fields, split, bad_rows),
        objective,
        lambda: {"seqio_task": name},
        tuple(task.splits),
        _metrics(task) if is_pair else (),
        "a task of seqio's registry",
    )


@dataclasses.dataclass(frozen=True)
class _TaskOfIds(TextTask):
    """A task whose documents are ids; ``vocabulary`` is that of its texts, None without any."""

    vocabulary: Vocabulary | None = None

    def examples(self, split: str, bad_rows: BadRows) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(source, references) as text, for models that read text.

        Raises:
            DataError: ids that no text gives, or a task without sources.
        """
        if self.vocabulary is None or not self.objective.has_source:
            what = "has no sources" if self.vocabulary else "has ids without a text"
            raise DataError(f"task {self.name} {what}; expected one with sources and targets")
        for number, document in enumerate(self._read(split, bad_rows), 1):
            texts = []
            for ids in map(ids_of, document):
                texts.append(self.vocabulary.decode(ids))
                if ends_with(ids, self.vocabulary.eos_id):
                    ids = ids[:-1]
                if self.vocabulary.encode(texts[-1]) != ids.tolist():
                    raise DataError(
                        f"task {self.name}, {split}, example {number} has ids that do not decode "
                        "to text, such as sentinels; evaluate a task with only the preprocessors "
                        "before tokenization"
                    )
            yield texts[0], (texts[1],)


def _task_of_ids(task: Any, fields: Sequence[str]) -> TextTask:
    vocabulary, flags, size = _vocabulary(task, fields)
    steps = [step for step in task.preprocessors if _name(step) != "CacheDatasetPlaceholder"]
    ends = any("append_eos" in _name(step) for step in steps)
    is_pair = len(fields) == 2
    objective = (GivenTokens if is_pair else GivenTargets)(
        task.name,
        flags,
        vocabulary.fingerprint if vocabulary else "",
        size,
        is_pair and ends and task.output_features["inputs"].add_eos,
    )

    def made(lengths: tuple[int, int] | None) -> TextTask:
        sizes = dict(zip(("inputs", "targets"), lengths)) if lengths else None
        return _TaskOfIds(
            task.name,
            lambda split, bad_rows: _id_documents(task, steps, fields, split, sizes),
            objective,
            lambda: {"seqio_task": task.name, "ids": True},
            tuple(task.splits),
            _metrics(task) if is_pair else (),
            "a task of seqio's registry, as ids of its own pipeline",
            sized=lambda inputs, targets: made((inputs, targets)),
            vocabulary=vocabulary,
        )

    return made(None)


def _vocabulary(task: Any, fields: Sequence[str]) -> tuple[Vocabulary | None, str, int]:
    """(ours that is the task's, the flags that name it, its ids); None where ids have no text."""
    theirs = [task.output_features[field].vocabulary for field in fields]
    if any(one != theirs[0] for one in theirs):
        raise DataError(
            f"seqio task {task.name} has different vocabularies for {' and '.join(fields)}, but a "
            "model has one for both: give both features the same one"
        )
    one, kind = theirs[0], type(theirs[0]).__name__
    if kind == "PassThroughVocabulary":
        return None, f"--vocabulary with {one.vocab_size} ids, --extra_ids included", one.vocab_size
    if kind == "ByteVocabulary":
        ours, named = load_vocabulary("bytes", extra_ids=one.extra_ids), "bytes"
    elif kind == "SentencePieceVocabulary" and getattr(one, "_reverse_extra_ids", True):
        named = os.fspath(one.sentencepiece_model_file)
        ours = load_vocabulary(named, extra_ids=one.extra_ids)
    else:
        raise DataError(
            f"seqio task {task.name} uses a {kind}, which is not supported; expected "
            "ByteVocabulary, SentencePieceVocabulary or PassThroughVocabulary, or register the "
            "task with only the preprocessors before tokenization"
        )
    return ours, f"--vocabulary={named} --extra_ids={one.extra_ids}", ours.size


def _holds_ids(task: Any, fields: Sequence[str]) -> bool:
    """Whether a task without a step that tokenizes gives ids all the same."""
    try:
        spec = _dataset(task, task.preprocessors, next(iter(task.splits)), None).element_spec
        return all(spec[field].dtype.is_integer for field in fields)
    except Exception:  # whatever it is, reading the task says it in full
        return False


def _dataset(task: Any, steps: Sequence[Any], split: str, lengths: Any) -> Any:
    """A split after some of its steps; those that draw give the same in every preparation."""
    seqio = sys.modules["seqio"]
    dataset = task.source.get_dataset(split=split, shuffle=False, seed=0)
    with seqio.map_seed_manager(0):
        for step in steps:
            step = seqio.add_kwargs_to_transform(
                step, sequence_length=lengths, output_features=task.output_features
            )
            dataset = step(dataset)
    return dataset


def _id_documents(
    task: Any, steps: Sequence[Any], fields: Sequence[str], split: str, lengths: Any
) -> Iterator[Document]:
    try:
        dataset = _dataset(task, steps, split, lengths)
    except TypeError as error:
        if lengths:
            raise
        raise DataError(
            f"seqio task {task.name} needs row lengths for its preprocessors ({error}), so it "
            "cannot be evaluated; register one with only the preprocessors before tokenization"
        ) from error
    for field in fields:
        found = dataset.element_spec.get(field)
        if found is None or not found.dtype.is_integer or found.shape.rank not in (1, None):
            raise DataError(
                f"seqio task {task.name}: {field!r} is {found} after its last preprocessor; "
                "expected a list of ids"
            )
    for example in dataset.as_numpy_iterator():
        yield as_document(*(example[field].tolist() for field in fields))


def _name(step: Any) -> str:
    while hasattr(step, "func"):  # functools.partial
        step = step.func
    return getattr(step, "__name__", type(step).__name__)


def _documents(
    task: Any, steps: Sequence[Any], fields: Sequence[str], split: str, bad_rows: BadRows
) -> Iterator[Document]:
    dataset = _dataset(task, steps, split, None)
    spec = dataset.element_spec
    for field in fields:
        kind = getattr(spec.get(field), "dtype", None)
        if kind is None or kind.name != "string":
            seen = "missing" if kind is None else f"of {kind.name}"
            raise DataError(
                f"seqio task {task.name}: {field!r} is {seen} before tokenization; expected text "
                f"(fields: {', '.join(spec)}); end its preprocessors with text and "
                "seqio.preprocessors.tokenize"
            )
    for number, example in enumerate(dataset.as_numpy_iterator(), 1):
        try:
            yield tuple(bytes(example[field]).decode("utf-8") for field in fields)
        except UnicodeDecodeError as error:
            where = f"{task.name}, {split}, example {number}"
            bad_rows.add(where, f"invalid UTF-8 ({error.reason})", "give text in UTF-8")


def _metrics(task: Any) -> tuple[str, ...]:
    """The task's metric functions of predictions, registered."""
    names = []
    for function in task.predict_metric_fns:
        name = f"{task.name}.{_name(function)}"
        if name not in METRICS:
            register(
                Metric(
                    name,
                    f"seqio metric function {_name(function)} of task {task.name}, after its "
                    "postprocessor; an interval where it is a mean over examples",
                    functools.partial(_scores, task, function),
                    (),
                )
            )
        names.append(name)
    return tuple(names)


def _scores(
    task: Any, function: Any, references: Sequence[Sequence[str]], answers: Sequence[str]
) -> list[Score]:
    """What a metric function gives; a value that no mean over examples gives has no interval."""
    targets = [
        task.postprocess_fn(texts[0], example={"targets_pretokenized": texts[0]}, is_target=True)
        for texts in references
    ]
    predictions = [
        task.postprocess_fn(text, example={"targets_pretokenized": texts[0]}, is_target=False)
        for text, texts in zip(answers, references)
    ]
    whole: Mapping[str, Any] = function(targets, predictions)
    number = lambda one, name: float(getattr(one[name], "value", one[name]))
    try:
        single = [function([target], [text]) for target, text in zip(targets, predictions)]
        by_name = {name: [number(one, name) for one in single] for name in whole}
    except Exception:  # of one example some have no value, such as a correlation
        by_name = {}
    scores: list[Score] = []
    for name in whole:
        value, each = number(whole, name), by_name.get(name)
        if each and np.isclose(np.mean(each), value, rtol=1e-6, atol=1e-9):
            scores += mean_score(name, each)
        else:
            scores.append(_WholeScore(name, len(targets), value))
    return scores


class _WholeScore(Score):
    """A value of all examples together, of which parts and so intervals are not known."""

    _whole: float

    def __init__(self, name: str, count: int, value: float):
        super().__init__(
            name,
            np.zeros((count, 1)),
            lambda sums_Nx1: np.full(len(sums_Nx1), np.nan),
            "no interval: not a mean over examples",
        )
        object.__setattr__(self, "_whole", value)

    def statistic(self, indices_NxE: np.ndarray) -> np.ndarray:
        """The value of all examples in order; of others it is not known."""
        everything_N = (indices_NxE == np.arange(self.count)).all(axis=1)
        return np.where(everything_N, self._whole, np.nan)
