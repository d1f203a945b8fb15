"""The Hugging Face Hub by its own client: models and data fetched by name, exports pushed.

Its environment holds: HF_TOKEN or a login, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME for the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from encdec.errors import ConfigError, DataError
from encdec.logs import shows_progress
from encdec.packages import require
from encdec.storage import any_path

# What an import reads of a repository: no checkpoints of other frameworks.
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "vocabulary/*")
# Of an earlier push: transformers would read a model.safetensors in place of new files.
_REPLACED = ("model.safetensors", "model-*.safetensors", "params/params-*.safetensors")
_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
# A revision has no slash, but for those that the Hub makes itself.
_REVISION = r"refs/(?:convert|pr)/[^/]+|[^/]+"
_DATA = re.compile(rf"hf://(datasets/)?(?!datasets/|spaces/)({_NAME})(?:@({_REVISION}))?/(.+)")


def repository(source: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """(name, revision) of ``ORG/NAME`` or ``ORG/NAME@REVISION``; None for an existing path."""
    text = os.fspath(source)
    found = re.fullmatch(rf"({_NAME})(?:@([\w./-]+))?", text)
    if found is None or pathlib.Path(text).exists():
        return None
    return found[1], found[2]


def download(name: str, revision: str | None = None) -> pathlib.Path:
    """A repository's configuration, weights and tokenizer in the Hub's cache, fetched if need be.

    Raises:
        ConfigError: huggingface_hub is not installed.
        DataError: no such repository or revision, no right to it, or no connection.
    """
    require("huggingface_hub", "hf", f"{name} of the Hub")
    import huggingface_hub

    _show_bars()
    with _explained(name, "give an existing directory, or the name as the Hub writes it"):
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(PATTERNS)
        )
    return pathlib.Path(folder)


def is_data(path: str | os.PathLike[str]) -> bool:
    """Whether this is written as the address of files of the Hub."""
    return os.fspath(path).startswith("hf://")


def data_path(text: str) -> str:
    """``argparse`` type of flags that name data: ``any_path``, and addresses of the Hub."""
    if not is_data(text):
        return any_path(text)
    try:
        _parts(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def data_files(address: str, wanted: Callable[[str], bool]) -> list[pathlib.Path]:
    """Files of a repository in the Hub's cache, fetched if need be; a file also without connection.

    Args:
        address: ``hf://datasets/ORG/NAME[@REVISION]/PATH``, or ``hf://ORG/NAME[@REVISION]/PATH`` of
            a model's repository; PATH is a file, a folder or a shell's pattern.
        wanted: whether a file of a folder, by its name, is taken.

    Raises:
        ConfigError: an address that is none of these, or huggingface_hub is not installed.
        DataError: no such repository or file, no right to it, or no connection.
    """
    kind, name, revision, path = _parts(address)
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    _show_bars()

    def fetch(file: str) -> pathlib.Path:
        found = huggingface_hub.hf_hub_download(name, file, repo_type=kind, revision=revision)
        return pathlib.Path(found)

    with _explained(address, "give what is there; private data needs HF_TOKEN or a login"):
        if not glob.has_magic(path):
            try:
                return [fetch(path)]
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                pass  # a folder, or nothing
        files: Any = huggingface_hub.HfFileSystem()  # a path may also be a bucket's, never here
        if glob.has_magic(path):
            found = files.glob(address)
        else:
            found = []
            with contextlib.suppress(FileNotFoundError, EntryNotFoundError):
                found = [file for file in files.find(address, maxdepth=1) if wanted(file)]
        if not found:
            raise DataError(
                f"there is no file at {address}; give an existing file, folder or pattern"
            )
        return [fetch(files.resolve_path(file).path_in_repo) for file in sorted(found)]


def _parts(address: str) -> tuple[str, str, str | None, str]:
    """(kind of repository, its name, revision, path in it); ConfigError if it has another form."""
    match = _DATA.fullmatch(address)
    if match is None:
        raise ConfigError(
            f"{address} is not an address of files on the Hub; expected "
            "hf://datasets/ORG/NAME/PATH, or hf://datasets/ORG/NAME@REVISION/PATH"
        )
    require("huggingface_hub", "hf", address)
    return "dataset" if match[1] else "model", match[2], match[3], match[4]


def check_push(name: str, private: bool = False) -> None:
    """Makes the repository that will be pushed to, or finds it.

    Raises:
        ConfigError: no ORG/NAME, or huggingface_hub is not installed.
        DataError: no right to it, or no connection.
    """
    if not re.fullmatch(_NAME, name):
        raise ConfigError(f"--push={name}; expected ORG/NAME")
    require("huggingface_hub", "hf", f"--push={name}")
    import huggingface_hub

    with _explained(name, "log in with `hf auth login`, or set HF_TOKEN"):
        huggingface_hub.create_repo(name, private=private, exist_ok=True)


def push(folder: str | os.PathLike[str], name: str, message: str) -> str:
    """Uploads a directory as one commit, which removes weights that were there; its address.

    Raises:
        DataError: no right to it, or no connection.
    """
    import huggingface_hub

    _show_bars()
    with _explained(name, f"{folder} is complete; to upload it again: hf upload {name} {folder}"):
        commit = huggingface_hub.upload_folder(
            repo_id=name,
            folder_path=os.fspath(folder),
            commit_message=message,
            delete_patterns=list(_REPLACED),
        )
    return str(commit.commit_url)


def _show_bars() -> None:
    """The client's bars of progress are left out after ``--quiet``."""
    from huggingface_hub.utils import disable_progress_bars

    if not shows_progress():
        disable_progress_bars()


@contextlib.contextmanager
def _explained(name: str, remedy: str) -> Iterator[None]:
    """The Hub's errors, and those of the connection to it, in one line."""
    from huggingface_hub import errors

    of_hub = (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.LocalTokenNotFoundError,
        errors.OfflineModeIsEnabled,
    )
    try:
        yield
    except Exception as error:
        # Which library of HTTP the client uses differs between its versions.
        transport = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
        if not transport and not isinstance(error, of_hub):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise DataError(f"{name} on the Hub: {lines[0].strip()}; {remedy}") from error
