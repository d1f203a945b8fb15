"""Small models with large random weights, and greedy generation by full forward passes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from encdec.inference.decoding import DecodingPlan
from encdec.inference.sampling import Choosing, RowSettings, greedy_rows
from encdec.model import (
    ModelConfig,
    abstract_params,
    build_model,
    panels_for_cpu,
    preset,
    shards_for_cpu,
)

CONFIGS = {
    # Heads apart from the embeddings: tied ones make random models repeat their input.
    "encoder_decoder": preset(
        "test", vocab_size=264, encoder_layers=1, decoder_layers=1, tie_embeddings=False
    ),
    "decoder_only": preset(
        "test",
        vocab_size=264,
        architecture="decoder_only",
        encoder_layers=0,
        decoder_layers=1,
        tie_embeddings=False,
    ),
}
WIDTH = 48  # of the full passes' rows, whatever is in them
START = 2  # not the padding id, so that a mix-up shows


def laid_out(config: ModelConfig, params: dict, shards: int) -> tuple[ModelConfig, dict]:
    """An unrolled model in panels, or, if it is decoder-only, in shards (0: in panels, too)."""
    if shards and not config.is_encoder_decoder:
        return shards_for_cpu(config, params, shards)
    return panels_for_cpu(config, params)


@functools.cache
def model(name: str, std: float = 0.3, **changes) -> tuple[ModelConfig, dict]:
    """A model whose greedy answers depend on the input and do not go round in circles at once."""
    config = CONFIGS[name].replace(**changes)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        spread = {"embedding": 1.0, "bias": 0.05, "scale": 0.1}.get(path[-1].key, std)
        values = rng.normal(path[-1].key == "scale", spread, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return config, jax.tree_util.tree_map_with_path(draw, abstract_params(build_model(config)))


def plan(config, capacity, **choosing) -> DecodingPlan:
    return DecodingPlan(Choosing(config.vocab_size, **choosing), capacity, START)


def rows(count, limit, **values) -> RowSettings:
    """Settings of ``count`` rows; greedy unless ``values`` say otherwise."""
    plain, values = greedy_rows(count, 0), {"limit": limit} | values
    fields = {f"{name}_R": value for name, value in values.items() if f"{name}_R" in vars(plain)}
    fields |= {name: value for name, value in values.items() if name in vars(plain)}
    assert len(fields) == len(values), values
    return plain.replace(
        **{
            name: np.broadcast_to(
                np.asarray(value, getattr(plain, name).dtype),
                (count,) if name.endswith("_R") else np.shape(value),
            )
            for name, value in fields.items()
        }
    )


def padded(inputs) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(ids) for ids in inputs], np.int32)
    tokens = np.full((len(inputs), lengths.max()), 3, np.int32)  # padding must not matter
    for row, ids in enumerate(inputs):
        tokens[row, : len(ids)] = ids
    return tokens, lengths


@functools.partial(jax.jit, static_argnames="config")
def _log_probs(config, params, batch):
    return jax.nn.log_softmax(build_model(config).apply({"params": params}, batch))


def next_log_probs(config, params, source, answers) -> np.ndarray:
    """Log-probabilities [A, len(answer) + 1, V] of what follows every start of each answer.

    By one full forward pass on fields made as training makes them; answers are equally long.
    """
    answers = np.asarray(answers, np.int32).reshape(len(answers), -1)
    wanted, length = answers.shape
    count = 1 if wanted == 1 else -(-wanted // 32) * 32  # few shapes to compile
    before = [START] if config.is_encoder_decoder else [START, *source]
    rows = np.tile(np.asarray(before, np.int32), (count, 1))
    rows = np.concatenate([rows, np.zeros((count, length), np.int32)], 1)
    rows[:wanted, len(before) :] = answers

    def fields(side, tokens):
        padding = ((0, 0), (0, WIDTH - tokens.shape[1]))
        return {
            f"{side}_input_tokens": np.pad(tokens, padding),
            f"{side}_segment_ids": np.pad(np.ones_like(tokens), padding),
            f"{side}_positions": np.pad(np.tile(np.arange(tokens.shape[1]), (count, 1)), padding),
        }

    batch = fields("decoder", rows)
    if config.is_encoder_decoder:
        batch |= fields("encoder", np.tile(np.asarray(source, np.int32), (count, 1)))
    result = _log_probs(config, params, batch)
    return np.asarray(result)[:wanted, len(before) - 1 : len(before) + length]


def greedy(config, params, source, count) -> tuple[list[int], list[float]]:
    tokens, log_probs = [], []
    for _ in range(count):
        row = next_log_probs(config, params, source, [tokens])[0, -1]
        tokens.append(int(row.argmax()))
        log_probs.append(float(row.max()))
    return tokens, log_probs
