"""The work directory: whose run it is, and all that is needed to use its model later."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from encdec.data.records import DatasetCard, Records
from encdec.data.vocabulary import copy_vocabulary
from encdec.errors import CheckpointError
from encdec.files import write_json, write_text
from encdec.jobs import differences, plain
from encdec.markup import aligned
from encdec.model import ModelConfig, abstract_params, logical_axes, parameter_count
from encdec.model.parameter_names import path_name
from encdec.saved.saved_config import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    FORMAT_VERSION,
    SOURCE_FIELD,
    model_config_of,
    read_config,
)
from encdec.storage import as_path, content_of, make_directory, user_place
from encdec.train.program import Program
from encdec.train.run_config import OPERATIONAL, RunConfig, to_dict

MODEL_INFO_FILE = "model-info.txt"
STARTED_FIELD = "started"
HELD_OUT_FIELD = "held_out"

# These schedules give every step its learning rate whatever the run's length, so that a finished
# run may be made longer.
_OPEN_ENDED = ("rsqrt", "constant")


def describe_run(
    run: RunConfig,
    model: ModelConfig,
    card: DatasetCard,
    eval_card: DatasetCard | None,
    teacher_fingerprint: str | None = None,
) -> dict[str, Any]:
    """The content of ``config.json``: the run, its model in full, and its data by content."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    return {
        "format_version": FORMAT_VERSION,
        "run": to_dict(run),
        "model": model.to_dict(),
        "data": {
            "fingerprint": card.fingerprint,
            "eval_fingerprint": eval_card.fingerprint if eval_card else None,
            "teacher_fingerprint": teacher_fingerprint,
            "task": card.task,
            "inputs_length": card.inputs_length,
            "targets_length": card.targets_length,
            "inputs_eos": card.inputs_eos,
            "decoder_start_id": card.decoder_start_id,
            "inputs_prefix": list(card.inputs_prefix),
            "vocabulary": card.vocabulary.to_dict(),
        },
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def check_workdir(workdir: epath.PathLike, description: Mapping[str, Any]) -> bool:
    """Whether ``workdir`` holds the run described; False where it holds none yet.

    Raises:
        CheckpointError: it holds another run; every field that differs is named.
    """
    workdir = as_path(user_place("--workdir", workdir))
    if workdir.is_file():
        raise CheckpointError(f"{workdir} is a file; give a directory as --workdir")
    if not (workdir / CONFIG_FILE).exists():
        if (workdir / CHECKPOINTS_FOLDER).exists():
            raise CheckpointError(
                f"{workdir} holds checkpoints but no {CONFIG_FILE}; restore the "
                "file, or give another --workdir"
            )
        if what := content_of(workdir):
            raise CheckpointError(f"{workdir} holds {what}; give another --workdir")
        return False
    content = read_config(workdir)
    if "run" not in content:
        raise CheckpointError(
            f"{workdir} holds a model that was not trained there; start from it: "
            f"--config.init_from={workdir} with another --workdir"
        )
    if "averaged" in content:
        raise CheckpointError(
            f"{workdir} holds an average of checkpoints, without an optimizer's "
            f"state; start from it: --config.init_from={workdir} with another "
            "--workdir"
        )
    if differ := differences(plain(_identity(content)), _identity(description)):
        raise CheckpointError(
            f"{workdir} holds another run: {'; '.join(differ)}. Set these fields as they were to "
            "continue it, or give another --workdir"
        )
    before, now = _held_out(content), _held_out(description)
    if before and now and (differ := differences(before, now)):
        raise CheckpointError(
            f"{workdir} holds a run whose held-out loss is of other rows: {'; '.join(differ)}. Set "
            "config.data.eval_records and config.eval as they were, leave the records out, or "
            "evaluate the run by `encdec evaluate`"
        )
    return True


def _held_out(description: Mapping[str, Any]) -> dict[str, Any] | None:
    """What decides of which rows the held-out loss is: one curve is of one set of them.

    Where a run was continued without held-out records, those of before; None if it had none.
    """
    fingerprint = description["data"].get("eval_fingerprint")
    if not fingerprint:
        return description.get(HELD_OUT_FIELD)
    run = _over(to_dict(RunConfig()), description["run"])
    found = {"fingerprint": fingerprint, "eval.batches": run["eval"]["batches"]}
    if found["eval.batches"]:
        size = run["eval"]["batch_size"] or run["batch_size"] // run["accumulation"]
        found["eval.batch_size"] = size
    return found


