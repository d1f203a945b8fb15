"""Fine-tuning a trained model on one task; the argument names the task.

    encdec prepare --task=squad_v2 --data_dir=DIR --vocabulary=runs/330m --out=data/squad_v2 ...
    encdec train --config=configs/finetune.py:squad_v2 --workdir=runs/330m-squad_v2 \
        --config.model=330m --config.init_from=runs/330m \
        --config.data.records=data/squad_v2 --config.data.eval_records=data/squad_v2-dev

For either architecture; --config.init_architecture=source takes over that of the run in init_from.
The run ends when the held-out loss has not fallen for `eval.patience` evaluations; `encdec evaluate
--step=best` takes the checkpoint of the lowest. With --config.distill.teacher=DIR (made by `encdec
score` on the same records) the model also learns from a teacher. What is not set here is as in
pretraining: encdec/train/config.py explains every field.

Time and loss: not measured at this size; docs/results.md has those of small models.
"""

from ml_collections import ConfigDict

# Passes and peaks are our choice: the paper gives only its distillation's 1e-4 and batch of 128.
STEPS = {
    "squad_v2": 3_000,
    "ielts_feedback": 300,
    "ielts_band": 300,
    "code_java2cs": 1_000,
    "code_refine_small": 1_500,
    "code_refine_medium": 1_500,
    "xsum": 4_000,
    "dialogsum": 1_000,
}


def get_config(task: str = "squad_v2") -> ConfigDict:
    if task not in STEPS:
        raise ValueError(f"no task is called {task!r}; there are {', '.join(STEPS)}")
    config = ConfigDict()
    config.steps = STEPS[task]  # at most; patience may end the run before
    config.log_every = 20
    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-4  # at the peak (paper's recipe)
    config.schedule = ConfigDict()
    config.schedule.warmup_steps = 0.05  # of the run
    config.eval = ConfigDict()
    config.eval.patience = 3  # evaluations without a lower loss that end the run; 0: none does
    config.checkpoint = ConfigDict()
    config.checkpoint.keep = 4  # more than patience, so that the best is still there
    return config
