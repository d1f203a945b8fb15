"""Fine-tuning a trained model on one task; the argument, if any, names the task.

    encdec prepare --task=squad_v2 --data_dir=DIR --vocabulary=runs/330m --out=data/squad_v2 ...
    encdec train --config=configs/finetune.py:squad_v2 --workdir=runs/330m-squad_v2 \
        --config.model=runs/330m \
        --config.data.records=data/squad_v2 --config.data.eval_records=data/squad_v2-dev

A task or mixture of your own is named in the same way (`--module=my_tasks`, docs/own-data.md);
records of plain files need no name: `--config=configs/finetune.py`.

config.model is a trained or imported model's directory, of either architecture. With a preset and
--config.init_from=DIR instead, the run says where their architectures differ.
The run ends when the held-out loss has not fallen for `eval.patience` evaluations; `encdec evaluate
--step=best` uses the checkpoint with the lowest. With --config.distill.teacher=DIR (made by `encdec
distill logits` on the same records) the model also learns from a teacher. Fields not set here are
as in pretraining: encdec/train/run_fields.py explains every field.

Time and loss: the micro-300k of configs/pretrain.py, tuned on stdlib_code_summarization in rows of
256 + 48 tokens (--config.steps=500 --config.batch_size=16), ends at 5.41 nats per held-out token
after 128 s of processor time (AMD EPYC, Zen 5, 2026-11-29). 330m is not measured; docs/results.md
has more of small models.
"""

from ml_collections import ConfigDict

from encdec.data.task_mixtures import task_or_mixture
from encdec.errors import DataError

# Of records without a task, and of tasks that name none. Passes and peaks are our choice: the
# paper gives only its distillation's 1e-4 and batch of 128.
STEPS = 1_000


def get_config(task: str = "") -> ConfigDict:
    config = ConfigDict()
    config.steps = _steps(task)  # at most; patience may end the run earlier
    config.log_every = 20
    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-4  # at the peak (paper's recipe)
    config.schedule = ConfigDict()
    config.schedule.warmup_steps = 0.05  # of the run
    config.eval = ConfigDict()
    config.eval.patience = 3  # evaluations without a lower loss that end the run; 0: never
    config.checkpoint = ConfigDict()
    config.checkpoint.keep = 4  # more than patience, so that the best checkpoint is kept
    return config


def _steps(name: str) -> int:
    """The most steps of a task's fine-tuning."""
    if not name:
        return STEPS
    try:
        task = task_or_mixture(name)
    except DataError as error:
        raise ValueError(str(error)) from None
    if "source" not in task.objective.document_fields:
        raise ValueError(f"task {name} is text for pretraining; name one with sources and targets")
    return task.fine_tune_steps or STEPS
