"""``encdec export``: writes a trained model in another program's format."""

from __future__ import annotations

import argparse
import time

from encdec import shipped
from encdec.errors import ConfigError
from encdec.export import formats
from encdec.export.formats import FORMATS
from encdec.flags import Parser
from encdec.storage import any_path, as_path, is_free, local_path

PRECISIONS = tuple(dict.fromkeys(name for one in FORMATS.values() for name in one.precisions))


def main(argv: list[str]) -> int:
    """``encdec export --checkpoint=DIR --format=hf|onnx|litert|encdec --out=DIR``.

    Raises:
        ConfigError: the output directory is in use, or the format cannot express the model.
        CheckpointError: the directory holds no trained model.
        DataError: the records of ``--check`` are missing or have another vocabulary.
    """
    options = _parser().parse_args(argv)
    out = as_path(options.out)
    if not is_free(out):
        raise ConfigError(f"--out={out} is not empty; give another directory")
    chosen = FORMATS[options.format]
    formats.check_precision(options.format, options.precision)
    if options.check and not chosen.runs:
        raise ConfigError(
            f"--check is for exported graphs, which --format={options.format} does not write; "
            "leave it out, and evaluate the export with `encdec evaluate`"
        )
    if options.own and options.format != "hf":
        raise ConfigError(f"--own is for --format=hf, not --format={options.format}; leave it out")
    if options.check_pairs < 1:
        raise ConfigError(f"check_pairs is {options.check_pairs}; expected 1 or more")
    started = time.monotonic()
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.export import quality
    from encdec.export.export_model import export_model
    from encdec.inference.generator import read_prompt_format

    pairs = None
    if options.check:
        prompts, _ = read_prompt_format(options.checkpoint)
        pairs = quality.read_pairs(
            options.check, options.check_pairs, prompts.vocabulary.fingerprint
        )
    report = export_model(
        options.checkpoint,
        out,
        format=options.format,
        precision=options.precision,
        step=options.step,
        own=options.own,
        license=options.license,
        template=options.template,
        push=options.push,
        private=options.private,
    )
    written, export = report.written, report.export
    if written.family == "encdec":
        why = f" (no T5Gemma: {'; '.join(written.reasons)})" if written.reasons else ""
        print(f"With a modelling file of its own: load it with trust_remote_code=True{why}")
    kind = chosen.title + (f", {written.family}" if written.family else "")
    print(
        f"{out}: {kind}, {options.precision}, {written.bytes:,} bytes, step {report.step:,} "
        f"({time.monotonic() - started:.1f} s)"
    )
    if report.address:
        print(f"pushed: {report.address}")
    if pairs:
        from encdec.inference.exported import load_exported_model

        print(
            quality.measure(
                load_exported_model(out),
                export.config,
                export.params,
                pairs,
                export.prompts.decoder_start_id,
            )
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="encdec export",
        description="Writes a trained model in the format of another program.",
        epilog="Example: encdec export --checkpoint=runs/mine --format=litert --precision=int8 "
        "--out=mine-int8 --check=records/validation; encdec generate --checkpoint=mine-int8 'x'",
    )
    parser.add_argument(
        "--checkpoint",
        type=shipped.checkpoint,
        required=True,
        metavar="DIR",
        help="work directory of `encdec train` or `encdec import`",
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
    parser.add_argument(
        "--format",
        required=True,
        choices=tuple(FORMATS),
        help="; ".join(f"{name}: {one.about}" for name, one in FORMATS.items())
        + "; `encdec generate` runs "
        + ", ".join(name for name, one in FORMATS.items() if one.runs),
    )
    parser.add_argument(
        "--out", type=any_path, required=True, metavar="DIR", help="directory to write"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="precision of the weights (default %(default)s); "
        + "; ".join(f"{name}: {', '.join(one.precisions)}" for name, one in FORMATS.items()),
    )
    parser.add_argument(
        "--own",
        action="store_true",
        help="hf: our modelling file even where T5Gemma could express the model",
    )
    parser.add_argument(
        "--license",
        type=local_path,  # an identifier stays as it is
        metavar="ID|FILE",
        help="license of the model, for its card: an identifier such as apache-2.0, or a file",
    )
    parser.add_argument(
        "--template",
        metavar="TEXT",
        help="of every input, {source} in the place of its own text, such as that of the task "
        "which the model was trained on; `encdec generate` and `serve` then add it (not for hf)",
    )
    parser.add_argument(
        "--push",
        metavar="ORG/NAME",
        help="also send the directory to this repository of the Hugging Face Hub (HF_TOKEN)",
    )
    parser.add_argument(
        "--private", action="store_true", help="make the repository of --push private, if it is new"
    )
    parser.add_argument(
        "--check",
        type=any_path,
        metavar="RECORDS",
        help="what `encdec generate` runs: loss per token and greedy agreement with the float32 "
        "model on these records",
    )
    parser.add_argument(
        "--check_pairs",
        type=int,
        default=64,
        metavar="N",
        help="with --check: number of (source, target) pairs to read (default %(default)s)",
    )
    return parser
