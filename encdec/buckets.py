"""Addresses in buckets, gs://BUCKET/PATH and s3://BUCKET/PATH: read, written and kept in a cache.

``etils.epath`` gives them the methods of ``pathlib``, over fsspec's gcsfs and s3fs. What differs
from a disk is here: an object appears whole or not at all, there is no append, no rename and no
folder without an object in it, and every request is a round trip. So

- a file is written next to the system's temporary files and then sent, whole;
- a directory is complete once the object that is sent last (its card) is there;
- programs that map files or know no buckets get them from a cache on this machine.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from encdec.errors import ConfigError, StorageError
from encdec.logs import logger
from encdec.machine import user_cache
from encdec.packages import require

_LOG = logger(__name__)

# What is read and written as an address: (package, extra of setup.py).
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
CACHE = "ENCDEC_BUCKET_CACHE"
UNFINISHED = ".partial"  # in a directory: the names of what is being sent there
TRANSFERS = 8  # at a time; each is a connection
_ADDRESS = re.compile(r"(gs|s3)://([^/]+)(/.*)?")
_MANIFEST = ".manifest.json"


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether this is written as the address of a bucket."""
    return os.fspath(path).startswith(("gs://", "s3://"))


def normal_address(name: str, text: str) -> str:
    """The address without doubled or final slashes.

    Raises:
        ConfigError: it names no bucket, or the package that opens it is not installed; ``name``
            is the flag or field.
    """
    match = _ADDRESS.fullmatch(text)
    if not match:
        raise ConfigError(f"{name} is {text!r}; expected {text.split(':')[0]}://BUCKET/PATH")
    parts = [part for part in (match[3] or "").split("/") if part]
    if {".", ".."} & set(parts):
        raise ConfigError(
            f"{name} is {text!r}; an address must not contain '.' or '..'; write it in full"
        )
    address = "/".join([f"{match[1]}://{match[2]}", *parts])
    package, extra = SCHEMES[match[1]]
    require(package, extra, f"{name}={address}")
    _configure()
    return address


@functools.cache
def _configure() -> None:
    """Called before the first address is used: fsspec for all of them, without its cache."""
    import fsspec
    from etils.epath import gpath

    # etils would take TensorFlow's file systems where that is installed: seconds to import, in
    # processes that train, and without s3://. It remembers what it found for the first path of the
    # process, which may have been Orbax's on this machine.
    os.environ.setdefault("EPATH_USE_TF", "false")
    with contextlib.suppress(AttributeError):
        gpath._is_tf_installed.cache_clear()
    for name in ("gcs", "s3"):
        # A listing that is kept hides what other processes write.
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    # s3fs leaves a busy service (503) to botocore, which gives up after some seconds.
    retries = {"mode": "standard", "max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS") or 8)}
    settings = fsspec.config.conf["s3"].setdefault("config_kwargs", {})
    settings.setdefault("retries", retries)
    # Each transfer of a large file holds so many parts of 50 MB in memory, each with a connection.
    parts = fsspec.config.conf["s3"].setdefault("max_concurrency", 4)
    settings.setdefault("max_pool_connections", TRANSFERS * parts)


def file_system(address: str | os.PathLike[str]) -> Any:
    """fsspec's file system of an address."""
    import fsspec

    _configure()
    return fsspec.filesystem("gcs" if os.fspath(address).startswith("gs:") else "s3")


@contextlib.contextmanager
def _named(address: str | os.PathLike[str], needs_bucket: bool = False) -> Iterator[None]:
    """Adds the address to a refusal, whose own text often lacks it.

    Raises StorageError where the bucket is missing; with ``needs_bucket`` nothing else can be.
    """
    address = os.fspath(address)
    try:
        yield
    except PermissionError as error:
        raise PermissionError(errno.EACCES, str(error), address) from error
    except FileNotFoundError as error:
        # s3fs says so, too, of an upload in parts that somebody else ended.
        response = getattr(error.__cause__, "response", {})
        if response.get("Error", {}).get("Code") == "NoSuchUpload":
            raise
        # A file of this machine has its name in the error.
        if not (needs_bucket and not error.filename) and "bucket does not exist" not in str(error):
            raise
        bucket = "/".join(address.split("/")[:3])
        raise StorageError(
            f"{address}: there is no bucket {bucket}; create it, or correct the address"
        ) from error


