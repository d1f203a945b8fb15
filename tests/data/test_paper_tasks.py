"""The paper's tasks: published prompts, official splits and files, faults, metrics, registry."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.resources
import itertools
import json
import sys

import pytest

from encdec.cli import main as encdec
from encdec.data.file_tasks import FileTask
from encdec.data.paper_tasks import PAPER_TASKS
from encdec.data.prepare import prepare
from encdec.data.readers import BadRows, check_files
from encdec.data.records import read_card
from encdec.data.task_registry import text_task
from encdec.errors import ConfigError, DataError
from encdec.metrics.metric_registry import METRICS
from tests.data.conftest import write_jsonl

ROWS = {
    "c4": {"text": "a web page", "url": "x"},
    "wikipedia": {"title": "T", "text": "an article"},
    "squad_v2": {"question": "Who?", "context": "It was I.", "answers": {"text": ["I", "It"]}},
    "xsum": {"document": "Long.", "summary": "Short."},
    "dialogsum": {"dialogue": "A: So?", "summary": "A asks."},
    "code_java2cs": {"java": "int a;", "cs": "var a;"},
    "code_refine_small": {"buggy": "a", "fixed": "b"},
    "code_refine_medium": {"buggy": "a", "fixed": "b"},
    "ielts_band": {"task": "Write.", "essay": "Words.", "band": "6.5"},
    "ielts_feedback": {"task": "Write.", "essay": "Words.", "comment": "Good."},
}
SQUAD = (
    "Answer the following question based only on the context.\n"
    "###Question\nWho?\n###Context\nIt was I.\n###Answer\n"
)


def _documents(name, data_dir, split="train", allowed=0):
    return list(text_task(name, str(data_dir)).documents(split, BadRows(allowed)))


def _put(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_jsonl(path, rows)


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_a_task_reads_its_own_fields_or_ready_pairs(tmp_path, name):
    task = PAPER_TASKS[name]
    ready = (
        {"text": "t"}
        if task.objective.document_fields == ("text",)
        else {"source": "s", "target": "t", "targets": ["t"]}
    )
    _put(tmp_path / name / "train.jsonl", [ROWS[name], ready])
    first, second = _documents(name, tmp_path)
    assert second == tuple(ready[field] for field in task.objective.document_fields)
    if task.objective.document_fields == ("text",):
        assert first == (ROWS[name]["text"],)
    else:
        source, target = first
        assert source.endswith("\n") and source.count("###") >= 2
        assert all(
            value in source or value == target
            for value in ROWS[name].values()
            if isinstance(value, str)
        )
    card = prepare(
        out=tmp_path / "out", vocabulary="bytes", task=name, data_dir=str(tmp_path), workers=1
    )
    assert card.task == name and card.documents == 2
    assert (card.inputs_length, card.targets_length) == task.lengths
    assert card.origin["files"]["train"] == ["train.jsonl"]


def test_rows_are_read_once_and_another_tasks_never(tmp_path):
    row = b'{"source": "a", "target": "b"}\n'
    (tmp_path / "train").mkdir()
    for name in ("qa-0", "qa-1", "qa_long"):
        (tmp_path / "train" / f"{name}.jsonl").write_bytes(row)
    task = FileTask("qa", "", ("source", "target"), tuple, {"train": None})
    dataclasses.replace(task, name="qa_long")
    assert [one.stem for one in task.find_files(tmp_path, "train")] == ["qa-0", "qa-1"]
    (tmp_path / "train" / "qa-1.jsonl.gz").write_bytes(gzip.compress(row))
    for read in (
        lambda: task.find_files(tmp_path, "train"),
        lambda: check_files([tmp_path / "train"]),
        lambda: check_files([f"{tmp_path}/train/*"]),
    ):
        with pytest.raises(DataError, match=r"qa-1.jsonl and .*qa-1.jsonl.gz are one file"):
            read()


def test_squad_has_the_published_prompt_and_unanswerable_questions(tmp_path):
    rows = [
        ROWS["squad_v2"],
        {**ROWS["squad_v2"], "answers": {"text": []}},
        {**ROWS["squad_v2"], "answers": [{"text": "I", "answer_start": 0}]},
    ]
    _put(tmp_path / "dev" / "squad_v2.0_part.jsonl", rows)
    assert _documents("squad_v2", tmp_path, "validation") == [
        (SQUAD, "I"),
        (SQUAD, "unanswerable"),
        (SQUAD, "I"),
    ]
    article = {"context": "It was I.", "qas": [{"question": "Who?", "answers": [], "id": "1"}]}
    official = tmp_path / "squad_v2" / "train-v2.0.json.gz"
    official.parent.mkdir()
    official.write_bytes(gzip.compress(json.dumps({"data": [{"paragraphs": [article]}]}).encode()))
    assert _documents("squad_v2", tmp_path) == [(SQUAD, "unanswerable")]
    article["qas"][0]["answers"] = 3
    official.write_bytes(gzip.compress(json.dumps({"data": [{"paragraphs": [article]}]}).encode()))
    with pytest.raises(DataError, match="'answers' is int, expected a list"):
        _documents("squad_v2", tmp_path)
    official.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match=r"train-v2.0.json.gz is not in SQuAD's format"):
        _documents("squad_v2", tmp_path)


def test_all_references_reach_evaluation_and_the_first_reaches_training(tmp_path):
    seqio = pytest.importorskip("seqio")
    from encdec.data import seqio_registration

    answers = [{"text": text, "answer_start": 0} for text in ("I", "me", "I", "it was I")]
    ready = {"source": "Who?", "target": "me", "targets": ["I", "me"]}
    _put(tmp_path / "dev" / "squad_v2.jsonl", [{**ROWS["squad_v2"], "answers": answers}, ready])
    task = text_task("squad_v2", str(tmp_path))
    assert _documents("squad_v2", tmp_path, "validation") == [(SQUAD, "I"), ("Who?", "me")]
    expected = [("I", "me", "it was I"), ("me", "I")]
    assert [refs for _, refs in task.examples("validation", BadRows())] == expected
    bound = seqio_registration.register(task)
    try:
        dataset = bound.get_dataset(
            {"inputs": 512, "targets": 16}, split="validation", shuffle=False
        )
        targets = [
            bound.postprocess_fn(" I ", example=example, is_target=True)
            for example in dataset.as_numpy_iterator()
        ]
        assert targets == [list(references) for references in expected]
        assert bound.postprocess_fn(" I ", example={}, is_target=False) == "I"
        measured = bound.metric_fns[0](targets, ["it was I", "I"])
        assert measured["em"] == measured["f1"] == 100.0
    finally:
        seqio_registration.register(text_task("squad_v2"))
    assert seqio.get_mixture_or_task("squad_v2")
    with pytest.raises(DataError, match=r"raw text"):
        list(text_task("stdlib_text").examples("train", BadRows()))


def test_code_tasks_read_the_official_parallel_files(tmp_path):
    folder = tmp_path / "code_java2cs"
    folder.mkdir()
    (folder / "valid.java-cs.txt.java").write_text("int a;\nint b;\n")
    (folder / "valid.java-cs.txt.cs").write_text("var a;\nvar b;\n")
    found = _documents("code_java2cs", tmp_path, "validation")
    prompt = "Translate the following Java method to C#.\n###Java\nint b;\n###C#\n"
    assert len(found) == 2 and found[1] == (prompt, "var b;")
    (folder / "valid.java-cs.txt.cs").write_text("var a;\n")
    with pytest.raises(DataError, match=r"different numbers of lines .*line 2"):
        _documents("code_java2cs", tmp_path, "validation")


def test_faults_are_named_by_file_and_line(tmp_path):
    bad = [{**ROWS["squad_v2"], "answers": 3}, {"question": "Who?"}, {**ROWS["squad_v2"]}]
    path = _put(tmp_path / "squad_v2" / "train.jsonl", bad)
    with pytest.raises(DataError, match=rf"{path.name}:1: 'answers' is int.*--max_bad_rows"):
        _documents("squad_v2", tmp_path)
    assert _documents("squad_v2", tmp_path, allowed=2) == [(SQUAD, "I")]
    with pytest.raises(DataError, match=rf"{path.name}:2: no 'context'"):
        _documents("squad_v2", tmp_path, allowed=1)


def test_missing_data_is_refused_with_the_place_to_put_it(tmp_path):
    with pytest.raises(DataError, match=r"no train split of xsum .*xsum/train.jsonl.*document"):
        _documents("xsum", tmp_path)
    _put(tmp_path / "xsum" / "validation.jsonl", [ROWS["xsum"]])
    with pytest.raises(DataError, match=r"no train split.*; there is validation \(--split\)"):
        _documents("xsum", tmp_path)
    with pytest.raises(DataError, match=r"c4 has train, validation"):
        _documents("c4", tmp_path, "test")
    with pytest.raises(DataError, match=r"not in tensorflow-datasets.*--data_dir"):
        list(text_task("ielts_band").documents("train", BadRows()))
    with pytest.raises(DataError, match=r"nowhere is not a directory"):
        text_task("xsum", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"has its own text"):
        text_task("stdlib_text", str(tmp_path))
    with pytest.raises(DataError, match=r"did you mean 'squad_v2'"):
        text_task("squad")


def test_tensorflow_datasets_are_read_where_they_are_and_never_fetched(tmp_path, monkeypatch):
    """A data set written in TFDS's own format under the name that the task asks for."""
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"is not on this machine.*tfds build xsum"):
        list(text_task("xsum").documents("train", BadRows()))
    builder = tfds.builder("xsum")
    rows = [{"document": f"text \u00e9{i}", "summary": f"summary {i}"} for i in range(3)]
    monkeypatch.setattr(
        type(builder), "_split_generators", lambda self, *_: {"train": self._generate_examples()}
    )
    monkeypatch.setattr(type(builder), "_generate_examples", lambda self: enumerate(rows))
    monkeypatch.setattr(type(builder), "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
    # TFDS writes with a backport that Python 3.11 has built in.
    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)
    builder.download_and_prepare()
    found = list(text_task("xsum").documents("train", BadRows()))
    assert sorted(target for _, target in found) == ["summary 0", "summary 1", "summary 2"]
    assert all(source.startswith("Summarize the following") for source, _ in found)
    with pytest.raises(DataError, match=r"split is 'validation'; xsum has train"):
        list(text_task("xsum").documents("validation", BadRows()))


