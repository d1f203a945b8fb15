"""Stores a teacher's logits on records: every row once, a few bytes per target token, resumable.

What is kept of a token depends on the seed, the row's number and the token's place, and on nothing
else.

Shards are written by blocks of rows, and a killed run continues where it was (``encdec.jobs``):
batches never cross shards, so the bytes come out the same.
Several processes on one file system write one shard each at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from encdec.data.records import Records, open_records, write_shard
from encdec.data.shards import Shard
from encdec.data.sparse_logits import SparseFormat, encode_row
from encdec.data.teacher_rows import (
    CARD_FILE,
    TeacherCard,
    read_teacher_card,
    teacher_fingerprint,
    unnamed,
)
from encdec.distill.draw import Kept, to_sparse
from encdec.distill.teacher_logits_settings import TeacherLogitsSettings
from encdec.distill.teachers import JaxBackend, TeacherBackend, teacher_model
from encdec.distill.torch_teacher import TorchBackend, torch_model
from encdec.jobs import DirectoryJob, Notes, Tally
from encdec.processes import wait_for_all
from encdec.storage import as_path

Progress = Callable[["LogitsTally"], None]


@dataclasses.dataclass
class LogitsTally(Tally):
    """Totals over some rows.

    ``entropy`` and ``tail`` are sums over tokens, ``max_pairs`` is the most in one row.
    """

    rows: int = 0
    tokens: int = 0
    pairs: int = 0
    max_pairs: int = dataclasses.field(default=0, metadata={"add": max})
    entropy: float = 0.0
    tail: float = 0.0
    bytes: int = 0


def store_teacher_logits(
    settings: TeacherLogitsSettings = TeacherLogitsSettings(),
    *,
    progress: Progress | None = None,
    **fields: Any,
) -> TeacherCard:
    """Writes a teacher directory as ``settings`` say, or with these of its ``fields``.

    Repeat an interrupted call to continue.

    Args:
        settings: which records, which teacher, and what to keep.
        progress: called after every batch with the tally of all rows so far.
        fields: of ``settings``.

    Returns:
        The card; at once where they are stored already.

    Raises:
        ConfigError: settings out of range or at odds with each other or the devices.
        DataError: records, vocabulary or lengths that do not fit the teacher; ``out`` is taken.
        CheckpointError: no teacher there.
    """
    settings = dataclasses.replace(settings, **fields)
    settings.check()
    opened = open_records(settings.records)
    fmt = settings.format(opened.card.vocabulary.size)
    teacher, backend = _backend(settings, opened, fmt)
    kept = {
        "teacher": unnamed(teacher),
        "records": opened.card.fingerprint,
        "format": fmt.to_dict(),
        "seed": settings.seed,
    }
    layout = {"batch_rows": backend.batch_rows, "hosts": backend.hosts}
    out = as_path(settings.out)
    job = DirectoryJob(
        out,
        "store of teacher logits",
        settings.identity() | kept | layout | {"what": "scoring"},  # its name in earlier versions
        CARD_FILE,
        LogitsTally,
        overwrite=settings.overwrite,
    )
    if job.finished:
        card = read_teacher_card(out)
        job.check_finished(card.identity(), kept)
        return card
    wait_for_all("teacher logits: look")  # nobody writes before all have seen what is there
    with contextlib.ExitStack() as held:
        if not jax.process_index():
            held.enter_context(job.writing())
        wait_for_all("teacher logits: begin")
        run = _Run(settings, backend, opened, fmt, job.notes, progress)
        run.all_shards()
        wait_for_all("teacher logits: shards")
        if not jax.process_index():
            run.card(teacher).write(job.directory)
            job.end()
    wait_for_all("teacher logits: card")
    return read_teacher_card(out)


def _backend(
    settings: TeacherLogitsSettings, records: Records, fmt: SparseFormat
) -> tuple[dict[str, Any], TeacherBackend]:
    """The teacher's identity and its backend; everything is checked, nothing is loaded."""
    rows = {"seed": settings.seed, "batch_rows": settings.batch_rows}
    if settings.backend == "torch":
        theirs = torch_model(settings.teacher, records, settings.vocabulary, settings.max_length)
        return theirs.identity, TorchBackend(theirs, records, fmt, **rows)
    ours = teacher_model(settings.teacher, records, settings.step, settings.max_length)
    return ours.identity, JaxBackend(ours, records, fmt, mesh=settings.mesh, **rows)


