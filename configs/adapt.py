"""Training an adapted model; the argument names the objective: prefix_lm or ul2.

    encdec adapt runs/smollm2 --out=runs/adapted
    encdec prepare --text FILE... --vocabulary=runs/adapted --objective=prefix_lm --out=data/train
    encdec train --config=configs/adapt.py:prefix_lm --workdir=runs/encdec \
        --config.init_from=runs/adapted --config.data.records=data/train \
        --config.data.eval_records=data/validation

Prefix LM also learns from its source's stored distributions: --config.distill.teacher=DIR, made by
`encdec distill logits --teacher=runs/smollm2 --records=data/train` (docs/adaptation.md). UL2 needs
sentinels in the vocabulary: `encdec adapt --extra_ids=136`, and records by
gin/objectives/ul2.gin.

Further words of the argument, after commas:

* `hold`: all but cross-attention waits at first, as where it was drawn (`encdec adapt
  --cross_attention=random` or `zero`): configs/adapt.py:prefix_lm,hold
* a shape (stories260k, smollm2-135m, smollm2-360m, qwen3-0.6b, gemma-3-1b) in place of a
  source's, from random parameters or for predictions:
  encdec compile --config=configs/adapt.py:prefix_lm,qwen3-0.6b --topology=v5e:4x4

Fields not set here are as in pretraining: encdec/train/run_fields.py explains every field.

Time and loss: stories260K adapted all-all and distilled ends at 1.314 nats per held-out token after
300 steps, about two minutes of processor time on shared cores of an AMD EPYC (2026-11-29);
SmolLM2-135M adapted with --cross_attention=zero has 2.265 after 300 steps of 4 rows of DialogSum,
66 minutes there. docs/adaptation.md has both, and predicted hours of the other shapes.
"""

from ml_collections import ConfigDict

OBJECTIVES = ("prefix_lm", "ul2")

# Of the public config.json files; every layer goes to both sides, as in T5Gemma.
LLAMA = dict(
    mlp_gated=True,
    mlp_activation="silu",
    mlp_bias=False,
    qkv_bias=False,
    attention_out_bias=False,
    kv_pairing="grouped",
    encoder_positions="from_zero",
    attention_dropout=0.0,
    mlp_dropout=0.0,
)
SHAPES = {
    "stories260k": dict(
        LLAMA,
        vocab_size=512,
        encoder_layers=5,
        decoder_layers=5,
        d_model=64,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        mlp_dim=172,
        norm_eps=1e-5,
        scan_layers=False,
        dtype="float32",
        param_dtype="float32",
    ),
    "smollm2-135m": dict(
        LLAMA,
        vocab_size=49_152,
        encoder_layers=30,
        decoder_layers=30,
        d_model=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1_536,
        norm_eps=1e-5,
        rope_theta=1e5,
    ),
    "smollm2-360m": dict(
        LLAMA,
        vocab_size=49_152,
        encoder_layers=32,
        decoder_layers=32,
        d_model=960,
        num_heads=15,
        num_kv_heads=5,
        head_dim=64,
        mlp_dim=2_560,
        norm_eps=1e-5,
        rope_theta=1e5,
    ),
    "qwen3-0.6b": dict(
        LLAMA,
        vocab_size=151_936,
        encoder_layers=28,
        decoder_layers=28,
        d_model=1_024,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=3_072,
        qk_norm=True,
        rope_theta=1e6,
    ),
    "gemma-3-1b": dict(
        LLAMA,
        mlp_activation="gelu_tanh",
        vocab_size=262_144,
        encoder_layers=26,
        decoder_layers=26,
        d_model=1_152,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        mlp_dim=6_912,
        qk_norm=True,
        post_norms=True,
        norm_plus_one=True,
        norm_cast="after_scale",
        embedding_scale=True,
        attention_window=512,
        global_layer_every=6,
        rope_theta=1e6,
        local_rope_theta=1e4,
        scan_layers=False,
    ),
}


def get_config(argument: str = "prefix_lm") -> ConfigDict:
    objective, *words = argument.split(",")
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}")
    shapes = [word for word in words if word in SHAPES]
    if unknown := [word for word in words if word not in ("hold", *shapes[:1])]:
        known = ", ".join(("hold", *SHAPES))
        raise ValueError(f"{unknown[0]!r} is not expected; after the objective, one of: {known}")
    config = ConfigDict()
    config.steps = 10_000  # (our choice)
    if shapes:
        config.model_overrides = ConfigDict(SHAPES[shapes[0]])
    else:
        config.init_architecture = "source"
    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-4  # (our choice)
    if "hold" in words:
        # arXiv 2504.06225 does so where cross-attention starts at random; for how long is our
        # choice.
        config.freeze = ConfigDict()
        config.freeze.parameters = "*,!*/encoder_attention/*,!*/cross_attention_*"
        config.freeze.steps = 0.05  # of the run
    config.schedule = ConfigDict()
    config.schedule.warmup_steps = 0.05  # of the run
    return config
