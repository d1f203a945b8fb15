"""Quantised weights: levels and scales, as the export formats define them."""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np

Precision = Literal["float32", "int8", "int4"]  # of the formats that compute in graphs
BLOCK = 32  # inputs that share a scale in int4
_SHRINKING = np.linspace(1, 0.7, 7)  # tried on the scale that just fits the largest weight


def eight_bits(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 levels and float32 scales (one for each slice along ``axis``, which is kept as 1)."""
    scales = np.maximum(np.abs(x).max(axis=axis, keepdims=True) / 127, 1e-12).astype(np.float32)
    return np.rint(x / scales).astype(np.int8), scales


def four_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 levels -7 ... 7, and float32 scales, one for each slice along the last axis.

    The scale is the candidate with the least squared error: clipping the largest weights a little
    costs less than rounding all others to coarser steps. Scales are representable in both float16
    and bfloat16, because LiteRT's file holds the one and XNNPACK computes with the other.

    Returns:
        Levels of the shape of ``x``; scales, the last axis kept as 1.
    """
    peak = np.abs(x).max(axis=-1, keepdims=True)
    least = np.full(peak.shape, np.inf, np.float32)
    scales = np.empty(peak.shape, np.float32)
    for share in _SHRINKING:
        tried = np.maximum(peak * np.float32(share / 7), np.float32(2.0**-20))
        tried = tried.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float32)
        error = np.square(_levels(x, tried) * tried - x).sum(axis=-1, keepdims=True)
        scales, least = np.where(error < least, tried, scales), np.minimum(error, least)
    return _levels(x, scales).astype(np.int8), scales


def _levels(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x / scales), -7, 7)


def in_blocks(weights: np.ndarray, block: int) -> np.ndarray:
    """Weights [out, in] as [out, blocks, block], the last block filled with zeros."""
    out, width = weights.shape
    blocks = -(-width // block)
    padded = np.zeros((out, blocks * block), np.float32)
    padded[:, :width] = weights
    return padded.reshape(out, blocks, block)


def nibbles(levels: np.ndarray) -> np.ndarray:
    """Two levels a byte along the last axis, the first in the lower half."""
    levels = levels.view(np.uint8)
    return (levels[..., ::2] & 15) | (levels[..., 1::2] << 4)