def test_data_dir_by_flag_and_gin(tmp_path, capsys):
    _put(tmp_path / "train" / "xsum.jsonl", [ROWS["xsum"]] * 3)
    command = ["prepare", "--task=xsum", "--vocabulary=bytes", f"--out={tmp_path / 'a'}"]
    assert encdec([*command, f"--data_dir={tmp_path}"]) == 0
    assert read_card(tmp_path / "a").documents == 3
    bound = f"prepare.data_dir = '{tmp_path}'"
    assert encdec([*command[:-1], f"--out={tmp_path / 'b'}", f"--gin_bindings={bound}"]) == 0
    assert read_card(tmp_path / "b").fingerprint == read_card(tmp_path / "a").fingerprint
    capsys.readouterr()
    text = ["prepare", "--text", "x", "--vocabulary=bytes", "--out=o", f"--data_dir={tmp_path}"]
    assert encdec(text) == ConfigError.exit_code
    assert "is for --task" in capsys.readouterr().err


def test_the_metrics_of_every_task_are_registered():
    for task in PAPER_TASKS.values():
        assert all(name in METRICS for name in task.metrics), task.name
    assert {"bleu_codexglue", "exact_match"} <= set(PAPER_TASKS["code_refine_small"].metrics)
    assert {"rouge", "rouge_stemmed"} <= set(PAPER_TASKS["dialogsum"].metrics)


