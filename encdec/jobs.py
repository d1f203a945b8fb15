"""Resumable jobs: directories filled block by block, and files of rows, that later calls continue.

While a directory is unfinished, ``encdec-unfinished/job.json`` in it says what is being made, and
each finished block leaves a note there of its file and its tally. Blocks depend on the job and
their number alone, so a repeated call makes the missing ones and ends in the same bytes. The card
is written last: a directory with a card is finished.

Answers and predictions are files of JSON rows: ``claim_settings`` or ``check_settings`` keeps the
settings that make them next to them, ``writing_rows`` and ``encdec.files.append_rows`` write, and
``stored_rows`` gives what is there, up to the last whole line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from encdec.buckets import copy_objects, is_address, objects, remove_objects
from encdec.errors import ConfigError, DataError, InUseError
from encdec.files import (
    clear_partial,
    file_sha256,
    file_size,
    sole_writer,
    whole_lines,
    write_bytes,
    write_json,
)
from encdec.storage import entries, make_directory, remove_directory

if TYPE_CHECKING:
    from etils import epath

NOTES = "encdec-unfinished"
JOB_FILE = "job.json"
# Under NOTES: the finished directory that this one replaces, while they change places.
REPLACED = "replaced"
# What earlier versions had in place of NOTES; what they began is not continued.
EARLIER_NOTES = ("preparing", "scoring", "writing")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a job: its name within the directory, rows, size in bytes and checksum."""

    name: str
    rows: int
    bytes: int
    sha256: str

    def is_whole(self, directory: pathlib.Path) -> bool:
        """Whether the file is in the directory with these very bytes."""
        path = directory / self.name
        return path.is_file() and file_size(path) == self.bytes and file_sha256(path) == self.sha256


@dataclasses.dataclass
class Tally:
    """Totals over some blocks; a field adds up, or has its own ``metadata["add"]``."""

    def add(self, other: Self) -> None:
        for field in dataclasses.fields(self):
            mine, more = getattr(self, field.name), getattr(other, field.name)
            add = field.metadata.get("add")
            setattr(self, field.name, add(mine, more) if add else mine + more)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        return cls(**content)


T = TypeVar("T", bound=Tally)
Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class Notes(Generic[T]):
    """The notes of finished blocks; workers in any process read and write them."""

    directory: pathlib.Path
    tally: type[T]

    def read(self, number: int) -> tuple[Shard | None, T]:
        """A finished block's shard, None where it gave no row, and its tally."""
        content = json.loads(self._path(number).read_text())
        shard = Shard(**content["shard"]) if content["shard"] else None
        return shard, self.tally.from_dict(content["tally"])

    def find(self, number: int, digest: str = "") -> tuple[Shard | None, T] | None:
        """The same if the block is finished, of this digest, and its shard whole; else None."""
        path = self._path(number)
        if not path.is_file() or json.loads(path.read_text())["digest"] != digest:
            return None
        shard, tally = self.read(number)
        return (shard, tally) if shard is None or shard.is_whole(self.directory) else None

    def missing(self, numbers: Iterable[int]) -> tuple[list[int], T]:
        """The blocks that are not finished, and the totals of the finished ones."""
        missing, total = [], self.tally()
        for number in numbers:
            found = self.find(number)
            if found is None:
                missing.append(number)
            else:
                total.add(found[1])
        return missing, total

    def write(self, number: int, shard: Shard | None, tally: T, digest: str = "") -> None:
        """Note a finished block; ``digest`` tells its contents where the job does not."""
        content = dataclasses.asdict(shard) if shard else None
        write_json(
            self._path(number), {"digest": digest, "shard": content, "tally": tally.to_dict()}
        )

    def _path(self, number: int) -> pathlib.Path:
        return self.directory / NOTES / f"{number:06d}.json"


def _replace(out: pathlib.Path, finished: pathlib.Path) -> None:
    """Moves a finished directory to its place, and removes with its notes what was there."""
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.rename(finished, out)
    shutil.rmtree(out / NOTES, ignore_errors=True)


