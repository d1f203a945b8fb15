"""Checkpoints in s3://, where Orbax cannot write: saved on this machine, then uploaded.

Orbax writes a step to a folder of this machine, and a thread sends its files, ``MARKER`` last: a
step in the bucket is whole once that object is there. It is the first to go when an old step is
deleted. What a killed process left without it is removed when the next one begins.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from encdec import buckets
from encdec.errors import StorageError
from encdec.logs import logger

_LOG = logger(__name__)

MARKER = "_CHECKPOINT_METADATA"  # Orbax writes it into every step, so copied ones have it, too
_STEP = re.compile(r"(\d+)/(.+)")


def are_uploaded(directory: str | os.PathLike[str]) -> bool:
    """Whether steps below this path go through a folder of this machine."""
    return os.fspath(directory).startswith("s3://")


def whole_steps(directory: epath.Path) -> list[int]:
    """The steps that are complete, in order."""
    return sorted(step for step, names in _steps(directory).items() if MARKER in names)


def staging_folder(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Where steps are before they are in the bucket."""
    return buckets.cache_folder() / "staging" / os.fspath(directory).replace("://", "/")


class UploadedSteps:
    """What ``Checkpoints`` asks of Orbax's manager, for one process and a bucket of S3's."""

    def __init__(self, directory: epath.Path, kept: Callable[[Sequence[int]], set[int]]):
        """
        Args:
            directory: an address; what is unfinished there is removed.
            kept: which of the steps are to stay; asked at every save.
        """
        self._directory, self._kept = directory, kept
        self._staging = staging_folder(directory)
        shutil.rmtree(self._staging, ignore_errors=True)
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "upload")
        self._upload: concurrent.futures.Future[None] | None = None
        self._steps: list[int] = []
        buckets.drop_uploads(os.fspath(directory))
        for step, names in _steps(directory).items():
            if MARKER not in names:
                _LOG.debug("%s was never complete and is removed", directory / str(step))
                self._remove(step, names)
        self.reload()
        copies = buckets.cache_folder() / os.fspath(directory).replace("://", "/")
        for copy in copies.glob("*"):  # of steps that are no longer there
            if copy.name not in map(str, self._steps):
                buckets.forget(f"{directory}/{copy.name}")

    def reload(self) -> None:
        self._steps = whole_steps(self._directory)

    def all_steps(self) -> list[int]:
        return list(self._steps)

    def latest_step(self) -> int | None:
        """The last step, which may still be on its way."""
        return max(self._steps, default=None)

    def save(self, step: int, args: Any, force: bool = False) -> None:
        """Copies the state off the devices; threads do the rest.

        The previous save is complete on return; its error is raised here.
        """
        self.wait_until_finished()
        if step in self._steps:
            return
        self._writer.save(self._staging / str(step), args=args, force=True)
        steps = [*self._steps, step]
        kept = self._kept(steps)
        self._steps = [one for one in steps if one in kept]
        old = [one for one in steps if one not in kept]
        self._upload = self._thread.submit(self._finish, step, old)

    def _finish(self, step: int, old: Sequence[int]) -> None:
        self._writer.wait_until_finished()
        found = _steps(self._directory)
        if step in found:
            self._remove(step, found[step])
        folder, address = self._staging / str(step), f"{self._directory}/{step}"
        _LOG.debug("%s is sent to %s", folder, address)
        buckets.send_files(folder, address, last=MARKER, before_last=self._check_sent)
        shutil.rmtree(folder)
        for one in old:
            self._remove(one, found.get(one, []))

    @staticmethod
    def _check_sent(sizes: Mapping[str, int], address: str) -> None:
        """Raises StorageError unless all files of a step are there, before it counts as whole.

        A second process that starts in the same directory would remove a step that is still being
        uploaded as unfinished.
        """
        there = buckets.objects(address)
        for name, size in sizes.items():
            if there.get(name, (-1, ""))[0] != size:
                raise StorageError(
                    f"{address}/{name} was uploaded, and is missing or has another size now; does "
                    "another process work in this directory? End it, and repeat the command"
                )

    def _remove(self, step: int, names: Sequence[str]) -> None:
        address = f"{self._directory}/{step}"
        buckets.remove_objects(address, sorted(names, key=lambda name: name != MARKER))
        buckets.forget(address)

    def wait_until_finished(self) -> None:
        """Returns when everything saved is complete in the bucket."""
        upload, self._upload = self._upload, None
        if upload:
            upload.result()

    def close(self) -> None:
        try:
            self.wait_until_finished()
        finally:
            self._thread.shutdown()
            self._writer.close()


def _steps(directory: epath.Path) -> dict[int, list[str]]:
    """The names of the objects of each step."""
    found: dict[int, list[str]] = {}
    for name in buckets.objects(directory):
        if match := _STEP.fullmatch(name):
            found.setdefault(int(match[1]), []).append(match[2])
    return found
