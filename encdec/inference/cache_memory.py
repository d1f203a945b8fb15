"""Whether keys and values fit into memory, known before any of it is taken."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from encdec.cost.flops import cache_bytes, weight_bytes
from encdec.errors import ConfigError
from encdec.inference.ready import decoding_dtype
from encdec.machine import memory_bytes
from encdec.model import ModelConfig

GB = 1e9


def device_memory() -> int:
    """Bytes of the device that computes: its own or, of a CPU, the machine's."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or memory_bytes()


def check_slots(
    models: Sequence[ModelConfig], slots: int, longest_input: int, longest_answer: int
) -> None:
    """ConfigError unless a server's weights and the keys and values of all slots fit.

    The input that is being read takes as much as a slot.

    Args:
        models: the model, and one that drafts for it.
        slots: answers generated at once.
        longest_input: tokens, as the answer's.
        longest_answer: the start token is not counted.
    """
    dtypes = [decoding_dtype(config) for config in models]
    weights = sum(map(weight_bytes, models, dtypes))
    token = sum(_token_bytes(config, dtype) for config, dtype in zip(models, dtypes, strict=True))
    width, memory = longest_input + 1 + longest_answer, device_memory()
    free, needed = memory - weights, token * width * (slots + 1)
    if needed <= free:
        return
    fitting = free // (token * (slots + 1))
    largest = (
        ("--max_input_tokens", fitting - 1 - longest_answer, 2),
        ("--max_tokens", fitting - 1 - longest_input, 1),
        ("--slots", free // (token * width) - 1, 1),
    )
    named = [f"{flag}={value}" for flag, value, least in largest if value >= least]
    remedy = f"the largest that fits is {' or '.join(named)}" if named else "lower all three"
    raise ConfigError(
        f"--slots={slots} with --max_input_tokens={longest_input} and "
        f"--max_tokens={longest_answer} takes {needed / GB:,.2f} GB for keys and values in "
        f"addition to {weights / GB:,.2f} GB of weights, and there are {memory / GB:,.2f} GB of "
        f"memory; {remedy}"
    )


def check_batch(config: ModelConfig, inputs: tuple[int, ...], answers: int, tokens: int) -> None:
    """ConfigError unless the keys and values of a batch fit into the devices of this process.

    Args:
        config: the model, ready for decoding.
        inputs: how many, and tokens of each.
        answers: to each of them, drawn or as hypotheses.
        tokens: of an answer.
    """
    rows, longest = inputs
    needed = _token_bytes(config, config.dtype) * rows * (longest + 1 + answers * tokens)
    memory = device_memory() * (1 if jax.default_backend() == "cpu" else jax.local_device_count())
    if needed > memory:
        raise ConfigError(
            f"{rows} inputs of {longest:,} tokens, with {answers} answers of up to {tokens:,} "
            f"each, take {needed / GB:,.2f} GB for keys and values, and there are "
            f"{memory / GB:,.2f} GB of memory; lower max_tokens, or batch_rows to "
            f"{max(rows * memory // needed, 1)}"
        )


def _token_bytes(config: ModelConfig, dtype: str) -> int:
    """Of one position, in all decoder layers."""
    return cache_bytes(config, 1, 1, dtype=dtype) // 2
