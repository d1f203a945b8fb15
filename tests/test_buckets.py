"""Work in buckets, against servers that speak the protocols on loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from encdec import buckets, cli
from encdec.data.prepare import prepare
from encdec.data.prepare_settings import PrepareSettings
from encdec.data.records import open_records
from encdec.errors import ConfigError, DataError
from encdec.files import LineAppender, append_rows, keep_lines, whole_lines, write_text
from encdec.storage import (
    any_path,
    as_path,
    is_free,
    local_path,
    make_directory,
    storage_error,
    whole_directory,
)
from encdec.train.checkpoints import load_params_for_inference, saved_steps
from encdec.train.fingerprint import fingerprints
from encdec.train.loop import train
from encdec.train.metrics import read_metrics
from tests import bucket_servers
from tests.bucket_servers import Proxy
from tests.train.conftest import small_run

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

SERVERS = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto")}
needs_google = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in SERVERS["gs"]),
    reason="gcsfs and gcp-storage-emulator are not installed (extra test)",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(buckets.CACHE, str(tmp_path_factory.mktemp("cache")))
        yield patch


def _serve(scheme: str, environment: pytest.MonkeyPatch) -> Iterator[Proxy]:
    if missing := [name for name in SERVERS[scheme] if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed (extra test)")
    serve = {"gs": bucket_servers.google, "s3": bucket_servers.amazon}[scheme]
    with serve() as (proxy, variables):
        for name, value in variables.items():
            environment.setenv(name, value)
        yield proxy


@pytest.fixture(scope="module")
def gs(environment) -> Iterator[Proxy]:
    yield from _serve("gs", environment)


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request, environment) -> Iterator[tuple[str, Proxy]]:
    if request.param == "gs":
        yield "gs://bucket", request.getfixturevalue("gs")
    else:
        for proxy in _serve("s3", environment):
            yield "s3://bucket", proxy


@pytest.fixture(autouse=True)
def nothing_local(tmp_path, monkeypatch) -> Iterator[None]:
    """No test leaves anything in the working directory, least of all a folder called gs:."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert not os.listdir(folder)


def test_tensorflow_does_not_open_addresses_even_where_it_was_found_first(monkeypatch):
    """etils looks for it at the first path of a process, and Orbax has such on this machine."""
    from etils import epath
    from etils.epath import backend, gpath

    monkeypatch.delenv("EPATH_USE_TF", raising=False)
    gpath._is_tf_installed.cache_clear()
    buckets._configure.cache_clear()
    assert epath.Path("/").exists()
    assert as_path("gs://bucket/file")._backend is backend.fsspec_backend


def test_appended_lines_are_read_in_order_whoever_wrote_them(server):
    path = as_path(f"{server[0]}/lines/a.jsonl")
    with pytest.raises(FileNotFoundError):
        list(whole_lines(path))
    append_rows(path, [{"n": 0}, {"n": 1}])
    writer = LineAppender(path)
    writer.PART_LINES = 3
    for n in range(2, 9):
        writer.append({"n": n})
    append_rows(path, [{"n": 9}])
    numbers = [(number, json.loads(line)["n"]) for number, line in whole_lines(path)]
    assert numbers == [(n + 1, n) for n in range(10)]
    assert len(buckets.objects(f"{path}.parts")) == 5  # 2 appends, parts of 3, 3 and 1 lines
    keep_lines(path, lambda line: json.loads(line)["n"] < 4)
    assert [json.loads(line)["n"] for _, line in whole_lines(path)] == [0, 1, 2, 3]
    copy = buckets.cached(f"{server[0]}/lines") / "a.jsonl"
    assert [json.loads(line)["n"] for _, line in whole_lines(copy)] == [0, 1, 2, 3]


def test_a_copy_is_made_once_and_again_when_the_object_changed(server):
    address, proxy = server
    for name, text in (("a.txt", "one"), ("b/c.txt", "two")):
        write_text(f"{address}/cached/{name}", text)
    folder = buckets.cached(f"{address}/cached")
    proxy.requests.clear()
    assert buckets.cached(f"{address}/cached") == folder
    assert len(proxy.requests) <= 3  # listings alone
    write_text(f"{address}/cached/a.txt", "three")
    buckets.remove_objects(f"{address}/cached", ["b/c.txt"])
    (folder / "x").write_text("not ours")
    assert (buckets.cached(f"{address}/cached") / "a.txt").read_text() == "three"
    assert not (folder / "b/c.txt").exists() and (folder / "x").exists()
    with pytest.raises(FileNotFoundError):
        buckets.cached(f"{address}/nothing")