def _identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change when a run is continued; fields newer than the file take defaults."""
    run = _over(to_dict(RunConfig()), description["run"])
    # Their outcome is compared in full under "model".
    run.pop("model"), run.pop("model_overrides")
    if run["schedule"]["name"] in _OPEN_ENDED:
        run.pop("steps")
    # How the model is run may change, unless parameters are then stored in another layout.
    model = model_config_of(description).to_dict()
    model["scan_layers"] = model.pop("execution")["scan_layers"]
    data = {"fingerprint": description["data"]["fingerprint"]}
    teacher = {"fingerprint": description["data"].get("teacher_fingerprint")}
    return {
        "config": _without(run, OPERATIONAL),
        "model": model,
        "records": data,
        "teacher": teacher,
    }


def _over(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` over ``defaults``, group by group."""
    groups = {
        k: _over(defaults[k], v)
        for k, v in values.items()
        if isinstance(v, Mapping) and isinstance(defaults.get(k), Mapping)
    }
    return {**defaults, **values, **groups}


def _without(values: Mapping[str, Any], left_out: Sequence[str], prefix: str = "") -> dict:
    kept = {}
    for key, value in values.items():
        name = prefix + key
        if name in left_out or f"{name}." in left_out:
            continue
        kept[key] = _without(value, left_out, f"{name}.") if isinstance(value, dict) else value
    return kept


def write_workdir(
    workdir: epath.PathLike, description: Mapping[str, Any], records: Records, program: Program
) -> None:
    """Writes configuration, vocabulary and parameter table; for process 0 alone."""
    workdir = as_path(workdir)
    make_directory(workdir)
    copy_vocabulary(records.directory, workdir)
    write_text(workdir / MODEL_INFO_FILE, parameter_table(program))
    # Last: it is what makes the directory this run's.
    write_json(workdir / CONFIG_FILE, description)


def start_of_run(workdir: epath.PathLike, description: Mapping[str, Any]) -> dict[str, Any]:
    """What the config of a run that is there says beyond its description: when the run was
    first started (Unix time; older runs do not tell) and from what, and its held-out rows where it
    is continued without them."""
    if not (as_path(workdir) / CONFIG_FILE).exists():
        return {}
    content = read_config(workdir)
    content[HELD_OUT_FIELD] = None if _held_out(description) else _held_out(content)
    fields = (STARTED_FIELD, SOURCE_FIELD, HELD_OUT_FIELD)
    return {name: content[name] for name in fields if content.get(name)}


def record_source(workdir: epath.PathLike, source: Mapping[str, Any]) -> None:
    """Adds where the first parameters came from to the config; process 0 alone."""
    if not jax.process_index():
        path = as_path(workdir) / CONFIG_FILE
        write_json(path, read_config(workdir) | {SOURCE_FIELD: source})


def parameter_table(program: Program) -> str:
    """Every parameter with its shape, number, logical axes and place on the mesh, as text."""
    params = abstract_params(program.model)
    axes = jax.tree.leaves(logical_axes(program.model), is_leaf=lambda x: isinstance(x, tuple))
    placed = jax.tree.leaves(program.abstract_state.params)
    rows = [("parameter", "shape", "number", "logical axes", "split over")]
    for (path, leaf), names, place in zip(
        jax.tree_util.tree_leaves_with_path(params), axes, placed, strict=True
    ):
        split = ", ".join("-" if part is None else str(part) for part in place.sharding.spec)
        rows.append((path_name(path), str(leaf.shape), f"{leaf.size:,}", ", ".join(names), split))
    total = f"total {parameter_count(params):,} parameters"
    lines = [*aligned(rows), "", total, f"mesh {dict(program.mesh.shape)}"]
    lines += [f"not sharded: {item}" for item in program.unsharded]
    return "\n".join(lines) + "\n"
