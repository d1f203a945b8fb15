"""Starting a run from another run's parameters, with an account of every one of them.

``plan_start`` decides from configurations and shapes alone, before anything is computed or
written, where each parameter of the run comes from; ``start_from`` then reads and places them.
No parameter is initialized randomly in place of one of the source unless ``config.init_partial`` or
``config.init_grow`` asks for it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from encdec.data.records import DatasetCard
from encdec.data.vocabulary import VocabularySpec, load_vocabulary, recorded_vocabulary
from encdec.errors import ConfigError, DataError
from encdec.fields import listed
from encdec.files import write_text
from encdec.model import ModelConfig, abstract_params, build_model, logical_axes, preset
from encdec.model.parameter_names import path_name, unrolled_names
from encdec.saved.saved_config import CONFIG_FILE, model_config_of, read_config
from encdec.saved.saved_params import load_params_for_inference
from encdec.storage import as_path
from encdec.train.run_config import RunConfig, is_directory
from encdec.train.state import TrainState

REPORT_FILE = "warm-start.txt"

# Fields that decide which parameters there are and how large they are; all others but the next
# two groups decide what is computed with them.
SIZES = (
    "architecture",
    "encoder_layers",
    "decoder_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
)
# Precision, speed, memory and layout: converted where they differ.
_EXECUTION = ("execution", "dtype", "param_dtype")
# Of training alone.
_DROPOUT = ("attention_dropout", "mlp_dropout", "residual_dropout")
_TRAINING = (*_DROPOUT, "init_std")


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Where a run's first parameters come from.

    Attributes:
        source: the work directory.
        loaded: parameters that are as in the source, by name.
        converted: those of them whose layers are stacked in one of both and apart in the other.
        initialized: parameters, and rows of the vocabulary's tables, that start at random.
        dropped: parameters of the source that the run has no place for, with the reason.
        differences: fields of the architecture, rates of dropout, and fields of the records'
            framing of texts that differ, kept as the run has them.
        step: of the source's checkpoint; 0 of an imported model, None before it was read.
    """

    source: str
    loaded: tuple[str, ...]
    converted: tuple[str, ...]
    initialized: tuple[str, ...]
    dropped: tuple[str, ...]
    differences: tuple[str, ...] = ()
    step: int | None = None

    def __str__(self) -> str:
        layout = f" ({len(self.converted)} converted)" if self.converted else ""
        return (
            f"starting from {self.source}, step {self.step}: {len(self.loaded)} parameters "
            f"loaded{layout}, {len(self.dropped)} dropped, {len(self.initialized)} initialized "
            f"randomly ({REPORT_FILE})" + "".join(f"; {one}" for one in self.differences)
        )

    def write(self, workdir: epath.PathLike) -> None:
        """Every name, in the work directory; process 0 alone."""
        if jax.process_index():
            return
        lines = [str(self)]
        for name in ("loaded", "converted", "initialized", "dropped", "differences"):
            lines += ["", f"{name}:", *(f"  {one}" for one in getattr(self, name))]
        write_text(as_path(workdir) / REPORT_FILE, "\n".join(lines) + "\n")


@dataclasses.dataclass(frozen=True)
class StartPlan:
    """What ``start_from`` does.

    Attributes:
        origin: the account.
        parts: for each parameter of the run its parts: one, or one per layer where layers are
            stacked. A part is the source's parameter and the place in its stack (None: not
            stacked), or None where it is initialized randomly.
        rows: of the vocabulary's tables: the source's row of each row of the run, -1 where it is
            initialized randomly; None where the tables are loaded whole.
    """

    origin: WarmStart
    parts: Mapping[str, Sequence[tuple[str, int | None] | None]]
    rows: np.ndarray | None


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields that decide the function computed, sizes included, the vocabulary's rows not."""
    left_out = (*_EXECUTION, *_TRAINING, "vocab_size")
    values = config.to_dict().items()
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values if k not in left_out}


