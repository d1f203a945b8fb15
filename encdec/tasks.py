"""Tasks, mixtures, preprocessors, metrics and objectives of your own: docs/own-data.md.

A module that registers them is named by ``--module`` of every command that takes names of tasks,
metrics or objectives.
"""

from encdec.data.file_tasks import FileTask
from encdec.data.objectives import CausalLM, Objective, PrefixLM, SequenceToSequence
from encdec.data.objectives import named as register_objective
from encdec.data.readers import BadRows, Fault
from encdec.data.task_mixtures import register_mixture
from encdec.data.task_registry import register_task
from encdec.data.text_tasks import TextTask
from encdec.metrics.metric_registry import register as register_metric
from encdec.metrics.score import Metric, Score, best_of, mean_score, ratio_score

__all__ = [
    "BadRows",
    "CausalLM",
    "Fault",
    "FileTask",
    "Metric",
    "Objective",
    "PrefixLM",
    "Score",
    "SequenceToSequence",
    "TextTask",
    "best_of",
    "mean_score",
    "ratio_score",
    "register_metric",
    "register_mixture",
    "register_objective",
    "register_task",
]
