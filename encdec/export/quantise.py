"""Weights in few bits: levels and scales, as the export formats want them."""

from __future__ import annotations

import numpy as np

BLOCK = 32  # weights that share a scale in four bits, where scales go by block


def eight_bits(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 levels and float32 scales (one for each slice along ``axis``, which is kept as 1)."""
    scales = np.maximum(np.abs(x).max(axis=axis, keepdims=True) / 127, 1e-12).astype(np.float32)
    return np.rint(x / scales).astype(np.int8), scales


def four_bits(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels and scales as MatMulNBits wants them, blocks of ``BLOCK`` along the input axis.

    Level 8 is zero. The weight of largest magnitude of a block gets level 0 exactly, so the scale
    bears the opposite of its sign.

    Returns:
        uint8 [out, blocks, BLOCK / 2], two levels a byte, the lower one first; float32
        [out, blocks].
    """
    width, out = kernel.shape
    blocks = -(-width // BLOCK)
    padded = np.zeros((out, blocks * BLOCK), np.float32)
    padded[:, :width] = kernel.T
    padded = padded.reshape(out, blocks, BLOCK)
    peak = np.take_along_axis(padded, np.abs(padded).argmax(-1)[..., None], -1)
    scales = (peak / -8).astype(np.float32)
    safe = np.where(scales == 0, 1, scales)
    levels = np.clip(np.rint(padded / safe) + 8, 0, 15).astype(np.uint8)
    return levels[..., ::2] | levels[..., 1::2] << 4, scales[..., 0]


def four_bits_by_channel(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric levels -7 ... 7 of weights [out, in], one scale an output, as TFLite packs them.

    Returns:
        uint8 [out, in / 2] as int8, two's complement, the lower half first; float32 [out].
    """
    peak = np.abs(weights).max(axis=1)
    scales = np.maximum(peak / 7, 1e-12).astype(np.float32)
    levels = np.clip(np.rint(weights / scales[:, None]), -7, 7).astype(np.int8)
    return (levels[:, ::2] & 15) | (levels[:, 1::2] << 4), scales
