"""Rows on disk: their codec, ArrayRecord shards written whole and read at random, one directory.

A row is one flat array of the card's ``token_dtype`` (little endian): the number of segments n, n
source lengths, n target lengths, then all source ids and all target ids. Nothing else is stored;
the eight model fields follow from it (``features``). Segment lengths rather than a padding id
mark what is real, so id 0 may be a token like any other.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from encdec.buckets import cached_shard, is_address, objects
from encdec.data.card import DatasetCard, read_card
from encdec.data.vocabulary import Vocabulary, load_vocabulary
from encdec.errors import DataError
from encdec.files import file_sha256, whole_file
from encdec.jobs import Shard
from encdec.storage import as_path, user_place

if TYPE_CHECKING:
    from etils import epath

READ_THREADS = 16
# A shard's rows take some tens of microseconds from a local disk, milliseconds from a bucket.
SLOW_READ_SECONDS = 2e-3


def encode_row(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], dtype: str) -> bytes:
    """One packed row as bytes: segment k has tokens ``sources[k]`` and ``targets[k]``."""
    if len(sources) != len(targets) or not sources:
        raise ValueError(
            f"a row has as many sources as targets; got {len(sources)} and {len(targets)}"
        )
    lengths = [len(sources), *map(len, sources), *map(len, targets)]
    stored = np.dtype(dtype).newbyteorder("<")
    return np.concatenate([lengths, *sources, *targets]).astype(stored).tobytes()


def decode_row(data: bytes, dtype: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The inverse of ``encode_row``: (sources, targets), one array of ids a segment."""
    row = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
    count = int(row[0])
    lengths = row[1 : 1 + 2 * count].astype(np.int64)
    parts = np.split(row[1 + 2 * count :], np.cumsum(lengths)[:-1])
    return parts[:count], parts[count:]


def write_shard(path: pathlib.Path | epath.Path, rows: Iterable[bytes]) -> Shard:
    """Write one ArrayRecord file: whole and on disk, or absent."""
    from array_record.python.array_record_module import ArrayRecordWriter

    with whole_file(path) as partial:
        # One record a chunk, since rows are read at random; zstd since ids of a large vocabulary
        # leave a third of two bytes unused.
        writer = ArrayRecordWriter(str(partial), "group_size:1,zstd:1")
        count = 0
        for row in rows:
            writer.write(row)
            count += 1
        writer.close()
        return Shard(path.name, count, partial.stat().st_size, file_sha256(partial))


class ShardedRows:
    """Rows of several ArrayRecord files, read by number; safe to use from several threads.

    ``remedy`` completes the message about a broken file: what to do about it.
    """

    def __init__(self, directory: str | pathlib.Path, shards: Sequence[Shard], remedy: str):
        self.directory = as_path(directory)
        self.shards = tuple(shards)
        self._remedy = remedy
        self._starts = np.cumsum([0] + [shard.rows for shard in self.shards])
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._fetching = [threading.Lock() for _ in range(READ_THREADS)]
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, row_numbers: Sequence[int] | np.ndarray) -> list[bytes]:
        """The rows' bytes in the order asked for.

        Raises DataError naming the shard where one is missing, truncated or corrupt.
        """
        numbers = np.asarray(row_numbers, np.int64)
        if numbers.size and not (0 <= numbers.min() and numbers.max() < len(self)):
            raise IndexError(f"rows {numbers.min()}..{numbers.max()} asked of {len(self)} rows")
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        result: list[bytes] = [b""] * len(numbers)
        groups = [(int(shard), np.flatnonzero(shard_of == shard)) for shard in np.unique(shard_of)]

        def read_group(group: tuple[int, np.ndarray]) -> list[bytes]:
            shard, where = group
            return self._read_shard(shard, (numbers[where] - self._starts[shard]).tolist())

        parts: list[list[bytes]] = []
        for group in groups:
            started = time.perf_counter()
            parts.append(read_group(group))
            # Threads pay where each shard costs a round trip; on a local disk they cost more than
            # the reading itself.
            rest = groups[len(parts) :]
            if rest and time.perf_counter() - started > SLOW_READ_SECONDS:
                parts += self._threads().map(read_group, rest)
                break
        for (_, where), part in zip(groups, parts):
            for place, row in zip(where, part):
                result[place] = row
        return result

    def _threads(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                workers = min(READ_THREADS, len(self.shards))
                self._pool = concurrent.futures.ThreadPoolExecutor(workers, "records")
            return self._pool

    def _read_shard(self, index: int, positions: list[int]) -> list[bytes]:
        try:
            return self._reader(index).read(positions)
        except (RuntimeError, IndexError, FileNotFoundError) as error:
            raise self._broken(self.shards[index], str(error)) from error

    def _reader(self, index: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if index in self._readers:
                return self._readers[index]
        path = self._file(index)
        with self._lock:
            if index not in self._readers:
                options = "readahead_buffer_size:0,max_parallelism:0"
                self._readers[index] = ArrayRecordReader(str(path), options)
            return self._readers[index]

    def _file(self, index: int) -> pathlib.Path | epath.Path:
        """A shard where ArrayRecord can read it; fetched from a bucket on its first use."""
        shard = self.shards[index]
        path = self.directory / shard.name
        if not is_address(path):
            return path
        with self._fetching[index % len(self._fetching)]:
            return cached_shard(os.fspath(path), shard.bytes, shard.sha256)

    def _broken(self, shard: Shard, seen: str) -> DataError:
        return DataError(
            f"shard {self.directory / shard.name} cannot be read: {seen}; {self._remedy}"
        )

    def check_files(self) -> None:
        """Refuse missing or wrongly sized shards now rather than at some step of a run."""
        found = objects(self.directory) if is_address(self.directory) else None
        for shard in self.shards:
            if found is not None:
                size = found[shard.name][0] if shard.name in found else None
            else:
                path = self.directory / shard.name
                size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise self._broken(shard, "the file is missing")
            if size != shard.bytes:
                raise self._broken(
                    shard, f"it has {size:,} bytes, but its card says {shard.bytes:,}"
                )


class Records(ShardedRows):
    """Rows of a records directory, with the card that describes them."""

    def __init__(self, directory: str | pathlib.Path, card: DatasetCard):
        super().__init__(
            directory,
            card.shards,
            "copy it again from where it was prepared, or run "
            f"encdec prepare --out={directory} --overwrite",
        )
        self.card = card

    def vocabulary(self) -> Vocabulary:
        """The vocabulary the records were made with, from its copy next to them."""
        return load_vocabulary(self.card.vocabulary, directory=self.directory)


def open_directory(directory: str | pathlib.Path) -> Records:
    """Open one records directory; errors as ``open_records``."""
    directory = as_path(user_place("the records directory", directory))
    records = Records(directory, read_card(directory))
    records.check_files()
    return records
