"""A teacher's column next to the records: its card, its shards, and the fields it adds to a batch.

A teacher directory holds ArrayRecord shards with one record a row, in the order of the records'
rows, and ``teacher.json``, written last. The card names the records that the teacher read by their
fingerprint; another set of records, vocabulary or length is refused. Records that are read as a
mixture have a teacher directory for each part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from encdec.data.mixing import MixedRecords
from encdec.data.records import Records, Shard, ShardedRows
from encdec.data.sparse_logits import SparseFormat, SparseLogits, decode_rows, there
from encdec.errors import ConfigError, DataError
from encdec.files import write_json
from encdec.storage import as_path, user_place

CARD_FILE = "teacher.json"
FORMAT_VERSION = 2

# What a teacher adds to a batch of B rows with up to T loss-bearing positions each.
PAIR_FIELDS = ("teacher_ids", "teacher_weights", "teacher_positions")


@dataclasses.dataclass(frozen=True)
class TeacherCard:
    """What a teacher directory holds.

    Attributes:
        teacher: whose logits they are: name, step and fingerprint of its parameters' source.
        records_fingerprint: of the records' content.
        vocabulary_fingerprint: of the vocabulary, which must be the teacher's own.
        format: what is kept of each distribution.
        seed: of the draws.
        rows, tokens, pairs: totals; tokens are loss-bearing target positions.
        max_pairs: the most pairs in one row.
        entropy: mean of the teacher's entropy, nats per token.
        tail: mean mass left out ("top_k"); 0 where nothing is.
        bytes_per_token: size of the shards over tokens.
        shards: the files.
        fingerprint: of the content.
    """

    teacher: dict[str, Any]
    records_fingerprint: str
    vocabulary_fingerprint: str
    inputs_length: int
    targets_length: int
    format: SparseFormat
    seed: int
    rows: int
    tokens: int
    pairs: int
    max_pairs: int
    entropy: float
    tail: float
    bytes_per_token: float
    shards: tuple[Shard, ...]
    fingerprint: str
    format_version: int = FORMAT_VERSION

    def identity(self) -> dict[str, Any]:
        """What of the job's identity the card keeps: all but how rows were laid out."""
        return {
            "teacher": unnamed(self.teacher),
            "records": self.records_fingerprint,
            "format": self.format.to_dict(),
            "seed": self.seed,
        }

    def write(self, directory: str | pathlib.Path) -> None:
        """Writes ``teacher.json``: in full or not at all."""
        write_json(as_path(directory) / CARD_FILE, dataclasses.asdict(self))


