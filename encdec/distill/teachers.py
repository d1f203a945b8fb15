"""Teachers that read rows of records: one of our models, its parameters spread over a mesh.

Rows are read in the teacher's own layout: a decoder-only teacher sees each segment as
[inputs; targets] with positions from 0, whatever architecture will learn from it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from encdec.cost.flops import count_parameters, forward_flops
from encdec.data.batches import Batches
from encdec.data.input_prefix import with_prefixes
from encdec.data.mixing import MixedRecords
from encdec.data.records import Records
from encdec.data.sparse_logits import SparseFormat
from encdec.data.teacher_rows import short
from encdec.data.vocabulary import VocabularySpec, recorded_vocabulary
from encdec.distill.draw import Kept, keep
from encdec.errors import ConfigError, DataError
from encdec.model import Model, ModelConfig, abstract_params, build_model, logical_axes
from encdec.saved.saved_config import model_config_of, read_config
from encdec.saved.saved_params import load_params_for_inference, step_to_read
from encdec.storage import as_path, directory_name
from encdec.train.across_mesh import on_mesh
from encdec.train.feed import host_slice, to_devices
from encdec.train.losses import loss_positions
from encdec.train.run_fields import MeshConfig
from encdec.train.sharding import ShardingRules, data_shards, make_mesh, param_shardings

HEAD_TOKENS = 32  # positions of a row that have their logits in memory at once


class TeacherBackend(Protocol):
    """Something that reads rows as a teacher.

    Attributes:
        batch_rows: read together, over all processes.
        host, hosts: whose part of them this process reads, of how many parts.
        writes: whether this process is the one to write down what its part gave.
    """

    batch_rows: int
    host: int
    hosts: int
    writes: bool

    def load(self) -> None:
        """Loads the parameters; called once, before the first row."""

    def forward(self, numbers: np.ndarray) -> Kept:
        """What is kept of each target token of this process's rows, -1 standing for none.

        The axes [rows, T] come first, T the row's loss-bearing positions in order; "tokens"
        [rows] int32 says how many of them are real. May return before it is computed.
        """

    def fetch(self, kept: Kept) -> dict[str, np.ndarray]:
        """What ``forward`` gave, once it is there."""


@dataclasses.dataclass(frozen=True)
class TeacherModel:
    """A teacher that fits the records; its parameters are not loaded yet.

    Attributes:
        workdir: where it is.
        config: its architecture.
        step: of the checkpoint; 0 of an imported model.
        identity: name, step, parameters and a fingerprint, for the card.
        start_id: the id before the first token of a text, as it was trained.
        inputs_prefix: the ids in front of a source, after ``start_id`` or in an encoder.
    """

    workdir: pathlib.Path
    config: ModelConfig
    step: int
    identity: dict[str, Any]
    start_id: int
    inputs_prefix: tuple[int, ...] = ()

    def forward_flops(self, records: Records) -> float:
        """Of one pass over all rows, padding included."""
        card = records.card
        return forward_flops(
            self.config, card.inputs_length, card.targets_length, batch_size=card.rows
        ).total


def teacher_model(
    workdir: str | os.PathLike[str],
    records: Records,
    step: int | None = None,
    max_length: int | None = None,
) -> TeacherModel:
    """The teacher, if it can read these records.

    Raises:
        CheckpointError: no teacher there.
        ConfigError: the records are a mixture.
        DataError: another vocabulary, or texts longer than the teacher is right for.
    """
    content = read_config(workdir)
    config, data = model_config_of(content), content["data"]
    vocabulary = recorded_vocabulary(content, workdir)
    check_records(records, workdir, VocabularySpec(**vocabulary), str(workdir))
    _check_lengths(content, records, max_length, workdir)
    imported, step = content.get("imported"), step_to_read(workdir, step)
    if imported:
        source = imported["fingerprint"]
    else:
        parts = ("run", "model", "data", "averaged")  # the last of averages alone
        what = {part: content[part] for part in parts if part in content}
        source = hashlib.sha256(json.dumps([what, step], sort_keys=True).encode()).hexdigest()
    identity = {
        "name": directory_name(workdir),
        "step": step,
        "fingerprint": source,
        "architecture": config.architecture,
        "parameters": count_parameters(config).total,
    }
    prefix = tuple(data.get("inputs_prefix", ()))
    return TeacherModel(as_path(workdir), config, step, identity, data["decoder_start_id"], prefix)


def check_records(
    records: Records, teacher: str | os.PathLike[str], vocabulary: VocabularySpec, remedy: str
) -> None:
    """Refuses mixtures (ConfigError) and another vocabulary than the teacher's (DataError).

    ``remedy`` is what to prepare records with instead.
    """
    if isinstance(records, MixedRecords):
        parts = ", ".join(str(part.directory) for part in records.parts)
        raise ConfigError(
            f"--records is a mixture of {parts}; store logits for each of them, and train with "
            "config.distill.teacher=TEACHER_A,TEACHER_B"
        )
    wanted = records.card.vocabulary
    if vocabulary.fingerprint != wanted.fingerprint:
        raise DataError(
            f"the teacher in {teacher} has the vocabulary {short(vocabulary.fingerprint)} of "
            f"{vocabulary.size:,} ids, but the records in {records.directory} have "
            f"{short(wanted.fingerprint)} of {wanted.size:,}; both must be the same: prepare "
            f"records with --vocabulary={remedy}"
        )


def _check_lengths(
    content: dict[str, Any],
    records: Records,
    max_length: int | None,
    workdir: str | os.PathLike[str],
) -> None:
    """Raises DataError where a text is longer than the teacher supports."""
    data = content["data"]
    right_for = (
        max_length
        or content.get("imported", {}).get("max_length")
        or (data["inputs_length"] + data["targets_length"])
    )
    check_longest(records, right_for, workdir)


def check_longest(records: Records, right_for: int, teacher: str | os.PathLike[str]) -> None:
    """Raises DataError where a text has more than ``right_for`` tokens."""
    if records.card.inputs_length + records.card.targets_length <= right_for:
        return
    longest = longest_segment(records)
    if longest > right_for:
        raise DataError(
            f"the longest text in {records.directory} has {longest:,} tokens, but the teacher in "
            f"{teacher} supports {right_for:,}; prepare shorter rows, or give "
            f"--max_length={longest} if it can read more than it was trained on"
        )


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


def make_logits_step(
    model: Model, fmt: SparseFormat, targets_length: int, seed: int
) -> Callable[[Any, dict[str, jax.Array]], Kept]:
    """``logits_step(params, batch) -> kept``, to be jitted.

    ``batch`` has the teacher's layout and ``row_numbers`` [B] uint32. Every value kept has the
    axes [B, T] first, T the row's loss-bearing positions in order, and "tokens" [B] int32 says how
    many of them are real.
    """
    positions = -(-targets_length // HEAD_TOKENS) * HEAD_TOKENS

    def logits_step(params: Any, batch: dict[str, jax.Array]) -> Kept:
        hidden = cast(jax.Array, model.apply({"params": params}, batch, method="hidden"))
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
            logits = cast(jax.Array, logits)
            keys_BxC = jax.vmap(fold, in_axes=(0, None))(keys_B, places_C)
            kept = keep(logits.reshape(-1, logits.shape[-1]), keys_BxC.reshape(-1), fmt)
            return jax.tree.map(lambda x: x.reshape(rows, HEAD_TOKENS, *x.shape[1:]), kept)

        # In parts, because all logits of a batch may not fit next to a large teacher.
        kept = jax.lax.map(some_tokens, (parts, places))
        kept = jax.tree.map(
            lambda x: x.swapaxes(0, 1).reshape(rows, positions, *x.shape[3:])[:, :targets_length],
            kept,
        )
        return kept | {"tokens": jnp.sum(weights_BxT > 0, axis=1, dtype=jnp.int32)}

    return logits_step


class JaxBackend:
    """A model of ours as a ``TeacherBackend``, sharded over the mesh."""

    def __init__(
        self,
        model: TeacherModel,
        records: Records,
        fmt: SparseFormat,
        *,
        seed: int,
        batch_rows: int,
        mesh: MeshConfig,
    ):
        """``batch_rows`` 0 is 8 for each data shard of the mesh.

        Raises ConfigError where the rows do not divide over the devices.
        """
        self._model, self._fmt, self._seed = model, fmt, seed
        self._targets_length = records.card.targets_length
        self._mesh = make_mesh(mesh)
        shards = data_shards(self._mesh)
        self.batch_rows = batch_rows or 8 * shards
        if self.batch_rows % shards:
            raise ConfigError(
                f"--batch_rows is {batch_rows}; expected a multiple of the {shards} "
                "data shards of the mesh"
            )
        self._sharding = NamedSharding(self._mesh, PartitionSpec(ShardingRules().batch))
        self.host, self.hosts = host_slice(self._sharding, self.batch_rows)
        self.writes = _writes(self._sharding, self.batch_rows)
        # The teacher's own ids before a text, which need not be the student's.
        own = copy.copy(with_prefixes(records, model.inputs_prefix))
        own.card = dataclasses.replace(own.card, decoder_start_id=model.start_id)
        self._batches = Batches(
            own,
            global_batch=self.batch_rows,
            layout=model.config.architecture,
            host_index=self.host,
            host_count=self.hosts,
        )
        self._step: Any = None
        self._params: Any = None

    def load(self) -> None:
        mesh, model = self._mesh, build_model(self._model.config)
        shardings, fitted, _ = param_shardings(
            ShardingRules(), mesh, abstract_params(model), logical_axes(model)
        )
        _, self._params, _ = load_params_for_inference(
            self._model.workdir, self._model.step or None, shardings
        )
        step = make_logits_step(model, self._fmt, self._targets_length, self._seed)
        self._step = jax.jit(
            on_mesh(step, mesh, fitted),
            in_shardings=(shardings, self._sharding),
            out_shardings=self._sharding,
        )

    def forward(self, numbers: np.ndarray) -> Kept:
        batch = self._batches.read_rows(numbers)
        batch["row_numbers"] = np.maximum(numbers, 0).astype(np.uint32)
        return self._step(self._params, to_devices(batch, self._sharding, self.batch_rows))

    def fetch(self, kept: Kept) -> dict[str, np.ndarray]:
        return {name: _local_rows(cast(jax.Array, x)) for name, x in kept.items()}


def _local_rows(x: jax.Array) -> np.ndarray:
    """The rows of this process's devices, in order, each once."""
    pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def _writes(sharding: NamedSharding, rows: int) -> bool:
    """Whether this process is the first of those whose devices hold its rows."""
    holders: dict[int, int] = {}
    own, mine = jax.process_index(), set()
    places: Mapping[Any, Any] = sharding.devices_indices_map((rows,))
    for device, index in places.items():
        start = index[0].start or 0
        holders[start] = min(holders.get(start, device.process_index), device.process_index)
        if device.process_index == own:
            mine.add(start)
    return all(holders[start] == own for start in mine)
