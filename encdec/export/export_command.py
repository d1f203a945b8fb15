"""``encdec export``: writes a trained model in another program's format."""

from __future__ import annotations

import time
from typing import cast

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
    started = time.monotonic()
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.export import quality
    from encdec.export.export_model import export_model
    from encdec.inference.generator import read_prompt_format

    pairs = None
    if options.check:
        prompts, _ = read_prompt_format(options.checkpoint)
        fingerprint = prompts.vocabulary.fingerprint
        pairs = quality.read_pairs(options.check, options.check_pairs, fingerprint)
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

        start_id = export.prompts.decoder_start_id
        exported = load_exported_model(out)
        print(
            quality.measure(
                cast(quality.ForcedModel, exported), export.config, export.params, pairs, start_id
            )
        )
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="encdec export",
        description="Writes a trained model in the format of another program.",
        epilog="Example: encdec export --checkpoint=runs/mine --format=litert --precision=int8 "
        "--out=mine-int8 --check=records/validation; encdec generate --checkpoint=mine-int8 'x'",
    )
    shipped.add_checkpoint_flag(parser)
    parser.add("--step", "checkpoint (default: the last)", int, least=0)
    parser.add(
        "--format",
        "; ".join(f"{name}: {one.about}" for name, one in FORMATS.items())
        + "; `encdec generate` runs "
        + ", ".join(name for name, one in FORMATS.items() if one.runs),
        required=True,
        choices=tuple(FORMATS),
    )
    parser.add("--out", "directory to write", any_path, required=True)
    parser.add(
        "--precision",
        "precision of the weights (default %(default)s); "
        + "; ".join(f"{name}: {', '.join(one.precisions)}" for name, one in FORMATS.items()),
        default="float32",
        choices=PRECISIONS,
    )
    parser.add(
        "--own",
        "hf: our modelling file even where T5Gemma could express the model",
        default=False,
        needs="--format=hf",
    )
    parser.add(
        "--license",
        "license of the model, for its card: an identifier such as apache-2.0, or a file",
        local_path,
        metavar="ID|FILE",
    )
    parser.add(
        "--template",
        "of every input, {source} in the place of its own text, such as that of the task "
        "which the model was trained on; `encdec generate` and `serve` then add it (not for hf)",
        metavar="TEXT",
    )
    parser.add(
        "--push",
        "also send the directory to this repository of the Hugging Face Hub (HF_TOKEN)",
        metavar="ORG/NAME",
    )
    parser.add(
        "--private",
        "make the repository of --push private, if it is new",
        default=False,
        needs="--push",
    )
    parser.add(
        "--check",
        "what `encdec generate` runs: loss per token and greedy agreement with the float32 "
        "model on these records",
        any_path,
        metavar="RECORDS",
    )
    parser.add(
        "--check_pairs",
        "number of (source, target) pairs of --check to read",
        int,
        64,
        least=1,
        needs="--check",
    )
    return parser
