"""Settings of an evaluation, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

from encdec.errors import ConfigError
from encdec.inference.generation_settings import AUTO, GenerationSettings, check_numbers
from encdec.metrics.intervals import RESAMPLES
from encdec.metrics.metric_registry import metric_named
from encdec.packages import require

TooLong = Literal["refuse", "cut", "skip"]


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """One evaluation of one checkpoint.

    Attributes:
        checkpoint: work directory of ``encdec train`` or ``encdec import``, or an export.
        out: receives predictions and reports; existing ones of the same settings are used.
        tasks: names, see ``encdec data list``.
        data_dir: directory with the tasks' files.
        split: of the tasks.
        jsonl: the user's own files, each a task named like the file.
        source_field, target_field: fields of these files; further references are in ``targets``.
        metrics: names of ``encdec.metrics.metric_registry`` instead of a task's own; files without
            any have exact match and Rouge.
        max_examples: the first examples only; None: all.
        step: checkpoint, a number or "best"; None: the last.
        too_long: sources longer than the model reads are refused, cut, or skipped.
        max_input_tokens: longest source; None: the longest in training.
        generation: how to answer.
        batch_rows: most answers generated at once.
        shard, shards: this process, and the number of processes that divide the examples.
        shuffle_sources: seed of a second pass with the sources permuted among the examples; None:
            no such pass.
        likelihood: whether references are read for perplexity, bits per byte and calibration.
        resamples: number of bootstrap samples.
        judge_endpoint, judge_model: a language model that judges the answers; "": none.

    Raises:
        ConfigError: a value out of range, or no such metric.
    """

    checkpoint: str
    out: str
    tasks: tuple[str, ...] = ()
    data_dir: str | None = None
    split: str = "validation"
    jsonl: tuple[str, ...] = ()
    source_field: str = "source"
    target_field: str = "target"
    metrics: tuple[str, ...] = ()
    max_examples: int | None = None
    step: str | None = None
    too_long: TooLong = "cut"
    max_input_tokens: int | None = None
    generation: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)
    batch_rows: int = 16
    draft: str = AUTO
    shard: int = 0
    shards: int = 1
    shuffle_sources: int | None = None
    likelihood: bool = True
    resamples: int = RESAMPLES
    judge_endpoint: str = ""
    judge_model: str = ""

    def __post_init__(self) -> None:
        # An input has at least one token and EOS.
        check_numbers(self, max_examples=1, batch_rows=1, max_input_tokens=2, resamples=1)
        check_numbers(self, shuffle_sources=0)
        if not 0 <= self.shard < self.shards:
            raise ConfigError(
                f"--shard is '{self.shard}/{self.shards}'; expected I/N with I from 0 to N - 1"
            )
        for name in self.metrics:
            metric_named(name)
        self._check_examples()
        self._check_judge()

    def _check_examples(self) -> None:
        """Raises for settings of tasks without tasks, and for settings of files without files."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for there, kind, names in (
            (self.tasks, "tasks", ("data_dir", "split")),
            (self.jsonl, "jsonl", ("source_field", "target_field")),
        ):
            for name in names if not there else ():
                if (value := getattr(self, name)) != defaults[name]:
                    raise ConfigError(
                        f"--{name} is {value!r}, which needs --{kind}; "
                        f"add --{kind}=..., or leave --{name} out"
                    )

    def _check_judge(self) -> None:
        if self.judge_endpoint and not self.judge_model:
            raise ConfigError(
                f"--judge_endpoint is {self.judge_endpoint!r} and --judge_model "
                "empty; expected the name of a model that the endpoint knows"
            )
        if self.judge_endpoint and not self.judge_endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"--judge_endpoint is {self.judge_endpoint!r}; expected an address such as "
                "https://HOST/v1"
            )
        if self.judge_model and not self.judge_endpoint:
            if not pathlib.Path(self.judge_model, "config.json").is_file():
                raise ConfigError(
                    f"--judge_model is {self.judge_model!r}, which holds no config.json; give a "
                    "Hugging Face model's directory, or --judge_endpoint=URL with a name"
                )
            for package in ("torch", "transformers"):  # it is asked after everything else
                require(package, "hf", "a judge on this machine")
