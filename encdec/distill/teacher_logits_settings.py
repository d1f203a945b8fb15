"""Settings of ``distill logits``, from whose fields flags, a job's identity and its card follow."""

# ruff: noqa: RUF009 (`setting` gives a field, which ruff cannot see)

from __future__ import annotations

import dataclasses
import os
from typing import Literal

from encdec.data.sparse_logits import SparseFormat
from encdec.errors import ConfigError
from encdec.settings import Settings, setting
from encdec.storage import any_path
from encdec.train.run_fields import MeshConfig


@dataclasses.dataclass(frozen=True)
class TeacherLogitsSettings(Settings):
    """The settings of ``encdec distill logits``.

    What is stored does not depend on the mesh; ``batch_rows`` counts over all devices.
    """

    # teacher, records and out have no default; ``check`` requires them.
    teacher: str | os.PathLike[str] = setting(
        None,
        "work directory of encdec train or encdec import; with --backend=torch a Hugging Face "
        "directory",
        type=any_path,
        metavar="DIR",
    )
    backend: Literal["jax", "torch"] = setting(
        "jax",
        "torch runs a Hugging Face model without conversion, for families that encdec import does "
        "not support (default %(default)s)",
        choices=("jax", "torch"),
    )
    vocabulary: str | os.PathLike[str] | None = setting(
        None,
        "of a torch teacher (default: the tokenizer.model or tokenizer.json in its directory)",
        type=any_path,
        metavar="FILE",
    )
    records: str | os.PathLike[str] = setting(
        None, "directory of encdec prepare", type=any_path, metavar="DIR"
    )
    out: str | os.PathLike[str] = setting(None, "receives the shards", type=any_path, metavar="DIR")
    method: Literal["sampled", "top_k", "full"] = setting(
        "sampled",
        "draws with replacement (unbiased), the likeliest ids, or everything (default %(default)s)",
        choices=("sampled", "top_k", "full"),
    )
    draws: int = setting(
        50, "draws a token (default %(default)s)", least=1, needs="method=sampled", metavar="N"
    )
    k: int = setting(12, "ids of top_k (default %(default)s)", least=1, needs="method=top_k")
    temperature: float = setting(
        1.0, "of the stored distribution (default %(default)s)", type=float, metavar="T"
    )
    proposal: float = setting(
        1.0,
        "draw from the distribution to this power, with importance weights (default %(default)s: "
        "from itself)",
        type=float,
        metavar="POWER",
    )
    step: int | None = setting(None, "the teacher's checkpoint (default: the last)", least=0)
    seed: int = setting(
        0, "of the draws (default %(default)s)", identity=True, least=0, needs="method=sampled"
    )
    batch_rows: int = setting(
        0, "in one forward pass (default: 8 a data shard)", least=0, metavar="ROWS"
    )
    shard_rows: int = setting(
        1024,
        "in a file; what a kill may lose (default %(default)s)",
        identity=True,
        least=1,
        metavar="ROWS",
    )
    max_length: int | None = setting(
        None,
        "that the teacher may read at once, if it supports more than it was trained on (default: "
        "its own limit)",
        least=1,
        metavar="TOKENS",
    )
    fsdp: int = setting(1, "shards of the teacher's parameters", least=1)
    tensor: int = setting(1, "shards of heads and MLP", least=1)
    overwrite: bool = setting(False, "replace stored logits in --out")

    @property
    def mesh(self) -> MeshConfig:
        """How the teacher is laid out on the devices."""
        return MeshConfig(-1, self.fsdp, self.tensor)

    def format(self, vocabulary_size: int) -> SparseFormat:
        """What is kept of each distribution; ConfigError where a value is out of range."""
        return SparseFormat(
            self.method, vocabulary_size, self.draws, self.k, self.temperature, self.proposal
        )

    def check(self, writes: bool = True) -> None:
        """ConfigError for what is missing, out of range or at odds whatever the teacher is.

        Without ``writes``, for a dry run, ``out`` may be missing.
        """
        for name in ("teacher", "records", *["out"] * writes):
            if getattr(self, name) is None:
                raise ConfigError(f"--{name} is missing; give it")
        super().check()
        if self.seed >= 2**31:
            raise ConfigError(f"seed is {self.seed}; expected an integer below 2^31")
        if self.backend not in ("jax", "torch"):
            raise ConfigError(f"--backend is {self.backend!r}; expected 'jax' or 'torch'")
        if self.backend == "torch" and (self.step is not None or self.mesh != MeshConfig()):
            raise ConfigError(
                "--step, --fsdp and --tensor have no effect with --backend=torch; leave "
                "them out, or import the model with encdec import"
            )
        if self.backend == "jax" and self.vocabulary is not None:
            raise ConfigError("--vocabulary is for --backend=torch; a work directory holds its own")