class _Run:
    """The shards of one call, group by group: one shard for each host that holds own rows."""

    def __init__(
        self,
        settings: TeacherLogitsSettings,
        backend: TeacherBackend,
        records: Records,
        fmt: SparseFormat,
        notes: Notes[LogitsTally],
        progress: Progress | None,
    ):
        self._backend, self._fmt, self._seed = backend, fmt, settings.seed
        self._shard_rows, self._notes, self._progress = settings.shard_rows, notes, progress
        self.records = records
        self.shards = -(-len(records) // settings.shard_rows)
        self.total = LogitsTally()

    def all_shards(self) -> None:
        """Reads every group of which a shard is not there yet."""
        hosts = self._backend.hosts
        groups = [
            range(first, min(first + hosts, self.shards)) for first in range(0, self.shards, hosts)
        ]
        missing = set(self._notes.missing(range(self.shards))[0])
        # Known to all before anyone writes on.
        wait_for_all("teacher logits: notes")
        for group in groups:
            if missing.isdisjoint(group):
                for number in group:
                    self.total.add(self._notes.read(number)[1])
        open_groups = [group for group in groups if not missing.isdisjoint(group)]
        if not open_groups:
            return
        self._backend.load()
        for group in open_groups:
            self._group(group)

    def _group(self, group: range) -> None:
        """Reads a group's rows; this process writes the shard of its own."""
        tally = LogitsTally()
        rows = self._encoded(group, tally)
        number = group.start + self._backend.host
        if number not in group or not self._backend.writes:
            for _ in rows:
                pass
            return
        shard = write_shard(self._notes.directory / f"logits-{number:06d}.arrayrecord", rows)
        self.total.bytes += shard.bytes - tally.bytes  # so far of the rows alone
        tally.bytes = shard.bytes
        self._notes.write(number, shard, tally)

    def _encoded(self, group: range, tally: LogitsTally) -> Iterator[bytes]:
        """This host's rows of a group in order, read and encoded, one batch behind."""
        size = self._backend.batch_rows // self._backend.hosts
        first = group.start * self._shard_rows  # of the group: the host with most rows
        steps = -(-min(self._shard_rows, len(self.records) - first) // size)
        own = (group.start + self._backend.host) * self._shard_rows
        waiting: tuple[np.ndarray, Kept] | None = None
        for index in range(steps):
            numbers = own + index * size + np.arange(size)
            inside = numbers < min(own + self._shard_rows, len(self.records))
            numbers = np.where(inside, numbers, -1)
            kept = self._backend.forward(numbers)
            if waiting is not None:
                yield from self._encode(*waiting, tally)
            waiting = numbers, kept
        if waiting is not None:
            yield from self._encode(*waiting, tally)

    def _encode(self, numbers: np.ndarray, kept: Kept, tally: LogitsTally) -> Iterator[bytes]:
        host = self._backend.fetch(kept)
        tokens = host.pop("tokens")
        new = LogitsTally()
        for place in np.flatnonzero(numbers >= 0):
            row = to_sparse(
                {name: x[place, : tokens[place]] for name, x in host.items()}, self._fmt
            )
            data = encode_row(row, self._fmt)
            new.add(
                LogitsTally(
                    1,
                    len(row),
                    len(row.ids),
                    len(row.ids),
                    float(row.entropy.sum(dtype=np.float64)),
                    float(row.tail.sum(dtype=np.float64)) if row.tail is not None else 0.0,
                    len(data),
                )
            )
            yield data
        tally.add(new)
        self.total.add(new)
        if self._progress:
            self._progress(self.total)

    def card(self, teacher: dict[str, Any]) -> TeacherCard:
        """The card of all shards, made of their notes."""
        shards: list[Shard] = []
        total = LogitsTally()
        for number in range(self.shards):
            shard, tally = self._notes.read(number)
            shards += [shard] if shard else []
            total.add(tally)
        card, tokens = self.records.card, max(total.tokens, 1)
        return TeacherCard(
            teacher=teacher,
            records_fingerprint=card.fingerprint,
            vocabulary_fingerprint=card.vocabulary.fingerprint,
            inputs_length=card.inputs_length,
            targets_length=card.targets_length,
            format=self._fmt,
            seed=self._seed,
            rows=total.rows,
            tokens=total.tokens,
            pairs=total.pairs,
            max_pairs=total.max_pairs,
            entropy=total.entropy / tokens,
            tail=total.tail / tokens,
            bytes_per_token=total.bytes / tokens,
            shards=tuple(shards),
            fingerprint=teacher_fingerprint(card.fingerprint, self._fmt, shards),
        )
