"""Ladders of runs for scaling curves; the argument names one: micro, small, paper.

    encdec scaling plan --ladder=configs/scaling.py:micro
    encdec scaling run  --ladder=configs/scaling.py:micro --workdir=runs/micro \
        --ladder.records=data/train --ladder.eval_records=data/validation

Any field is set by --ladder.FIELD=VALUE; what is not set here is as in encdec/scaling/ladder.py,
which explains every field. On each rung (a size at a budget) the encoder-decoder of the first split
is the reference, and all other series are matched to it.

Time and loss: micro took 65 minutes on 2 shared cores of an AMD EPYC (2026-11-24), with 385
English books in rows of 128 + 32 tokens. At 5e12 FLOPs its 300k models reach 4.661 (encoder-decoder
2/3) and 4.534 (decoder-only) nats per held-out target token; docs/scaling.md has the rest. small
and paper are not measured.
"""

from ml_collections import ConfigDict


def get_config(name: str = "micro") -> ConfigDict:
    ladders = {"micro": micro, "small": small, "paper": paper}
    if name not in ladders:
        raise ValueError(f"unknown ladder {name!r}; known: {', '.join(ladders)}")
    ladder = ConfigDict(dict(name=name, sizes={}, budgets={}, batch={}))
    ladders[name](ladder)
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
    ladder.learning_rate = ConfigDict(
        dict(peak=1e-2, reference_width=96, reference_batch=4, batch_exponent=0.0)
    )
    ladder.evaluations = 1
    ladder.seeds = ConfigDict(dict(count=3, sizes=("300k", "1m"), budgets=(5e11,)))
    ladder.run = ConfigDict(dict(optimizer=dict(name="muon"), checkpoint=dict(every=500)))


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
    ladder.batch.reference_rows, ladder.batch.smallest = 500_000, 32
    ladder.seeds = ConfigDict(dict(count=3, sizes=("14m", "28m"), budgets=(3e16,)))


def paper(ladder: ConfigDict) -> None:
    """The paper's three sizes, for a TPU pod. Its token budgets are not published; ours."""
    for size in ("330m", "500m", "1b"):
        ladder.sizes[size] = ConfigDict(
            dict(preset=f"{size}-tpu", attention_dropout=0.0, mlp_dropout=0.0)
        )
    ladder.budgets.kind = "tokens_per_parameter"
    ladder.budgets.values = (5.0, 10.0, 20.0, 40.0)
    ladder.budgets.min_steps, ladder.budgets.max_epochs = 2000, 1.0
    ladder.batch.rows, ladder.batch.reference_rows, ladder.batch.smallest = 512, 5_000_000, 128
    ladder.run = ConfigDict(dict(log_every=50))
