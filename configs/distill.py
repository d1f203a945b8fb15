"""Training on a teacher's stored distributions and on gold targets; the argument names the student.

    encdec distill logits --teacher=teacher --records=data/train --out=data/train-teacher
    encdec train --config=configs/distill.py:330m --workdir=runs/330m-distilled \
        --config.data.records=data/train --config.distill.teacher=data/train-teacher \
        --config.data.eval_records=data/validation

The paper's recipe: 0.9 x forward KL at temperature 1 + 0.1 x cross entropy, AdamW at 1e-4.
Everything else, losses included, is as in pretraining (encdec/train/run_fields.py explains every
field), so that a student and its baseline differ only by the teacher. Either architecture learns
from a decoder-only teacher.

Time and loss: micro-300k, on the records and with the settings that configs/pretrain.py names, from
a teacher of its own size trained on them, at 1e-3, ends at 3.42 nats per held-out token after 88 s
of processor time, and 27 s for `encdec distill logits` (AMD EPYC, Zen 5, 2026-11-29). 330m is
not measured; docs/distillation.md has more of small models.
"""

from ml_collections import ConfigDict


def get_config(model: str = "330m") -> ConfigDict:
    config = ConfigDict()
    config.model = model
    config.steps = 10_000  # (our choice)
    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-4  # (paper's recipe); from random parameters, use 1e-3
    config.schedule = ConfigDict()
    config.schedule.warmup_steps = 0.05  # of the run (our choice)
    return config
