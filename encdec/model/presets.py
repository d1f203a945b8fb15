"""Named configurations: a base, and suffixes that vary it.

    BASE[-half|-third][-tpu][-dec|-dec-flops]

* ``330m`` is the paper's model exactly: 20 + 10 layers, 332,042,240 parameters (arXiv 2501.16273).
  ``500m`` and ``1b`` are our own shapes: the paper names these sizes and gives no dimensions.
* ``-half`` and ``-third`` split the same number of layers 1/2-1/2 and 1/3-2/3 between encoder and
  decoder, in place of 2/3-1/3.
* ``-tpu`` is the accelerator-shaped sibling: heads 128 wide, as the matrix unit is, and every size
  a multiple of 128.
* ``-dec`` is the decoder-only peer with the same number of parameters, ``-dec-flops`` the one with
  the same training FLOPs per example (1,024 source and 256 target tokens): equal parameters and
  equal data are not equal compute.

Small bases: ``test`` for tests, ``quickstart`` for two CPU cores, ``micro-300k`` ... ``micro-8m``
for the laptop's scaling ladder.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

from encdec.errors import ConfigError
from encdec.fields import did_you_mean
from encdec.model.model_config import ModelConfig

# The paper's choices where its release shows them; shared by all sizes so that size is all that
# differs. ``kv_pairing``, ``encoder_positions`` and ``norm_cast`` follow the released weights.
_PAPER = ModelConfig(
    vocab_size=32_128,
    encoder_layers=20,
    decoder_layers=10,
    d_model=1024,
    num_heads=6,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=4096,
    kv_pairing="tiled",
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    encoder_positions="centred",
    norm_cast="before_scale",
    attention_dropout=0.1,
    mlp_dropout=0.1,
)


def _shape(
    layers: tuple[int, int],
    d_model: int,
    heads: tuple[int, int, int],
    mlp_dim: int | None = None,
    **changes: Any,
) -> ModelConfig:
    """The paper's choices at another size; heads are (query heads, kv heads, head width)."""
    return _PAPER.replace(
        encoder_layers=layers[0],
        decoder_layers=layers[1],
        d_model=d_model,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=heads[2],
        mlp_dim=mlp_dim or 4 * d_model,
        **changes,
    )


def _small(
    layers: tuple[int, int], d_model: int, heads: tuple[int, int, int], vocab_size: int
) -> ModelConfig:
    """A CPU-sized model: float32, and no dropout, for runs that hardly see a token twice.

    ``init_std`` grows as the width shrinks, so that the logits of attention and of the head start
    as spread out as in the paper's model; at 0.02 narrow models spend their short runs learning to
    attend.
    """
    return _shape(
        layers,
        d_model,
        heads,
        vocab_size=vocab_size,
        dtype="float32",
        attention_dropout=0.0,
        mlp_dropout=0.0,
        init_std=_PAPER.init_std * (_PAPER.d_model / d_model) ** 0.5,
    )


_BASES: dict[str, ModelConfig] = {
    "330m": _PAPER,
    "500m": _shape((24, 12), 1152, (8, 4, 64)),
    "1b": _shape((24, 12), 1664, (10, 5, 64)),
    "test": _small((2, 1), 32, (4, 2, 8), 256).replace(init_std=_PAPER.init_std),
    # Unrolled, because XLA's CPU programs gain a fifth by it and compile quickly at this size.
    "quickstart": _small((4, 2), 128, (2, 1, 64), 4096).replace(scan_layers=False),
    "micro-300k": _small((4, 2), 48, (2, 1, 24), 2048),
    "micro-1m": _small((4, 2), 96, (3, 1, 32), 2048),
    "micro-3m": _small((4, 2), 192, (6, 3, 32), 2048),
    "micro-8m": _small((8, 4), 256, (6, 3, 32), 2048),
}

# Heads 128 wide; grouped pairing and plain norms, which accelerators' kernels expect.
_TPU: dict[str, Any] = {
    "kv_pairing": "grouped",
    "norm_cast": "after_scale",
    "encoder_positions": "from_zero",
    "attention_dropout": 0.0,
}
_TPU_BASES: dict[str, ModelConfig] = {
    "330m": _shape((20, 10), 1024, (3, 3, 128), **_TPU),
    "500m": _shape((24, 12), 1152, (4, 2, 128), **_TPU),
    "1b": _shape((24, 12), 1664, (6, 3, 128), **_TPU),
}

_SPLITS = {"": None, "-half": (1, 2), "-third": (1, 3)}
_PEERS: dict[str, Literal["parameters", "training_flops"] | None] = {
    "": None,
    "-dec": "parameters",
    "-dec-flops": "training_flops",
}


def preset_names() -> tuple[str, ...]:
    """All names that ``preset`` accepts."""
    names = []
    for base, config in _BASES.items():
        for split, share in _SPLITS.items():
            if share and config.num_layers % share[1]:
                continue
            for shape in ("", "-tpu") if base in _TPU_BASES else ("",):
                # A peer has no encoder, so it is a peer of the base whatever the split.
                names += [base + split + shape + peer for peer in _PEERS if not (split and peer)]
    return tuple(names)


@functools.cache
def _named(name: str) -> ModelConfig:
    if name not in preset_names():
        names = preset_names()
        raise ConfigError(
            f"unknown preset {name!r}{did_you_mean(name, names)} (known: {', '.join(names)})"
        )
    peer = next(p for p in ("-dec-flops", "-dec", "") if name.endswith(p))
    rest = name.removesuffix(peer)
    bases = _TPU_BASES if rest.endswith("-tpu") else _BASES
    rest = rest.removesuffix("-tpu")
    split = next(s for s in ("-half", "-third", "") if rest.endswith(s))
    config = bases[rest.removesuffix(split)]
    if share := _SPLITS[split]:
        encoder_layers = config.num_layers * share[0] // share[1]
        config = config.replace(
            encoder_layers=encoder_layers, decoder_layers=config.num_layers - encoder_layers
        )
    if by := _PEERS[peer]:
        # Here, because the formulas know configurations and not the other way round.
        from encdec.cost.peers import match_decoder_only

        multiple = 128 if bases is _TPU_BASES else 64 if config.d_model >= 512 else 8
        config = match_decoder_only(config, by=by, mlp_multiple=multiple)
    return config


def preset(name: str, **changes: Any) -> ModelConfig:
    """The configuration called ``name``, with ``changes`` to its fields.

    Raises:
        ConfigError: no such preset or field; the message names the nearest.
    """
    return _named(name).replace(**changes)
