"""Tasks and mixtures of seqio's registry as text tasks, where a user's module registered some.

seqio is never imported here: a module of the user's own that registers tasks with it has done so.
Text is taken where the task's preprocessors turn it into tokens, and tokenised by the vocabulary
that ``encdec prepare`` is given; what a task does to tokens is an objective's work here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from encdec.data.objectives import Document, Objective, PrefixLM, SequenceToSequence
from encdec.data.readers import BadRows
from encdec.data.text_tasks import TextTask
from encdec.errors import DataError
from encdec.metrics.registry import METRICS, register
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


def seqio_task(name: str) -> TextTask | None:
    """A task of seqio's registry; None where it has none of that name.

    A task with ``inputs`` is one of pairs, with ``targets`` alone one of raw text. Its metric
    functions are registered as metrics called TASK.FUNCTION.

    Raises:
        DataError: a step after its tokenisation changes the tokens, or it has no text.
    """
    if name not in seqio_task_names():
        return None
    task = sys.modules["seqio"].TaskRegistry.get(name)
    steps = list(task.preprocessors)
    for place, step in enumerate(steps):
        if _name(step).startswith("tokenize"):
            for after in steps[place:]:
                if _name(after) not in TOKEN_STEPS:
                    raise DataError(
                        f"seqio task {name} changes its tokens by {_name(after)}; register it "
                        "with the steps before tokenize alone, and give --objective what should "
                        "become of the text (docs/own-data.md)"
                    )
            steps = steps[:place]
            break
    steps = [step for step in steps if _name(step) not in TOKEN_STEPS]
    is_pair = "inputs" in task.output_features
    objective: Objective = SequenceToSequence() if is_pair else PrefixLM()
    fields = ("inputs", "targets") if is_pair else ("targets",)
    return TextTask(
        name,
        lambda split, bad_rows: _documents(task, steps, fields, split, bad_rows),
        objective,
        lambda: {"seqio_task": name},
        tuple(task.splits),
        _metrics(task) if is_pair else (),
        "a task of seqio's registry",
    )


def _name(step: Any) -> str:
    while hasattr(step, "func"):  # functools.partial
        step = step.func
    return getattr(step, "__name__", type(step).__name__)


def _documents(
    task: Any, steps: Sequence[Any], fields: Sequence[str], split: str, bad_rows: BadRows
) -> Iterator[Document]:
    seqio = sys.modules["seqio"]
    dataset = task.source.get_dataset(split=split, shuffle=False, seed=0)
    # The seed makes steps that draw give the same text in every preparation.
    with seqio.map_seed_manager(0):
        for step in steps:
            step = seqio.add_kwargs_to_transform(
                step, sequence_length=None, output_features=task.output_features
            )
            dataset = step(dataset)
    spec = dataset.element_spec
    for field in fields:
        kind = getattr(spec.get(field), "dtype", None)
        if kind is None or kind.name != "string":
            seen = "missing" if kind is None else f"of {kind.name}"
            raise DataError(
                f"seqio task {task.name}: {field!r} is {seen} before tokens are made, expected "
                f"text (fields: {', '.join(spec)}); end its preprocessors with text and "
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
    single = [function([target], [text]) for target, text in zip(targets, predictions)]
    scores: list[Score] = []
    for name, value in whole.items():
        value = float(getattr(value, "value", value))
        each = [float(getattr(one[name], "value", one[name])) for one in single]
        if np.isclose(np.mean(each), value, rtol=1e-6, atol=1e-9):
            scores += mean_score(name, each)
        else:
            scores.append(_WholeScore(name, len(each), value))
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

    def statistic(self, indices: np.ndarray) -> float:
        """The value of all examples in order; of others it is not known."""
        everything = np.array_equal(indices, np.arange(self.count))
        return self._whole if everything else float("nan")