def test_seqio_registers_every_task_with_splits_and_metrics(tmp_path):
    seqio = pytest.importorskip("seqio")
    from encdec.data import seqio_registration

    for name, task in PAPER_TASKS.items():
        registered = seqio.get_mixture_or_task(name)
        assert set(registered.splits) == set(task.splits)
        assert len(registered.metric_objs) == len(task.metrics)
    _put(tmp_path / "xsum" / "train.jsonl", [ROWS["xsum"]] * 2)
    bound = seqio_registration.register(text_task("xsum", str(tmp_path)))
    try:
        lengths = {"inputs": 96, "targets": 16}
        examples = list(bound.get_dataset(lengths, shuffle=False).as_numpy_iterator())
        assert len(examples) == 2
        measured = bound.metric_fns[0](["a b"], ["a b"])
        assert measured["rougeL"] == 100.0
    finally:
        seqio_registration.register(text_task("xsum"))


@pytest.mark.corpora
def test_the_real_files_are_found_and_have_the_published_prompts(corpora):
    splits = {
        "code_java2cs": "train",
        "code_refine_small": "validation",
        "xsum": "train",
        "ielts_band": "train",
        "ielts_feedback": "validation",
        "squad_v2": "validation",
    }
    for name, split in splits.items():
        task = PAPER_TASKS[name]
        read = text_task(name, str(corpora / "t2t")).documents(split, BadRows())
        shape = task.document({**{field: "@" for field in task.fields}, "answers": ["@"]})[0]
        pieces = shape.split("@")
        for source, target in itertools.islice(read, 50):
            assert source.startswith(pieces[0]) and source.endswith(pieces[-1]) and target
    official = corpora / "squad" / "dev-v2.0-visible10.json.gz"
    found = list(PAPER_TASKS["squad_v2"]._read_squad([official]))
    again = list(text_task("squad_v2", str(corpora / "t2t")).documents("validation", BadRows()))
    assert len(found) == 3468
    assert sum(target == "unanswerable" for _, target, *_ in found) > 1000
    words = [{" ".join(source.split()) for source, *_ in part} for part in (found, again)]
    assert words[0] == words[1]
