"""``encdec export``: a trained model in the format of another program."""

from __future__ import annotations

import argparse
import pathlib
import time

from encdec.errors import ConfigError
from encdec.storage import is_free, local_path, whole_directory
from encdec.train.workdir import model_config_of, read_config

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
_ALLOWED = {
    "hf": ("float32", "bfloat16"),
    "onnx": ("float32", "int8", "int4"),
    "litert": ("float32", "int8", "int4"),
}


def main(argv: list[str]) -> int:
    """``encdec export --checkpoint=DIR --format=hf|onnx|litert --out=DIR``.

    Raises:
        ConfigError: the output is taken, or the format cannot express the model.
        CheckpointError: no trained model there.
        DataError: the records of ``--check`` are missing or of another vocabulary.
    """
    options = _parser().parse_args(argv)
    out = pathlib.Path(options.out)
    if not is_free(out):
        raise ConfigError(f"--out={out} is not empty; give another directory")
    if options.precision not in _ALLOWED[options.format]:
        raise ConfigError(
            f"--precision={options.precision} does not go with --format="
            f"{options.format}; wanted {' or '.join(_ALLOWED[options.format])}"
        )
    if options.check and options.format == "hf":
        raise ConfigError("--check measures --format=onnx and =litert; leave it out")
    if options.check_pairs < 1:
        raise ConfigError(f"check_pairs is {options.check_pairs}; wanted 1 or more")
    content = read_config(options.checkpoint)
    config, started = model_config_of(content), time.monotonic()
    # Imported late: a mistake in the command line is answered at once.
    from encdec.export import huggingface, litert_export, onnx_export, quality
    from encdec.inference.generator import read_prompt_format
    from encdec.train.checkpoints import load_params_for_inference

    writers = {"hf": huggingface, "onnx": onnx_export, "litert": litert_export}
    writer = writers[options.format]
    writer.check(config)
    prompts, targets_length = read_prompt_format(options.checkpoint)
    pairs = None
    if options.check:
        pairs = quality.read_pairs(
            options.check, options.check_pairs, prompts.vocabulary.fingerprint
        )
    config, params, step = load_params_for_inference(options.checkpoint, options.step)
    if options.format == "hf":
        with whole_directory(out) as partial:
            family, reasons = huggingface.write(
                partial,
                config,
                params,
                prompts,
                targets_length=targets_length,
                dtype=options.precision,
                native=not options.own,
            )
        if family == "encdec":
            why = f" (no T5Gemma: {'; '.join(reasons)})" if reasons else ""
            print(f"With a modelling file of its own: load it with trust_remote_code=True{why}")
        kind = f"Hugging Face, {family}"
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    else:
        with whole_directory(out) as partial:
            size = writer.write(
                partial,
                config,
                params,
                precision=options.precision,
                content=content,
                vocabulary_from=options.checkpoint,
            )
        kind = {"onnx": "ONNX", "litert": "LiteRT"}[options.format]
    print(
        f"{out}: {kind}, {options.precision}, {size:,} bytes, step {step:,} "
        f"({time.monotonic() - started:.1f} s)"
    )
    if pairs:
        from encdec.inference.exported import load_exported_model

        print(
            quality.measure(
                load_exported_model(out), config, params, pairs, prompts.decoder_start_id
            )
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="encdec export",
        allow_abbrev=False,
        description="Writes a trained model in the format of another program.",
        epilog="Example: encdec export --checkpoint=runs/mine --format=litert --precision=int8 "
        "--out=mine-int8 --check=records/validation; encdec generate --checkpoint=mine-int8 'x'",
    )
    parser.add_argument(
        "--checkpoint",
        type=local_path,
        required=True,
        metavar="DIR",
        help="work directory of `encdec train` or `encdec import`",
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
    parser.add_argument(
        "--format",
        required=True,
        choices=tuple(_ALLOWED),
        help="hf: a Hugging Face directory; onnx: graphs for onnxruntime; "
        "litert: graphs for LiteRT, the fastest on a CPU; `encdec generate` runs "
        "both",
    )
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="directory to write"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the weights: float32 (default), bfloat16 (hf), int8 or int4 (onnx, litert)",
    )
    parser.add_argument(
        "--own", action="store_true", help="hf: our modelling file even where T5Gemma would do"
    )
    parser.add_argument(
        "--check",
        metavar="RECORDS",
        help="onnx, litert: loss per token and greedy agreement with the float32 "
        "model on these records",
    )
    parser.add_argument(
        "--check_pairs",
        type=int,
        default=64,
        metavar="N",
        help="of --check: (source, target) pairs to read (default %(default)s)",
    )
    return parser
