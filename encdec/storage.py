"""Paths as users write them, and the operating system's errors as one line.

A full disk reaches Python as an ``OSError``, as a ``ValueError`` of tensorstore or as a
``RuntimeError`` of ArrayRecord, often as the cause of another error. ``storage_error`` finds it
wherever it is and names the path and the remedy.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from encdec.buckets import (
    SCHEMES,
    cached,
    copy_objects,
    is_address,
    is_unfinished,
    normal_address,
    objects,
    remove_objects,
    send_files,
    sent_directory,
)
from encdec.errors import ConfigError, EncdecError, StorageError
from encdec.files import sole_writer

if TYPE_CHECKING:
    from etils import epath

_PARTIAL = ".partial"  # what a command has not finished writing
_SPACE = "free some space there"
_RIGHTS = "allow this user to use it, or name another path"
# errno: (what it is called, by libraries in their own errors too; remedy)
_REFUSALS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("No space left on device", f"{_SPACE}, or name a path on another disk"),
    errno.EDQUOT: ("Disk quota exceeded", f"{_SPACE} or raise the quota, or name another path"),
    errno.EFBIG: ("File too large", "raise the limit on file sizes (ulimit -f)"),
    errno.EROFS: ("Read-only file system", "name a path that can be written"),
    errno.EACCES: ("Permission denied", _RIGHTS),
    errno.EPERM: ("Operation not permitted", _RIGHTS),
    errno.EIO: ("Input/output error", "check the disk or the mount"),
    errno.ESTALE: ("Stale file handle", "mount the network file system again"),
    errno.ENAMETOOLONG: ("File name too long", "choose a shorter path"),
    errno.EMFILE: ("Too many open files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("Too many open files in system", "raise the system's limit"),
    errno.ENOTDIR: ("Not a directory", "name a directory"),
    errno.EISDIR: ("Is a directory", "name a file"),
    errno.ELOOP: ("Too many levels of symbolic links", "name another path"),
    errno.ENXIO: ("No such device or address", "name another path"),
}
_TEXTS = re.compile("|".join(re.escape(name) for name, _ in _REFUSALS.values()))
_NUMBERS = {name: number for number, (name, _) in _REFUSALS.items()}
_PATH = re.compile(r"(?:gs|s3)://[^\s'\"`:;,\])>]+|(?<![\w/:])/[^\s'\"`:;,\])>]+")
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://?([^/]*)/?(.*)")
# What the libraries of buckets say where an account may not do something.
_DENIED = re.compile(
    r"^Forbidden: |PERMISSION_DENIED|UNAUTHENTICATED|AccessDenied|Access Denied|Invalid Credentials"
    r"|Unable to locate credentials|does not have \S+ access|InvalidAccessKeyId"
)
_MOUNTS = {
    "gs": "gcsfuse --implicit-dirs {bucket} /mnt/{bucket}",
    "s3": "mount-s3 {bucket} /mnt/{bucket}",
}


def storage_error(error: BaseException, safe: str = "", where: str = "") -> StorageError | None:
    """The refusal by the operating system behind ``error``; None where there is none.

    Args:
        error: an exception; its causes, contexts and the members of groups are searched.
        safe: a sentence on what is not lost and how to continue.
        where: what was being written, if the error names no path.
    """
    found = [refusal for refusal in map(_refusal, _causes(error)) if refusal]
    if not found:
        return None
    number, path = next((refusal for refusal in found if refusal[1]), found[0])
    name, remedy = _REFUSALS[number]
    path = path or where
    place = f"{path}: " if path else ""
    return StorageError(f"{place}{name.lower()}; {remedy}.{' ' * bool(safe)}{safe}")


@contextlib.contextmanager
def refusals_explained(safe: Callable[[], str], where: str = "") -> Iterator[None]:
    """Raises a refusal within the block as ``StorageError``; ``safe()`` is asked only then.

    Orbax writes in threads, which report a refusal to the block *and* print it, one traceback for
    each array; they are left out, and so is what its closed event loop says to late callbacks.
    """
    restore = _silence_threads()
    try:
        yield
    except Exception as error:
        if isinstance(error, EncdecError) or storage_error(error) is None:
            restore()
            raise
        # What threads still have to say is left out until the process ends.
        refusal = storage_error(error, safe(), where)
        assert refusal is not None  # asked above, without the call that this takes
        raise refusal from error
    else:
        restore()


def _silence_threads() -> Callable[[], None]:
    """Leaves refusals out of what threads print; returns how to undo it."""
    hooks = threading.excepthook, sys.excepthook, sys.unraisablehook
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]

    def is_noise(error: BaseException | None) -> bool:
        return error is not None and (
            storage_error(error) is not None or str(error) == "Event loop is closed"
        )

    def keep(record: logging.LogRecord) -> bool:
        return not (record.exc_info and is_noise(record.exc_info[1]))

    def hook(original: Callable[..., object], which: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values: None if is_noise(which(*values)) else original(*values)

    threading.excepthook = hook(hooks[0], lambda arguments: arguments.exc_value)
    sys.excepthook = hook(hooks[1], lambda kind, value, trace: value)
    sys.unraisablehook = hook(hooks[2], lambda arguments: arguments.exc_value)
    for log in logs:
        log.addFilter(keep)

    def restore() -> None:
        for log in logs:
            log.removeFilter(keep)
        threading.excepthook, sys.excepthook, sys.unraisablehook = hooks

    return restore


def user_path(name: str, text: str | os.PathLike[str]) -> str:
    """A path as a user wrote it, with ``~`` expanded.

    Raises:
        ConfigError: an empty path (an unset variable of the shell, as a rule), or a ``~`` that
            names no home directory; ``name`` is the flag or field.
    """
    path = os.fspath(text)
    if not path.strip():
        raise ConfigError(
            f"{name} is empty; expected a path. Is a variable of the shell unset? "
            "The current folder is written '.'"
        )
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{name} is {path!r}, but there is no home directory {path.split('/')[0]!r}; "
            f"write the path in full, or './{path}' for a file of that name"
        )
    return expanded


def user_place(name: str, text: str | os.PathLike[str]) -> str:
    """``user_path`` of a file or directory on this machine or in a bucket (gs://, s3://).

    Raises:
        ConfigError: also for other addresses, and where what opens an address is not installed.
    """
    path = user_path(name, text)
    address = _ADDRESS.match(path)
    if not address or (not is_address(path) and os.path.exists(path)):
        return path
    if is_address(path):
        return normal_address(name, path)
    raise ConfigError(
        f"{name} is {path}, an unsupported address; expected a path on this machine, "
        f"gs://BUCKET/PATH or s3://BUCKET/PATH{_slashes(address)}"
    )


def local(name: str, text: str | os.PathLike[str]) -> str:
    """``user_path`` of what has to be on this machine.

    Raises:
        ConfigError: also for an address such as gs://BUCKET/DIR.
    """
    path = user_path(name, text)
    address = _ADDRESS.match(path)
    if not address or os.path.exists(path):
        return path
    scheme, bucket, rest = address[1], address[2] or "BUCKET", address[3]
    mount = _MOUNTS.get(scheme, "its provider's file system").format(bucket=bucket)
    raise ConfigError(
        f"{name} is {path}, an address; expected a path on this machine: copy it here, or mount "
        f"the bucket ({mount}) and give /mnt/{bucket}/{rest}".rstrip("/")
    )


def as_path(text: str | os.PathLike[str]) -> pathlib.Path | epath.Path:
    """A path to work with: ``pathlib`` on this machine, ``epath`` in a bucket.

    Of ``epath`` a bucket has no ``resolve``, ``rename`` and ``mkdir`` (see ``encdec/buckets.py``).
    """
    if not is_address(text):
        return pathlib.Path(text)
    from etils import epath

    return epath.Path(normal_address("the path", os.fspath(text)))


def on_this_machine(text: str | os.PathLike[str]) -> pathlib.Path:
    """The file or directory itself, or its copy in the cache where it is in a bucket.

    Raises FileNotFoundError where a bucket has nothing there.
    """
    if is_address(text):
        return cached(normal_address("the path", os.fspath(text)))
    return pathlib.Path(text)


def absolute(text: str | os.PathLike[str]) -> pathlib.Path | epath.Path:
    """The path from the root, equal for all spellings of one place."""
    return as_path(text) if is_address(text) else pathlib.Path(text).resolve()


def directory_name(text: str | os.PathLike[str]) -> str:
    """What a model or run is called where it has no other name: the last part of its path."""
    return absolute(text).name


def path_ends(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The ends of different paths, all as long as it takes to tell them apart."""
    parts = [os.fspath(path).split("/") for path in paths]
    for length in range(1, 1 + max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def entries(directory: pathlib.Path | epath.Path) -> set[str]:
    """The names in a directory; none where it is not there."""
    if is_address(directory):
        return {name.partition("/")[0] for name in objects(directory)}
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()


def file_names(directory: pathlib.Path | epath.Path, name: str) -> list[str]:
    """The files of this name in and below a directory, as paths from it, in order."""
    if is_address(directory):
        return sorted(one for one in objects(directory) if one.rpartition("/")[2] == name)
    found = pathlib.Path(directory).glob(f"**/{name}")
    return sorted(path.relative_to(directory).as_posix() for path in found)


def make_directory(path: pathlib.Path | epath.Path) -> None:
    """Makes a directory and those above it; a bucket needs none."""
    if not is_address(path):
        _check_no_address(path)
        path.mkdir(parents=True, exist_ok=True)


def move_directory(path: pathlib.Path | epath.Path, target: pathlib.Path | epath.Path) -> None:
    """Gives a directory another name; in a bucket its objects are copied, then deleted."""
    if is_address(path):
        names = sorted(objects(path))
        copy_objects(os.fspath(path), os.fspath(target), names)
        remove_objects(path, names)
    else:
        os.rename(path, target)


def remove_directory(path: pathlib.Path | epath.Path) -> None:
    """Removes a directory and all in it; nothing where it is not there.

    Of a symbolic link to a directory, and of a mount point, the content alone.
    """
    if is_address(path):
        remove_objects(path)
    elif os.path.isdir(path) and (os.path.islink(path) or os.path.ismount(path)):
        for entry in pathlib.Path(path).iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    else:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


def _slashes(address: re.Match[str]) -> str:
    """A hint for gs:/BUCKET, which shells and path functions make of gs://BUCKET."""
    if address[1] not in SCHEMES or address[0].startswith(f"{address[1]}://"):
        return ""
    return f"; did you mean {address[1]}://{address[2]}/{address[3]}".rstrip("/") + "?"


def local_path(text: str) -> str:
    """``argparse`` type of ``local``, for flags that cannot name a bucket."""
    try:
        return local("the path", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def any_path(text: str) -> str:
    """``argparse`` type of ``user_place``: for all other flags that name a path."""
    try:
        return user_place("the path", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _check_no_address(path: str | os.PathLike[str]) -> None:
    """Raises ConfigError for what ``pathlib`` makes of an address: no folder is called gs:."""
    if re.match(r"(gs|s3):/", os.fspath(path)):
        raise ConfigError(f"{path} is no longer an address; give it as gs://BUCKET/PATH, as text")


# Of the directories that commands write, the file that says so, and what it is.
_MARKS = {"dataset.json": "records", "teacher.json": "a teacher's rows", "config.json": "a model"}


def content_of(directory: str | os.PathLike[str]) -> str:
    """What a command wrote to a directory, "records" say; "" where nothing says so."""
    place = as_path(directory)
    return next((what for name, what in _MARKS.items() if (place / name).exists()), "")


def is_free(out: str | os.PathLike[str]) -> bool:
    """Whether ``whole_directory`` may write there: missing, or a directory that holds nothing."""
    if is_address(out):
        found = objects(as_path(out))
        return not found or is_unfinished(found)
    path = pathlib.Path(out)
    return not path.exists() or (path.is_dir() and entries(path) <= {_PARTIAL})


@contextlib.contextmanager
def filled_directory(out: pathlib.Path | epath.Path) -> Iterator[pathlib.Path]:
    """A directory to add files to: ``out`` itself, or one that is sent there at the block's end.

    Files of other names stay there, and ones of the same names are replaced.
    """
    if not is_address(out):
        make_directory(out)
        yield pathlib.Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="encdec-") as folder:
        local = pathlib.Path(folder)
        yield local
        send_files(local, os.fspath(out))


@contextlib.contextmanager
def whole_directory(out: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A new directory to write into, whose content becomes that of ``out`` at the end of the block.

    ``out`` is free (``is_free``), and after an error or a kill it still is, so that the same
    command can be run again. An existing directory stays (it may be a mount) and receives the
    entries one by one; a new one appears whole.
    """
    if is_address(out):
        with sent_directory(os.fspath(as_path(out)), last="config.json") as partial:
            yield partial
        return
    _check_no_address(out)
    target = pathlib.Path(out).absolute()
    if target.is_symlink():  # its target may not exist yet
        target = target.resolve()
    existed = target.is_dir()
    partial = target / _PARTIAL if existed else target.with_name(target.name + _PARTIAL)
    partial.mkdir(parents=True, exist_ok=True)
    with sole_writer(partial, shown=target):
        for entry in partial.iterdir():  # what a killed process left
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield partial
            if not existed:
                os.replace(partial, target)
                return
            for entry in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(entry, target / entry.name)  # config.json last: it says all is there
            partial.rmdir()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that led to it, nearest first, each once."""
    waiting, seen = [error], set()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        members = cause.exceptions if isinstance(cause, BaseExceptionGroup) else ()
        waiting += [next_ for next_ in (cause.__cause__, cause.__context__, *members) if next_]


def _refusal(error: BaseException) -> tuple[int, str] | None:
    """(errno, path or "") where this one error is a refusal."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        names = [name for name in (error.filename2, error.filename) if name]
        return error.errno, os.fsdecode(names[0]) if names else _path_in(str(error))
    if isinstance(error, EncdecError) or not isinstance(error, Exception):
        return None
    text = str(error)
    if isinstance(error, PermissionError) or _DENIED.search(text):
        return errno.EACCES, _path_in(text)
    match = _TEXTS.search(text)
    return (_NUMBERS[match[0]], _path_in(text)) if match else None


def _path_in(text: str) -> str:
    found = _PATH.search(text)
    return found[0] if found else ""
