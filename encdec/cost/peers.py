"""Decoder-only peers: the same widths, and as many parameters or training FLOPs."""

from __future__ import annotations

import math
from typing import Literal

from encdec.cost.flops import count_parameters, training_flops
from encdec.errors import ConfigError
from encdec.model.model_config import ModelConfig

MATCH = 0.005  # matches this close are preferred
TOLERANCE = 0.01  # worse matches are refused

# Trade-off between mismatch and MLP width: one percent of match is worth ten percent of width.
_WIDTH_PER_MISMATCH = 10.0


PeerMatch = Literal["parameters", "training_flops"]


def match_decoder_only(
    config: ModelConfig,
    *,
    by: PeerMatch = "parameters",
    inputs: int = 1024,
    targets: int = 256,
    mlp_multiple: int | None = None,
) -> ModelConfig:
    """The decoder-only model that costs as much as an encoder-decoder.

    Model width, heads, vocabulary and every other choice stay; layers and MLP width are chosen,
    among the matches within 0.5 % if there are any, so that the MLP's width is closest to the
    original and the match tight.

    Args:
        config: the encoder-decoder.
        by: the quantity to match: all parameters, or the training FLOPs of one example.
        inputs: source tokens of that example.
        targets: its target tokens.
        mlp_multiple: the MLP's width is a multiple of this; by default 128 for models shaped for
            accelerators (heads and width in multiples of 128), else 64, and 8 for small ones.

    Raises:
        ConfigError: not an encoder-decoder, or no match within 1 %.
    """
    if not config.is_encoder_decoder:
        raise ConfigError("a peer is made from an encoder-decoder; this model is decoder_only")
    if by not in ("parameters", "training_flops"):
        raise ConfigError(f"by is {by!r}; expected 'parameters' or 'training_flops'")
    if mlp_multiple is None:
        shaped = config.head_dim % 128 == 0 and config.d_model % 128 == 0
        mlp_multiple = 128 if shaped else 64 if config.d_model >= 512 else 8

    def cost(candidate: ModelConfig) -> float:
        if by == "parameters":
            return count_parameters(candidate).total
        return training_flops(candidate, inputs, targets)

    def candidate(layers: int, mlp_dim: int) -> ModelConfig:
        return config.replace(
            architecture="decoder_only",
            encoder_layers=0,
            decoder_layers=layers,
            mlp_dim=mlp_dim,
            cross_attention_rope="none",
            merged_attention=False,
            encoder_window=(),
            encoder_global_layers=(),
            encoder_unrotated_layers=(),
        )

    wanted = cost(config)
    found: list[tuple[bool, float, ModelConfig]] = []
    for layers in range(1, 2 * config.num_layers + 1):
        # Cost is linear in the MLP's width, so two points give the width that matches exactly.
        base = cost(candidate(layers, mlp_multiple))
        step = cost(candidate(layers, 2 * mlp_multiple)) - base
        exact = 1 + (wanted - base) / step
        for units in {math.floor(exact), math.ceil(exact)}:
            if units < 1:
                continue
            peer = candidate(layers, units * mlp_multiple)
            mismatch = abs(cost(peer) / wanted - 1)
            if mismatch <= TOLERANCE:
                stretch = abs(math.log(peer.mlp_dim / config.mlp_dim))
                distance = stretch + _WIDTH_PER_MISMATCH * mismatch
                found.append((mismatch > MATCH, distance, peer))
    if not found:
        raise ConfigError(
            f"no decoder-only model matches the {by} within {TOLERANCE:.0%} with an MLP width in "
            f"multiples of {mlp_multiple}; choose a smaller mlp_multiple"
        )
    return min(found, key=lambda entry: entry[:2])[2]
