"""Training from random parameters on prepared records; the argument names the model.

    encdec train --config=configs/pretrain.py:330m --workdir=runs/330m \
        --config.data.records=data/train --config.data.eval_records=data/validation

Any preset serves as the argument (`encdec describe` lists them): 330m, 330m-dec, quickstart, ...
Where a value is our choice rather than the paper's, which is silent on pretraining, it says so.
"""

from ml_collections import ConfigDict


def get_config(model: str = "330m") -> ConfigDict:
    config = ConfigDict()

    config.model = model  # preset; single fields by --config.model_overrides.FIELD=VALUE
    config.batch_size = 128  # packed rows in an optimizer step, over all devices (paper's recipe)
    config.accumulation = 1  # micro-batches a step; batch_size must be a multiple
    config.steps = 100_000  # optimizer steps of the whole run (our choice)
    config.seed = 0  # of initial parameters, dropout and the rows' order
    config.init_from = ""  # work directory to take parameters from; empty: drawn ones
    config.init_architecture = "refuse"  # where its model differs; or "source", "run"
    config.init_partial = ""  # names of parameters that may be drawn or left, as in "encoder/*"
    config.init_grow = False  # draw the rows that its vocabulary tables lack
    config.log_every = 50  # steps between lines of metrics

    config.data = ConfigDict()
    config.data.records = ""  # directory written by `encdec prepare`; must be given
    config.data.eval_records = ""  # held-out directory; empty: no evaluation
    config.data.shuffle = True  # another order of the rows in every epoch

    config.mesh = ConfigDict()  # devices along each axis; -1 on one of them: all the rest
    config.mesh.data = -1  # copies of the model; fastest as long as the state fits
    config.mesh.fsdp = 1  # shards of parameters and optimizer state
    config.mesh.tensor = 1  # shards of heads, MLP and vocabulary
    config.mesh.gather = "step"  # when shards are put together; "use": at each use, least memory
    config.mesh.reduce_dtype = "bfloat16"  # of gradients summed over devices; or "float32"

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw, adafactor, or muon (AdamW outside the layers)
    config.optimizer.learning_rate = 1e-3  # at the peak (our choice; the paper distils at 1e-4)
    config.optimizer.weight_decay = 0.01  # times the learning rate, matrices only (paper's recipe)
    config.optimizer.clip_norm = 1.0  # global gradient norm (paper's recipe)
    config.optimizer.b1 = 0.9  # AdamW's first moment (paper's recipe)
    config.optimizer.b2 = 0.98  # AdamW's second moment (paper's recipe)
    config.optimizer.eps = 1e-8  # AdamW: added to the root of the second moment
    config.optimizer.momentum = 0.95  # Muon
    config.optimizer.decay_rate = 0.8  # Adafactor: second moment decays by 1 - step^-0.8

    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # cosine, linear, rsqrt, wsd or constant (paper: cosine)
    config.schedule.warmup_steps = 1_000  # linear; less than config.steps (our choice)
    config.schedule.final_fraction = 0.0  # of the peak, at the end (paper's recipe)
    config.schedule.decay_fraction = 0.2  # wsd: part of the run in which it falls

    config.loss = ConfigDict()
    config.loss.z_loss = 1e-4  # weight of log(Z)^2, as in PaLM (our choice); 0: off
    config.loss.label_smoothing = 0.0  # probability spread over the vocabulary
    config.loss.vocab_tile = 0  # entries scored at a time, to save memory for time; 0: all

    config.distill = ConfigDict()  # see configs/distill.py
    config.distill.teacher = ""  # directory written by `encdec score`; empty: no distillation
    config.distill.loss = "forward_kl"  # or soft_cross_entropy, reverse_kl, jensen_shannon
    config.distill.alpha = 0.9  # weight of the teacher; gold targets get the rest
    config.distill.alpha_schedule = "constant"  # warmup: rises; learning_rate: falls with it
    config.distill.warmup_steps = 0  # of alpha, with alpha_schedule "warmup"
    config.distill.temperature = 1.0  # that of the stored distributions
    config.distill.beta = 0.5  # jensen_shannon: the teacher's share of the mixture
    config.distill.tail = "merged"  # top-k rows: what was left out is one outcome, or "dropped"

    config.eval = ConfigDict()
    config.eval.every = 1_000  # steps; 0: only after the last
    config.eval.batches = 0  # batches each time; 0: every held-out row once
    config.eval.batch_size = 0  # rows; 0: as in a training micro-batch
    config.eval.patience = 0  # evaluations without a lower loss that end the run; 0: none does

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1_000  # steps; the last step is always saved
    config.checkpoint.keep = 2  # newest kept; 0: all
    config.checkpoint.keep_best = 0  # also keep so many of the lowest held-out loss
    config.checkpoint.keep_every = 0  # steps; also keep these multiples for good

    config.profile = ConfigDict()
    config.profile.first_step = 0  # profiler trace from here into WORKDIR/profile; 0: none
    config.profile.steps = 5  # steps in the trace

    if "-tpu" in model:
        _for_tpus(config, model)
    return config


def _for_tpus(config: ConfigDict, model: str) -> None:
    """What `encdec compile` predicts to be fastest on TPU pods; docs/pod.md has the figures."""
    config.batch_size = 256  # 16 rows on each of 16 chips; keep 16 a chip on larger slices
    # AdamW's work and state are split over 16 chips, which divide every preset's width; larger
    # slices hold copies of these. A slice of fewer chips needs --config.mesh.fsdp=-1.
    config.mesh.data, config.mesh.fsdp = -1, 16
    config.model_overrides = ConfigDict()
    config.model_overrides.scan_layers = False  # a fifth off the step; compiles for minutes
    # At 16 rows a chip the smallest keeps all that matrix products gave, the others not the MLP's.
    config.model_overrides.remat = "dots" if model.startswith("330m") else "attention"
    config.model_overrides.mlp_dropout = 0.0  # one pass over much text (our choice)
