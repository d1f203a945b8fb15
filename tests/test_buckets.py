"""Work in buckets, against servers that speak the protocols on loopback."""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from encdec import buckets, cli, jobs
from encdec.adapt.adapt_command import main as adapt_main
from encdec.data.prepare import prepare
from encdec.data.prepare_settings import PrepareSettings
from encdec.data.records import open_records
from encdec.errors import CheckpointError, ConfigError, DataError
from encdec.files import LineAppender, append_rows, keep_lines, whole_lines, write_text
from encdec.inference import answer_files
from encdec.inference.answer_files import ResumableOutput
from encdec.interop.import_model import _given_vocabulary
from encdec.interop.llama2c import find_tokenizers, read_tokenizer
from encdec.paper.paper_command import main as paper_main
from encdec.paper.result_rows import append_results, read_results
from encdec.saved.fingerprint import fingerprints
from encdec.saved.saved_config import read_config
from encdec.saved.saved_params import load_params_for_inference, saved_steps
from encdec.scaling import run as scaling_run
from encdec.scaling.results_file import ResultsFile
from encdec.scaling.run import check_division, run_plan
from encdec.storage import (
    any_path,
    as_path,
    is_free,
    local_path,
    make_directory,
    storage_error,
    whole_directory,
)
from encdec.train import job
from encdec.train.loop import Hook, train
from encdec.train.metrics import read_metrics
from encdec.train.sharding import make_mesh
from encdec.train.train_command import leave_at_once
from launch.local import free_port
from tests import bucket_servers
from tests.adapt.test_workflow import write_source
from tests.bucket_servers import Proxy
from tests.forks import Fork
from tests.interop.test_llama2c import tokenizer_bytes
from tests.scaling.test_run import tiny
from tests.train.conftest import ONE_LAYER, eval_records, records, small_run  # noqa: F401

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
    remove = jobs.remove_objects

    def killed(place, names=None):
        if os.fspath(place) == f"{out}.new" and len(names) > 1:
            remove(place, names[:2])
            raise KeyboardInterrupt
        remove(place, names)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(jobs, "remove_objects", killed)
        prepare(_settings(out, changed, overwrite=True))
    with pytest.raises(DataError, match="already holds"):
        prepare(_settings(out, changed))
    other = open_records(out).card
    assert all(shard.name in buckets.objects(out) for shard in other.shards)
    assert other.fingerprint != card.fingerprint
    assert not buckets.objects(out + ".new")
    size = other.shards[0].bytes
    buckets.write_bytes(f"{out}/{other.shards[0].name}", b"x" * size)
    with pytest.raises(DataError, match="sha256 differs"):
        open_records(out).read([0])


