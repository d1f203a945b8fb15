"""How a model is run: choices of speed and memory that do not change the function it computes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from encdec.errors import ConfigError
from encdec.fields import check_types


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How a model is compiled and run; results are equal up to rounding under every choice.

    The first group is set for training, by name among ``config.model_overrides``. The
    second is chosen by ``encdec.inference.ready`` for this machine and is never stored.

    Raises:
        ConfigError: a value of the wrong type, out of range, or in conflict with another field.
    """

    # Compile one layer and loop over stacked parameters, or compile every layer. The only choice
    # that changes the tree of parameters (``scan_params`` and ``unroll_params`` convert it).
    scan_layers: bool = True
    # What the backward pass recomputes: nothing, cheap values, the MLP as well, or everything
    remat: Literal["none", "dots", "attention", "full"] = "none"
    # auto: splash on TPU, cuDNN on NVIDIA GPUs, else XLA
    attention_kernel: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    # One matrix product for queries, keys and values, and one for gate and up
    fuse_projections: bool = False

    # Chosen for inference on CPUs; see encdec/model/cpu_layout.py
    attention_block: int = 0  # queries whose logits are held at once; 0: all of them
    cpu_panels: bool = False  # decoder kernels in panels instead of as trained
    cpu_shards: int = 0  # or in as many shards, which cores read in parallel; decoder-only models
    encoder_dtype: Literal["", "bfloat16"] = ""  # of the encoder's computation; "": the model's
    accumulate_in_float32: bool = False  # sums of bfloat16 products, and activations

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("attention_block", "cpu_shards"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"ExecutionConfig.{name} is {getattr(self, name)}; expected 0 (off) or a "
                    "positive number"
                )
        if self.laid_out and self.scan_layers:
            raise ConfigError(
                f"ExecutionConfig.cpu_panels is {self.cpu_panels} and cpu_shards {self.cpu_shards} "
                "with scan_layers=True; expected False and 0, or scan_layers=False: "
                "panels_for_cpu and shards_for_cpu take unrolled layers"
            )
        if self.cpu_panels and self.cpu_shards:
            raise ConfigError(
                f"ExecutionConfig.cpu_shards is {self.cpu_shards} with cpu_panels=True; expected "
                "one of the two"
            )
        if self.attention_block and self.attention_kernel not in ("auto", "xla"):
            raise ConfigError(
                f"ExecutionConfig.attention_kernel is {self.attention_kernel!r} with "
                f"attention_block={self.attention_block}; expected 'auto' or 'xla': blocks of "
                "queries are computed by XLA"
            )

    @property
    def for_cpu(self) -> bool:
        """Whether the modules of ``encdec.model.cpu_layout`` run the model."""
        return bool(self.attention_block or self.laid_out or self.encoder_dtype)

    @property
    def laid_out(self) -> bool:
        """Whether the decoder's kernels are kept in another layout than the trained one."""
        return self.cpu_panels or self.cpu_shards > 0


EXECUTION_FIELDS = tuple(field.name for field in dataclasses.fields(ExecutionConfig))
# Chosen by inference for a machine; refused in a run's configuration.
INFERENCE_FIELDS = (
    "attention_block",
    "cpu_panels",
    "cpu_shards",
    "encoder_dtype",
    "accumulate_in_float32",
)
