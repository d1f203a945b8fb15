"""Packed batches for model tests, built independently of the data package."""

from __future__ import annotations

import jax
import numpy as np

from encdec.model import Model, Params, init_params


def drawn(model: Model, seed: int = 0) -> Params:
    """``init_params`` as one program, not one for each of its operations."""
    return jax.jit(lambda key: init_params(model, key))(jax.random.key(seed))


def packed_batch(rng, vocab, source_lengths, target_lengths, source_width, target_width, rows=2):
    """Rows that all hold the same segment lengths with random tokens: the eight record fields."""

    def side(lengths, width):
        segments, positions = np.zeros(width, np.int32), np.zeros(width, np.int32)
        start = 0
        for number, length in enumerate(lengths, 1):
            segments[start : start + length] = number
            positions[start : start + length] = np.arange(length)
            start += length
        tile = lambda x: np.tile(x, (rows, 1))
        tokens = rng.integers(2, vocab, (rows, width), dtype=np.int32) * (segments > 0)
        return tokens, tile(segments), tile(positions)

    source, source_segments, source_positions = side(source_lengths, source_width)
    target, target_segments, target_positions = side(target_lengths, target_width)
    shifted = np.pad(target[:, :-1], ((0, 0), (1, 0))) * (target_positions > 0)
    return {
        "encoder_input_tokens": source,
        "encoder_segment_ids": source_segments,
        "encoder_positions": source_positions,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": target,
        "decoder_loss_weights": (target_segments > 0).astype(np.float32),
        "decoder_segment_ids": target_segments,
        "decoder_positions": target_positions,
    }


def decoder_fields(batch):
    return {name: value for name, value in batch.items() if name.startswith("decoder_")}


def segment(batch, number):
    """The rows' segment ``number`` alone, unpacked, without padding."""
    source = batch["encoder_segment_ids"][0] == number
    target = batch["decoder_segment_ids"][0] == number
    alone = {}
    for name, value in batch.items():
        alone[name] = value[:, source if name.startswith("encoder_") else target].copy()
        if name.endswith("segment_ids"):
            alone[name][:] = 1
    return alone