def objects(address: str | os.PathLike[str]) -> dict[str, tuple[int, str]]:
    """(bytes, tag of the content) of every object below an address by its relative name.

    The object at the address itself has the name "". Empty where nothing is there.
    """
    address = os.fspath(address)
    below = address.partition("://")[2]
    found = {}
    with _named(address, needs_bucket=True):
        listed = file_system(address).find(address, detail=True)
    for name, info in listed.items():
        if info["type"] != "file" or name.endswith("/"):  # a console's "folder"
            continue
        tag = next((info[key] for key in ("generation", "etag", "ETag") if key in info), "")
        found[name.removeprefix(below).removeprefix("/")] = (int(info["size"]), str(tag))
    return found


def read_bytes(address: str | os.PathLike[str]) -> bytes:
    """An object's content; FileNotFoundError where there is none."""
    with _named(address):
        return file_system(address).cat_file(os.fspath(address))


def read_many(addresses: list[str]) -> list[bytes]:
    """The contents of several objects of one bucket, by as many requests at a time."""
    with concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool:
        return list(pool.map(read_bytes, addresses))


def write_bytes(address: str | os.PathLike[str], content: bytes) -> None:
    """Writes one object: it is there in full on return, or as it was before."""
    with _named(address, needs_bucket=True):
        file_system(address).pipe_file(os.fspath(address), content)


def send_file(source: pathlib.Path, address: str | os.PathLike[str]) -> None:
    """Copies a file to an object, which appears only when it is complete."""
    with _named(address, needs_bucket=True):
        file_system(address).put_file(str(source), os.fspath(address))


def copy_objects(source: str, target: str, names: list[str]) -> None:
    """Copies objects within the storage, by their names below the two addresses."""
    fs = file_system(source)

    def copy(name: str) -> None:
        fs.cp_file(f"{source}/{name}", f"{target}/{name}")

    with concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(copy, names))


def remove_objects(address: str | os.PathLike[str], names: list[str] | None = None) -> None:
    """Deletes the named objects below an address, or all of them; missing ones are ignored."""
    address = os.fspath(address)
    fs = file_system(address)
    for name in sorted(objects(address)) if names is None else names:
        with contextlib.suppress(FileNotFoundError), _named(f"{address}/{name}"):
            fs.rm_file(f"{address}/{name}" if name else address)


def cache_folder() -> pathlib.Path:
    """Where copies of objects are kept: $ENCDEC_BUCKET_CACHE, else below ~/.cache/encdec."""
    if folder := os.environ.get(CACHE):
        if is_address(folder):
            raise ConfigError(f"{CACHE} is {folder}; expected a folder of this machine")
        return pathlib.Path(os.path.expanduser(folder))
    return user_cache() / "buckets"


def cached(address: str) -> pathlib.Path:
    """A copy of an object, or of all objects below an address, on this machine.

    It is made once. Later calls ask for the objects' sizes and tags alone, and fetch again what
    has changed; a copy of another size than its object is fetched again, too.

    Raises FileNotFoundError where nothing is at the address.
    """
    found = objects(address)
    if not found:
        raise FileNotFoundError(f"there is nothing at {address}")
    target = cache_folder() / address.replace("://", "/")
    manifest = target.with_name(target.name + _MANIFEST)
    try:
        known = {name: tuple(entry) for name, entry in json.loads(manifest.read_text()).items()}
    except (OSError, ValueError):
        known = {}
    for name in known.keys() - found.keys():
        (target / name).unlink(missing_ok=True)

    def fetch(name: str) -> None:
        path = target / name if name else target
        if known.get(name) == found[name] and _size(path) == found[name][0]:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(f"{address}/{name}" if name else address, path, found[name][0])

    with concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(fetch, found))
    if known != found:
        with _whole(manifest) as partial:
            partial.write_text(json.dumps(found))
    return target


