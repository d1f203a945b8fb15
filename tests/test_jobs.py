"""Jobs that are killed and repeated: the protocol at every system call, and each of its users."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from encdec import files
from encdec.data.prepare import prepare
from encdec.data.records import decode_row, read_card
from encdec.data.teacher_rows import read_teacher_card
from encdec.data.vocabulary import ByteVocabulary
from encdec.distill import rollout as rollout_module
from encdec.distill import teacher_logits
from encdec.distill.teacher_logits_settings import TeacherLogitsSettings
from encdec.errors import ConfigError, DataError, InUseError
from encdec.evaluation.examples import Example
from encdec.evaluation.predictions import PredictionFiles, predict
from encdec.files import append_rows, sole_writer, whole_file, whole_lines, write_json
from encdec.inference.answer_files import ResumableOutput
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.generator import Generation
from encdec.inference.text_io import PromptFormat
from encdec.jobs import NOTES, DirectoryJob, Tally, differences
from encdec.storage import whole_directory
from tests.data.conftest import write_jsonl

WORKER = """
import dataclasses, os, pathlib, sys
from encdec.files import file_sha256, write_text
from encdec.jobs import DirectoryJob, Shard, Tally

@dataclasses.dataclass
class Count(Tally):
    rows: int = 0

def work(out, text, overwrite):
    job = DirectoryJob(out, "copy", {"text": text}, "card.txt", Count, overwrite=overwrite)
    if job.finished:
        return
    with job.writing():
        missing, total = job.notes.missing(range(2))
        for number in missing:
            path = job.directory / f"{number}.txt"
            write_text(path, f"{text} {number}")
            shard = Shard(path.name, 1, path.stat().st_size, file_sha256(path))
            job.notes.write(number, shard, Count(1))
            total.add(Count(1))
        assert total.rows == 2
        write_text(job.directory / "card.txt", text)
        job.end()

def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}

def whole(text):
    return {"card.txt": text} | {f"{number}.txt": f"{text} {number}" for number in range(2)}

os.fsync = lambda file: None  # slow, and nothing here survives a power cut
calls = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir")
# What the job finds: nothing, an earlier finished job, or another one's unfinished blocks.
for case in ("fresh", "finished", "unfinished"):
    died = 0
    for last in range(1000):
        folder = pathlib.Path(sys.argv[1]) / f"{case}{last}"
        folder.mkdir()
        out = folder / "out"
        if case != "fresh":
            work(out, "old", False)
        if case == "unfinished":
            (out / "encdec-unfinished").mkdir()
            (out / "card.txt").rename(out / "encdec-unfinished" / "000009.json")
            with DirectoryJob(folder / "x", "copy", {"text": "old"}, "card.txt", Count).writing():
                pass
            (folder / "x/encdec-unfinished/job.json").rename(out / "encdec-unfinished/job.json")
            (folder / "x/encdec-unfinished").rmdir(); (folder / "x").rmdir()
        child = os.fork()
        if not child:
            left = last
            def dying(call):
                def counted(*args, **kwargs):
                    global left
                    left -= 1
                    if left < 0:
                        os._exit(9)
                    return call(*args, **kwargs)
                return counted
            for name in calls:
                setattr(os, name, dying(getattr(os, name)))
            work(out, "new", True)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = contents(folder)
        if case == "finished" and not (out / "card.txt").is_file():
            # Between two renames: the old contents are still there, and the new ones are whole.
            assert (folder / "out.new/card.txt").is_file(), found
            assert (folder / "out.new/encdec-unfinished/replaced/card.txt").is_file(), found
        elif (out / "card.txt").is_file():
            text = (out / "card.txt").read_text()
            seen = {name: data for name, data in contents(out).items() if "/" not in name}
            assert {k: v for k, v in seen.items() if not k.endswith(".partial")} == whole(text)
        work(out, "new", True)
        assert contents(folder) == {f"out/{k}": v for k, v in whole("new").items()}, (case, last)
        if code == 0:
            break
        assert code == 9, code
        died += 1
    print(case, died)