def unnamed(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher without its name, which another place of its directory changes."""
    return {key: value for key, value in teacher.items() if key != "name"}


def teacher_fingerprint(
    records_fingerprint: str, fmt: SparseFormat, shards: Sequence[Shard]
) -> str:
    """sha256 over the rows it belongs to, the format and the content."""
    content = [
        FORMAT_VERSION,
        records_fingerprint,
        fmt.to_dict(),
        [(shard.rows, shard.sha256) for shard in shards],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_teacher_card(directory: str | pathlib.Path) -> TeacherCard:
    """The card of a teacher directory; DataError where it is missing, broken or too new."""
    directory = as_path(user_place("the teacher directory", directory))
    path = directory / CARD_FILE
    again = f"run encdec distill logits --out={directory} with the same arguments to finish it"
    if not directory.is_dir():
        raise DataError(
            f"teacher directory {directory} does not exist; make it with encdec distill logits "
            f"--teacher=... --records=... --out={directory}"
        )
    if not path.is_file():
        raise DataError(f"{directory} has no {CARD_FILE}: it is not finished; {again}")
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); copy it again") from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format_version {version!r}, this encdec reads "
            f"{FORMAT_VERSION}; use the version that wrote it or store it again"
        )
    try:
        content["format"] = SparseFormat(**content["format"])
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        return TeacherCard(**content)
    except (TypeError, KeyError) as error:
        raise DataError(f"{path} is malformed: {error}; copy or store it again") from error


class Teacher(ShardedRows):
    """A teacher's rows by number, and the batch fields made of them."""

    def __init__(self, directory: str | pathlib.Path, card: TeacherCard):
        super().__init__(
            directory,
            card.shards,
            f"copy it again from where it was made, or run encdec distill logits --out={directory} "
            "--overwrite",
        )
        self.card = card
        self.format, self.fingerprint = card.format, card.fingerprint

    def describe(self) -> str:
        """One line: whose distributions, what is kept of them, and what that leaves out."""
        card = self.card
        kept = {
            "sampled": f"{card.format.draws} draws",
            "top_k": f"top {card.format.k}",
            "full": "every id",
        }[card.format.method]
        left_out = f", mass left out {card.tail:.2%}" if card.tail else ""
        return (
            f"teacher {card.teacher.get('name')}: {kept} a token at temperature "
            f"{card.format.temperature:g}, {card.bytes_per_token:.1f} bytes per token, entropy "
            f"{card.entropy:.4f} nats{left_out}"
        )

    def distributions(
        self, row_numbers: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, SparseLogits]:
        """Tokens of each row, and all their distributions; -1 stands for an empty row.

        Raises DataError naming the shard that cannot be read or the row that is damaged.
        """
        numbers = np.asarray(row_numbers, np.int64)
        real = numbers >= 0
        stored = iter(self.read(numbers[real]))
        rows = [next(stored) if present else b"" for present in real]
        return decode_rows(rows, self.card.format, names=numbers.tolist())

    def fields(
        self, row_numbers: Sequence[int] | np.ndarray, max_pairs: int | None = None
    ) -> dict[str, np.ndarray]:
        """The columns of a batch [B rows], padded with zeros.

        teacher_entropy [B, T] float32, nats; then for "sampled" and "top_k" teacher_ids [B, P]
        int32, teacher_weights [B, P] float32 and teacher_positions [B, P] int32, the place of
        each pair's token among the row's loss-bearing positions, with P = ``max_pairs``, by
        default the most pairs of any row; teacher_tail [B, T] for "top_k"; teacher_log_probs
        [B, T, V] for "full".

        Raises DataError as ``distributions`` does.
        """
        tokens, table = self.distributions(row_numbers)
        length = self.card.targets_length
        if tokens.size and tokens.max() > length:
            bad = int(np.argmax(tokens))
            raise DataError(
                f"the teacher's row {row_numbers[bad]} has {tokens[bad]} tokens, but its card "
                f"allows {length}; run encdec distill logits again"
            )
        return batch_fields(tokens, table, self.format, length, max_pairs or self.card.max_pairs)


def batch_fields(
    tokens: np.ndarray, table: SparseLogits, fmt: SparseFormat, length: int, max_pairs: int
) -> dict[str, np.ndarray]:
    """The columns that ``Teacher.fields`` gives, from rows with these numbers of ``tokens``.

    ``length`` is T, ``max_pairs`` is P.
    """
    count = len(tokens)
    row = np.repeat(np.arange(count), tokens)
    place = np.arange(len(row)) - np.repeat(np.cumsum(tokens) - tokens, tokens)

    def by_token(values: np.ndarray) -> np.ndarray:
        field = np.zeros((count, length, *values.shape[1:]), np.float32)
        field[row, place] = values
        return field

    fields = {"teacher_entropy": by_token(table.entropy)}
    if fmt.method == "full":
        return fields | {"teacher_log_probs": by_token(there(table.log_probs))}
    if fmt.method == "top_k":
        fields["teacher_tail"] = by_token(there(table.tail))
    pair_row = np.repeat(row, table.sizes)
    pairs = np.bincount(pair_row, minlength=count)
    index = np.arange(len(pair_row)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    values = (table.ids, table.weights(fmt), np.repeat(place, table.sizes))
    for name, value in zip(PAIR_FIELDS, values):
        field = np.zeros((count, max_pairs), np.float32 if name == "teacher_weights" else np.int32)
        field[pair_row, index] = value
        fields[name] = field
    return fields


class MixedTeacher:
    """The teachers of a mixture's parts, with the mixture's row numbers."""

    def __init__(self, parts: Sequence[Teacher]):
        self.parts = tuple(parts)
        first = self.parts[0]
        for part in self.parts[1:]:
            for name in ("method", "temperature"):
                mine, other = getattr(first.format, name), getattr(part.format, name)
                if mine != other:
                    raise ConfigError(
                        f"teachers cannot be mixed: {name} is {mine!r} in {first.directory} but "
                        f"{other!r} in {part.directory}; store both with the same settings"
                    )
        self.format = first.format
        self.fingerprint = hashlib.sha256(
            json.dumps([part.fingerprint for part in self.parts]).encode()
        ).hexdigest()
        self._offsets = np.cumsum([0] + [part.card.rows for part in self.parts])
        self._max_pairs = max(part.card.max_pairs for part in self.parts)

    def describe(self) -> str:
        return "; ".join(part.describe() for part in self.parts)

    def fields(self, row_numbers: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """As ``Teacher.fields``; P is the most pairs of any row of any part."""
        numbers = np.asarray(row_numbers, np.int64)
        sums: dict[str, np.ndarray] = {}
        for index, part in enumerate(self.parts):
            first, end = self._offsets[index : index + 2]
            own = np.where((first <= numbers) & (numbers < end), numbers - first, -1)
            fields = part.fields(own, self._max_pairs)
            # Rows of other parts are zeros.
            sums = {name: sums[name] + x for name, x in fields.items()} if sums else fields
        return sums


TeacherRows = Teacher | MixedTeacher


def open_teacher(directory: str | pathlib.Path, records: Records | MixedRecords) -> TeacherRows:
    """Opens a teacher directory as a column of ``records``; for a mixture "A,B", one a part.

    Raises:
        ConfigError: not as many teachers as the mixture has parts, or of different formats.
        DataError: missing, unfinished or incomplete; or of other records, another
            vocabulary or other lengths: both sides are named.
    """
    if isinstance(records, MixedRecords):
        names = [name.strip() for name in str(directory).split(",")]
        if len(names) != len(records.parts):
            wanted = ",".join(f"TEACHER_OF_{part.directory.name}" for part in records.parts)
            raise ConfigError(
                f"the records are a mixture of {len(records.parts)} directories, but "
                f"{str(directory)!r} names {len(names)} teacher(s); give one for each part, in "
                f"their order: {wanted}"
            )
        return MixedTeacher([_open_one(name, part) for name, part in zip(names, records.parts)])
    return _open_one(directory, records)


def _open_one(directory: str | pathlib.Path, records: Records) -> Teacher:
    teacher = Teacher(directory, read_teacher_card(directory))
    check_pair(teacher.card, records, str(directory))
    teacher.check_files()
    return teacher


def check_pair(card: TeacherCard, records: Records, name: str) -> None:
    """Raises DataError unless the teacher's rows are those of ``records``."""
    wanted = records.card
    sides = (
        ("vocabulary fingerprint", card.vocabulary_fingerprint, wanted.vocabulary.fingerprint),
        ("inputs_length", card.inputs_length, wanted.inputs_length),
        ("targets_length", card.targets_length, wanted.targets_length),
        ("number of rows", card.rows, wanted.rows),
        ("records fingerprint", card.records_fingerprint, wanted.fingerprint),
    )
    differ = [
        f"{what} {short(theirs)} there and {short(ours)} here"
        for what, theirs, ours in sides
        if theirs != ours
    ]
    if differ:
        raise DataError(
            f"the teacher in {name} read other records than {records.directory}: "
            f"{'; '.join(differ)}. Give the records that it read, or let it read these: encdec "
            f"distill logits --records={records.directory} --out=..."
        )


def short(value: Any) -> str:
    """A fingerprint's first 16 digits; other values as they are."""
    return value[:16] if isinstance(value, str) else str(value)
