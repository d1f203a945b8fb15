"""encdec as eight functions, from text to a trained model in use.

Each does what the command of its name does (``import_model``, ``export_model`` and
``store_teacher_logits``: ``encdec import``, ``encdec export`` and ``encdec distill logits``),
returns what was made, and raises the errors of ``encdec.errors``, which name the value and the
remedy. These names and arguments are stable; everything else may move between versions.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from encdec.data.prepare import prepare
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.errors import ConfigError
from encdec.evaluation.evaluate import evaluate as _evaluate
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.export.export_model import ExportReport, export_model
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.generator import Generation, TextGenerator
from encdec.inference.load_generator import load
from encdec.interop.import_model import ImportReport, import_model
from encdec.train.loop import Hook, Summary
from encdec.train.loop import train as _train
from encdec.train.reports import OnReport
from encdec.train.run_config import load_config

__all__ = [
    "ExportReport",
    "Hook",
    "ImportReport",
    "evaluate",
    "export_model",
    "generate",
    "import_model",
    "load",
    "prepare",
    "store_teacher_logits",
    "train",
]


def __getattr__(name: str) -> Any:
    if name != "score":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("encdec.api.score is now called store_teacher_logits", FutureWarning, 2)
    return store_teacher_logits


def train(
    config: str | Mapping[str, Any],
    workdir: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    stop_at: int | None = None,
    on_report: OnReport | None = None,
    hooks: Sequence[Hook] = (),
) -> Summary:
    """Trains a model, or continues from the work directory's last checkpoint.

    Args:
        config: ``FILE.py[:ARGUMENT]``, as ``encdec train --config``, or the fields themselves.
        workdir: receives checkpoints, metrics and all that inference needs.
        overrides: fields by dotted name, ``{"optimizer.name": "muon"}``; of a file only.
        stop_at: stop and save after this many steps in all, before ``config.steps``.
        on_report: called with (step, numbers) at every report.
        hooks: called between steps.

    Returns:
        The last step's numbers, the last evaluation's, and the seconds of this call.

    Raises:
        ConfigError, DataError, CheckpointError: nothing was written.
        NonFiniteError: a loss, gradient or parameter is NaN or infinite.
    """
    if isinstance(config, str):
        given = (overrides or {}).items()
        config = load_config(config, [f"--config.{name}={value}" for name, value in given])
    elif overrides:
        raise ConfigError(
            f"overrides are {dict(overrides)}, but config is not a file; change its fields instead"
        )
    return _train(config, workdir, stop_at=stop_at, on_report=on_report, hooks=hooks)


def generate(
    model: TextGenerator | str | os.PathLike[str], texts: Sequence[str], **settings: Any
) -> list[str]:
    """The answer to each text; if ``samples`` or ``beams`` give several, beam search's best or the
    one with the highest mean log-probability per token.

    Args:
        model: what ``load`` gave, or a directory that it would take. ``load(...).generate`` gives
            token ids, log-probabilities and further answers, too.
        texts: the inputs.
        settings: fields of ``encdec.inference.generation_settings.GenerationSettings``.

    Raises:
        ConfigError: settings that cannot be.
        DataError: an input is empty or longer than the model reads.
    """
    if isinstance(texts, str):
        texts = [texts]
    generator = model if isinstance(model, TextGenerator) else load(model)
    answers = generator.generate(texts, GenerationSettings(**settings))
    return [max(made, key=_likelihood).text for made in answers]


def _likelihood(answer: Generation) -> float:
    mean = sum(answer.log_probs) / max(len(answer.log_probs), 1)
    return mean if answer.normalized_log_prob is None else answer.normalized_log_prob


def evaluate(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], **settings: Any
) -> dict[str, Any] | None:
    """Answers and scores tasks or files of pairs; repeat an interrupted call to continue.

    Args:
        checkpoint: work directory, or an export.
        out: receives predictions, report.json and report.md.
        settings: fields of ``encdec.evaluation.evaluation_settings.EvaluationSettings``, such as
            ``tasks``, ``jsonl``, ``metrics``, ``max_examples`` or ``shuffle_sources``.

    Returns:
        The report: what report.json holds; None where other processes (``shards``) are not done.

    Raises:
        ConfigError, DataError, CheckpointError: see ``encdec.evaluation.evaluate.evaluate``.
    """
    if "limit" in settings:  # its former name
        settings["max_examples"] = settings.pop("limit")
    return _evaluate(EvaluationSettings(str(checkpoint), str(out), **settings))
