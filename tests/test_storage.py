"""Refusals of the operating system are one line, and paths are what users mean by them."""

from __future__ import annotations

import argparse
import ast
import errno
import os
import pathlib
import resource
import subprocess
import sys

import pytest

from encdec import cli
from encdec.errors import ConfigError, DataError, StorageError
from encdec.storage import (
    is_free,
    local,
    local_path,
    refusals_explained,
    storage_error,
    whole_directory,
)
from tests.train.conftest import SHARED, random_pairs, write_records

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def nested(inner: Exception) -> Exception:
    """``inner`` as the cause of a library's own error, inside a group."""
    outer = RuntimeError("write failed")
    outer.__cause__ = inner
    return ExceptionGroup("several threads", [ValueError("other"), outer])


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: no space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "raise the quota"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), "/root/x: permission"),
        (OSError(errno.EROFS, "Read-only file system", "r"), "r: read-only file system"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "f/x"), "f/x: not a directory"),
        (
            ValueError('RESOURCE_EXHAUSTED: "/w/7": Failed to write: No space left on device [28]'),
            "/w/7: no space left on device",
        ),
        (RuntimeError("ArrayRecord: Permission denied; open /r/a"), "/r/a: permission denied"),
    ],
)
def test_a_refusal_is_found_wherever_it_is(error, said):
    for shape in (error, nested(error)):
        found = storage_error(shape, "Step 4 is whole.")
        assert said in str(found)
        assert str(found).endswith(". Step 4 is whole.")


@pytest.mark.parametrize(
    "error", [ValueError("shape"), FileNotFoundError(2, "no", "x"), KeyError()]
)
def test_other_errors_stay_what_they_are(error):
    assert storage_error(nested(error)) is None
    with pytest.raises(type(error)), refusals_explained(lambda: pytest.fail("asked")):
        raise error


def test_our_own_errors_pass_through():
    """Even where the operating system's refusal led to them: they say more."""
    with pytest.raises(DataError), refusals_explained(lambda: ""):
        raise DataError("named") from OSError(errno.EACCES, "Permission denied", "/x")


def test_the_command_line_prints_one_line(monkeypatch, capsys):
    def refuse(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "/full/out")

    monkeypatch.setattr(cli, "load", lambda target: refuse)
    assert cli.main(["prepare", "--out", "x"]) == StorageError.exit_code
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "/full/out: no space left" in text and "run the same command again" in text


@pytest.mark.parametrize("flags", [["--out=/a/b"], ["--x", "--workdir", "/a/b"], ["--work=/a/b"]])
def test_a_refusal_without_a_path_names_what_is_written(flags, monkeypatch, capsys):
    def refuse(argv):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "load", lambda target: refuse)
    assert cli.main(["export", *flags]) == StorageError.exit_code
    assert "/a/b: no space left" in capsys.readouterr().err


def test_home_is_expanded_and_nothing_else_is_guessed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local("--out", "~/data") == f"{tmp_path}/data"
    assert local("--out", "a~b/~") == "a~b/~"
    for empty in ("", "  "):
        with pytest.raises(ConfigError, match="--out is empty.*unset"):
            local("--out", empty)
    with pytest.raises(ConfigError, match="no home directory '~nobody-here'"):
        local("--out", "~nobody-here/x")


@pytest.mark.parametrize("address", ["gs://b/x", "s3://b/x", "gs:/b/x", "hf://b/x"])
def test_a_bucket_is_no_folder(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match=f"{address}.*mount.*/mnt/b/x"):
        local_path(address)
    assert not os.listdir(tmp_path)


def test_every_flag_that_names_a_path_has_the_type():
    """Read from the source, so that a new flag cannot forget it."""
    forgotten = []
    for path in (REPOSITORY / "encdec").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (
                isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
            ):
                continue
            values = {word.arg: word.value for word in node.keywords}
            metavar = getattr(values.get("metavar"), "value", "")
            if "type" not in values and any(
                word in str(metavar).split("=")[0] for word in ("DIR", "FILE", "PATH", "OUT")
            ):
                forgotten.append(f"{path.name}:{node.lineno} {ast.unparse(node.args[0])}")
    assert not forgotten, "give them type=encdec.storage.local_path: " + ", ".join(forgotten)


def test_training_on_a_full_disk_names_the_last_whole_checkpoint(one_device, tmp_path):
    """A limit on file sizes refuses like a full disk, from some step on, and needs no mount."""
    write_records(tmp_path / "records", random_pairs(16, seed=0))
    command = [
        "train", f"--config={REPOSITORY}/configs/pretrain.py:test",
        "--config.model_overrides.vocab_size=264", "--config.batch_size=8", *SHARED,
        "--config.checkpoint.every=1", "--config.steps=2",
        f"--config.data.records={tmp_path}/records", f"--workdir={tmp_path}/run",
    ]  # fmt: skip
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    uncached = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # it would be cut, too
    refused = subprocess.run(
        [sys.executable, "-m", "encdec", *command],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env=uncached,
    )
    assert refused.returncode == StorageError.exit_code, refused.stderr
    assert "Traceback" not in refused.stderr
    # Python may warn at its end of reads that were given up.
    [error] = [line for line in refused.stderr.splitlines() if line.startswith("encdec: error")]
    assert "file too large" in error and "starts at step 0" in error
    assert cli.main(command) == 0


@pytest.mark.parametrize("existed", [False, True])
def test_a_directory_is_whole_or_still_free(existed, tmp_path):
    out = tmp_path / "deep" / "out"
    if existed:
        out.mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(OSError), whole_directory(out) as partial:
            (partial / "a").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        assert is_free(out)
    with whole_directory(out) as partial:
        (partial / "folder").mkdir()
        (partial / "folder" / "a").write_text("all")
        (partial / "config.json").write_text("{}")
    assert (out / "folder" / "a").read_text() == "all" and not is_free(out)
    assert {path.name for path in out.iterdir()} == {"folder", "config.json"}
    assert {path.name for path in out.parent.iterdir()} == {"out"}
