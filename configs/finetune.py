"""Fine-tuning a trained model on one task; the argument names the task.

    encdec prepare --task=squad_v2 --data_dir=DIR --vocabulary=runs/330m --out=data/squad_v2 ...
    encdec train --config=configs/finetune.py:squad_v2 --workdir=runs/330m-squad_v2 \
        --config.model=330m --config.init_from=runs/330m \
        --config.data.records=data/squad_v2 --config.data.eval_records=data/squad_v2-dev

For either architecture; --config.init_architecture=source uses that of the run in init_from.
The run ends when the held-out loss has not fallen for `eval.patience` evaluations; `encdec evaluate
--step=best` uses the checkpoint with the lowest. With --config.distill.teacher=DIR (made by `encdec
score` on the same records) the model also learns from a teacher. Fields not set here are as in
pretraining: encdec/train/config.py explains every field.

Time and loss: not measured at this size; docs/results.md has those of small models.
"""

from ml_collections import ConfigDict

from encdec.data.paper_tasks import PAPER_TASKS

# Passes and peaks are our choice: the paper gives only its distillation's 1e-4 and batch of 128.
STEPS = {name: task.fine_tune_steps for name, task in PAPER_TASKS.items() if task.fine_tune_steps}


def get_config(task: str = "squad_v2") -> ConfigDict:
    if task not in STEPS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(STEPS)}")
    config = ConfigDict()
    config.steps = STEPS[task]  # at most; patience may end the run earlier
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