def with_source_model(run: RunConfig, workdir: epath.PathLike | None = None) -> RunConfig:
    """The run with the architecture of the model that it starts from, if it asks for that.

    Args:
        run: a run; returned as it is unless ``config.init_architecture`` is "source".
        workdir: the run's own, which records what was loaded once the run has started: its source
            may be gone by then.

    Raises:
        ConfigError: ``config.model_overrides`` contradict the source.
        CheckpointError: no model there.
    """
    if run.init_architecture != "source":
        return run
    begun = workdir is not None and (as_path(workdir) / CONFIG_FILE).exists()
    source = model_config_of(read_config(workdir if begun else run.init_from))
    theirs = architecture(source)
    if run.init_partial:
        theirs = {name: value for name, value in theirs.items() if name not in SIZES}
    for name, value in run.model_overrides.items():
        if name in theirs and theirs[name] != (list(value) if isinstance(value, tuple) else value):
            raise ConfigError(
                f"config.model_overrides.{name} is {value!r}, but config.init_architecture is "
                f"'source' and {run.init_from} has {theirs[name]!r}; leave the override out, or "
                "set config.init_architecture='run'"
            )
    if is_directory(run.model):
        # All of it is that model's, what only training reads included, except for the type that an
        # imported one is stored in: bfloat16 would round most updates of a parameter to nothing.
        if not begun:
            source = source.replace(param_dtype=run.base_model().param_dtype)
        overrides = {"architecture": source.architecture}
        overrides |= source.changes_from(run.base_model()) | dict(run.model_overrides)
        run = dataclasses.replace(run, model_overrides=overrides)
        run.model_config()
        return run
    # As many rows as its tables have, unless the run says how many. Dropout is its own too: a
    # model that never knew any may be destroyed by a preset's (SmolLM2: 9.2 nats instead of 3.0).
    theirs = {"vocab_size": source.vocab_size} | theirs
    theirs |= {name: getattr(source, name) for name in _DROPOUT}
    base = preset(run.model)
    # The preset's own choice of stacked layers may not go with the source's model.
    execution = {"scan_layers": base.execution.scan_layers and source.execution.scan_layers}
    model = base.replace(**execution | theirs | dict(run.model_overrides))
    changes = model.changes_from(base)
    return dataclasses.replace(run, model_overrides=changes)


def plan_start(run: RunConfig, model: ModelConfig, card: DatasetCard) -> StartPlan:
    """Where each parameter of ``model`` comes from, by configurations and shapes alone.

    Raises:
        CheckpointError: no model in ``config.init_from``.
        DataError: it belongs to another vocabulary than the records'.
        ConfigError: another architecture, or parameters that must be initialized or dropped,
            without a field that asks for that.
    """
    content = read_config(run.init_from)
    source = model_config_of(content)
    data = content.get("data", {})
    vocabulary = recorded_vocabulary(content, run.init_from)
    rows = _vocabulary_rows(run, model, source, vocabulary, card)
    # Training on texts framed in another way is a choice of the records; it is told.
    here = {
        "decoder_start_id": card.decoder_start_id,
        "inputs_eos": card.inputs_eos,
        "inputs_prefix": list(card.inputs_prefix),
    }
    differences = _compare(run, model, source) + tuple(
        f"{name} is {data[name]!r} there and {value!r} here"
        for name, value in here.items()
        if name in data and data[name] != value
    )
    parts, shapes = _parts(abstract_params(build_model(model)), _vocabulary_axis(model))
    theirs, their_shapes = _parts(abstract_params(build_model(source)), _vocabulary_axis(source))
    fits = {name for name in shapes if their_shapes.get(name) == shapes[name]}
    shape = lambda name: f"{name}: shape {_shown(their_shapes[name])}"
    dropped = [
        f"{shape(name)}, expected {_shown(shapes[name])}" if name in shapes else shape(name)
        for name in their_shapes
        if name not in fits
    ]
    missing = [name for name in shapes if name not in fits]
    _require_asked_for(run, missing, "initialized randomly")
    _require_asked_for(run, [name.split(":")[0] for name in dropped], "dropped")
    if not fits:
        raise ConfigError(
            f"config.init_from={run.init_from} has no parameter with the run's names and shapes; "
            "use the config.model and config.model_overrides of that run"
        )
    places = _places(theirs)
    sources = {
        leaf: [places[name] if name in fits else None for name in names]
        for leaf, names in parts.items()
    }
    stacked = {leaf: names != [leaf] for leaf, names in parts.items()}
    converted = [
        leaf
        for leaf, pieces in sources.items()
        if any(piece and (piece[1] is not None) != stacked[leaf] for piece in pieces)
    ]
    initialized = [*missing]
    if rows is not None:
        tables = [name for name in fits if None in shapes[name]]
        initialized += [
            f"{name}, rows {_ranges(rows)}" for name in sorted(tables) if (rows < 0).any()
        ]
    loaded = [leaf for leaf, pieces in sources.items() if any(pieces)]
    origin = WarmStart(
        run.init_from,
        tuple(loaded),
        tuple(converted),
        tuple(initialized),
        tuple(dropped),
        differences,
    )
    return StartPlan(origin, sources, rows)


