"""Every flag of prepare, vocab and data changes something or is refused."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import pathlib

import pytest

from encdec.cli import main as encdec
from encdec.data import gin_bindings, prepare_command, vocab_command
from encdec.data.denoising import SETTINGS, MixtureOfDenoisers, SpanCorruption
from encdec.data.objectives import PrefixLM
from encdec.data.prepare import prepare
from encdec.data.prepare_settings import PrepareSettings
from encdec.data.records import open_records
from encdec.data.text_tasks import jsonl_task, text_files_task
from encdec.errors import ConfigError
from tests.data.conftest import write_jsonl


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pairs, text, a task's files and a bad row, where the commands are run."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"source": f"word {i} " * (1 + i % 5), "target": "b" * (1 + i % 7)} for i in range(60)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "bad.jsonl", [*pairs, {"source": 1}])
    (tmp_path / "text.txt").write_text("".join(f"line {i} of the text\n" for i in range(90)))
    for split in ("train", "validation"):
        (tmp_path / "files" / split).mkdir(parents=True)
        rows = [{"document": f"{split} {i}", "summary": "s"} for i in range(5)]
        write_jsonl(tmp_path / "files" / split / "xsum.jsonl", rows)
    (tmp_path / "my.gin").write_text("prepare.targets_length = 300\n")
    return tmp_path


def made(folder, command):
    """(exit code, all files of the records as bytes, without where time shows)."""
    out = folder / "out"
    code = encdec(["prepare", *command, "--out=out"])
    files = {path.name: path.read_bytes() for path in out.glob("*")} if out.is_dir() else {}
    files.pop("operative_config.gin", None)
    if out.is_dir():
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    return code, files


PAIRS = ["--jsonl=pairs.jsonl", "--vocabulary=bytes"]
TEXT = ["--text=text.txt", "--vocabulary=bytes", "--inputs_length=64", "--targets_length=64"]
TASK = ["--task=xsum", "--data_dir=files", "--vocabulary=bytes"]
NAMED = ["--task=stdlib_text", "--vocabulary=bytes"]
# (flag: command without it, what is added)
CHANGES = {
    "documents": (TEXT, ["--documents=lines"]),
    "objective": (TEXT, ["--objective=span_corruption", "--extra_ids=99"]),
    "extra_ids": (TEXT, ["--extra_ids=5"]),
    "split": (TASK, ["--split=validation"]),
    "inputs_length": (PAIRS, ["--inputs_length=99"]),
    "targets_length": (PAIRS, ["--targets_length=99"]),
    "packing": (PAIRS, ["--packing=none"]),
    "decoder_start_id": (PAIRS, ["--decoder_start_id=2"]),
    "inputs_prefix": (PAIRS, ["--inputs_prefix", "2", "5"]),
    "seed": (TEXT, ["--seed=3"]),
    "passes": (TEXT, ["--passes=2"]),
    "max_examples": (PAIRS, ["--max_examples=7"]),
    "max_bad_rows": (["--jsonl=bad.jsonl", "--vocabulary=bytes"], ["--max_bad_rows=1"]),
    "block_bytes": (PAIRS, ["--block_bytes=200"]),
    "source_field": (PAIRS, ["--source_field=target"]),
    "target_field": (PAIRS, ["--target_field=source"]),
    "gin_file": (PAIRS, ["--gin_file=my.gin"]),
    "gin_bindings": (PAIRS, ["--gin_bindings=sequence_to_sequence.inputs_eos = False"]),
}
REFUSED = {
    "task": (TASK, ["--jsonl=pairs.jsonl"], "give exactly one of"),
    "jsonl": (PAIRS, ["--text=text.txt"], "give exactly one of"),
    "text": (TEXT, ["--task=xsum"], "give exactly one of"),
    "data_dir": (PAIRS, ["--data_dir=files"], "is for --task"),
    "documents": (PAIRS, ["--documents=lines"], "leave it out"),
    "source_field": (TEXT, ["--source_field=text"], "is for files of --jsonl"),
    "text_field": (PAIRS, ["--text_field=source"], "is for files of --text"),
    "extra_ids": (["--jsonl=pairs.jsonl", "--vocabulary=bytes"], ["--extra_ids=-1"], "extra_ids"),
    "seed": (PAIRS, ["--seed=3"], "has nothing random"),
    "passes": (PAIRS, ["--passes=2"], "has no noise"),
    "workers": (PAIRS, ["--workers=2", "--beam_options=--runner=DirectRunner"], "Beam"),
    "beam_options": (PAIRS, ["--workers=1", "--beam_options="], "Beam"),
    "gin_bindings": (PAIRS, ["--gin_bindings=prefix_lm.split = 0.3"], "binds prefix_lm, which is"),
    "mixture": (TASK, ["--gin_bindings=mixture.temperature = 2.0"], "mixture.rates, .temp"),
    "split": (TASK, ["--split=dev"], "dev"),
}
# What changes no byte of the records, and where that is shown.
ELSEWHERE = {
    "help": "prints",
    argparse.SUPPRESS: "--quiet and --verbose: test_cli",
    "out": "every case",
    "vocabulary": "every case",
    "lossless": "test_vocabulary_losses",
    "module": "test_own_tasks",
    "overwrite": "test_prepare",
    "workers": "test_prepare: any number gives the same bytes",
}


def test_every_flag_of_prepare_is_looked_at():
    flags = {action.dest for action in prepare_command.parser()._actions}
    assert flags == (set(CHANGES) | set(REFUSED) | set(ELSEWHERE)) - {"mixture"}


@pytest.mark.parametrize("flag", CHANGES)
def test_a_flag_changes_what_is_written(folder, flag):
    command, more = CHANGES[flag]
    before, after = made(folder, command), made(folder, [*command, *more])
    assert after[0] == 0 and before != after


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_without_effect_is_refused(folder, flag, capsys):
    command, more, message = REFUSED[flag]
    code, files = made(folder, [*command, *more])
    assert code in (2, 3) and not files and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["data", "show", "out", "--split=train"],
        ["data", "show", "out", "--vocabulary=bytes"],
        ["data", "show", "out", "--inputs_length=9"],
        ["data", "verify", "out", "--full", "--rows=3"],
        ["data", "verify", "out", "--rows=0"],
        ["vocab", "--text=text.txt", "--split=test", "--out=v.model"],
        ["vocab", "--text=text.txt", "--sample_bytes=7", "--out=v.model"],
    ],
)
def test_flags_of_data_and_vocab_that_mean_nothing_are_refused(folder, command, capsys):
    assert encdec(["prepare", *PAIRS, "--out=out"]) == 0
    assert encdec(command) == 2
    assert command[-1 if command[0] == "data" else 2].split("=")[0].strip("-") in (
        capsys.readouterr().err
    )


def test_flags_of_vocab_change_the_model(folder):
    command = ["vocab", "--size=400", "--overwrite", "--out=v.model"]
    (folder / "more.txt").write_text(argparse.__doc__ + pathlib.Path(argparse.__file__).read_text())
    models = set()
    for more in (
        ["more.txt"],
        ["more.txt", "--size=401"],
        ["more.txt", "--model_type=unigram"],
        ["more.txt", "--jsonl", "pairs.jsonl"],
        ["more.txt", "--sample_bytes=4000"],
        ["more.txt", "--sample_bytes=4000", "--seed=5"],
    ):
        assert encdec([*command, "--text", *more]) == 0
        models.add((folder / "v.model").read_bytes())
    assert len(models) == 6
    given = {action.dest for action in vocab_command.parser()._actions}
    assert given == {
        *("help", "task", "jsonl", "text", "split", "size", "model_type", "sample_bytes", "seed"),
        *("max_bad_rows", "out", "overwrite", "module", "source_field", "target_field"),
        "text_field",  # how they change what is read: test_tables
        argparse.SUPPRESS,  # --quiet and --verbose
    }


def test_paths_are_the_users_in_every_place(folder, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home").mkdir()
    assert encdec(["prepare", *PAIRS, "--out=~/data/train"]) == 0
    assert len(open_records("~/data/train")) and not (folder / "~").exists()
    assert encdec(["vocab", "--text=text.txt", "--size=300", "--out=~/v.model"]) == 0
    bindings = ["--gin_bindings=prepare.vocabulary='~/v.model'", "--gin_bindings=prepare.out='~/o'"]
    assert encdec(["prepare", "--jsonl=pairs.jsonl", *bindings]) == 0
    assert (folder / "home" / "o" / "dataset.json").is_file() and not (folder / "~").exists()
    with gzip.open(folder / "home" / "a.txt", "wb") as file:
        file.write(b"words")
    bindings = ["--gin_bindings=prepare.text=['~/a.txt']"]
    assert encdec(["prepare", "--vocabulary=~/v.model", "--out=p", *bindings]) == 0
    before = sorted(path.name for path in folder.iterdir())
    for empty in ("--out=", "--gin_bindings=prepare.out=''"):
        with pytest.raises(SystemExit) if empty == "--out=" else contextlib.nullcontext():
            assert encdec(["prepare", *PAIRS, empty]) == 2
        assert "empty" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before
    json.loads((folder / "p" / "dataset.json").read_text())


def test_a_tasks_own_objective_keeps_its_settings_where_gin_binds_none(folder):
    own = {
        "prefix": PrefixLM(split=0.2),
        "denoisers": MixtureOfDenoisers(SETTINGS["ul2"]),  # which no task here has
        "spans": SpanCorruption(density=0.3),
    }
    tasks = {name: text_files_task(["text.txt"], objective) for name, objective in own.items()}
    gin_bindings.parse_gin([], [])
    for name, task in tasks.items():
        assert gin_bindings.choose_objective(None, task) == own[name]
    bound = ["prefix_lm.split = 0.7", "span_corruption.mean_span = 5.0"]
    gin_bindings.parse_gin([], bound)
    assert gin_bindings.choose_objective(None, tasks["prefix"]) == PrefixLM(split=0.7)
    found = gin_bindings.choose_objective(None, tasks["spans"])
    assert found == SpanCorruption(density=0.3, mean_span=5.0)


def test_identity_flags_and_gin_follow_from_the_fields(folder, capsys):
    settings = PrepareSettings(seed=3, workers=5)
    assert settings.identity()["seed"] == 3 and "workers" not in settings.identity()
    with pytest.raises(ConfigError, match=r"--out is missing; give it, or bind prepare.out"):
        settings.check()
    with pytest.raises(ConfigError, match=r"block_bytes is 'big'; expected an integer, 1 or more"):
        PrepareSettings(out="o", vocabulary="bytes", block_bytes="big").check()
    for binding, message in (
        ("prepare.inputs_lenght = 3", "did you mean 'inputs_length'"),
        ("prefx_lm.split = 0.3", "did you mean 'prefix_lm'"),
        ("prefix_lm.split = half", "a text in quotes"),
    ):
        assert encdec(["prepare", *PAIRS, "--out=o", f"--gin_bindings={binding}"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"task jsonl already has its files"):
        task = jsonl_task(["pairs.jsonl"])
        prepare(task=task, data_dir="files", out=folder / "o", vocabulary="bytes")
