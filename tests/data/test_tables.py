"""Every form of input gives the same records, byte for byte; faults of tables are named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pathlib
import sys

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from encdec.data import readers
from encdec.data.prepare import prepare
from encdec.data.prepare_command import report
from encdec.data.prepare_settings import PrepareSettings, choose_task
from encdec.data.readers import BadRows, check_files, has_rows
from encdec.errors import ConfigError, DataError
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.evaluation.examples import load_examples
from encdec.inference.answer_files import read_inputs

ROWS = [
    {"source": 'a "quoted", cell', "target": "one"},
    {"source": "two\nlines\tand a tab", "target": "zwei\r\nZeilen"},
    {"source": "日本語 \U0001f600", "target": " spaces "},
    {"source": "x" * 200_000, "target": "long"},
]
RENAMED = [{"in": row["source"], "out": row["target"], "id": i} for i, row in enumerate(ROWS)]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def delimited(rows, delimiter=",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def stream(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, 2)


def dataset(folder, rows):
    """As ``datasets.Dataset.save_to_disk`` writes it, in two shards."""
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (rows[:1], rows[1:])):
        stream(folder / name, part)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """(form, the argument of --jsonl) of the same rows."""
    root = tmp_path_factory.mktemp("forms")
    for name, content in (
        ("a.jsonl", jsonl(ROWS)),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))),
        ("a.csv", delimited(ROWS)),
        ("b.csv", b"\xef\xbb\xbf" + delimited(ROWS)),
        ("a.csv.gz", gzip.compress(delimited(ROWS))),
        ("a.tsv", delimited(ROWS, "\t")),
        ("utf16.csv", delimited(ROWS).decode().encode("utf-16")),
    ):
        (root / name).write_bytes(content)
    table = pa.Table.from_pylist(ROWS)
    pa.parquet.write_table(table, root / "a.parquet", row_group_size=2)
    pa.feather.write_feather(table, root / "a.arrow")
    stream(root / "stream.arrow", ROWS)
    dataset(root / "saved" / "train", ROWS)
    (root / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for number, part in enumerate((ROWS[:2], ROWS[2:])):
        (root / "many").mkdir(exist_ok=True)
        (root / "many" / f"{number}.jsonl").write_bytes(jsonl(part))
    (root / "many" / "notes.bin").write_bytes(b"\0")
    found = {path.name: str(path) for path in root.iterdir() if path.is_file()}
    found |= {name: str(root / name) for name in ("many", "saved/train")}
    return found | {"glob": f"{root}/many/*.jsonl", "deep glob": f"{root}/**/[01].jsonl"}


def documents(*paths, **fields):
    return list(choose_task(None, paths, fields=fields).documents("train", BadRows()))


def test_every_form_gives_the_same_records(forms, tmp_path, monkeypatch):
    wanted = [(row["source"], row["target"]) for row in ROWS]
    for form, path in forms.items():
        assert documents(path) == wanted, form
    cards = {
        form: prepare(out=tmp_path / form, vocabulary="bytes", jsonl=[forms[form]], workers=1)
        for form in ("a.jsonl", "a.csv", "a.parquet", "saved/train", "glob")
    }
    assert len({card.fingerprint for card in cards.values()}) == 1
    shards = [(tmp_path / form / card.shards[0].name).read_bytes() for form, card in cards.items()]
    assert len(set(shards)) == 1
    readers._standard_input.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(jsonl(ROWS))))
    assert documents("-") == documents("-") == wanted
    assert check_files(["-"])[0].name == "standard_input"


def test_fields_by_name_of_pairs_and_of_text(forms, tmp_path):
    wanted = [(row["source"], row["target"]) for row in ROWS]
    (tmp_path / "a.csv").write_bytes(delimited(RENAMED))
    pa.parquet.write_table(pa.Table.from_pylist(RENAMED), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        path = str(tmp_path / name)
        assert documents(path, source_field="in", target_field="out") == wanted
        task = choose_task(None, text=[path], fields={"text_field": "in"})
        assert [text for (text,) in task.documents("train", BadRows())] == [a for a, _ in wanted]
        assert task.origin() == {"files": [name], "fields": ["in"]}
    assert has_rows(forms["a.parquet"]) and has_rows(forms["stream.arrow"])
    with pytest.raises(ConfigError, match="--text_field=in is for files of --text"):
        documents(path, text_field="in")
    with pytest.raises(DataError, match=r"no 'source' \(keys: 'id', 'in', 'out'\)"):
        documents(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match=r"no column 'source' \(columns: in, out, id\).*_field"):
        documents(path)


def test_evaluate_and_generate_read_them_too(forms):
    examples = load_examples(
        EvaluationSettings("c", "o", jsonl=(forms["a.csv"], forms["saved/train"], forms["many"]))
    )
    assert [one.name for one in examples] == ["a", "train", "many"]
    assert len({one.examples for one in examples}) == 1
    sources = [row["source"] for row in ROWS]
    for form in ("a.jsonl", "a.csv", "a.parquet", "many"):
        assert read_inputs(forms[form]) == sources, form


FAULTS = {
    "a.csv:3: 1 cells, expected the header's 2": b"source,target\na,b\nc\n",
    "a.csv:2: invalid CSV": b'source,target\n"a"b,c\n',
    "a.csv:3: the line is empty": b"source,target\na,b\n\nc,d\n",
    "a.csv:2: invalid UTF-8": b"source,target\n\xff,b\n",
    "a.csv:1: the header line: unexpected end": b'"source,target\na,b\n',
    "a.csv:1: .*a name twice": b"source,source\na,b\n",
    "a.csv:1: the file is empty": b"",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_csv_are_named_by_line(tmp_path, fault):
    (tmp_path / "a.csv").write_bytes(FAULTS[fault])
    with pytest.raises(DataError, match=fault):
        documents(str(tmp_path / "a.csv"))


def test_a_quote_that_nothing_closes_counts_every_line_that_it_takes(tmp_path):
    (tmp_path / "a.csv").write_text('source,target\na,b\n"c,d\n' + "e,f\n" * 5)
    task, bad_rows = choose_task(None, [str(tmp_path / "a.csv")]), BadRows(6)
    assert list(task.documents("train", bad_rows)) == [("a", "b")] and bad_rows.count == 6
    assert "a.csv:3: invalid CSV: unexpected end" in bad_rows.named[0]
    with pytest.raises(DataError, match="a.csv:8: .*from line 3 to 8.*6 bad rows, 5 allowed"):
        list(task.documents("train", BadRows(5)))


def test_faults_of_other_forms_are_named(tmp_path, forms):
    rows = [{"source": "a", "target": None}, {"source": "b", "target": "c"}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet:row 1: 'target' is NoneType null, expected a"):
        documents(str(tmp_path / "a.parquet"))
    task = choose_task(None, [str(tmp_path / "a.parquet")])
    assert list(task.documents("train", BadRows(1))) == [("b", "c")]
    whole = pathlib.Path(forms["a.parquet"]).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="b.parquet cannot be read as a parquet table"):
        documents(str(tmp_path / "b.parquet"))
    with pytest.raises(DataError, match=r"has the splits train; name one .*saved/train"):
        documents(str(pathlib.Path(forms["saved/train"]).parent))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file of .jsonl"):
        documents(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no file matches"):
        documents(f"{tmp_path}/*.jsonl")


def test_prepare_says_which_lengths_hold_the_pairs(tmp_path):
    rows = [{"source": "s" * (20 if n < 90 else 120), "target": "t" * 5} for n in range(100)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    card = prepare(out=tmp_path / "out", vocabulary="bytes", jsonl=[str(tmp_path / "a.jsonl")])
    text = report(card, 1.0)
    assert text.startswith("a.jsonl: 100 documents") and card.split == ""
    assert "sources that fit a length of 32: 90 %, 64: 90 %, 128: 100 %" in text
    assert "targets that fit a length of 16: 100 %" in text
    assert "100 pairs fill only" in text and "--inputs_length=128 --targets_length=16" in text
    wide = prepare(
        out=tmp_path / "fits",
        vocabulary="bytes",
        jsonl=[str(tmp_path / "a.jsonl")],
        inputs_length=128,
        targets_length=16,
    )
    assert "warning" not in report(wide, 1.0)


def test_files_are_called_what_they_are():
    named = lambda *paths, **more: PrepareSettings(jsonl=paths, **more).split_name
    assert named("x/dev.jsonl") == named("squad_valid-1.csv.gz") == "validation"
    assert named("train.jsonl", "more_train.jsonl") == "train"
    assert named("pairs.jsonl") == named("train.jsonl", "dev.jsonl") == named("latest.jsonl") == ""
    assert named("dev.jsonl", split="test") == "test"
    assert PrepareSettings(task="xsum").split_name == "train"
