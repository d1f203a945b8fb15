"""Records on disk: the row codec, the dataset card, ArrayRecord shards read at random.

A row is one flat array of the card's `token_dtype` (little endian): the number of segments n, n
source lengths, n target lengths, then all source ids and all target ids. Nothing else is stored;
the eight model fields follow from it (``features``). Segment lengths rather than a padding id
mark what is real, so id 0 may be a token like any other.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from encdec.data.vocabulary import CARD_FILE, Vocabulary, VocabularySpec, load_vocabulary
from encdec.errors import DataError
from encdec.fields import did_you_mean
from encdec.storage import local, user_path

FORMAT_VERSION = 1
READ_THREADS = 16
# A shard's rows take some tens of microseconds from a local disk, milliseconds from a bucket.
SLOW_READ_SECONDS = 2e-3


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: its name within the directory, rows, size in bytes and checksum."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class DatasetCard:
    """What a records directory holds; ``dataset.json``, written last.

    Lengths are tokens per packed row. Token counts include EOS and exclude padding;
    `target_bytes` are the UTF-8 bytes of text the target tokens stand for. `truncated` counts
    examples and tokens cut off, `dropped` what was left out, by reason; `lost` is what the
    vocabulary cannot write (`losses.Losses`; empty in cards of before it was counted).
    `origin` says where the text came from (file names, Python's version).
    """

    task: str
    split: str
    origin: dict[str, Any]
    vocabulary: VocabularySpec
    inputs_length: int
    targets_length: int
    packing: str
    inputs_eos: bool
    objective: dict[str, Any]
    seed: int
    decoder_start_id: int
    token_dtype: str
    rows: int
    examples: int
    documents: int
    source_tokens: int
    target_tokens: int
    target_bytes: int
    non_padding_share: float
    truncated: dict[str, int]
    dropped: dict[str, int]
    shards: tuple[Shard, ...]
    fingerprint: str
    format_version: int = FORMAT_VERSION
    lost: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """Whether a row may hold more than one example."""
        return self.packing != "none"

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["packed"] = self.packed
        content["shards"] = [dataclasses.asdict(shard) for shard in self.shards]
        return content

    def write(self, directory: str | pathlib.Path) -> None:
        """Write ``dataset.json`` atomically: it is there in full or not at all."""
        write_json(pathlib.Path(directory) / CARD_FILE, self.to_dict())


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write a JSON file and wait until it is on disk; it is there in full or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_card(directory: str | pathlib.Path) -> DatasetCard:
    """The card of a records directory; DataError where it is missing, broken or too new."""
    directory = pathlib.Path(local("the records directory", directory))
    path = directory / CARD_FILE
    if not directory.is_dir():
        raise DataError(
            f"records directory {directory} does not exist; make it with "
            f"encdec prepare --out={directory}"
        )
    if not path.is_file():
        raise DataError(
            f"{directory} has no {CARD_FILE}: its preparation did not finish, or it holds no "
            f"records; run encdec prepare --out={directory} again"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON ({error}); prepare again") from error
    return _card_from_dict(content, path)


def _card_from_dict(content: Any, path: pathlib.Path) -> DatasetCard:
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, wanted an object")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format_version {version!r}, this encdec reads {FORMAT_VERSION}; "
            "use the version that wrote it or prepare again"
        )
    names = {field.name for field in dataclasses.fields(DatasetCard)}
    values = {key: value for key, value in content.items() if key != "packed"}
    for key in values:
        if key not in names:
            raise DataError(f"{path} has the unknown field {key!r}{did_you_mean(key, names)}")
    if missing := names - set(values) - {"lost"}:
        raise DataError(f"{path} lacks {sorted(missing)}; prepare again")
    try:
        values["vocabulary"] = VocabularySpec(**values["vocabulary"])
        values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
    except TypeError as error:
        raise DataError(f"{path} is malformed: {error}; prepare again") from error
    return DatasetCard(**values)


def token_dtype(vocabulary_size: int, inputs_length: int, targets_length: int) -> str:
    """ "uint16" where ids and lengths fit it, else "uint32"."""
    fits = vocabulary_size <= 2**16 and max(inputs_length, targets_length) < 2**16
    return "uint16" if fits else "uint32"


def encode_row(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], dtype: str) -> bytes:
    """One packed row as bytes: segment k has tokens `sources[k]` and `targets[k]`."""
    if len(sources) != len(targets) or not sources:
        raise ValueError(
            f"a row wants as many sources as targets, got {len(sources)} and {len(targets)}"
        )
    lengths = [len(sources), *map(len, sources), *map(len, targets)]
    stored = np.dtype(dtype).newbyteorder("<")
    return np.concatenate([lengths, *sources, *targets]).astype(stored).tobytes()


def decode_row(data: bytes, dtype: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The inverse of `encode_row`: (sources, targets), one array of ids a segment."""
    row = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
    count = int(row[0])
    lengths = row[1 : 1 + 2 * count].astype(np.int64)
    parts = np.split(row[1 + 2 * count :], np.cumsum(lengths)[:-1])
    return parts[:count], parts[count:]


def write_shard(path: pathlib.Path, rows: Iterable[bytes]) -> Shard:
    """Write one ArrayRecord file under a partial name, then rename it: whole or absent."""
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = path.with_name(path.name + ".partial")
    # One record a chunk, since rows are read at random; zstd since ids of a large vocabulary
    # leave a third of two bytes unused.
    writer = ArrayRecordWriter(str(partial), "group_size:1,zstd:1")
    count = 0
    for row in rows:
        writer.write(row)
        count += 1
    writer.close()
    shard = Shard(path.name, count, partial.stat().st_size, file_sha256(partial))
    os.replace(partial, path)
    return shard


def file_sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_fingerprint(
    shards: Sequence[Shard],
    vocabulary: VocabularySpec,
    inputs_length: int,
    targets_length: int,
    decoder_start_id: int,
) -> str:
    """sha256 over all that a teacher's column or a run must agree on with the records."""
    content = [
        FORMAT_VERSION,
        vocabulary.fingerprint,
        inputs_length,
        targets_length,
        decoder_start_id,
        [(shard.rows, shard.sha256) for shard in shards],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class ShardedRows:
    """Rows of several ArrayRecord files, read by number; safe to use from several threads.

    `mend` completes the message about a broken file: what to do about it.
    """

    def __init__(self, directory: str | pathlib.Path, shards: Sequence[Shard], mend: str):
        self.directory = pathlib.Path(directory)
        self.shards = tuple(shards)
        self._mend = mend
        self._starts = np.cumsum([0] + [shard.rows for shard in self.shards])
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
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
        except (RuntimeError, IndexError) as error:
            raise self._broken(self.shards[index], str(error)) from error

    def _reader(self, index: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if index not in self._readers:
                path = self.directory / self.shards[index].name
                options = "readahead_buffer_size:0,max_parallelism:0"
                self._readers[index] = ArrayRecordReader(str(path), options)
            return self._readers[index]

    def _broken(self, shard: Shard, seen: str) -> DataError:
        return DataError(
            f"shard {self.directory / shard.name} cannot be read: {seen}; {self._mend}"
        )

    def check_files(self) -> None:
        """Refuse missing or wrongly sized shards now rather than at some step of a run."""
        for shard in self.shards:
            path = self.directory / shard.name
            if not path.is_file():
                raise self._broken(shard, "the file is missing")
            size = path.stat().st_size
            if size != shard.bytes:
                raise self._broken(shard, f"it has {size:,} bytes, its card says {shard.bytes:,}")


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
        """The vocabulary the records were made with, from its copy beside them."""
        return load_vocabulary(self.card.vocabulary, directory=self.directory)


def open_directory(directory: str | pathlib.Path) -> Records:
    """Open one records directory; errors as `open_records`."""
    directory = pathlib.Path(local("the records directory", directory))
    records = Records(directory, read_card(directory))
    records.check_files()
    return records


def open_records(directory: str | pathlib.Path) -> Records:
    """Open a records directory written by ``encdec prepare``, or a mixture of several.

    A mixture is "A=3,B=1" (rates), "A,B" (proportional to their rows) or "A,B;temperature=2"; it
    is a `mixing.MixedRecords` and reads as one directory does. What exists as a directory is one,
    and so is what names no second part.

    Raises DataError where the directory, its card or a shard is missing, or a shard's size is
    not what the card says.
    """
    text = user_path("the records directory", str(directory))
    if "," not in text or pathlib.Path(text).exists():
        return open_directory(text)
    from encdec.data.mixing import mix_records, parse_mixture

    names, rates, temperature = parse_mixture(text)
    if missing := [name for name in names if not pathlib.Path(name).is_dir()]:
        raise DataError(
            f"{text} is no directory, and as a mixture (DIR=RATE,DIR=RATE) its part {missing[0]} "
            "does not exist; give a directory written by encdec prepare, or several"
        )
    return mix_records(names, rates, temperature=temperature)
