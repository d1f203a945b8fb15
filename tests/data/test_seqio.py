"""Agreement with seqio itself: vocabularies, feature converters, tasks."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest

from encdec.data.batches import Batches
from encdec.data.blocks import DocumentBlock, Recipe, encode_block
from encdec.data.readers import BadRows
from encdec.data.text_tasks import EMBEDDED_TASKS, TextTask
from encdec.data.vocabulary import ByteVocabulary, load_vocabulary
from encdec.errors import ConfigError
from tests.data.conftest import random_pairs, write_jsonl

seqio = pytest.importorskip("seqio")
import tensorflow as tf  # noqa: E402

from encdec.data import seqio_registration  # noqa: E402

TEXTS = [
    "plain words",
    "def f(x):\n\treturn  x  # \u00e9\u65e5\U0001f600\n",
    "",
    "  leading and trailing  ",
]


def _seqio_rows(converter, sources, targets, lengths):
    def generate():
        for source, target in zip(sources, targets):
            yield {"inputs": source, "targets": target}

    spec = tf.TensorSpec((None,), tf.int32)
    dataset = tf.data.Dataset.from_generator(
        generate, output_signature={"inputs": spec, "targets": spec}
    )
    return list(converter(dataset, lengths).as_numpy_iterator())


@pytest.mark.parametrize("start_id", [0, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_eight_fields_equal_seqios_packed_converter(make_records, seed, start_id):
    # More examples than seqio packs at once, and ids above 0, which seqio takes for padding.
    sources, targets = random_pairs(np.random.default_rng(seed), 130, 20, 9)
    converter = seqio.EncDecFeatureConverter(pack=True, bos_id=start_id)
    expected = _seqio_rows(converter, sources, targets, {"inputs": 48, "targets": 24})
    records = make_records(
        sources,
        targets,
        inputs_length=48,
        targets_length=24,
        packing="greedy",
        decoder_start_id=start_id,
    )
    assert len(records) == len(expected)
    batch = Batches(records, global_batch=len(records), shuffle=False)[0]
    assert set(batch) == set(expected[0])
    for row, fields in enumerate(expected):
        if start_id:
            # seqio puts a start id other than 0 on the first padding position too.
            real = fields["decoder_segment_ids"] > 0
            fields["decoder_input_tokens"] = fields["decoder_input_tokens"] * real
        for name, values in fields.items():
            np.testing.assert_array_equal(batch[name][row], values, err_msg=name)


def test_unpacked_rows_equal_seqios_packed_converter_on_one_example(make_records):
    sources, targets = random_pairs(np.random.default_rng(2), 2, 20, 9)
    records = make_records(sources, targets, inputs_length=48, targets_length=24, packing="none")
    batch = Batches(records, global_batch=2, shuffle=False)[0]
    for row in range(2):
        (expected,) = _seqio_rows(
            seqio.EncDecFeatureConverter(pack=True),
            sources[row : row + 1],
            targets[row : row + 1],
            {"inputs": 48, "targets": 24},
        )
        for name, values in expected.items():
            np.testing.assert_array_equal(batch[name][row], values, err_msg=name)


def test_decoder_only_layout_equals_seqios_prefix_lm_converter(make_records):
    """Row by row: seqio packs a joined row by its own rule, so it gets the segments of ours."""
    sources, targets = random_pairs(np.random.default_rng(0), 14, 20, 9)
    records = make_records(sources, targets, inputs_length=48, targets_length=24)
    from encdec.data.records import decode_row

    batch = Batches(records, global_batch=len(records), shuffle=False, layout="decoder_only")[0]
    converter = seqio.PrefixLMFeatureConverter(pack=True)
    for row, stored in enumerate(records.read(range(len(records)))):
        parts = [[part.astype(np.int32) for part in side] for side in decode_row(stored, "uint16")]
        (expected,) = _seqio_rows(converter, *parts, {"inputs": 48, "targets": 24})
        expected.pop("decoder_causal_attention")
        assert set(batch) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(batch[name][row], values, err_msg=name)


def test_byte_ids_equal_seqios():
    ours, theirs = ByteVocabulary(extra_ids=3), seqio.ByteVocabulary(extra_ids=3)
    assert (ours.size, ours.eos_id, ours.pad_id) == (
        theirs.vocab_size,
        theirs.eos_id,
        theirs.pad_id,
    )
    for text in TEXTS:
        assert ours.encode(text) == list(theirs.encode(text))
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_sentencepiece_ids_equal_seqios(model_path):
    ours = load_vocabulary(model_path, extra_ids=10)
    theirs = seqio_registration.seqio_vocabulary(ours, model_path)
    assert (ours.size, ours.eos_id) == (theirs.vocab_size, theirs.eos_id)
    for text in TEXTS:
        assert ours.encode(text) == list(theirs.encode(text))
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    # T5's sentinels: the first is the last id.
    assert theirs.tokenizer.id_to_piece(ours.extra_id(0)) == "\u2581<extra_id_0>"


def _both_ways(task, vocabulary, lengths, split="train", limit=40):
    """Examples by seqio's pipeline and by prepare's own."""
    documents = list(itertools.islice(task.documents(split, BadRows()), limit))
    short = TextTask(
        task.name, lambda split, bad: iter(documents), task.objective, task.origin, task.splits
    )
    registered = seqio_registration.register(short, vocabulary)
    try:
        dataset = registered.get_dataset(lengths, split=split, shuffle=False)
        theirs = list(dataset.as_numpy_iterator())
    finally:
        seqio_registration.register(task)
    recipe = Recipe(task.objective, lengths["inputs"], lengths["targets"])
    ours = encode_block(recipe, vocabulary, DocumentBlock(0, 0, documents))
    return theirs, ours


@pytest.mark.parametrize("name", sorted(EMBEDDED_TASKS))
def test_seqio_task_gives_prepares_examples(name):
    lengths = {"inputs": 96, "targets": 32}
    theirs, ours = _both_ways(EMBEDDED_TASKS[name], ByteVocabulary(), lengths, "validation", 12)
    assert len(theirs) == len(ours.sources) >= 12
    for example, source, target in zip(theirs, ours.sources, ours.targets):
        np.testing.assert_array_equal(example["inputs"], source)
        np.testing.assert_array_equal(example["targets"], target)


def test_embedded_tasks_are_registered_with_their_splits():
    for name, task in EMBEDDED_TASKS.items():
        registered = seqio.get_mixture_or_task(name)
        assert set(registered.splits) == set(task.splits) == {"train", "validation", "test"}


def test_supervised_examples_equal_seqios_own_preprocessors(tmp_path, model_path):
    """tokenize and append_eos_after_trim of seqio on the same JSONL."""
    from encdec.data.text_tasks import jsonl_task

    rows = [{"source": text * 9, "target": "to " + text} for text in TEXTS]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    vocabulary = load_vocabulary(model_path)
    lengths = {"inputs": 40, "targets": 20}
    theirs, ours = _both_ways(jsonl_task([str(path)]), ByteVocabulary(), lengths)
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True, dtype=tf.int32)
    features = {"inputs": feature, "targets": feature}
    dataset = tf.data.Dataset.from_tensor_slices(
        {"inputs": [row["source"] for row in rows], "targets": [row["target"] for row in rows]}
    )
    dataset = seqio.preprocessors.tokenize(dataset, features, copy_pretokenized=False)
    dataset = seqio.preprocessors.append_eos_after_trim(dataset, features, lengths)
    plain = list(dataset.as_numpy_iterator())
    assert len(plain) == len(theirs) == len(ours.sources) == len(rows)
    for expected, example, source, target in zip(plain, theirs, ours.sources, ours.targets):
        np.testing.assert_array_equal(expected["inputs"], source)
        np.testing.assert_array_equal(expected["targets"], target)
        np.testing.assert_array_equal(example["inputs"], source)
    assert vocabulary.size


def test_rates_of_the_users_own_mixture_are_seqios_too(monkeypatch):
    from encdec.data import task_mixtures

    for name in ("MIXTURES", "RATES"):
        monkeypatch.setattr(task_mixtures, name, {})
    task_mixtures.register_mixture("rated", ("xsum", "squad_v2"), (3, 1))
    importlib.reload(seqio_registration)
    found = seqio.MixtureRegistry.get("rated")
    assert found.get_rate(seqio.TaskRegistry.get("xsum")) == 3
    seqio.MixtureRegistry.remove("rated")
    task_mixtures.register_mixture("rated", ("xsum", "squad_v2"))
    assert task_mixtures.RATES == {}


def test_mixtures_are_seqio_mixtures_at_their_rates(tmp_path):
    from encdec.data.task_mixtures import MIXTURES
    from encdec.data.text_tasks import jsonl_task

    for name, parts in MIXTURES.items():
        assert {task.name for task in seqio.MixtureRegistry.get(name).tasks} == set(parts)
    names = []
    for count in (2, 6):
        rows = [{"source": "s", "target": "t"}] * count
        made = jsonl_task([str(write_jsonl(tmp_path / f"{count}.jsonl", rows))])
        names.append(f"made_{count}")
        seqio_registration.register(
            TextTask(names[-1], made.read, made.objective, made.origin, ("train",))
        )
    proportional = seqio_registration.register_mixture("made_mixture", names)
    rates = [proportional.get_rate(seqio.TaskRegistry.get(name)) for name in names]
    assert rates == [2.0, 6.0]
    explicit = seqio_registration.register_mixture("made_mixture", names, [1.0, 4.0])
    assert [explicit.get_rate(seqio.TaskRegistry.get(name)) for name in names] == [1.0, 4.0]
    with pytest.raises(ConfigError, match="expected 2 numbers above 0"):
        seqio_registration.register_mixture("made_mixture", names, [1.0])
    examples = explicit.get_dataset(
        {"inputs": 8, "targets": 8}, shuffle=False, num_epochs=1
    ).as_numpy_iterator()
    assert next(examples)["targets"].tolist()[-1] == 1
    seqio.MixtureRegistry.remove("made_mixture")
    for name in names:
        seqio.TaskRegistry.remove(name)
