"""The sources of an adapted model: work directories of decoder-only models, and what they hold."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from encdec.data.vocabulary import Vocabulary, load_vocabulary, recorded_vocabulary
from encdec.errors import ConfigError, DataError
from encdec.interop.framing import Framing
from encdec.model import ModelConfig, unroll_params
from encdec.model.parameter_names import path_name
from encdec.saved.lineage import Lineage, lineage
from encdec.saved.saved_config import model_config_of, read_config
from encdec.saved.saved_params import load_params_for_inference, step_to_read
from encdec.storage import absolute, directory_name

# Tables with one row, or column, an id of the vocabulary: the axis of ids.
VOCABULARY_AXIS = {"embedder/embedding": 0, "encoder_embedder/embedding": 0, "embedder/head": 1}


@dataclasses.dataclass(frozen=True)
class AdaptationSource:
    """A decoder-only model's work directory; parameters are read only when needed.

    Attributes:
        directory: the work directory.
        content: its config.json.
        config: its model.
        step: of the checkpoint that is taken; 0 of an imported model.
    """

    directory: pathlib.Path | epath.Path
    content: Mapping[str, Any]
    config: ModelConfig
    step: int

    @property
    def place(self) -> str:
        """Its directory, equal for all spellings of it."""
        return str(absolute(self.directory))

    @property
    def checkpoint(self) -> tuple[str, int]:
        """What tells its parameters from those of other sources."""
        return self.place, self.step

    @property
    def name(self) -> str:
        """For cards: what it was imported as, or its directory's name."""
        imported = self.content.get("imported", {})
        return imported.get("name") or directory_name(self.directory)

    @property
    def framing(self) -> Framing:
        """The special tokens around its texts."""
        data = self.content["data"]
        return Framing(
            data["decoder_start_id"],
            data["inputs_eos"],
            tuple(data.get("inputs_prefix", ())),
            data["inputs_length"],
            data["targets_length"],
        )

    @property
    def max_length(self) -> int:
        """The longest sequence that it supports, in tokens."""
        data = self.content["data"]
        longest = self.content.get("imported", {}).get("max_length")
        return longest or data["inputs_length"] + data["targets_length"]

    def lineage(self) -> Lineage:
        return lineage(self.directory, self.step)

    def vocabulary(self) -> Vocabulary | None:
        """Its vocabulary; None if the model was imported without one."""
        recorded = self.content["data"]["vocabulary"]
        return load_vocabulary(recorded, directory=self.directory) if recorded else None

    def parameters(self) -> dict[str, np.ndarray]:
        """Its parameters by name, with unrolled layers.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        config, params, _ = load_params_for_inference(self.directory, self.step or None)
        if config.execution.scan_layers:
            params = unroll_params(params, config)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def open_source(
    directory: pathlib.Path | epath.Path, step: int | None, flag: str, step_flag: str = "--step"
) -> AdaptationSource:
    """A source that can be adapted; nothing of its parameters is read.

    ``flag`` and ``step_flag`` are what messages call the directory and the step.

    Raises:
        CheckpointError: no work directory, or no such checkpoint.
        ConfigError: it is an encoder-decoder.
    """
    content = read_config(directory)
    config = model_config_of(content)
    if config.is_encoder_decoder:
        raise ConfigError(
            f"{flag} {directory} is already an encoder-decoder; expected a decoder-only model's "
            "work directory. To train it further: encdec train --config.init_from=DIR"
        )
    return AdaptationSource(directory, content, config, step_to_read(directory, step, step_flag))


def check_same_vocabulary(decoder: AdaptationSource, encoder: AdaptationSource) -> None:
    """Raises DataError unless both sources are known to read the same ids."""
    prints = [
        recorded_vocabulary(source.content, source.directory)["fingerprint"]
        for source in (decoder, encoder)
    ]
    if prints[0] != prints[1]:
        raise DataError(
            f"the vocabularies differ: {decoder.directory} has fingerprint {prints[0][:16]}, "
            f"{encoder.directory} has {prints[1][:16]}; both stacks must share a vocabulary: give "
            "sources with the same one"
        )


def grown(
    source: AdaptationSource, extra_ids: int
) -> tuple[Vocabulary | None, int, np.ndarray | None]:
    """The vocabulary with ``extra_ids`` sentinels; 0 leaves it as it is.

    Returns:
        The vocabulary; the number of rows of the tables for it; and each row's row in the source's
        tables, -1 of those that are new, or None where nothing changes. Extra ids are numbered
        from the vocabulary's end, so the source's own stay behind the new ones.

    Raises:
        DataError: the model has no vocabulary.
        ConfigError: it has more extra ids than are asked for.
    """
    vocabulary, rows = source.vocabulary(), source.config.vocab_size
    if not extra_ids:
        return vocabulary, rows, None
    if vocabulary is None:
        raise DataError(
            f"--extra_ids={extra_ids} extends the vocabulary, but {source.directory} was imported "
            "without one; import it again with --vocabulary=FILE"
        )
    have = vocabulary.extra_ids
    if extra_ids < have:
        raise ConfigError(
            f"--extra_ids is {extra_ids}, but the vocabulary of {source.directory} has {have} "
            "already; leave it out, or give more"
        )
    if extra_ids == have:
        return vocabulary, rows, None
    larger, added = vocabulary.with_extra_ids(extra_ids), extra_ids - have
    size, base = max(rows, larger.size), vocabulary.size - have
    places = np.arange(size)
    places = np.where(places >= base + added, places - added, places)
    places[base : base + added] = -1
    places[larger.size :] = -1
    return larger, size, places


def with_rows(name: str, table: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """A vocabulary table with the rows asked for; new ones are drawn like those that are there.

    Each of a new row's numbers is normal, with the mean and the spread that the source's rows have
    in that place: sentinels then begin as some token or other, not as something never seen.
    """
    axis = VOCABULARY_AXIS[name]
    taken = np.take(table, np.maximum(rows, 0), axis=axis)
    wide = np.asarray(table, np.float32)
    mean, spread = wide.mean(axis, keepdims=True), wide.std(axis, keepdims=True)
    shape = list(table.shape)
    shape[axis] = int((rows < 0).sum())
    drawn = mean + spread * np.random.default_rng([seed, axis]).standard_normal(shape)
    index: list[Any] = [slice(None)] * table.ndim
    index[axis] = np.flatnonzero(rows < 0)
    taken[tuple(index)] = drawn.astype(table.dtype)
    return taken
