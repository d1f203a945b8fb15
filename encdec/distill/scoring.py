"""Scores records with a teacher: every row once, a few bytes a target token, resumable.

Rows are read in the teacher's own layout: a decoder-only teacher sees each segment as
[inputs; targets] with positions from 0, whatever architecture will learn from it. What is kept of a
token depends on the seed, the row's number and the token's place, and on nothing else.

Shards are written by blocks of rows. Each finished shard leaves a note under ``scoring/``, so that
a killed run goes on where it was; batches never cross shards, so the bytes come out the same.
Several processes on one file system write one shard each at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from encdec.data.batches import Batches
from encdec.data.mixing import MixedRecords
from encdec.data.records import Records, Shard, open_records, write_json, write_shard
from encdec.distill.draw import Kept, keep, to_sparse
from encdec.distill.sparse_logits import SparseFormat, encode_row
from encdec.distill.teacher import (
    CARD_FILE,
    TeacherCard,
    read_teacher_card,
    short,
    teacher_fingerprint,
)
from encdec.errors import ConfigError, DataError
from encdec.model import (
    Model,
    ModelConfig,
    abstract_params,
    build_model,
    logical_axes,
)
from encdec.model.flops import count_parameters
from encdec.train.checkpoints import latest_step, load_params_for_inference
from encdec.train.config import MeshConfig
from encdec.train.feed import host_slice, to_devices
from encdec.train.losses import loss_positions
from encdec.train.sharding import ShardingRules, data_shards, make_mesh, on_mesh, param_shardings
from encdec.train.workdir import model_config_of, read_config

NOTES = "scoring"
SHARD_ROWS = 1024
HEAD_TOKENS = 32  # positions of a row that have their logits in memory at once

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


@dataclasses.dataclass(frozen=True)
class ScoringModel:
    """A teacher that fits the records; its parameters are not loaded yet.

    Attributes:
        workdir: where it lies.
        config: its architecture.
        step: of the checkpoint; 0 of an imported model.
        identity: name, step, parameters and a fingerprint, for the card.
        start_id: the id before the first token of a text, as it was trained.
    """

    workdir: pathlib.Path
    config: ModelConfig
    step: int
    identity: dict[str, Any]
    start_id: int


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
) -> TeacherCard:
    """Writes a teacher directory for ``records``, or goes on with one that was interrupted.

    Args:
        teacher: work directory of ``encdec train`` or ``encdec import``.
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
        raise ConfigError(f"--seed={seed}, --shard_rows={shard_rows}, --batch_rows={batch_rows}: "
                          "wanted a seed from 0 to 2^31 - 1 and positive numbers of rows")
    model = scoring_model(teacher, opened, step, max_length)
    devices = make_mesh(mesh)
    shards = data_shards(devices)
    batch_rows = batch_rows or 8 * shards
    if batch_rows % shards:
        raise ConfigError(f"--batch_rows is {batch_rows}; wanted a multiple of the {shards} data "
                          "shards of the mesh")
    sharding = NamedSharding(devices, PartitionSpec(ShardingRules().batch))
    host, hosts = host_slice(sharding, batch_rows)
    job = {"teacher": model.identity, "records": opened.card.fingerprint, "format": fmt.to_dict(),
           "seed": seed, "batch_rows": batch_rows, "hosts": hosts, "shard_rows": shard_rows}
    out = pathlib.Path(out)
    if _check_out(out, job, overwrite):
        return read_teacher_card(out)
    if not jax.process_index():
        _begin(out, job, overwrite)
    _meet("begin")
    run = _Run(model, opened, fmt, seed, sharding, batch_rows, shard_rows, out, host, hosts,
               _writes(sharding, batch_rows), progress)
    run.all_shards()
    _meet("shards")
    if not jax.process_index():
        run.card().write(out)
        shutil.rmtree(out / NOTES)
    _meet("card")
    return read_teacher_card(out)


