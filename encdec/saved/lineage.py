"""What a trained model comes from: the runs that it started from, their cost and their seeds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from encdec.cost.flops import training_flops
from encdec.saved.saved_config import SOURCE_FIELD, model_config_of, name_and_origin, read_config
from encdec.saved.saved_params import latest_step
from encdec.storage import as_path


@dataclasses.dataclass(frozen=True)
class Lineage:
    """A run up to a step and, before it, the runs that it started from.

    Attributes:
        training_flops: forward and backward over whole rows, padding included, without a
            teacher's. None after an imported model, whose training is unknown; an adapted model
            has those of its sources.
        seeds: the run's own first; None after an imported model, and where an earlier run no
            longer exists.
    """

    training_flops: float | None
    seeds: tuple[int, ...] | None


def lineage(workdir: str | os.PathLike[str], step: int) -> Lineage:
    """The lineage of the checkpoint at ``step`` (0 for an imported model).

    A run records from which step of its source it started; for runs of earlier versions, which do
    not, the source's last step counts.
    """
    content = read_config(workdir)
    if "imported" in content:
        return _recorded(
            content["imported"].get("lineage", {"training_flops": None, "seeds": None})
        )
    run, data = content["run"], content["data"]
    flops = step * training_flops(
        model_config_of(content),
        data["inputs_length"],
        data["targets_length"],
        batch_size=run["batch_size"],
    )
    before = _before(content)
    return Lineage(
        None if before.training_flops is None else flops + before.training_flops,
        None if before.seeds is None else (run["seed"], *before.seeds),
    )


def _recorded(record: Mapping[str, Any]) -> Lineage:
    seeds = record["seeds"]
    return Lineage(record["training_flops"], None if seeds is None else tuple(seeds))


def _before(content: dict[str, Any]) -> Lineage:
    source = content["run"].get("init_from")
    if not source:
        return Lineage(0.0, ())
    if record := content.get(SOURCE_FIELD):
        return _recorded(record)
    if not as_path(source).is_dir():
        return Lineage(None, None)
    imported = "imported" in read_config(source)
    return lineage(source, 0 if imported else latest_step(source))


def source_record(workdir: str, step: int) -> dict[str, Any]:
    """What a run's config.json keeps of the checkpoint that it starts from."""
    source = name_and_origin(workdir, read_config(workdir))
    return {"source": source, "step": step, **dataclasses.asdict(lineage(workdir, step))}