def forget(address: str) -> None:
    """Removes the copies of what is, or was, below an address."""
    shutil.rmtree(cache_folder() / address.replace("://", "/"), ignore_errors=True)


def drop_uploads(address: str) -> None:
    """Drops the parts of large files whose upload below an S3 address was never completed.

    They are in no listing but are charged for. Nothing is dropped where the service refuses that.
    """
    fs = file_system(address)
    bucket, prefix, _ = fs.split_path(address)
    with contextlib.suppress(OSError):
        found = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
        for upload in found.get("Uploads", []):
            named = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            fs.call_s3("abort_multipart_upload", Bucket=bucket, **named)


def cached_shard(address: str, size: int, sha256: str) -> pathlib.Path:
    """A copy of a file with a known checksum, which is verified when the copy is made.

    Raises RuntimeError where the object is not the file that was written.
    """
    path = cache_folder() / address.replace("://", "/")
    path = path.with_name(f"{path.name}.{sha256[:16]}")
    if _size(path) != size:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(address, path, size)
        with open(path, "rb") as file:
            seen = hashlib.file_digest(file, "sha256").hexdigest()
        if seen != sha256:
            path.unlink()
            raise RuntimeError("its sha256 differs from its card's")
    return path


def _size(path: pathlib.Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _fetch(address: str, path: pathlib.Path, size: int) -> None:
    with _whole(path) as partial:
        _LOG.debug("%s is copied to %s", address, path)
        with _named(address):
            file_system(address).get_file(address, str(partial))
        if (seen := partial.stat().st_size) != size:
            raise RuntimeError(
                f"only {seen:,} of the {size:,} bytes of {address} arrived; try again"
            )


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".partial")
    os.close(handle)
    partial = pathlib.Path(name)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_unfinished(found: Mapping[str, Any]) -> bool:
    """Whether ``sent_directory`` was killed while it sent these objects (``objects``)."""
    return UNFINISHED in found


def _files_below(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


def send_files(
    folder: pathlib.Path,
    address: str,
    last: str = "",
    before_last: Callable[[Mapping[str, int], str], None] = lambda sizes, address: None,
) -> None:
    """Copies the files of a folder to objects; the one called ``last``, if any, after all others.

    Before it, ``before_last`` is given the bytes of the others by name, and the address.
    """
    files = _files_below(folder)
    with concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool:
        rest = [name for name in files if name != last]
        list(pool.map(lambda name: send_file(files[name], f"{address}/{name}"), rest))
    before_last({name: files[name].stat().st_size for name in rest}, address)
    if last in files:
        send_file(files[last], f"{address}/{last}")


@contextlib.contextmanager
def sent_directory(address: str, last: str) -> Iterator[pathlib.Path]:
    """A new directory on this machine to write into, which is sent at the end of the block.

    An object ``.partial`` at the address names what is on its way and goes when all is there.
    The file called ``last`` is sent after the others. After an error nothing of it is left.
    """
    with tempfile.TemporaryDirectory(prefix="encdec-") as folder:
        local = pathlib.Path(folder) / address.rpartition("/")[2]
        local.mkdir()
        yield local
        files = _files_below(local)
        if (before := objects(address)) and is_unfinished(before):
            remove_objects(address, json.loads(read_bytes(f"{address}/{UNFINISHED}")))
        write_bytes(f"{address}/{UNFINISHED}", json.dumps(list(files)).encode())
        try:
            send_files(local, address, last)
        except BaseException:
            with contextlib.suppress(Exception):
                remove_objects(address, [*files, UNFINISHED])
            raise
        remove_objects(address, [UNFINISHED])