def scoring_model(
    workdir: str | pathlib.Path, records: Records, step: int | None = None,
    max_length: int | None = None,
) -> ScoringModel:
    """The teacher, if it can read these records.

    Raises:
        CheckpointError: no teacher there.
        ConfigError: the records are a mixture.
        DataError: another vocabulary, or texts longer than the teacher is right for.
    """
    if isinstance(records, MixedRecords):
        parts = ", ".join(str(part.directory) for part in records.parts)
        raise ConfigError(f"--records is a mixture of {parts}; score each of them by itself, and "
                          "train with config.distill.teacher=TEACHER_A,TEACHER_B")
    content = read_config(workdir)
    config, data = model_config_of(content), content["data"]
    vocabulary, wanted = data["vocabulary"], records.card.vocabulary
    if vocabulary is None:
        raise DataError(f"the vocabulary of the teacher in {workdir} is unknown; import it again "
                        "with --vocabulary=FILE")
    if vocabulary["fingerprint"] != wanted.fingerprint:
        raise DataError(
            f"the teacher in {workdir} has the vocabulary {short(vocabulary['fingerprint'])} of "
            f"{vocabulary['size']:,} ids, the records in {records.directory} have "
            f"{short(wanted.fingerprint)} of {wanted.size:,}; a teacher's logits mean nothing in "
            f"another vocabulary: prepare with --vocabulary={workdir}")
    _check_lengths(content, records, max_length, workdir)
    imported = content.get("imported")
    if imported:
        name, source, step = imported["name"], imported["fingerprint"], step or 0
    else:
        name, step = content["run"]["model"], latest_step(workdir, step)
        what = {part: content[part] for part in ("run", "model", "data")}
        source = hashlib.sha256(json.dumps([what, step], sort_keys=True).encode()).hexdigest()
    identity = {"name": name, "step": step, "fingerprint": source,
                "architecture": config.architecture, "parameters": count_parameters(config).total}
    return ScoringModel(
        pathlib.Path(workdir), config, step, identity, data["decoder_start_id"])


def _check_lengths(
    content: dict[str, Any], records: Records, max_length: int | None, workdir: str | pathlib.Path
) -> None:
    """Raises DataError where a text is longer than what the teacher is right for."""
    card, data = records.card, content["data"]
    right_for = max_length or content.get("imported", {}).get("max_length") or (
        data["inputs_length"] + data["targets_length"])
    row = card.inputs_length + card.targets_length
    if row > right_for:
        longest = longest_segment(records)
        if longest > right_for:
            raise DataError(
                f"the longest text in {records.directory} has {longest:,} tokens, and the teacher "
                f"in {workdir} is right for {right_for:,}; prepare shorter rows, or give "
                f"--max_length={longest} if it can read more than it was trained on")


def longest_segment(records: Records, at_once: int = 4096) -> int:
    """Tokens of the longest [inputs; targets] of any row."""
    longest = 0
    dtype = np.dtype(records.card.token_dtype).newbyteorder("<")
    for first in range(0, len(records), at_once):
        for data in records.read(range(first, min(first + at_once, len(records)))):
            row = np.frombuffer(data, dtype)
            count = int(row[0])
            lengths = row[1 : 1 + 2 * count].astype(np.int64).reshape(2, count)
            longest = max(longest, int(lengths.sum(axis=0).max()))
    return longest


