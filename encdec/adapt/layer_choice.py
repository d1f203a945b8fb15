"""Which layers of a source go into a stack: rules of selection."""

from __future__ import annotations

import re

from encdec.errors import ConfigError

FORMS = "all, N (evenly spaced), even:N, first:N, last:N, or a list such as 0,2,5-8 or list:3"
_RULES = ("even", "first", "last")


def chosen_layers(choice: str, layers: int, flag: str, source: str) -> tuple[int, ...]:
    """Numbers, from 0, of the source's layers that make up a stack, in order.

    Args:
        choice: ``all``; ``N`` or ``even:N``, evenly spaced from the first layer to the last;
            ``first:N``; ``last:N``; or numbers and ranges in rising order, ``0,2,5-8``, a single
            one as ``list:3``.
        layers: how many the source has.
        flag: the option that it was given by, for messages.
        source: the source, for messages.

    Raises:
        ConfigError: no such rule, no layer at all, or a layer that the source does not have.
    """
    text = choice.strip()
    if text == "all":
        return tuple(range(layers))
    rule, _, rest = text.rpartition(":")
    if rule in ("", *_RULES) and re.fullmatch(r"\d+", rest):
        return _by_rule(rule or "even", int(rest), layers, flag, source)
    if rule in ("", "list") and re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", rest):
        return _listed(rest, layers, flag, source)
    raise ConfigError(f"{flag} is {choice!r}; expected {FORMS}")


def _by_rule(rule: str, count: int, layers: int, flag: str, source: str) -> tuple[int, ...]:
    if not 1 <= count <= layers:
        raise ConfigError(
            f"{flag} asks for {count} layers, but {source} has {layers}; expected 1 to {layers}"
        )
    if rule == "first":
        return tuple(range(count))
    if rule == "last":
        return tuple(range(layers - count, layers))
    # Both ends included: the first layer reads embeddings, the last one feeds the head.
    step = (layers - 1) / max(1, count - 1)
    return tuple(round(index * step) for index in range(count))


def _listed(text: str, layers: int, flag: str, source: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in text.split(","):
        begin, _, end = part.partition("-")
        first, last = int(begin), int(end or begin)
        if last < first or (numbers and first <= numbers[-1]):
            raise ConfigError(f"{flag} is {text!r}; expected layers in ascending order, each once")
        if last >= layers:
            raise ConfigError(
                f"{flag} names layer {last}, but {source} has layers 0 to {layers - 1}"
            )
        numbers += range(first, last + 1)
    return tuple(numbers)
