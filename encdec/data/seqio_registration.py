"""The text tasks as seqio tasks; importing this registers them.

``seqio.get_mixture_or_task(name).get_dataset(...)`` gives exactly the examples that ``prepare``
writes, through seqio's own pipeline: for mixtures, feature converters and evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from encdec.data.mixing import mixing_rates
from encdec.data.objectives import Form, Objective
from encdec.data.readers import BadRows
from encdec.data.task_mixtures import MIXTURES, RATES
from encdec.data.task_registry import TEXT_TASKS
from encdec.data.text_tasks import TextTask
from encdec.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from encdec.errors import DataError
from encdec.metrics.metric_registry import metric_named
from encdec.packages import require
from encdec.quiet import quiet_stderr

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
require("seqio", "seqio", "the registry of seqio tasks (encdec.data.seqio_registration)")
with quiet_stderr():
    import seqio
    import tensorflow as tf

# TensorFlow reads text here; the accelerator belongs to JAX.
tf.config.set_visible_devices([], "GPU")

# The field of all references of an example, next to seqio's inputs and targets.
REFERENCES = "references"


class TextDataSource(seqio.DataSource):
    """A text task's documents as tf.data, one string a field."""

    def __init__(self, task: TextTask, splits: tuple[str, ...]):
        self.task = task
        super().__init__(splits=splits)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [split]

    def num_input_examples(self, split: str) -> int:
        """Documents of a split, by reading them: seqio's proportional rates ask for it."""
        return sum(1 for _ in self.task.documents(split, BadRows()))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
    ) -> tf.data.Dataset:
        if shard_info and shard_info.num_shards > 1:
            raise ValueError("a text source has one shard; prepare splits the work itself")
        fields = self.task.objective.document_fields
        signature = {field: tf.TensorSpec((), tf.string) for field in fields}

        def generate() -> Iterator[dict[str, Any]]:
            if not self.task.metrics:
                for document in self.task.documents(split, BadRows()):
                    yield dict(zip(fields, document))
                return
            for source, references in self.task.examples(split, BadRows()):
                yield dict(zip(fields, (source, references[0]))) | {REFERENCES: references}

        if self.task.metrics:
            signature[REFERENCES] = tf.TensorSpec((None,), tf.string)
        dataset = tf.data.Dataset.from_generator(generate, output_signature=signature)
        return dataset.shuffle(2**14, seed=seed) if shuffle else dataset


def seqio_vocabulary(vocabulary: Vocabulary, model_file: str | None = None) -> seqio.Vocabulary:
    """seqio's counterpart of a vocabulary; a SentencePiece one needs its ``model_file``."""
    if isinstance(vocabulary, ByteVocabulary):
        return seqio.ByteVocabulary(extra_ids=vocabulary.extra_ids)
    if isinstance(vocabulary, SentencePieceVocabulary) and model_file:
        return seqio.SentencePieceVocabulary(model_file, extra_ids=vocabulary.extra_ids)
    raise DataError(f"seqio needs the .model file of a {vocabulary.kind} vocabulary")


def objective_preprocessor(
    objective: Objective, vocabulary: Vocabulary, seed: int = 0
) -> Callable[..., tf.data.Dataset]:
    """An objective as a seqio preprocessor: documents in, ``inputs`` and ``targets`` out."""

    def encode(number: np.int64, *parts: Any) -> list[np.ndarray]:
        document = tuple(text.decode("utf-8") for text in parts[:-1])
        inputs, targets = (int(length) for length in parts[-1])
        encoded = objective.encode([document], int(number), Form(vocabulary, inputs, targets, seed))
        result = []
        for tokens in (encoded.sources, encoded.targets):
            result.append(np.concatenate([np.zeros(0, np.int32), *tokens]).astype(np.int32))
            result.append(np.array([len(part) for part in tokens], np.int64))
        return result

    def preprocess(
        dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None = None
    ) -> tf.data.Dataset:
        if not sequence_length:
            raise ValueError("this objective needs sequence_length for inputs and targets")
        lengths = tf.constant([sequence_length["inputs"], sequence_length["targets"]])

        def examples(number: tf.Tensor, document: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
            texts = [document[field] for field in objective.document_fields]
            types = [tf.int32, tf.int64] * 2
            parts = tf.numpy_function(encode, [number, *texts, lengths], types)
            for part in parts:
                part.set_shape([None])
            found = tf.data.Dataset.from_tensor_slices(
                {
                    "inputs": tf.RaggedTensor.from_row_lengths(parts[0], parts[1]),
                    "targets": tf.RaggedTensor.from_row_lengths(parts[2], parts[3]),
                }
            )
            if REFERENCES not in document:
                return found
            return found.map(lambda example: {**example, REFERENCES: document[REFERENCES]})

        return dataset.enumerate().flat_map(examples)

    return preprocess


def postprocess(
    text: str, example: Mapping[str, Any] | None = None, is_target: bool = False, **_: Any
) -> str | list[str]:
    """A prediction without space at its ends; a target as all of its example's references."""
    if is_target and example and REFERENCES in example:
        return [reference.decode("utf-8").strip() for reference in example[REFERENCES]]
    return text.strip()


def seqio_metric(name: str) -> Callable[..., dict[str, float]]:
    """A metric as seqio calls it: (targets, predictions), by those names."""
    metric = metric_named(name)

    def measured(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        return metric(targets, predictions)

    measured.__name__ = name
    return measured


def register(
    task: TextTask,
    vocabulary: Vocabulary | None = None,
    *,
    model_file: str | None = None,
    splits: tuple[str, ...] = ("train", "validation", "test"),
    seed: int = 0,
) -> seqio.Task:
    """Register a text task with seqio under its name, in place of any earlier one.

    ``vocabulary`` defaults to bytes; a SentencePiece one needs its ``model_file`` for seqio.
    """
    vocabulary = vocabulary or ByteVocabulary()
    feature = seqio.Feature(seqio_vocabulary(vocabulary, model_file), add_eos=False)
    if task.name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(task.name)
    return seqio.TaskRegistry.add(
        task.name,
        source=TextDataSource(task, task.splits or splits),
        preprocessors=[objective_preprocessor(task.objective, vocabulary, seed)],
        output_features={"inputs": feature, "targets": feature},
        postprocess_fn=postprocess,
        metric_fns=[seqio_metric(name) for name in task.metrics],
    )


def proportional_rate(task: seqio.Task) -> float:
    """A task's documents in its training split, as seqio's mixtures want a rate."""
    return float(task.source.num_input_examples("train"))


def register_mixture(
    name: str, tasks: Sequence[str], rates: Sequence[float] | None = None
) -> seqio.Mixture:
    """Register a mixture of registered tasks: explicit rates, else proportional to documents."""
    if name in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(name)
    if rates is not None:
        mixing_rates([1] * len(tasks), rates)  # as many as tasks, all above 0
    parts = list(zip(tasks, rates)) if rates is not None else list(tasks)
    return seqio.MixtureRegistry.add(name, parts, default_rate=proportional_rate)


for _task in TEXT_TASKS.values():
    register(_task)
for _name, _tasks in MIXTURES.items():
    register_mixture(_name, _tasks, RATES.get(_name))
