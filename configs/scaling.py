"""Ladders of runs for scaling curves; the argument names one: micro, small, paper.

    encdec scaling plan --ladder=configs/scaling.py:micro
    encdec scaling run  --ladder=configs/scaling.py:micro --workdir=runs/micro \
        --ladder.records=data/train --ladder.eval_records=data/validation

Any field is set by --ladder.FIELD=VALUE. On each rung (a size at a budget) the encoder-decoder of
the first split is the reference, and all other series are matched to it.
"""

from ml_collections import ConfigDict


def get_config(name: str = "micro") -> ConfigDict:
    ladders = {"micro": micro, "small": small, "paper": paper}
    if name not in ladders:
        raise ValueError(f"unknown ladder {name!r}; known: {', '.join(ladders)}")
    ladder = common()
    ladder.name = name
    ladders[name](ladder)
    return ladder


def common() -> ConfigDict:
    ladder = ConfigDict()
    ladder.name = ""

    # Size: preset and changes to it. Layers must be divisible by all splits' denominators.
    ladder.sizes = ConfigDict()
    ladder.splits = ("2/3", "1/2", "1/3")  # encoder's share of the layers; the first: reference
    ladder.decoder_only = True  # also run the decoder-only series "dec"

    # What is equal on a rung; the third always differs:
    #   flops+data        other series have another number of parameters (the paper's claim)
    #   parameters+data   they cost another number of FLOPs
    #   flops+parameters  they read another number of rows
    ladder.match = "flops+data"

    ladder.records = ""  # training records; without, plans count slots instead of tokens
    ladder.eval_records = ""  # held-out records, whose losses make the curves
    ladder.inputs = 1024  # row lengths; must match the records
    ladder.targets = 256

    ladder.budgets = ConfigDict()
    ladder.budgets.kind = "flops"  # flops, rows, or tokens_per_parameter (source and target)
    ladder.budgets.values = ()  # each size is trained at each of these
    ladder.budgets.min_steps = 50  # rungs with fewer optimizer steps are left out
    ladder.budgets.max_epochs = 4.0  # rungs that read the records more often are left out

    # Rows per step: rows * (rows read / reference_rows)^exponent, to a power of two in bounds.
    ladder.batch = ConfigDict()
    ladder.batch.rows = 128
    ladder.batch.reference_rows = 2_000_000
    ladder.batch.exponent = 0.5
    ladder.batch.smallest = 8
    ladder.batch.largest = 4096

    # Peak: peak * (reference_width / d_model)^width_exponent
    #            * (batch / reference_batch)^batch_exponent
    ladder.learning_rate = ConfigDict()
    ladder.learning_rate.peak = 1e-3
    ladder.learning_rate.reference_width = 1024
    ladder.learning_rate.width_exponent = 0.5
    ladder.learning_rate.reference_batch = 128
    ladder.learning_rate.batch_exponent = 0.5

    ladder.warmup_fraction = 0.1  # of the steps
    ladder.evaluations = 4  # evaluations per run; only the last one is fitted

    ladder.seeds = ConfigDict()
    ladder.seeds.count = 1  # of the rungs below
    ladder.seeds.sizes = ()  # none: all sizes
    ladder.seeds.budgets = ()  # none: all budgets

    # Series repeated with a teacher: "ed-2of3+kd" in addition to "ed-2of3", with the same rows,
    # steps and student. More teachers may be added under other names.
    ladder.distilled = ConfigDict()
    ladder.distilled.series = ()  # e.g. ("ed-2of3", "dec")
    ladder.distilled.teachers = ConfigDict(
        dict(
            kd=dict(
                # directory of `encdec score --records=RECORDS`, of the ladder's own records
                rows="",
                loss=0.0,
            )
        )
    )  # the teacher's held-out loss, nats a target token; needed by the distillation law

    # Fields of configs/pretrain.py that all runs share. The schedule must end with the run: a
    # loss in mid-schedule is too high, and more so in long runs.
    ladder.run = ConfigDict()
    ladder.run.log_every = 20
    ladder.run.accumulation = 1  # micro-batches a step
    ladder.run.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    ladder.run.distill = ConfigDict(dict(alpha=0.9))  # of distilled series
    ladder.run.optimizer = ConfigDict(
        dict(name="adamw", weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.95)
    )
    ladder.run.schedule = ConfigDict(dict(name="cosine", final_fraction=0.1))
    ladder.run.loss = ConfigDict(dict(z_loss=1e-4))
    ladder.run.eval = ConfigDict(dict(batches=0))
    ladder.run.checkpoint = ConfigDict(dict(every=1000, keep=1))
    return ladder