def test_an_interrupted_upload_is_not_whole_and_can_be_repeated(server, monkeypatch):
    out, real = f"{server[0]}/model", buckets.send_file

    def send(source: pathlib.Path, address: str) -> None:
        if address.endswith("/config.json"):
            raise KeyboardInterrupt
        real(source, address)

    def write() -> None:
        with whole_directory(out) as folder:
            (folder / "params").mkdir()
            (folder / "params/w").write_bytes(b"w" * 100)
            (folder / "config.json").write_text("{}")

    monkeypatch.setattr(buckets, "send_file", send)
    with monkeypatch.context() as killed:  # a kill leaves no time to tidy up
        killed.setattr(buckets, "remove_objects", lambda *arguments: None)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert set(buckets.objects(out)) == {".partial", "params/w"} and is_free(out)
    monkeypatch.setattr(buckets, "send_file", real)
    write()
    assert set(buckets.objects(out)) == {"config.json", "params/w"} and not is_free(out)


def _settings(out: str | pathlib.Path, text: str | pathlib.Path, **more) -> PrepareSettings:
    return PrepareSettings(
        jsonl=(str(text),),
        vocabulary="bytes",
        inputs_length=24,
        targets_length=12,
        out=str(out),
        block_bytes=400,
        workers=1,
        **more,
    )


def _text(rows: int, first: int = 0) -> str:
    pairs = ((f"{n:08d}", f"{n:04d}"[::-1]) for n in range(first, first + rows))
    return "".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in pairs)


