"""Writes a trained encoder-decoder as LiteRT graphs that ``encdec generate`` runs."""

from __future__ import annotations

import pathlib
from typing import cast

from encdec.errors import ConfigError
from encdec.export import equivalents
from encdec.export.formats import Export, Written
from encdec.export.quantise import Precision
from encdec.inference.litert_runtime import DECODER_FILE, ENCODER_FILE
from encdec.model import ModelConfig
from encdec.packages import install_hint


def check(config: ModelConfig) -> None:
    """Raises ConfigError if the graphs cannot express the model."""
    if not config.is_encoder_decoder:
        raise ConfigError(
            f"this model cannot be exported to LiteRT: architecture is {config.architecture!r}, "
            "expected 'encoder_decoder' (--format=onnx takes decoder-only models)"
        )


def write(out: pathlib.Path, export: Export) -> Written:
    """Writes encoder.tflite, decoder.tflite, the vocabulary, and last config.json.

    Precisions: float32; int8 (weights by output channel, activations as they come); int4 (the
    decoder's MLPs by blocks of 32 weights where they fit, all others in int8).

    Raises:
        ConfigError: ai-edge-litert is missing.
    """
    try:
        from encdec.export import litert_graph
    except ImportError as error:
        raise ConfigError(
            f"--format=litert needs the ai-edge-litert package: {install_hint('litert')}"
        ) from error
    config, params = equivalents.on_host(export.config, export.params)
    out.mkdir(parents=True, exist_ok=True)
    precision = cast(Precision, export.precision)  # one of the format's
    written = litert_graph.encoder_graph(config, params, precision).save(out / ENCODER_FILE)
    size = export.content["data"]["vocabulary"]["size"]
    written += litert_graph.decoder_graph(config, params, precision, size).save(out / DECODER_FILE)
    return export.finish(out, "litert", config, written)
