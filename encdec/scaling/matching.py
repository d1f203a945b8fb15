"""Models of one rung: the reference's size or cost in another architecture or split.

Of parameters N, data D and training FLOPs C, any two can be made equal between architectures, not
all three: an encoder-decoder's tokens pass through one of two stacks, a decoder-only model's
through all layers.
"""

from __future__ import annotations

import fractions
import math
from collections.abc import Callable
from typing import Literal

from encdec.cost.flops import count_parameters, training_flops
from encdec.cost.peers import MATCH, TOLERANCE, PeerMatch, match_decoder_only
from encdec.errors import ConfigError
from encdec.model import ModelConfig

Match = Literal["flops+data", "parameters+data", "flops+parameters"]

DECODER_ONLY = "dec"  # the series of decoder-only models


def series_name(split: str) -> str:
    """``ed-2of3`` for the split ``2/3``: two thirds of the layers in the encoder."""
    return "ed-" + split.replace("/", "of")


def distilled_name(series: str, teacher: str) -> str:
    """``ed-2of3+kd``: the series repeated with the teacher named ``kd``."""
    return f"{series}+{teacher}"


def plain_name(series: str) -> str:
    """The series without a teacher that corresponds to ``series``; itself if it has none."""
    return series.partition("+")[0]


def is_distilled(series: str) -> bool:
    return "+" in series


def encoder_share(split: str) -> fractions.Fraction:
    """The encoder's part of the layers.

    Raises:
        ConfigError: not a fraction between 0 and 1.
    """
    try:
        share = fractions.Fraction(split)
    except (ValueError, ZeroDivisionError):
        share = fractions.Fraction(0)
    if not 0 < share < 1:
        raise ConfigError(
            f"split is {split!r}; expected the encoder's share of the layers, such as '2/3'"
        )
    return share


def with_split(config: ModelConfig, split: str) -> ModelConfig:
    """The same number of layers, ``split`` of them in the encoder.

    Raises:
        ConfigError: the number of layers is not divisible.
    """
    layers = encoder_share(split) * config.num_layers
    if layers.denominator != 1:
        raise ConfigError(
            f"{config.num_layers} layers cannot be split {split} between encoder and decoder; "
            f"expected a multiple of {encoder_share(split).denominator} layers at each size"
        )
    return config.replace(
        encoder_layers=int(layers), decoder_layers=config.num_layers - int(layers)
    )


def matched(
    reference: ModelConfig, series: str, split: str, match: Match, inputs: int, targets: int
) -> ModelConfig:
    """The model of ``series`` on the reference's rung.

    Parameters or training FLOPs of a row are matched, as ``match`` says, by the MLP's width (and,
    in a decoder-only model, the number of layers); all other widths stay. Multiples that suit
    accelerators are preferred within the tolerance of 1 %.

    Args:
        reference: the rung's encoder-decoder.
        series: "dec", or an encoder-decoder's name.
        split: the encoder's share; ignored for "dec".
        match: the quantities to match.
        inputs, targets: row lengths.

    Raises:
        ConfigError: no model within 1 %.
    """
    by: PeerMatch = "training_flops" if match == "flops+data" else "parameters"

    def cost(config: ModelConfig) -> float:
        if by == "parameters":
            return count_parameters(config).total
        return training_flops(config, inputs, targets)

    wanted = cost(reference)
    found: list[tuple[tuple[bool, float], ModelConfig]] = []
    # The most convenient multiples of the MLP's width first.
    multiples = [m for m in (128, 64, 8, 4, 2, 1) if reference.mlp_dim % m == 0]
    for rank, multiple in enumerate(multiples):
        try:
            if series == DECODER_ONLY:
                model = match_decoder_only(
                    reference, by=by, inputs=inputs, targets=targets, mlp_multiple=multiple
                )
            else:
                model = _with_width(with_split(reference, split), cost, wanted, multiple)
        except ConfigError:
            if series != DECODER_ONLY:
                raise
            continue
        mismatch = abs(cost(model) / wanted - 1)
        if mismatch <= TOLERANCE:
            # A coarser multiple may cost a little of the match and of the MLP's proportion.
            stretch = abs(math.log(model.mlp_dim / reference.mlp_dim))
            found.append(((mismatch > MATCH, stretch + 10 * mismatch + 0.05 * rank), model))
    if not found:
        raise ConfigError(
            f"no {series} model has the reference's {by.replace('_', ' ')} within {TOLERANCE:.0%}; "
            "widen the reference's MLP, or leave this series out"
        )
    return min(found, key=lambda entry: entry[0])[1]


def _with_width(
    config: ModelConfig, cost: Callable[[ModelConfig], float], wanted: float, multiple: int
) -> ModelConfig:
    """The MLP width, a multiple of ``multiple``, at which ``cost`` is closest to ``wanted``."""
    base = cost(config.replace(mlp_dim=multiple))
    step = cost(config.replace(mlp_dim=2 * multiple)) - base  # cost is linear in the width
    units = max(1, round(1 + (wanted - base) / step))
    return config.replace(mlp_dim=units * multiple)