def micro(ladder: ConfigDict) -> None:
    """0.3M to 9M parameters, two decades of FLOPs, 72 runs, 1.2e14 FLOPs: for two CPU cores."""
    for size in ("300k", "1m", "3m", "8m"):
        ladder.sizes[size] = ConfigDict(dict(preset=f"micro-{size}"))
    ladder.inputs, ladder.targets = 128, 32
    ladder.budgets.values = (5e10, 1.6e11, 5e11, 1.6e12, 5e12)
    ladder.budgets.min_steps = 60
    # At 1e3 rows, batches of 4 and Muon end half a nat below batches of 16 and AdamW.
    ladder.batch.rows, ladder.batch.reference_rows = 4, 1_000
    ladder.batch.smallest, ladder.batch.largest = 4, 64
    ladder.learning_rate.peak = 1e-2
    ladder.learning_rate.reference_width = 96
    ladder.learning_rate.reference_batch = 4
    ladder.learning_rate.batch_exponent = 0.0
    ladder.run.optimizer.name = "muon"
    ladder.evaluations = 1
    ladder.seeds.count, ladder.seeds.sizes, ladder.seeds.budgets = 3, ("300k", "1m"), (5e11,)
    ladder.run.checkpoint.every = 500


def small(ladder: ConfigDict) -> None:
    """14M to 119M parameters, two decades of FLOPs, 2.4e19 in all: 17 H200 hours at 40 % MFU."""
    shapes = {  # encoder and decoder layers, width, query heads, kv heads
        "14m": (8, 4, 256, 4, 2),
        "28m": (8, 4, 384, 6, 3),
        "60m": (12, 6, 512, 6, 3),
        "119m": (12, 6, 768, 6, 3),
    }
    for size, (encoder, decoder, width, heads, kv_heads) in shapes.items():
        ladder.sizes[size] = ConfigDict(
            dict(
                preset="330m",
                vocab_size=16_384,
                encoder_layers=encoder,
                decoder_layers=decoder,
                d_model=width,
                num_heads=heads,
                num_kv_heads=kv_heads,
                mlp_dim=4 * width,
                attention_dropout=0.0,
                mlp_dropout=0.0,
            )
        )
    ladder.inputs, ladder.targets = 512, 128
    ladder.budgets.values = (1e16, 3e16, 1e17, 3e17, 1e18)
    ladder.budgets.min_steps = 1000
    ladder.batch.rows, ladder.batch.reference_rows = 128, 500_000
    ladder.batch.smallest = 32
    ladder.seeds.count, ladder.seeds.sizes, ladder.seeds.budgets = 3, ("14m", "28m"), (3e16,)


def paper(ladder: ConfigDict) -> None:
    """The paper's three sizes, for a TPU pod. Its token budgets are not published; ours."""
    for size in ("330m", "500m", "1b"):
        ladder.sizes[size] = ConfigDict(
            dict(preset=f"{size}-tpu", attention_dropout=0.0, mlp_dropout=0.0)
        )
    ladder.budgets.kind = "tokens_per_parameter"
    ladder.budgets.values = (5.0, 10.0, 20.0, 40.0)
    ladder.budgets.min_steps = 2000
    ladder.budgets.max_epochs = 1.0
    ladder.batch.rows, ladder.batch.reference_rows = 512, 5_000_000
    ladder.batch.smallest = 128
    ladder.run.log_every = 50
    ladder.run.checkpoint.every = 1000