def _replace_objects(out: epath.Path, finished: epath.Path, card: str) -> None:
    """``_replace`` in a bucket, where nothing is renamed; called again after a kill, it continues.

    Between the removal of the old card and the writing of the new one ``out`` is unfinished, and
    REPLACED, written before, says that ``finished`` is to take its place.
    """
    names = [name for name in objects(finished) if not name.startswith(f"{NOTES}/")]
    if card in names:  # else the kill came when all was copied
        old = list(objects(out))
        remove_objects(out, [card])
        remove_objects(out, [name for name in old if name not in names])
        copy_objects(os.fspath(finished), os.fspath(out), [name for name in names if name != card])
        copy_objects(os.fspath(finished), os.fspath(out), [card])
        remove_objects(finished, [card])
    marker = f"{NOTES}/{REPLACED}"
    remove_objects(finished, [name for name in objects(finished) if name != marker])
    remove_objects(finished, [marker])


def _clear(directory: pathlib.Path) -> None:
    """Empties the directory of a job but for its job file, which says whose it is until the end."""
    if is_address(directory):
        kept = f"{NOTES}/{JOB_FILE}"
        remove_objects(directory, [name for name in objects(directory) if name != kept])
        return
    for path in sorted(directory.iterdir(), key=lambda path: path.name in (NOTES, *EARLIER_NOTES)):
        if path.name == NOTES:
            for note in path.iterdir():
                if note.name != JOB_FILE:
                    _remove(note)
        else:
            _remove(path)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What two settings differ in, each as "NAME is A there and B here"; "A.B" is B within A."""
    now = plain(now)
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [f"{name} is {before!r} there and {now!r} here"] if before != now else []
    inner = {key: f"{name}.{key}" if name else str(key) for key in {**before, **now}}
    return [
        text
        for key in sorted(inner, key=str)
        for text in differences(before.get(key), now.get(key), inner[key])
    ]


def plain(content: Any) -> Any:
    """As JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(content))