def test_records_are_the_same_bytes_and_go_on_after_a_stop(server, tmp_path, monkeypatch):
    address, proxy = server
    text, changed = f"{address}/text/a.jsonl", f"{address}/text/b.jsonl"
    write_text(text, _text(100))
    write_text(changed, _text(100, 100))
    (tmp_path / "a.jsonl").write_text(_text(100))
    local_card = prepare(_settings(tmp_path / "records", tmp_path / "a.jsonl"))
    out = f"{address}/records"

    real = buckets.send_file
    monkeypatch.setattr(
        buckets,
        "send_file",
        lambda source, to: (
            (_ for _ in ()).throw(KeyboardInterrupt)
            if "rows-000002" in os.fspath(to)
            else real(source, to)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        prepare(_settings(out, text))
    with pytest.raises(DataError, match=r"no dataset\.json"):
        open_records(out)
    sent = []
    monkeypatch.setattr(
        buckets, "send_file", lambda source, to: (sent.append(os.fspath(to)), real(source, to))
    )
    card = prepare(_settings(out, text))
    assert card.fingerprint == local_card.fingerprint and card.shards == local_card.shards
    assert len(sent) == len(card.shards) - 2
    assert not any("unfinished" in name for name in buckets.objects(out))
    here, there = open_records(tmp_path / "records"), open_records(out)
    numbers = [0, len(here) - 1, 3]
    assert there.read(numbers) == here.read(numbers)
    with pytest.raises(DataError, match="already holds"):
        prepare(_settings(out, text))
    other = prepare(_settings(out, changed, overwrite=True))
    assert open_records(out).card == other and other.fingerprint != card.fingerprint
    assert not buckets.objects(out + ".new")
    size = other.shards[0].bytes
    buckets.write_bytes(f"{out}/{other.shards[0].name}", b"x" * size)
    with pytest.raises(DataError, match="sha256 differs"):
        open_records(out).read([0])


def _run(records: str, **more) -> dict:
    return small_run(
        steps=6,
        log_every=1,
        data={"records": records, "eval_records": records},
        checkpoint={"every": 2},
        eval={"every": 3},
        **more,
    )


def _saved(workdir: str) -> dict:
    return {
        step: fingerprints(load_params_for_inference(workdir, step)[1])
        for step in saved_steps(workdir)
    }


def _without_time(rows: list[dict]) -> list[dict]:
    kept = ("step", "train/loss", "train/gradient_norm", "eval/loss")
    return [{name: row[name] for name in kept if name in row} for row in rows]


CHILD = """
import json, sys, jax
jax.config.update("jax_num_cpu_devices", 8)
from encdec.train.loop import train
train(json.loads(sys.argv[1]), sys.argv[2])
"""


@needs_google
def test_a_run_in_a_bucket_that_is_killed_while_it_saves_ends_as_a_local_one(gs, tmp_path):
    (tmp_path / "a.jsonl").write_text(_text(100))
    records, workdir, here = "gs://bucket/life/records", "gs://bucket/life/run", tmp_path / "run"
    prepare(_settings(records, tmp_path / "a.jsonl"))
    train(_run(records), here)
    assert [int(row["step"]) for row in read_metrics(here)][-1] == 6

    child = None

    def kill(method: str, path: str) -> int | None:
        writes = method in ("POST", "PUT")
        if child and writes and "checkpoints%2F4%2Foptimizer" in path.replace("/", "%2F"):
            child.send_signal(signal.SIGKILL)
            return 503
        if path.startswith("/storage") and len(gs.requests) % 10 == 0:
            return 503  # now and then, all the time: clients try again
        return None

    gs.requests.clear()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(_run(records)), workdir],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    gs.fault = kill
    try:
        assert child.wait(timeout=300) == -signal.SIGKILL
    finally:
        gs.fault = None
        child.kill()
    assert any("checkpoints/4/" in name for name in buckets.objects(f"{workdir}"))
    assert saved_steps(workdir) == [2]

    summary = train(_run(records), workdir)
    assert summary.step == 6
    assert _saved(workdir) == _saved(str(here))
    assert _without_time(read_metrics(workdir)) == _without_time(read_metrics(here))
    assert any(".tfevents." in name for name in buckets.objects(f"{workdir}/tensorboard"))


@needs_google
def test_what_is_done_with_a_model_takes_addresses(gs, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(_text(40))
    records, workdir = "gs://bucket/use/records", "gs://bucket/use/run"
    prepare(_settings(records, tmp_path / "a.jsonl"))
    train(_run(records), workdir, stop_at=4)
    assert cli.main(["generate", f"--checkpoint={workdir}", "00000012", "--max_tokens=4"]) == 0
    out = "gs://bucket/use/evaluation"
    test = "gs://bucket/use/data/dialogsum/test.jsonl"
    write_text(test, '{"source": "00000001", "target": "1000"}\n' * 3)
    evaluate = ["evaluate", f"--checkpoint={workdir}", "--tasks=dialogsum", f"--out={out}"]
    evaluate += ["--data_dir=gs://bucket/use/data", "--max_tokens=4", "--resamples=10"]
    evaluate += ["--split=test"]
    assert cli.main(evaluate) == 0
    assert {"report.json", "report.md"} <= set(buckets.objects(out))
    answers = len(buckets.objects(f"{out}/dialogsum"))
    assert cli.main(evaluate) == 0  # what is answered is not answered again
    assert len(buckets.objects(f"{out}/dialogsum")) == answers
    assert train(_run(records, init_from=workdir), tmp_path / "more", stop_at=1).step == 1
    mean, model = "gs://bucket/use/mean", "gs://bucket/use/hf"
    assert cli.main(["average", f"--checkpoint={workdir}", "--last=2", f"--out={mean}"]) == 0
    assert saved_steps(mean) == [4]
    assert cli.main(["export", f"--checkpoint={mean}", "--format=hf", f"--out={model}"]) == 0
    back = "gs://bucket/use/imported"
    assert cli.main(["import", "--from=hf", model, f"--out={back}"]) == 0
    assert cli.main(["generate", f"--checkpoint={back}", "00000012", "--max_tokens=4"]) == 0


@needs_google
def test_a_bucket_that_refuses_is_one_line_and_exit_code_7(gs, capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text(_text(20))
    gs.fault = lambda method, path: 403 if method in ("POST", "PUT") else None
    try:
        flags = ["--vocabulary=bytes", "--inputs_length=24", "--targets_length=12"]
        code = cli.main(
            ["prepare", f"--jsonl={tmp_path}/a.jsonl", "--out=gs://bucket/no/records", *flags]
        )
        said = capsys.readouterr().err
        assert code == 7 and "permission denied; allow this user" in said.splitlines()[-1]
        assert "Traceback" not in said
        for library in ('PERMISSION_DENIED: Error writing "gs://b/x"', "Forbidden: gs://b/x"):
            assert "gs://b/x: permission denied" in str(storage_error(ValueError(library)))
    finally:
        gs.fault = None
    assert not buckets.objects("gs://bucket/no")


@pytest.mark.parametrize("address", ["gs:/b/x", "hf://b/x", "gs://", "s3:///x", "gs://b/../x"])
def test_addresses_that_name_no_place(address):
    with pytest.raises(Exception, match="expected|write it in full"):
        any_path(address)


def test_an_address_that_became_a_path_makes_no_folder():
    for write in (make_directory, lambda path: whole_directory(path).__enter__()):
        with pytest.raises(ConfigError, match="gs:/b/x is no address any more"):
            write(pathlib.Path("gs://b/x"))


def test_what_cannot_be_remote_says_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(Exception, match=r"copy it here, or mount .*gcsfuse.* /mnt/b/x"):
        local_path("gs://b/x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs s3fs, which is not installed: pip install"):
        as_path("s3://b/x")