def start_from(
    state: TrainState, plan: StartPlan, model: ModelConfig
) -> tuple[TrainState, WarmStart]:
    """The state with the last checkpoint's parameters as ``plan`` says; the optimizer is new.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    _, params, step = load_params_for_inference(plan.origin.source)
    there = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    vocabulary_axis = _vocabulary_axis(model)

    def pick(path: Any, leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        pieces = plan.parts[name]
        if not any(pieces):
            return leaf
        known = [piece is not None for piece in pieces]
        rows = plan.rows if name in vocabulary_axis else None
        arrays = [
            _array(there, piece, rows, vocabulary_axis.get(name)) if piece else None
            for piece in pieces
        ]
        example = next(x for x in arrays if x is not None)
        blank = np.zeros(example.shape, leaf.dtype)
        filled = [blank if x is None else x.astype(leaf.dtype, copy=False) for x in arrays]
        values = np.stack(filled) if leaf.ndim > example.ndim else filled[0]
        read = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda i: values[i])
        mask = np.ones((), bool)
        if not all(known):
            mask = np.reshape(known, (-1,) + (1,) * (leaf.ndim - 1))
        if rows is not None and (rows < 0).any():
            axis = vocabulary_axis[name]
            mask = np.reshape(rows >= 0, (1,) * axis + (-1,) + (1,) * (leaf.ndim - axis - 1))
        if mask.all():
            return read
        return jax.jit(lambda a, b: jnp.where(mask, a, b), out_shardings=leaf.sharding)(read, leaf)

    params = jax.tree_util.tree_map_with_path(pick, state.params)
    return state.replace(params=params), dataclasses.replace(plan.origin, step=step)


def _array(
    there: Mapping[str, jax.Array],
    piece: tuple[str, int | None],
    rows: np.ndarray | None,
    axis: int | None,
) -> np.ndarray:
    name, layer = piece
    values = np.asarray(there[name] if layer is None else there[name][layer])
    if rows is not None and axis is not None:
        values = np.take(values, np.maximum(rows, 0), axis=axis)
    return values


def _vocabulary_rows(
    run: RunConfig,
    model: ModelConfig,
    source: ModelConfig,
    vocabulary: Mapping[str, Any],
    card: DatasetCard,
) -> np.ndarray | None:
    """See ``StartPlan.rows``; extra ids are numbered from a vocabulary's end, so that those that
    the source has keep their rows behind the new ones."""
    spec = VocabularySpec(**dict(vocabulary))
    added = 0
    if spec.fingerprint != card.vocabulary.fingerprint:
        added = _added_extra_ids(run, spec, card.vocabulary)
    size, before = model.vocab_size, source.vocab_size
    if size < before:
        raise ConfigError(
            f"config.model_overrides.vocab_size is {size}, but config.init_from={run.init_from} "
            f"has tables of {before} rows; set --config.model_overrides.vocab_size={before}"
        )
    if not added and size == before:
        return None
    if not run.init_grow:
        what = (
            f"the records' vocabulary has {added} more extra ids than that of "
            if added
            else f"config.model_overrides.vocab_size is {size}, and {before} in "
        )
        keep = "" if added else f"set --config.model_overrides.vocab_size={before}, or "
        raise ConfigError(
            f"{what}config.init_from={run.init_from}; {keep}set --config.init_grow=True, which "
            "initializes the new rows of the tables randomly"
        )
    base = spec.size - spec.extra_ids
    rows = np.arange(size)
    if added:
        rows = np.where(rows >= base + added, rows - added, rows)
        rows[base : base + added] = -1
        rows[card.vocabulary.size :] = -1
    rows[rows >= before] = -1
    return rows


def _added_extra_ids(run: RunConfig, there: VocabularySpec, here: VocabularySpec) -> int:
    """How many extra ids the records' vocabulary has beyond the source's, being the same else."""
    added = here.extra_ids - there.extra_ids
    if here.kind == there.kind and here.eos_id == there.eos_id and added > 0:
        grown = load_vocabulary(run.init_from).with_extra_ids(here.extra_ids)
        if grown.fingerprint == here.fingerprint:
            return added
    fewer = here.kind == there.kind and here.size - here.extra_ids == there.size - there.extra_ids
    extra = f" with {there.extra_ids} extra ids, the records {here.extra_ids}" if fewer else ""
    raise DataError(
        f"config.init_from={run.init_from} was trained with vocabulary fingerprint "
        f"{there.fingerprint[:16]}{extra or f', the records have {here.fingerprint[:16]}'}; "
        f"prepare the records with --vocabulary={run.init_from}, and --extra_ids=N to add "
        "sentinels to it"
    )


def _compare(run: RunConfig, model: ModelConfig, source: ModelConfig) -> tuple[str, ...]:
    """Fields that differ, in words; raises ConfigError where that was not asked for."""
    ours, theirs = architecture(model), architecture(source)
    differ = [name for name in ours if ours[name] != theirs[name]]
    words = {name: f"{name} is {theirs[name]!r} there and {ours[name]!r} here" for name in differ}
    sizes = [name for name in differ if name in SIZES]
    function = [name for name in differ if name not in SIZES]
    asked = run.init_partial or run.init_architecture == "run"
    if sizes and not run.init_partial or function and not asked:
        overrides = " ".join(
            f"--config.model_overrides.{name}={theirs[name]}"
            for name in differ
            if not isinstance(theirs[name], list)
        )
        remedy = (
            "To start with some of its parameters, name those that may be initialized randomly or "
            "dropped: --config.init_partial='PATTERN,...'"
            if sizes
            else "To keep the run's values all the same: --config.init_architecture=run"
        )
        raise ConfigError(
            f"config.init_from={run.init_from} is a different model: {'; '.join(words.values())}. "
            f"Use its architecture with --config.init_architecture=source, or set {overrides}. "
            f"{remedy}"
        )
    if function and run.init_architecture != "run":
        raise ConfigError(
            f"config.init_from={run.init_from} computes a different function: "
            f"{'; '.join(words[name] for name in function)}. Set --config.init_architecture=source "
            "to adopt these fields, or =run to keep the run's"
        )
    dropout = tuple(
        f"{name} is {getattr(source, name)} there and {getattr(model, name)} here"
        for name in _DROPOUT
        if getattr(source, name) != getattr(model, name)
    )
    return tuple(words.values()) + dropout


def _require_asked_for(run: RunConfig, names: Sequence[str], what: str) -> None:
    patterns = listed(run.init_partial, "config.init_partial")
    refused = [name for name in names if not any(fnmatch.fnmatch(name, p) for p in patterns)]
    if refused:
        shown = ", ".join(refused[:6]) + f" and {len(refused) - 6} more" * (len(refused) > 6)
        raise ConfigError(
            f"config.init_from={run.init_from}: {shown} would be {what}; use the config.model and "
            "config.model_overrides of that run, or allow this with "
            "--config.init_partial='PATTERN,...' (as in 'encoder/*,*/layers_3/*')"
        )


def _vocabulary_axis(model: ModelConfig) -> dict[str, int]:
    """The dimension of the vocabulary in each parameter that has one."""
    leaves = jax.tree_util.tree_leaves_with_path(
        logical_axes(build_model(model)), is_leaf=lambda x: isinstance(x, tuple)
    )
    return {path_name(path): axes.index("vocab") for path, axes in leaves if "vocab" in axes}


def _parts(
    params: Any, vocabulary_axis: Mapping[str, int]
) -> tuple[dict[str, list[str]], dict[str, tuple[int | None, ...]]]:
    """Each parameter's parts, named as unrolled layers are, and the parts' shapes, in which None
    stands for the vocabulary's rows."""
    parts = unrolled_names(params)
    shapes: dict[str, tuple[int | None, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, shape = path_name(path), tuple(leaf.shape)
        if parts[name] != [name]:
            shape = shape[1:]
        if name in vocabulary_axis:
            shape = tuple(None if i == vocabulary_axis[name] else n for i, n in enumerate(shape))
        shapes |= {part: shape for part in parts[name]}
    return parts, shapes


def _places(parts: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, int | None]]:
    """Where each part is: its parameter, and its place in the stack."""
    return {
        part: (name, index if names != [name] else None)
        for name, names in parts.items()
        for index, part in enumerate(names)
    }


def _shown(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("vocabulary" if n is None else str(n) for n in shape) + ")"


def _ranges(rows: np.ndarray) -> str:
    """The numbers of the rows that are initialized randomly: "264-279"."""
    numbers = np.flatnonzero(rows < 0)
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return " and ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