"""


def test_a_job_killed_at_any_system_call_ends_in_the_same_bytes(tmp_path):
    """Never without the old or the new contents, and never with a mixture of them."""
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    died = dict(line.split() for line in done.stdout.splitlines())
    assert died.keys() == {"fresh", "finished", "unfinished"}
    assert all(int(count) > 20 for count in died.values()), died


def test_tallies_add_up_field_by_field():
    tally = teacher_logits.LogitsTally(rows=1, max_pairs=9, entropy=0.5)
    tally.add(teacher_logits.LogitsTally(rows=2, max_pairs=4, entropy=0.25))
    assert (tally.rows, tally.max_pairs, tally.entropy) == (3, 9, 0.75)
    assert teacher_logits.LogitsTally.from_dict(json.loads(json.dumps(tally.to_dict()))) == tally


def test_differences_are_named_where_they_are():
    before = {"a": {"b": [1, {"c": 2}], "d": 0}, "e": 5}
    assert differences(before, {"a": {"b": (1, {"c": 3}), "d": 0}, "f": None}) == [
        "a.b.1.c is 2 there and 3 here",
        "e is 5 there and None here",
    ]
    assert differences(before, before) == []


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "card.json"
    write_json(path, {"a": [1]})
    for error in (KeyboardInterrupt, DataError):
        with pytest.raises(error), whole_file(path) as partial:
            partial.write_text("half")
            raise error("stopped")
    assert json.loads(path.read_text()) == {"a": [1]} and len(list(tmp_path.iterdir())) == 1


def test_a_lock_ends_with_its_block_and_is_waited_for(tmp_path):
    with pytest.raises(Stopped), sole_writer(tmp_path):
        raise Stopped
    held = contextlib.ExitStack()
    held.enter_context(sole_writer(tmp_path))
    threading.Timer(0.3, held.close).start()
    with pytest.raises(InUseError), sole_writer(tmp_path, patience=0.01):
        pass
    with sole_writer(tmp_path, patience=60), pytest.raises(InUseError, match="other is in use"):
        with sole_writer(tmp_path, shown="other"):
            pass


def test_a_lock_on_what_was_moved_away_meanwhile_is_none(tmp_path, monkeypatch):
    """As when a directory was opened just before the process that held it put it into place."""
    made, lock = tmp_path / "made", files._lock
    made.mkdir()

    def late(descriptor):
        made.rename(tmp_path / "in place")
        return lock(descriptor)

    monkeypatch.setattr(files, "_lock", late)
    with pytest.raises(InUseError, match="repeat the command"), sole_writer(made):
        pass


def test_a_model_that_another_process_writes_is_left_alone(tmp_path):
    for out in (tmp_path / "new", tmp_path):  # a directory that is there is filled
        with whole_directory(out) as partial:
            (partial / "a").write_text("first")
            with pytest.raises(InUseError, match="is in use"), whole_directory(out):
                pass
        assert (out / "a").read_text() == "first"


def test_the_current_folder_is_a_directory_with_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = functools.partial(DirectoryJob, what="rollout", identity={}, card="card", tally=Tally)
    with job(pathlib.Path(".")).writing():
        pathlib.Path("card").write_text("old")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert job(pathlib.Path("..")).finished
    (tmp_path / "inner").rmdir()
    monkeypatch.chdir(tmp_path.parent)
    assert job(tmp_path / "x" / "..", overwrite=True).directory.parent == tmp_path.parent
    with pytest.raises(DataError, match="root directory"):
        job(pathlib.Path("/"))


def test_links_keep_their_place_and_mounts_are_not_moved(tmp_path, monkeypatch):
    job = functools.partial(DirectoryJob, what="rollout", identity={}, card="card", tally=Tally)
    (tmp_path / "large disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "large disk" / "records")
    for text in ("old", "new"):
        again = job(link, overwrite=True)
        with again.writing():
            (again.directory / "card").write_text(text)
            again.end()
        assert link.is_symlink()
        assert contents(tmp_path / "large disk") == {"records/card": text.encode()}
    monkeypatch.setattr("os.path.ismount", lambda path: path == link.resolve())
    with pytest.raises(DataError, match="records is a mount point"):
        job(link, overwrite=True)
    assert job(link).finished
    model = tmp_path / "model"
    model.symlink_to(tmp_path / "large disk" / "model")
    with whole_directory(model) as partial:
        (partial / "config.json").write_text("{}")
    assert model.is_symlink() and (model / "config.json").is_file()


def test_lines_follow_the_last_whole_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": "\u2028"}])
    path.write_bytes(path.read_bytes() + b'{"a": "cut sh')
    append_rows(path, [2])
    assert [(n, json.loads(line)) for n, line in whole_lines(path)] == [
        (1, {"a": "\u2028"}),
        (2, 2),
    ]


def test_what_is_in_the_way_is_left_alone(tmp_path):
    job = functools.partial(DirectoryJob, what="rollout", identity={}, card="card", tally=Tally)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        job(tmp_path / "file", overwrite=True)
    # Neither a folder that happens to have the notes' name nor a finished card of another kind.
    (tmp_path / "mine" / NOTES).mkdir(parents=True)
    (tmp_path / "mine" / "thesis.txt").write_text("of ten years")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not empty, but holds no rollout"):
            job(tmp_path / "mine", overwrite=overwrite)
    # Where the new contents would be made.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "card").write_text("")
    shutil.copytree(tmp_path / "mine", tmp_path / "out.new")
    with pytest.raises(DataError, match="out.new is not empty"):
        job(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.new" / "thesis.txt").exists()


# The users. Each fills a directory `out` from scratch or continues, and calls `step` after a block.


class Stopped(Exception):
    pass


class EchoModel:
    """Answers every text with itself, in capital letters."""

    prompts = PromptFormat(ByteVocabulary())

    def generate(self, texts, settings, *, truncate, first_number, on_batch, follow=0):
        return [[self._answer(text.upper())] for text in texts]

    def generate_from_tokens(self, sources, settings, *, numbers):
        texts = [self.prompts.vocabulary.decode(ids) for ids in sources]
        return [[self._answer(text.upper()[:20])] for text in texts]

    def _answer(self, text):
        tokens = [*self.prompts.vocabulary.encode(text), 1]
        return Generation(text, tokens, [-1.0] * len(tokens), "eos", None, False)


class EchoBackend:
    """Draws of each target token: the token itself and the next id."""

    batch_rows, host, hosts, writes = 2, 0, 1, True

    def __init__(self, records):
        self._records = records

    def load(self):
        pass

    def forward(self, numbers):
        kept = {"tokens": np.zeros(len(numbers), np.int32)}
        draws = np.zeros((len(numbers), 200, 4), np.int32)
        for place, number in enumerate(numbers):
            if number >= 0:
                _, targets = decode_row(self._records.read([number])[0], "uint16")
                ids = np.concatenate(targets).astype(np.int32)
                kept["tokens"][place] = len(ids)
                draws[place, : len(ids)] = np.stack([ids, ids, ids, ids + 1], -1)
        scalars = np.ones(draws.shape[:2], np.float32)
        return kept | {"draws": draws, "log_normaliser": scalars, "entropy": scalars}

    fetch = staticmethod(dict)


SOURCES = [f"text {number}" * (1 + number % 3) for number in range(40)]


@pytest.fixture
def users(tmp_path, monkeypatch):
    rows = [{"source": text, "target": text[::-1]} for text in SOURCES]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = dict(vocabulary="bytes", jsonl=[str(path)], inputs_length=64, targets_length=64)
    records = tmp_path / "records"
    prepare(out=records, **options)
    monkeypatch.setattr(
        teacher_logits,
        "_backend",
        lambda settings, records, fmt: ({"name": "echo"}, EchoBackend(records)),
    )
    config = {"run": {}, "data": {"vocabulary": {"fingerprint": ByteVocabulary().fingerprint}}}
    monkeypatch.setattr(rollout_module, "read_config", lambda workdir: config)
    monkeypatch.setattr(rollout_module, "step_to_read", lambda workdir, step: 3)
    monkeypatch.setattr(rollout_module, "load", lambda *args, **more: EchoModel())
    monkeypatch.setattr("encdec.evaluation.predictions.WINDOW", 4)

    def prepared(out, step, overwrite=False, other=False, **more):
        prepare(
            out=out,
            block_bytes=160,
            workers=1,
            progress=lambda counts: step(),
            seed=0,
            decoder_start_id=int(other),
            overwrite=overwrite,
            **options,
            **more,
        )

    def on_beam(out, step, **more):
        from encdec.data.beam_prepare import BeamWriter

        prepared(out, step, writer=BeamWriter(), **more)

    def logits(out, step, overwrite=False, other=False):
        settings = TeacherLogitsSettings("echo", records=records, out=out, draws=4, shard_rows=3)
        # After every batch, which is less than a shard.
        teacher_logits.store_teacher_logits(
            settings, seed=int(other), overwrite=overwrite, progress=lambda tally: step()
        )

    def rolled_out(out, step, overwrite=False, other=False):
        rollout_module.rollout(
            "echo",
            records,
            out,
            answering=rollout_module.Answering(
                GenerationSettings(max_tokens=8 - int(other)), block_rows=1
            ),
            overwrite=overwrite,
            progress=lambda written: step(),
        )

    def generated(out, step, other=False):
        out.mkdir(exist_ok=True)
        output = ResumableOutput(out / "answers.jsonl", {"seed": int(other)}, SOURCES)
        row = lambda n, s: {"index": n, "source": SOURCES[n], "of": 2, "sample": s, "text": f"{s}"}
        with output.held():
            done = output.done()
            output.begin()
            for first in range(done, len(SOURCES), 4):
                window = range(first, min(first + 4, len(SOURCES)))
                output.append([row(n, s) for n in window for s in range(2)])
                step()

    def predicted(out, step, other=False):
        examples = [Example(text, (text,)) for text in SOURCES]
        files = PredictionFiles(out, {"seed": int(other)}, examples)
        append = files.append
        files.append = lambda shard, made: (append(shard, made), step())
        predict(EchoModel(), files, examples, GenerationSettings())

    return {
        "prepare": prepared,
        "beam": on_beam,
        "logits": logits,
        "rollout": rolled_out,
        "generate": generated,
        "evaluate": predicted,
    }


needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="the extra beam is not installed"
)
OTHER = r"(seed|decoder_start_id) is 0 there and 1 here|max_tokens is 8 there and 7 here"
# As earlier versions wrote them, whose unfinished jobs are continued.
KINDS = {"prepare": "preparation", "logits": "scoring", "rollout": "rollout"}
DIRECTORY_JOBS = ["prepare", pytest.param("beam", marks=needs_beam), "logits", "rollout"]


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def stopping(after):
    """A step that stops the job at its n-th call."""
    calls = iter([*[None] * after, Stopped])

    def step():
        if error := next(calls, None):
            raise error

    return step


@pytest.mark.parametrize("user", [*DIRECTORY_JOBS, "generate", "evaluate"])
def test_an_interrupted_job_ends_in_the_same_bytes(user, users, tmp_path):
    call, out = users[user], tmp_path / "out"
    steps = []
    call(tmp_path / "whole", lambda: steps.append(None))
    whole = contents(tmp_path / "whole")
    assert len(steps) > 5
    for after in (0, 2, 3):  # each time blocks are there that are not made again
        with pytest.raises(Stopped):
            call(out, stopping(after))
    before = contents(out)
    if user in KINDS:
        assert json.loads(before[f"{NOTES}/job.json"])["what"] == KINDS[user]
    with pytest.raises((DataError, ConfigError), match=OTHER):
        call(out, lambda: None, other=True)
    assert contents(out) == before
    again = []
    call(out, lambda: again.append(None))
    if user != "prepare":  # which tells of the blocks that were there, too
        assert 0 < len(again) < len(steps)
    assert contents(out) == whole


def test_nothing_stays_of_text_that_is_gone(users, tmp_path):
    call, out = users["prepare"], tmp_path / "out"
    with pytest.raises(Stopped):
        call(out, stopping(6))
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:9]))
    (out / "bad_rows.txt").write_text("of the rows that were there")
    call(out, lambda: None)
    call(tmp_path / "whole", lambda: None)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("user", ["generate", "evaluate"])
def test_rows_that_a_kill_cut_at_any_byte_are_made_again(user, users, tmp_path):
    """Also a file that has its settings, but no row yet."""
    call, out = users[user], tmp_path / "out"
    call(out, lambda: None)
    whole = contents(out)
    [rows] = out.glob("*.jsonl")
    size = rows.stat().st_size
    for cut in [*range(0, size, size // 12), size - 1]:
        rows.write_bytes(whole[rows.name][:cut])
        call(out, lambda: None)
        assert contents(out) == whole, cut
    rows.write_bytes(b'{"index": 0}\n')
    with pytest.raises(DataError, match=r"jsonl:1 is not (an answer written by|a prediction of)"):
        call(out, lambda: None)


@pytest.mark.parametrize("user", [*DIRECTORY_JOBS, "generate", "evaluate"])
def test_a_second_process_is_refused_and_the_first_loses_nothing(user, users, tmp_path):
    call, refused = users[user], []

    def second():
        with pytest.raises(InUseError, match="out.* is in use: another process"):
            call(tmp_path / "out", lambda: None)
        refused.append(contents(tmp_path / "out"))

    call(tmp_path / "out", second)
    call(tmp_path / "whole", lambda: None)
    assert len(refused) > 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("user", ["prepare", "logits", "rollout"])
def test_a_shard_that_was_damaged_meanwhile_is_made_again(user, users, tmp_path):
    call, out = users[user], tmp_path / "out"
    call(tmp_path / "whole", lambda: None)
    with pytest.raises(Stopped):
        call(out, stopping(6))
    first, second = sorted(out.glob("*.arrayrecord"))[:2]
    times = [path.stat().st_mtime_ns for path in (first, second)]
    data = first.read_bytes()
    first.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the same size
    call(out, lambda: None)
    assert contents(out) == contents(tmp_path / "whole")
    assert first.stat().st_mtime_ns != times[0] and second.stat().st_mtime_ns == times[1]


@pytest.mark.parametrize("user", ["prepare", "logits", "rollout"])
def test_what_an_earlier_version_began_is_refused(user, users, tmp_path):
    call, out = users[user], tmp_path / "out"
    notes = {"prepare": "preparing", "logits": "scoring", "rollout": "writing"}[user]
    write = out / notes / "job.json"
    write.parent.mkdir(parents=True)
    write.write_text("{}")
    (out / "rows-000000.arrayrecord").write_text("rows")
    before = contents(out)
    with pytest.raises(DataError, match=rf"earlier version of encdec started \({notes}/job.json\)"):
        call(out, lambda: None)
    assert contents(out) == before
    call(tmp_path / "whole", lambda: None)
    call(out, lambda: None, overwrite=True)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("user", ["prepare", "logits", "rollout"])
def test_finished_contents_stay_until_those_that_replace_them_are_whole(user, users, tmp_path):
    call, out = users[user], tmp_path / "out"
    call(out, lambda: None, other=True)
    before = contents(out)
    for after in (1, 4):
        with pytest.raises(Stopped):
            call(out, stopping(after), overwrite=True)
        assert contents(out) == before
    call(tmp_path / "whole", lambda: None)
    call(out, lambda: None, overwrite=True)
    assert contents(out) == contents(tmp_path / "whole") != before
    assert not (tmp_path / "out.new").exists()


def test_a_finished_job_is_not_done_again(users, tmp_path):
    for user in ("logits", "rollout", "generate", "evaluate"):
        out = tmp_path / user
        users[user](out, lambda: None)
        before = contents(out)
        if user in ("logits", "rollout"):  # killed after the card was there
            (out / NOTES).mkdir()
            (out / NOTES / "job.json").write_text("{}")
        users[user](out, stopping(0))
        assert contents(out) == before
        with pytest.raises((DataError, ConfigError), match=OTHER):
            users[user](out, stopping(0), other=True)
        assert contents(out) == before
    assert read_teacher_card(tmp_path / "logits").rows == read_card(tmp_path / "records").rows