def make_score_step(
    model: Model, fmt: SparseFormat, targets_length: int, seed: int
) -> Callable[[Any, dict[str, jax.Array]], Kept]:
    """``score_step(params, batch) -> kept``, to be jitted.

    ``batch`` has the teacher's layout and ``row_numbers`` [B] uint32. Every value kept has the
    axes [B, T] first, T the row's loss-bearing positions in order, and "tokens" [B] int32 says how
    many of them are real.
    """
    positions = -(-targets_length // HEAD_TOKENS) * HEAD_TOKENS

    def score_step(params: Any, batch: dict[str, jax.Array]) -> Kept:
        hidden = model.apply({"params": params}, batch, method="hidden")
        weights_BxT = batch["decoder_loss_weights"]
        if not model.config.is_encoder_decoder:
            hidden, _, weights_BxT = loss_positions(hidden, batch, targets_length)
        rows, width = hidden.shape[0], hidden.shape[-1]
        hidden = jnp.pad(hidden, ((0, 0), (0, positions - targets_length), (0, 0)))
        parts = hidden.reshape(rows, -1, HEAD_TOKENS, width).swapaxes(0, 1)
        places = jnp.arange(positions, dtype=jnp.uint32).reshape(-1, HEAD_TOKENS)
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        keys_B = fold(jax.random.key(seed), batch["row_numbers"])

        def some_tokens(part: tuple[jax.Array, jax.Array]) -> Kept:
            hidden_BxCxM, places_C = part
            logits = model.apply({"params": params}, hidden_BxCxM, method="logits")
            keys_BxC = jax.vmap(fold, in_axes=(0, None))(keys_B, places_C)
            kept = keep(logits.reshape(-1, logits.shape[-1]), keys_BxC.reshape(-1), fmt)
            return jax.tree.map(lambda x: x.reshape(rows, HEAD_TOKENS, *x.shape[1:]), kept)

        # In parts, because all logits of a batch may not fit beside a large teacher.
        kept = jax.lax.map(some_tokens, (parts, places))
        kept = jax.tree.map(
            lambda x: x.swapaxes(0, 1).reshape(rows, positions, *x.shape[3:])[:, :targets_length],
            kept)
        return kept | {"tokens": jnp.sum(weights_BxT > 0, axis=1, dtype=jnp.int32)}

    return score_step


class _Run:
    """The shards of one scoring, group by group: one shard for each host that holds own rows."""

    def __init__(
        self, model: ScoringModel, records: Records, fmt: SparseFormat, seed: int,
        sharding: NamedSharding, batch_rows: int, shard_rows: int, out: pathlib.Path, host: int,
        hosts: int, writes: bool, progress: Progress | None,
    ):
        self._model, self._fmt, self._seed, self._sharding = model, fmt, seed, sharding
        self._batch_rows, self._shard_rows, self._out = batch_rows, shard_rows, out
        self._host, self._hosts, self._writes, self._progress = host, hosts, writes, progress
        self.records = records
        # The teacher's own id before a text, which need not be the student's.
        own = copy.copy(records)
        own.card = dataclasses.replace(records.card, decoder_start_id=model.start_id)
        self._batches = Batches(
            own, global_batch=batch_rows, layout=model.config.architecture, host_index=host,
            host_count=hosts)
        self.shards = -(-len(records) // shard_rows)
        self.total = Tally()

    def all_shards(self) -> None:
        """Scores every group of which a shard is not there yet."""
        groups = [range(first, min(first + self._hosts, self.shards))
                  for first in range(0, self.shards, self._hosts)]
        open_groups = [group for group in groups
                       if any(self.note(number) is None for number in group)]
        # Known to all before anyone writes on.
        _meet("notes")
        for number in set(range(self.shards)) - {n for group in open_groups for n in group}:
            self.total.add(self.note(number)[1])
        if not open_groups:
            return
        step, params = self._compiled()
        for group in open_groups:
            self._group(group, step, params)

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

    def _compiled(self) -> tuple[Any, Any]:
        """The jitted step and the parameters, laid out over the mesh."""
        config, mesh = self._model.config, self._sharding.mesh
        model = build_model(config)
        shardings, fitted, _ = param_shardings(
            ShardingRules(), mesh, abstract_params(model), logical_axes(model))
        _, params, _ = load_params_for_inference(
            self._model.workdir, self._model.step or None, shardings)
        step = make_score_step(model, self._fmt, self.records.card.targets_length, self._seed)
        return jax.jit(on_mesh(step, mesh, fitted), in_shardings=(shardings, self._sharding),
                       out_shardings=self._sharding), params

    def _group(self, group: range, step: Any, params: Any) -> None:
        """Scores a group's rows; this process writes the shard of its own."""
        tally = Tally()
        rows = self._encoded(group, step, params, tally)
        number = group.start + self._host
        if number not in group or not self._writes:
            for _ in rows:
                pass
            return
        shard = write_shard(self._out / f"logits-{number:06d}.arrayrecord", rows)
        tally.bytes = shard.bytes
        write_json(self._note_path(number),
                   {"shard": dataclasses.asdict(shard), "tally": dataclasses.asdict(tally)})
        self.total.bytes += shard.bytes

    def _encoded(self, group: range, step: Any, params: Any, tally: Tally) -> Iterator[bytes]:
        """This host's rows of a group in order, scored and encoded, one batch behind."""
        size = self._batch_rows // self._hosts
        first = group.start * self._shard_rows  # of the group: the host with most rows
        steps = -(-min(self._shard_rows, len(self.records) - first) // size)
        own = (group.start + self._host) * self._shard_rows
        waiting: tuple[np.ndarray, Kept] | None = None
        for index in range(steps):
            numbers = own + index * size + np.arange(size)
            inside = numbers < min(own + self._shard_rows, len(self.records))
            numbers = np.where(inside, numbers, -1)
            batch = self._batches.read_rows(numbers)
            batch["row_numbers"] = np.maximum(numbers, 0).astype(np.uint32)
            kept = step(params, to_devices(batch, self._sharding, self._batch_rows))
            if waiting is not None:
                yield from self._encode(*waiting, tally)
            waiting = numbers, kept
        if waiting is not None:
            yield from self._encode(*waiting, tally)

    def _encode(self, numbers: np.ndarray, kept: Kept, tally: Tally) -> Iterator[bytes]:
        host = {name: _local_rows(x) for name, x in kept.items()}
        tokens = host.pop("tokens")
        new = Tally()
        for place in np.flatnonzero(numbers >= 0):
            row = to_sparse({name: x[place, : tokens[place]] for name, x in host.items()},
                            self._fmt)
            new.add(Tally(
                1, len(row), len(row.ids), len(row.ids), float(row.entropy.sum(dtype=np.float64)),
                float(row.tail.sum(dtype=np.float64)) if row.tail is not None else 0.0))
            yield encode_row(row, self._fmt)
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
            teacher=self._model.identity, records_fingerprint=card.fingerprint,
            vocabulary_fingerprint=card.vocabulary.fingerprint, inputs_length=card.inputs_length,
            targets_length=card.targets_length, format=self._fmt, seed=self._seed,
            rows=total.rows, tokens=total.tokens, pairs=total.pairs, max_pairs=total.max_pairs,
            entropy=total.entropy / tokens, tail=total.tail / tokens,
            bytes_per_token=total.bytes / tokens, shards=tuple(shards),
            fingerprint=teacher_fingerprint(card.fingerprint, self._fmt, shards))


def _local_rows(x: jax.Array) -> np.ndarray:
    """The rows of this process's devices, in order, each once."""
    pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def _writes(sharding: NamedSharding, rows: int) -> bool:
    """Whether this process is the first of those whose devices hold its rows."""
    holders: dict[int, int] = {}
    for device, index in sharding.devices_indices_map((rows,)).items():
        start = index[0].start or 0
        holders[start] = min(holders.get(start, device.process_index), device.process_index)
    mine = [index[0].start or 0
            for index in sharding.addressable_devices_indices_map((rows,)).values()]
    return all(holders[start] == jax.process_index() for start in mine)


def _check_out(out: pathlib.Path, job: dict[str, Any], overwrite: bool) -> bool:
    """Whether this very scoring is done; DataError where ``out`` holds something else."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; give another --out")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    ours = (out / CARD_FILE).is_file() or (out / NOTES).is_dir()
    if not ours:
        raise DataError(f"{out} is not empty and holds no teacher's rows; give another --out "
                        "(--overwrite replaces these only)")
    if overwrite:
        return False
    done = (out / CARD_FILE).is_file()
    if done:
        card = read_teacher_card(out)
        begun = {"teacher": card.teacher, "records": card.records_fingerprint,
                 "format": card.format.to_dict(), "seed": card.seed}
    else:
        begun = json.loads((out / NOTES / "job.json").read_text())
    differ = [f"{name} is {value} there and {job[name]} here"
              for name, value in begun.items() if value != json.loads(json.dumps(job[name]))]
    if differ:
        raise DataError(f"{out} holds another scoring: {'; '.join(differ)}. Repeat that command, "
                        "give another --out, or --overwrite to replace it")
    return done


def _begin(out: pathlib.Path, job: dict[str, Any], overwrite: bool) -> None:
    if overwrite and out.is_dir():
        shutil.rmtree(out)
    (out / NOTES).mkdir(parents=True, exist_ok=True)
    write_json(out / NOTES / "job.json", job)


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"encdec score: {name}")
