"""A user's own module: tasks, mixtures, preprocessors and metrics, from docs/own-data.md."""

from __future__ import annotations

import statistics
import sys
import types

import pytest

from encdec import cli
from encdec.data import seqio_tasks, task_mixtures, task_registry
from encdec.data.objectives import OBJECTIVES
from encdec.data.readers import BadRows
from encdec.data.records import open_records
from encdec.errors import ConfigError, DataError
from encdec.metrics import metric_registry as metrics
from encdec.modules import import_modules
from encdec.tasks import FileTask, PrefixLM, TextTask, register_mixture, register_task
from tests.data.conftest import write_jsonl
from tests.pages import ROOT, blocks, run_by
from tests.run_pages import run_blocks

PAGE = ROOT / "docs" / "own-data.md"
REGISTRIES = (
    *(
        task_registry.TEXT_TASKS,
        task_registry.FILE_TASKS,
        task_mixtures.MIXTURES,
        task_mixtures.RATES,
    ),
    *(metrics.METRICS, OBJECTIVES),
)
ROWS = [{"question": f"What is {n}?", "answer": f"{n} is a number"} for n in range(12)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with the page's modules and rows; what they register is taken back."""
    kept = [dict(one) for one in REGISTRIES]
    path, modules = list(sys.path), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    run_blocks([block for block in blocks(PAGE) if block.language == "python"])
    for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
        write_jsonl(tmp_path / "rows" / "faq" / f"{split}.jsonl", rows)
    yield tmp_path
    for one, content in zip(REGISTRIES, kept):
        one.clear()
        one.update(content)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


def test_the_pages_module_is_known_to_configurations_and_mixtures(folder):
    # Steps come from the task unless the command line says otherwise.
    import_modules(["my_tasks"])
    config = cli.load("encdec.train.train_command:load_config")(f"{ROOT}/configs/finetune.py:faq")
    assert config.steps == 200
    mixture = cli.load("encdec.data.task_mixtures:task_or_mixture")("faq_and_sums", "rows")
    documents = list(mixture.documents("train", BadRows()))
    assert sum("Question" in source for source, _ in documents[:8]) == 6


def test_seqios_registry_is_read_up_to_its_tokens(folder):
    pytest.importorskip("seqio")
    run_blocks([block for block in run_by(__file__) if block.language == "sh"])
    records = open_records("data/shouts")
    vocabulary = records.vocabulary()
    from encdec.data.records import decode_row

    [row] = records.read([0])
    sources, targets = decode_row(row, records.card.token_dtype)
    pairs = {(vocabulary.decode(a), vocabulary.decode(b)) for a, b in zip(sources, targets)}
    assert pairs <= {("oak", "OAK"), ("elm", "ELM"), ("ash", "ASH")} and len(pairs) > 1
    assert records.card.examples == 12
    task = task_registry.text_task("shout")
    [name] = task.metrics
    [score] = metrics.metric_named(name).scores(["OAK", "ELM"], ["abc", "toolong"])
    assert (name, score.name, score.value) == ("shout.same_length", "same_length", 0.5)

    import seqio

    seqio.TaskRegistry.remove("shout")
    seqio.MixtureRegistry.remove("shouts")


def test_a_metric_without_a_value_of_one_example_is_one_of_the_whole_set():
    def spread(targets, predictions):
        return {"spread": statistics.stdev(map(float, predictions))}

    task = types.SimpleNamespace(postprocess_fn=lambda text, **_: text)
    [score] = seqio_tasks._scores(task, spread, [["a"], ["b"]], ["1", "3"])
    assert score.value == pytest.approx(2**0.5) and score.count == 2 and score.remark


IDS_MODULE = """
# my_ids.py
import functools

import seqio
import tensorflow as tf

words = lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
    {"text": ["oak", "elm tree", "ash"] * 4}
)
lists = lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors(
    {"inputs": tf.constant([5, 6, 7]), "targets": tf.constant([8, 9])}
)


def twice(dataset):
    return dataset.map(lambda row: {"inputs": row["text"], "targets": row["text"]})


def backwards(dataset):
    return dataset.map(lambda row: row | {"targets": row["targets"][::-1]})


def masked(dataset, sequence_length, output_features):
    first = output_features["inputs"].vocabulary.vocab_size - 1
    head = lambda ids: tf.concat([ids[: sequence_length["inputs"] // 8], [first]], 0)
    return dataset.map(lambda row: row | {"inputs": head(row["inputs"])})


def targets_alone(dataset):
    return dataset.map(lambda row: {"targets": row["targets"]})


def add(name, vocabulary, source, *steps, sides=("inputs", "targets")):
    feature = seqio.Feature(vocabulary)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, splits=("train", "validation")),
        preprocessors=steps,
        output_features={side: feature for side in sides},
        metric_fns=[],
    )


ours, tokens = seqio.ByteVocabulary(extra_ids=4), seqio.preprocessors
add("my_text", ours, words, twice, tokens.tokenize, tokens.append_eos)
add("my_backwards", ours, words, twice, tokens.tokenize, backwards, tokens.append_eos)
add("my_masked", ours, words, twice, tokens.tokenize, masked, tokens.append_eos)
add("my_lists", seqio.PassThroughVocabulary(263), lists)
add("my_targets", ours, words, twice, targets_alone, tokens.tokenize, backwards, sides=["targets"])
add("my_other", seqio.ByteVocabulary(extra_ids=9), words, twice, tokens.tokenize, backwards)
seqio.MixtureRegistry.add("my_mixture", [("my_text", 3.0), ("my_masked", 1.0)])
"""


@pytest.fixture
def ids_module(folder):
    seqio = pytest.importorskip("seqio")
    (folder / "my_ids.py").write_text(IDS_MODULE)
    yield seqio
    for name in [name for name in seqio.TaskRegistry.names() if name.startswith("my_")]:
        seqio.TaskRegistry.remove(name)
    seqio.MixtureRegistry.remove("my_mixture")


def stored_pairs(directory):
    from encdec.data.records import decode_row

    records = open_records(directory)
    found = []
    for row in records.read(range(len(records))):
        for source, target in zip(*decode_row(row, records.card.token_dtype)):
            found.append((tuple(source.tolist()), tuple(target.tolist())))
    return records.card, sorted(found)


def seqio_pairs(seqio, name, lengths):
    dataset = seqio.get_mixture_or_task(name).get_dataset(lengths, "train", shuffle=False)
    taken = dataset.take(12).as_numpy_iterator()
    sides = [[tuple(x[side]) if side in x else () for side in ("inputs", "targets")] for x in taken]
    return sorted(map(tuple, sides))


def test_tasks_that_change_their_tokens_are_read_as_ids(ids_module, capsys):
    """As seqio's own pipeline gives them, by its vocabulary or not at all."""
    lengths = {"inputs": 16, "targets": 12}
    flags = ["--module=my_ids", "--inputs_length=16", "--targets_length=12"]
    for name in ("my_backwards", "my_masked"):
        given = [*flags, f"--task={name}", "--vocabulary=bytes", f"--out=ids/{name}"]
        assert cli.main(["prepare", *given, "--extra_ids=9"]) == ConfigError.exit_code
        assert "give --vocabulary=bytes --extra_ids=4" in capsys.readouterr().err
        assert cli.main(["prepare", *given, "--extra_ids=4"]) == 0
        card, pairs = stored_pairs(f"ids/{name}")
        assert pairs == seqio_pairs(ids_module, name, lengths)
        assert card.inputs_eos and not card.truncated and card.lost["texts"] == 0
    assert cli.main(["data", "list", "--module=my_ids"]) == 0
    listed = capsys.readouterr().out
    assert "my_masked: a task of seqio's registry" in listed
    assert "my_mixture: mixture of my_masked, my_text" in listed
    shown = ["data", "show", "my_masked", *flags, "--extra_ids=4", "--count=1"]
    assert cli.main(shown) == 0 and "<extra_id_0>" in capsys.readouterr().out
    assert cli.main(["vocab", "--module=my_ids", "--task=my_masked", "--out=v.model"]) == 3
    assert "has ids but no text" in capsys.readouterr().err


def test_ids_of_a_source_and_of_other_vocabularies(ids_module, capsys):
    flags = ["--module=my_ids", "--inputs_length=16", "--targets_length=12", "--vocabulary=bytes"]
    assert cli.main(["prepare", *flags, "--task=my_lists", "--extra_ids=4", "--out=lists"]) == 0
    assert stored_pairs("lists")[1] == [((5, 6, 7), (8, 9))]
    assert cli.main(["prepare", *flags, "--task=my_lists", "--out=x"]) == ConfigError.exit_code
    assert "its own vocabulary of 263 ids" in capsys.readouterr().err
    assert cli.main(["prepare", *flags, "--task=my_other", "--extra_ids=4", "--out=x"]) == 2
    assert "--extra_ids=9" in capsys.readouterr().err


def test_ids_of_a_task_without_sources_are_for_decoder_only_models(ids_module):
    flags = ["--module=my_ids", "--inputs_length=0", "--targets_length=7", "--vocabulary=bytes"]
    assert cli.main(["prepare", *flags, "--task=my_targets", "--extra_ids=4", "--out=alone"]) == 0
    card, pairs = stored_pairs("alone")
    assert pairs == seqio_pairs(ids_module, "my_targets", {"targets": 7})
    assert card.inputs_length == 0 and card.truncated["targets"] == 4  # "elm tree" has 8 ids


def test_a_mixture_with_ids_keeps_its_rates(ids_module):
    flags = ["--module=my_ids", "--inputs_length=16", "--targets_length=12", "--vocabulary=bytes"]
    assert cli.main(["prepare", *flags, "--task=my_mixture", "--extra_ids=4", "--out=mixed"]) == 0
    card, pairs = stored_pairs("mixed")
    sentinels = sum(262 in source for source, _ in pairs)
    # Until both are read: 12 masked ones, and three times as many of the other.
    assert sentinels == 12 and 45 <= card.examples <= 48
    assert card.origin["rates"] == [1.0, 3.0] and [*card.origin["mixture"]] == [
        "my_masked",
        "my_text",
    ]
    text = {pair for pair in pairs if 262 not in pair[0]}
    assert text == set(seqio_pairs(ids_module, "my_text", {"inputs": 16, "targets": 12}))


def test_ids_are_evaluated_where_they_are_those_of_a_text(ids_module):
    from encdec.evaluation.examples import of_task
    from encdec.modules import import_modules

    import_modules(["my_ids"])
    one = of_task("my_backwards", None, "validation", ("exact_match",), 2).examples[1]
    assert (one.source, one.references) == ("elm tree", ("eert mle",))
    with pytest.raises(DataError, match="my_masked needs row lengths"):
        of_task("my_masked", None, "validation", ("exact_match",))
    with pytest.raises(DataError, match="example 1 has ids that do not decode to text"):
        list(
            task_registry.text_task("my_masked").at_lengths(16, 8).examples("validation", BadRows())
        )
    with pytest.raises(DataError, match="ids without a text"):
        of_task("my_lists", None, "validation", ("exact_match",))


def test_names_are_kept_apart_and_mistakes_are_named(folder):
    own = TextTask("own", lambda split, bad_rows: iter([("a", "b")]))
    register_task(own)
    register_task(own)  # a module imported twice
    with pytest.raises(ConfigError, match="'own' is already registered"):
        register_task(TextTask("own", lambda split, bad_rows: iter([])))
    with pytest.raises(ConfigError, match="'xsum' is already registered"):
        register_task(FileTask("xsum", "", (), tuple, {"train": None}))
    for name in ("a b", "..", "a/b", ""):
        with pytest.raises(ConfigError, match=f"named '{name}'"):
            register_task(TextTask(name, lambda split, bad_rows: iter([])))
    with pytest.raises(ConfigError, match="'own' is already registered"):
        register_mixture("own", ("own",))
    with pytest.raises(ConfigError, match="rates"):
        register_mixture("mine", ("own", "xsum"), rates=(1,))
    with pytest.raises(ConfigError, match="'mine' has 'own' twice"):
        register_mixture("mine", ("own", "xsum", "own"))
    with pytest.raises(DataError, match="--module"):
        task_registry.text_task("unknown")
    with pytest.raises(ConfigError, match="has its own text"):
        task_registry.text_task("own", str(folder))
    assert cli.main(["prepare", "--module=absent", "--task=own", "--out=x"]) == 2
    register_task(TextTask("raw", lambda split, bad_rows: iter([("a",)]), PrefixLM()))
    load_config = cli.load("encdec.train.train_command:load_config")
    with pytest.raises(ConfigError, match="raw is text for pretraining"):
        load_config(f"{ROOT}/configs/finetune.py:raw")
    assert load_config(f"{ROOT}/configs/finetune.py").steps == 1_000


def test_ready_pairs_of_a_task_that_brings_its_own_text(folder):
    register_task(TextTask("own", lambda split, bad_rows: iter([("a", "b")]), splits=("train",)))
    write_jsonl(folder / "train" / "own.jsonl", [{"source": "c", "target": "d"}])
    documents = task_registry.text_task("own", str(folder)).documents("train", BadRows())
    assert list(documents) == [("c", "d")]
