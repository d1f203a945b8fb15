"""Writes a trained model as ONNX graphs that ``encdec generate`` runs."""

from __future__ import annotations

import pathlib
from typing import cast

from encdec.errors import ConfigError
from encdec.export import equivalents
from encdec.export.formats import Export, Written
from encdec.export.quantise import Precision
from encdec.inference.onnx_runtime import DECODER_FILE, ENCODER_FILE
from encdec.model import ModelConfig
from encdec.packages import install_hint


def check(config: ModelConfig) -> None:
    """The graphs express every model whose fields they know (``encdec.model.coverage``)."""


def write(out: pathlib.Path, export: Export) -> Written:
    """Writes encoder.onnx, decoder.onnx, the vocabulary, and last config.json.

    Precisions: float32; int8 (weights by column, in an encoder-decoder's decoder by blocks,
    activations as they come); int4 (the decoder's MLPs by blocks of 32 weights, all others in
    int8).

    Raises:
        ConfigError: the onnx package is missing.
    """
    try:
        import onnx

        from encdec.export import onnx_graph
    except ImportError as error:
        raise ConfigError(
            f"--format=onnx needs the onnx package: {install_hint('onnx')}"
        ) from error
    config, params = equivalents.on_host(export.config, export.params)
    out.mkdir(parents=True, exist_ok=True)
    graphs = {DECODER_FILE: onnx_graph.decoder_graph}
    if config.is_encoder_decoder:
        graphs[ENCODER_FILE] = onnx_graph.encoder_graph
    for name, make in graphs.items():
        # Weights are stored next to the graph, which may not exceed 2 GB.
        onnx.save_model(
            make(config, params, cast(Precision, export.precision)),
            str(out / name),
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=f"{name}.data",
            size_threshold=1024,
        )
    written = sum(
        (out / f"{name}{end}").stat().st_size
        for name in graphs
        for end in ("", ".data")
        if (out / f"{name}{end}").is_file()
    )
    return export.finish(out, "onnx", config, written)