def _run(records: str, **more) -> dict:
    return small_run(
        steps=6,
        log_every=1,
        model_overrides=ONE_LAYER,
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


RECORDS, LIFE = "gs://bucket/life/records", "gs://bucket/life/run"


def train_together(run: dict, workdir: str, address: str, index: int) -> None:
    """One of two processes; one with an error of its own says it and leaves at once, and one
    that hangs says where."""
    faulthandler.dump_traceback_later(240, exit=True)
    jax.distributed.initialize(address, 2, index)
    try:
        train(run, workdir)
    except Exception as error:
        leave_at_once(error)


@pytest.fixture(scope="module")
def two_devices() -> Iterator[None]:
    """The run has the devices of two processes here, too: a sum of two has no order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:2]))
        yield


@pytest.fixture(scope="module")
def life(gs, two_devices, tmp_path_factory) -> dict[str, Any]:
    """A run of two processes in a bucket: killed while it saves step 4, resumed by one process
    while the bucket is slow. What was seen at each; next to it the same run on this machine."""
    folder = tmp_path_factory.mktemp("life")
    (folder / "a.jsonl").write_text(_text(100))
    prepare(_settings(RECORDS, folder / "a.jsonl"))
    train(_run(RECORDS), folder / "run")
    seen: dict[str, Any] = {"here": folder / "run"}

    address, processes = f"localhost:{free_port()}", []

    def kill(method: str, path: str) -> int | None:
        writes = method in ("POST", "PUT")
        if writes and "checkpoints%2F4%2Foptimizer" in path.replace("/", "%2F"):
            for process in processes:
                process.send_signal(signal.SIGKILL)
            return 503
        if path.startswith("/storage") and len(gs.requests) % 30 == 0:
            return 503  # now and then, all the time: clients wait a second or two and try again
        return None

    gs.fault = kill
    try:
        for index in (0, 1):
            arguments = [_run(RECORDS), LIFE, address, index]
            processes.append(Fork(train_together, arguments, folder / f"{index}.log"))
        while (codes := [process.poll() for process in processes]).count(None) and not any(codes):
            time.sleep(0.1)
        # The other process is being killed, too, or would wait for the one that left.
        seen["codes"] = [process.wait(60) for process in processes] if -9 in codes else codes
    finally:
        gs.fault = None
        for process in processes:
            process.kill()
    seen["left"] = list(buckets.objects(LIFE))
    seen["saved"] = saved_steps(LIFE)

    held, further = [], threading.Event()

    def slow(method: str, path: str) -> None:
        """What is saved at step 4 is held until the run has gone on; all else is only late."""
        if "checkpoints%2F4%2F" in path.replace("/", "%2F") and method in ("POST", "PUT"):
            held.append(further.wait(timeout=60))
        time.sleep(0.005)

    gs.fault = slow
    try:
        on = Hook(lambda session: further.set() if session.step == 5 else None, every=1)
        seen["summary"] = train(_run(RECORDS), LIFE, hooks=[on])
    finally:
        gs.fault = None
    return seen | {"held": held}


@needs_google
def test_a_run_of_two_processes_that_is_killed_while_it_saves_ends_as_a_local_one(life):
    assert life["codes"] == [-signal.SIGKILL] * 2
    assert any("checkpoints/4/" in name for name in life["left"]) and life["saved"] == [2]
    assert life["summary"].step == 6
    assert _saved(LIFE) == _saved(str(life["here"]))
    assert _without_time(read_metrics(LIFE)) == _without_time(read_metrics(life["here"]))
    assert any(".tfevents." in name for name in buckets.objects(f"{LIFE}/tensorboard"))


@needs_google
def test_steps_go_on_while_a_slow_bucket_takes_a_checkpoint(life):
    assert life["held"] and all(life["held"])


@needs_google
def test_what_is_done_with_a_model_takes_addresses(life):
    model, use = f"--checkpoint={LIFE}", "gs://bucket/use"
    questions, answers = f"{use}/questions.txt", f"{use}/answers.jsonl"
    write_text(questions, "00000012\n00000034\n")
    generate = ["generate", model, "--max_tokens=4"]
    asked = [*generate, f"--file={questions}", f"--out={answers}", "--batch_rows=1"]
    assert cli.main(asked) == 0
    assert not buckets.objects(f"{answers}.parts")
    rows = [json.loads(line) for line in buckets.read_bytes(answers).splitlines()]
    assert [row["source"] for row in rows] == ["00000012", "00000034"]
    out, test = f"{LIFE}/evaluation", f"{use}/data/dialogsum/test.jsonl"
    write_text(test, '{"source": "00000001", "target": "1000"}\n' * 3)
    evaluate = ["evaluate", model, "--tasks=dialogsum", f"--out={out}", "--split=test"]
    evaluate += [f"--data_dir={use}/data", "--max_tokens=4", "--resamples=10"]
    assert cli.main(evaluate) == 0
    assert {"report.json", "report.md"} <= set(buckets.objects(out))
    assert cli.main(["report", LIFE, str(life["here"]), f"--out={use}/page.html"]) == 0
    page = buckets.read_bytes(f"{use}/page.html").decode()
    assert "dialogsum" in page and "train/loss" not in page and "Training loss" in page
    mean, exported, back = f"{use}/mean", f"{use}/hf", f"{use}/imported"
    assert cli.main(["average", model, "--last=2", f"--out={mean}"]) == 0
    assert saved_steps(mean) == [6]
    assert cli.main(["export", f"--checkpoint={mean}", "--format=hf", f"--out={exported}"]) == 0
    assert cli.main(["import", "--format=hf", exported, f"--out={back}"]) == 0
    assert read_config(back)["imported"]["parameters"] > 0


@needs_google
def test_how_fast_records_come_from_a_bucket_is_measured(gs, capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text(_text(100))
    records = "gs://bucket/speed"
    shards = prepare(_settings(records, tmp_path / "a.jsonl")).shards
    open_records(records).read([0])  # this machine has a copy of one
    command = ["benchmark", "data", f"--records={records}", "--batch=8", "--steps=2"]
    gs.requests.clear()
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    asked = {path for _, path in gs.requests if ".arrayrecord" in path and "media" in path}
    assert len(asked) == len(shards)
    assert result["fetched_megabytes"] == sum(shard.bytes for shard in shards) / 1e6
    rate, step = result["fetched_megabytes_per_second"], result["step"]
    megabytes = 4 * 16 * 1280 * result["bytes_per_token"] / 1e6
    assert result["step_share_of_fetching"] == pytest.approx(megabytes / rate / step["seconds"])


def test_a_tokenizer_next_to_a_models_address_is_found(server):
    """Of what is next to it nothing else is copied."""
    folder = f"{server[0]}/llama2c"
    pieces = [(0.0, b"<unk>"), (0.0, b"<s>"), (0.0, b"</s>"), (0.0, b"a")]
    for name in ("tok4.bin", "other.bin", "deeper/tok4.bin"):
        buckets.write_bytes(f"{folder}/{name}", tokenizer_bytes(pieces))
    model = as_path(f"{folder}/model.bin")
    [found] = find_tokenizers(model, 4)
    assert found.name == "tok4.bin" and len(list(found.parent.glob("**/*.bin"))) == 1
    assert find_tokenizers(model, 5) == []
    given = _given_vocabulary(f"{folder}/tok4.bin", "llama2c")
    assert given.size == 4 and given.fingerprint == read_tokenizer(found).fingerprint


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_a_decoder_only_model_is_adapted_in_a_bucket(server):
    source, out = f"{server[0]}/adapt/source", f"{server[0]}/adapt/out"
    write_source(as_path(source))
    assert cli.main(["adapt", source, f"--out={out}"]) == 0
    assert read_config(out)["imported"]["sources"]["encoder"]["directory"] == source
    with pytest.raises(ConfigError, match="is a source"):
        adapt_main([source, f"--out={source}/"])


@needs_google
def test_answers_in_a_bucket_are_continued_after_a_kill_at_any_point(gs, monkeypatch):
    path = as_path("gs://bucket/answers/a.jsonl")
    output = ResumableOutput(path, {"model": 1}, ["a", "b", "c"])
    rows = lambda n: [
        {"index": n, "sample": s, "of": 2, "source": "abc"[n], "text": "x"} for s in (0, 1)
    ]
    assert output.done() == 0
    output.begin()
    output.append(rows(0))
    assert output.done() == 1
    output.begin()
    output.append([*rows(1), *rows(2)])
    assert output.done() == 3
    with pytest.raises(ConfigError, match="other settings"):
        ResumableOutput(path, {"model": 2}, ["a", "b", "c"]).done()
    removed = []
    with monkeypatch.context() as killed:  # between the file and the end of its parts
        killed.setattr(answer_files, "remove_objects", lambda *given: removed.append(given))
        output.end()
    assert removed and len(buckets.objects(f"{path}.parts")) == 2
    assert output.done() == 3
    output.end()
    assert not buckets.objects(f"{path}.parts") and output.done() == 3
    lines = [json.loads(line) for line in buckets.read_bytes(path).splitlines()]
    assert lines == [row for n in range(3) for row in rows(n)]


@needs_google
def test_a_ladder_is_recorded_in_a_bucket(gs, records, eval_records, monkeypatch):
    """Results of processes that record one run at a time are read once."""
    place = "gs://bucket/ladder"
    found = tiny(records, eval_records)
    with pytest.raises(ConfigError, match="no locks.* --alone .* --only or --index"):
        check_division(place, named=False, alone=False)
    monkeypatch.setattr(scaling_run, "check_place", lambda workdir: None)  # training is replaced

    def trained(config: Any, workdir: str) -> None:
        lines = LineAppender(as_path(workdir) / "metrics.jsonl")
        for step in (config.steps // 2, config.steps):
            lines.append({"step": step, "eval/loss": 2.0 - step / 99, "eval/bits_per_byte": 1.5})

    first = run_plan(found, place, only=["dec_tiny_64_s0"], train=trained)
    assert first.done == ("dec_tiny_64_s0",)
    assert len(run_plan(found, place, train=trained).done) == 3
    assert run_plan(found, place, train=trained).done == ()
    results = ResultsFile(f"{place}/results.jsonl")
    rows = results.read()
    assert len(rows) == 8 and results.append(rows) == 0
    append_rows(results.path, rows[:3])  # another process recorded these at the same time
    assert results.read() == rows
    with pytest.raises(CheckpointError, match="holds another ladder"):
        run_plan(tiny(records, eval_records, inputs=16), place, train=trained)


@needs_google
def test_result_rows_of_the_paper_are_added_in_a_bucket(gs):
    path = as_path("gs://bucket/paper/results.jsonl")
    with pytest.raises(DataError, match="is not a file"):
        paper_main(["table", str(path)])
    row = {"kind": "costs", "setting": "a", "row": "DEC"}
    append_results(path, [row])
    append_results(path, [row | {"row": "ED"}])
    assert [one["row"] for one in read_results(path)] == ["DEC", "ED"]
    config = f"--config={REPOSITORY}/configs/paper.py:laptop"
    with pytest.raises(ConfigError, match="a disk: .* locks .* --results=gs://b/w/results.jsonl"):
        paper_main([config, "--data_dir=gs://b/d", "--workdir=gs://b/w"])


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
        with pytest.raises(ConfigError, match="gs:/b/x is no longer an address"):
            write(pathlib.Path("gs://b/x"))


def test_what_cannot_be_remote_says_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(Exception, match=r"copy it here, or mount .*gcsfuse.* /mnt/b/x"):
        local_path("gs://b/x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs s3fs, which is not installed: pip install"):
        as_path("s3://b/x")