class DirectoryJob(Generic[T]):
    """One call of a command that fills a directory; nothing is written before ``writing``.

    With ``overwrite``, finished contents stay until the new ones are finished: these are made in
    ``OUT.new``.

    Args:
        out: the directory.
        what: names the kind of job in messages ("rollout"); another kind's is not continued.
        identity: all that decides what is written; plain JSON values.
        card: name of the file that makes the directory finished.
        tally: what blocks count.
        overwrite: replace finished contents, discard an unfinished other job.

    Raises:
        DataError: ``out`` is a file, the root directory or a finished mount point to be replaced,
            or holds something else or an unfinished other job.
    """

    def __init__(
        self,
        out: pathlib.Path,
        what: str,
        identity: Mapping[str, Any],
        card: str,
        tally: type[T],
        *,
        overwrite: bool = False,
    ):
        # "." and ".." have no name that OUT.new could be made of; a link keeps its place.
        if not is_address(out) and (out.name in ("", "..") or out.is_symlink()):
            out = out.resolve()
            if not out.name:
                raise DataError(f"{out} is the root directory; give another --out")
        self._out, self._what, self._card, self._overwrite = out, what, card, overwrite
        self._job = {"what": what} | plain(identity)
        new = out.with_name(out.name + ".new")
        if out.is_file():
            raise DataError(f"{out} is a file; give another --out")
        # A call was killed while the two changed places.
        if is_address(out):
            if (new / NOTES / REPLACED).is_file():
                _replace_objects(out, new, card)
        elif not out.exists() and (new / NOTES / REPLACED).is_dir():
            _replace(out, new)
        finished = (out / card).is_file()
        if finished and overwrite and not is_address(out) and os.path.ismount(out):
            raise DataError(
                f"{out} is a mount point, whose contents cannot be replaced at once; empty it, or "
                "give a directory in it as --out"
            )
        self.finished = finished and not overwrite
        """Whether there is nothing to do: the contents are whole and not to be replaced."""
        self.directory = new if finished and overwrite else out
        self.notes = Notes(self.directory, tally)
        self._resumed = self._discards = False
        if not self.finished:
            self._look()

    def _look(self) -> None:
        directory, job_file = self.directory, self.directory / NOTES / JOB_FILE
        found = entries(directory)
        earlier = [name for name in EARLIER_NOTES if (directory / name / JOB_FILE).is_file()]
        if job_file.is_file():
            differ = differences(json.loads(job_file.read_text()), self._job)
            if differ and not self._overwrite:
                raise DataError(
                    f"{directory} holds an unfinished {self._what} with other settings: "
                    f"{'; '.join(differ)}. Repeat that command, give another --out, or --overwrite "
                    "to discard it"
                )
            self._discards, self._resumed = bool(differ), not differ
        elif earlier and not self._overwrite:
            raise DataError(
                f"{directory} holds a {self._what} that an earlier version of encdec started "
                f"({earlier[0]}/{JOB_FILE}). Finish it with that version, give another --out, or "
                "--overwrite to discard it"
            )
        elif found - {NOTES} and not earlier:
            raise DataError(
                f"{directory} is not empty, but holds no {self._what}; give another --out "
                "(--overwrite replaces only one)"
            )
        else:  # nothing, an earlier version's job, or one killed before it wrote anything
            self._discards = bool(found)

    def check_finished(self, made: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """DataError unless what is finished there was made of this identity."""
        if not made:  # another command's, of the same form
            raise DataError(f"{self._out} holds no {self._what}; give another --out")
        remove_directory(self._out / NOTES)  # killed after its card was written
        if differ := differences(plain(made), now):
            raise DataError(
                f"{self._out} holds another {self._what}: {'; '.join(differ)}. Repeat that "
                "command, give another --out, or --overwrite to replace it"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Makes the directory, or continues the existing one, which no other process writes
        within the block.

        Raises:
            InUseError: another process writes it.
        """
        make_directory(self.directory)
        with sole_writer(self.directory):
            if self.directory == self._out and (self._out / self._card).is_file():
                raise InUseError(
                    f"another process has finished {self.directory} meanwhile; repeat the command"
                )
            self._look()
            if self._discards:
                _clear(self.directory)
            make_directory(self.directory / NOTES)
            write_json(self.directory / NOTES / JOB_FILE, self._job)
            yield

    def discard(self) -> None:
        """Removes what this call began; a job that an earlier call began stays to be resumed."""
        if not self._resumed:
            _clear(self.directory)
            remove_directory(self.directory)

    def end(self) -> None:
        """Ends the job, whose card is written; where it replaces something, it takes its place."""
        clear_partial(self.directory)
        if self.directory == self._out:
            remove_directory(self._out / NOTES)
        elif is_address(self._out):
            write_bytes(self.directory / NOTES / REPLACED, b"")
            _replace_objects(self._out, self.directory, self._card)
        else:
            os.rename(self._out, self.directory / NOTES / REPLACED)
            _replace(self._out, self.directory)


def check_settings(
    path: pathlib.Path, identity: Mapping[str, Any], *, holder: pathlib.Path, remedy: str
) -> None:
    """ConfigError, with the remedy, where ``holder`` was made with other settings, in this file."""
    if differ := differences(json.loads(path.read_text()), identity):
        raise ConfigError(f"{holder} was made with other settings: {'; '.join(differ)}; {remedy}")


def claim_settings(
    path: pathlib.Path, identity: Mapping[str, Any], *, holder: pathlib.Path, remedy: str
) -> None:
    """``check_settings`` where the file exists; else writes it, for later calls to be checked."""
    if path.is_file():
        check_settings(path, identity, holder=holder, remedy=remedy)
    else:
        write_json(path, plain(identity))


@contextlib.contextmanager
def writing_rows(path: pathlib.Path | epath.Path) -> Iterator[None]:
    """Makes a file of rows, or holds the existing one, which no other process writes within the
    block; ``append_rows(..., held=True)`` writes them.

    Raises:
        InUseError: another process writes it.
    """
    if not is_address(path):
        path.touch()
    with sole_writer(path):
        yield


def stored_rows(
    path: pathlib.Path | epath.Path, parse: Callable[[Any], Row], what: str, remedy: str
) -> Iterator[tuple[str, int, Row]]:
    """(file and line, bytes of the line, the row) of each whole line of a file of rows.

    Args:
        path: the file.
        parse: a row of a line's JSON value; ValueError, KeyError or TypeError where it is none.
        what: a row, in messages: "a prediction of this command".
        remedy: what to do about another line.

    Raises:
        DataError: a line that is not such a row.
    """
    for number, line in whole_lines(path):
        where = f"{path}:{number}"
        try:
            row = parse(json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{where} is not {what}; {remedy}") from None
        yield where, len(line), row
