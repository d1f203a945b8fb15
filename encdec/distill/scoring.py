"""Scores records with a teacher: every row once, a few bytes a target token, resumable.

What is kept of a token depends on the seed, the row's number and the token's place, and on nothing
else.

Shards are written by blocks of rows. Each finished shard leaves a note under ``scoring/``, so that
a killed run goes on where it was; batches never cross shards, so the bytes come out the same.
Several processes on one file system write one shard each at a time.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from encdec.data.records import Records, Shard, open_records, write_json, write_shard
from encdec.data.sparse_logits import SparseFormat, encode_row
from encdec.data.teacher_rows import CARD_FILE, TeacherCard, read_teacher_card, teacher_fingerprint
from encdec.distill.draw import Kept, to_sparse
from encdec.distill.scorers import JaxScorer, Scorer, scoring_model
from encdec.distill.torch_scorer import TorchScorer, torch_model
from encdec.errors import ConfigError, DataError
from encdec.train.config import MeshConfig

NOTES = "scoring"
SHARD_ROWS = 1024

Progress = Callable[["Tally"], None]


@dataclasses.dataclass
class Tally:
    """What some rows came to; tallies of shards add up.

    ``entropy`` and ``tail`` are sums over tokens, ``max_pairs`` is the most in one row.
    """

    rows: int = 0
    tokens: int = 0
    pairs: int = 0
    max_pairs: int = 0
    entropy: float = 0.0
    tail: float = 0.0
    bytes: int = 0

    def add(self, other: Tally) -> None:
        for field in dataclasses.fields(self):
            mine, more = getattr(self, field.name), getattr(other, field.name)
            whole = max(mine, more) if field.name == "max_pairs" else mine + more
            setattr(self, field.name, whole)


def score(
    teacher: str | pathlib.Path,
    records: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    method: str = "sampled",
    draws: int = 50,
    k: int = 12,
    temperature: float = 1.0,
    proposal: float = 1.0,
    step: int | None = None,
    seed: int = 0,
    batch_rows: int = 0,
    shard_rows: int = SHARD_ROWS,
    mesh: MeshConfig = MeshConfig(),
    max_length: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    backend: str = "jax",
    vocabulary: str | pathlib.Path | None = None,
) -> TeacherCard:
    """Writes a teacher directory for ``records``, or goes on with one that was interrupted.

    Args:
        teacher: work directory of ``encdec train`` or ``encdec import``; with the torch backend
            a Hugging Face directory.
        records: directory of ``encdec prepare``.
        out: receives shards and ``teacher.json``.
        method, draws, k, temperature, proposal: see ``SparseFormat``.
        step: checkpoint of the teacher; by default the last.
        seed: of the draws.
        batch_rows: rows in one forward pass over all devices; 0: 8 for each data shard.
        shard_rows: rows in a file, which is what a killed run may lose.
        mesh: how the teacher is laid out on the devices.
        max_length: tokens that the teacher may read at once, where it is right for more than it
            was trained on.
        overwrite: replace what an earlier scoring left in ``out``.
        progress: called after every batch with the tally of all rows so far.
        backend: "jax", or "torch" for families that ``encdec import`` does not know.
        vocabulary: of a torch teacher, by default the one in its directory.

    Returns:
        The card; at once where this very scoring is done already.

    Raises:
        ConfigError: settings out of range or at odds with each other or the devices.
        DataError: records, vocabulary or lengths that do not fit the teacher; ``out`` is taken.
        CheckpointError: no teacher there.
    """
    opened = open_records(records)
    fmt = SparseFormat(method, opened.card.vocabulary.size, draws, k, temperature, proposal)
    if not 0 <= seed < 2**31 or shard_rows < 1 or batch_rows < 0:
        raise ConfigError(
            f"--seed={seed}, --shard_rows={shard_rows}, --batch_rows={batch_rows}: "
            "wanted a seed from 0 to 2^31 - 1 and positive numbers of rows"
        )
    identity, scorer = _scorer(
        teacher,
        opened,
        fmt,
        backend,
        step=step,
        max_length=max_length,
        seed=seed,
        batch_rows=batch_rows,
        mesh=mesh,
        vocabulary=vocabulary,
    )
    job = {
        "teacher": identity,
        "records": opened.card.fingerprint,
        "format": fmt.to_dict(),
        "seed": seed,
        "batch_rows": scorer.batch_rows,
        "hosts": scorer.hosts,
        "shard_rows": shard_rows,
    }
    out = pathlib.Path(out)
    if _check_out(out, job, overwrite):
        return read_teacher_card(out)
    _meet("look")  # nobody writes before all have seen what lies there
    if not jax.process_index():
        _begin(out, job, overwrite)
    _meet("begin")
    run = _Run(identity, scorer, opened, fmt, seed, shard_rows, out, progress)
    run.all_shards()
    _meet("shards")
    if not jax.process_index():
        run.card().write(out)
        shutil.rmtree(out / NOTES)
    _meet("card")
    return read_teacher_card(out)


def _scorer(
    teacher: str | pathlib.Path,
    records: Records,
    fmt: SparseFormat,
    backend: str,
    *,
    step: int | None,
    max_length: int | None,
    seed: int,
    batch_rows: int,
    mesh: MeshConfig,
    vocabulary: str | pathlib.Path | None,
) -> tuple[dict[str, Any], Scorer]:
    """Who the teacher is, and how it reads rows; everything is checked, nothing is loaded."""
    if backend == "torch":
        if step is not None or mesh != MeshConfig():
            raise ConfigError(
                "--step, --fsdp and --tensor mean nothing to --backend=torch; leave "
                "them out, or import the model with encdec import"
            )
        model = torch_model(teacher, records, vocabulary, max_length)
        return model.identity, TorchScorer(model, records, fmt, seed=seed, batch_rows=batch_rows)
    if backend != "jax":
        raise ConfigError(f"--backend is {backend!r}; wanted 'jax' or 'torch'")
    if vocabulary is not None:
        raise ConfigError("--vocabulary is for --backend=torch; a work directory holds its own")
    ours = scoring_model(teacher, records, step, max_length)
    return ours.identity, JaxScorer(ours, records, fmt, seed=seed, batch_rows=batch_rows, mesh=mesh)


class _Run:
    """The shards of one scoring, group by group: one shard for each host that holds own rows."""

    def __init__(
        self,
        identity: dict[str, Any],
        scorer: Scorer,
        records: Records,
        fmt: SparseFormat,
        seed: int,
        shard_rows: int,
        out: pathlib.Path,
        progress: Progress | None,
    ):
        self._identity, self._scorer, self._fmt, self._seed = identity, scorer, fmt, seed
        self._shard_rows, self._out, self._progress = shard_rows, out, progress
        self.records = records
        self.shards = -(-len(records) // shard_rows)
        self.total = Tally()

    def all_shards(self) -> None:
        """Scores every group of which a shard is not there yet."""
        hosts = self._scorer.hosts
        groups = [
            range(first, min(first + hosts, self.shards)) for first in range(0, self.shards, hosts)
        ]
        open_groups = [
            group for group in groups if any(self.note(number) is None for number in group)
        ]
        # Known to all before anyone writes on.
        _meet("notes")
        for number in set(range(self.shards)) - {n for group in open_groups for n in group}:
            self.total.add(self.note(number)[1])
        if not open_groups:
            return
        self._scorer.load()
        for group in open_groups:
            self._group(group)

    def note(self, number: int) -> tuple[Shard, Tally] | None:
        """What a finished shard left; None where it is missing."""
        path = self._note_path(number)
        if not path.is_file():
            return None
        content = json.loads(path.read_text())
        shard = Shard(**content["shard"])
        file = self._out / shard.name
        whole = file.is_file() and file.stat().st_size == shard.bytes
        return (shard, Tally(**content["tally"])) if whole else None

    def _note_path(self, number: int) -> pathlib.Path:
        return self._out / NOTES / f"{number:06d}.json"

    def _group(self, group: range) -> None:
        """Scores a group's rows; this process writes the shard of its own."""
        tally = Tally()
        rows = self._encoded(group, tally)
        number = group.start + self._scorer.host
        if number not in group or not self._scorer.writes:
            for _ in rows:
                pass
            return
        shard = write_shard(self._out / f"logits-{number:06d}.arrayrecord", rows)
        self.total.bytes += shard.bytes - tally.bytes  # so far of the rows alone
        tally.bytes = shard.bytes
        write_json(
            self._note_path(number),
            {"shard": dataclasses.asdict(shard), "tally": dataclasses.asdict(tally)},
        )

    def _encoded(self, group: range, tally: Tally) -> Iterator[bytes]:
        """This host's rows of a group in order, scored and encoded, one batch behind."""
        size = self._scorer.batch_rows // self._scorer.hosts
        first = group.start * self._shard_rows  # of the group: the host with most rows
        steps = -(-min(self._shard_rows, len(self.records) - first) // size)
        own = (group.start + self._scorer.host) * self._shard_rows
        waiting: tuple[np.ndarray, Kept] | None = None
        for index in range(steps):
            numbers = own + index * size + np.arange(size)
            inside = numbers < min(own + self._shard_rows, len(self.records))
            numbers = np.where(inside, numbers, -1)
            kept = self._scorer.score(numbers)
            if waiting is not None:
                yield from self._encode(*waiting, tally)
            waiting = numbers, kept
        if waiting is not None:
            yield from self._encode(*waiting, tally)

    def _encode(self, numbers: np.ndarray, kept: Kept, tally: Tally) -> Iterator[bytes]:
        host = self._scorer.fetch(kept)
        tokens = host.pop("tokens")
        new = Tally()
        for place in np.flatnonzero(numbers >= 0):
            row = to_sparse(
                {name: x[place, : tokens[place]] for name, x in host.items()}, self._fmt
            )
            data = encode_row(row, self._fmt)
            new.add(
                Tally(
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

    def card(self) -> TeacherCard:
        """The card of all shards, made of their notes."""
        shards, total = [], Tally()
        for number in range(self.shards):
            shard, tally = self.note(number)
            shards.append(shard)
            total.add(tally)
        card, tokens = self.records.card, max(total.tokens, 1)
        return TeacherCard(
            teacher=self._identity,
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


def _check_out(out: pathlib.Path, job: dict[str, Any], overwrite: bool) -> bool:
    """Whether this very scoring is done; DataError where ``out`` holds something else."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; give another --out")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    ours = (out / CARD_FILE).is_file() or (out / NOTES).is_dir()
    if not ours:
        raise DataError(
            f"{out} is not empty and holds no teacher's rows; give another --out "
            "(--overwrite replaces these only)"
        )
    if overwrite:
        return False
    done = (out / CARD_FILE).is_file()
    if done:
        card = read_teacher_card(out)
        begun = {
            "teacher": card.teacher,
            "records": card.records_fingerprint,
            "format": card.format.to_dict(),
            "seed": card.seed,
        }
    elif not (out / NOTES / "job.json").is_file():
        return False  # it was killed as it began, before it wrote anything
    else:
        begun = json.loads((out / NOTES / "job.json").read_text())
    differ = [
        f"{name} is {value} there and {job[name]} here"
        for name, value in begun.items()
        if value != json.loads(json.dumps(job[name]))
    ]
    if differ:
        raise DataError(
            f"{out} holds another scoring: {'; '.join(differ)}. Repeat that command, "
            "give another --out, or --overwrite to replace it"
        )
    return done


def _begin(out: pathlib.Path, job: dict[str, Any], overwrite: bool) -> None:
    if overwrite and out.is_dir():
        shutil.rmtree(out)
    (out / NOTES).mkdir(parents=True, exist_ok=True)
    write_json(out / NOTES / "job.json", job)


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"encdec score: {name}")
