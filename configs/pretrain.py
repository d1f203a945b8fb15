"""Training from scratch on prepared records; the argument names the model.

    encdec train --config=configs/pretrain.py:330m --workdir=runs/330m \
        --config.data.records=data/train --config.data.eval_records=data/validation

The argument is any preset (`encdec describe` lists them): 330m, 330m-dec, quickstart, ...
The recipe is the defaults of encdec/train/run_fields.py, which explains every field. Set any of
them with --config.FIELD=VALUE. For a shorter run --config.steps is enough: warmup, evaluations and
checkpoints scale with it.

Time and loss: micro-300k on `encdec prepare --task=stdlib_repair` in rows of 96 + 96 tokens
(vocabulary of 2,048, --config.steps=1000 --config.batch_size=16) ends at 3.39 nats per held-out
token after 100 s of processor time on shared cores of an AMD EPYC (Zen 5), 2026-11-29. 330m, 500m
and 1b are not measured; docs/prediction.md has predicted times.
"""

from ml_collections import ConfigDict


def get_config(model: str = "330m") -> ConfigDict:
    config = ConfigDict()
    config.model = model
    if "-tpu" in model:
        _for_tpus(config, model)
    return config


def _for_tpus(config: ConfigDict, model: str) -> None:
    """The fastest settings on TPU pods as predicted by `encdec compile`; see docs/prediction.md."""
    config.batch_size = 256  # 16 rows on each of 16 chips; keep 16 per chip on larger slices
    # AdamW's work and state are sharded over 16 chips, which divides every preset's width; larger
    # slices hold copies. A slice of fewer chips needs --config.mesh.fsdp=-1.
    config.mesh = ConfigDict(dict(data=-1, fsdp=16))
    config.model_overrides = ConfigDict()
    config.model_overrides.scan_layers = False  # saves a fifth of the step; compiles for minutes
    # At 16 rows per chip the smallest keeps all outputs of matrix products, others not the MLP's.
    config.model_overrides.remat = "dots" if model.startswith("330m") else "attention"
    config.model_overrides.mlp_dropout = 0.0  # one pass over much text (our choice)
