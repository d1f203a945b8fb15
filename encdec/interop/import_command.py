"""``encdec import``: converts another project's model to a work directory."""

from __future__ import annotations

import argparse
import time

from encdec.flags import Parser
from encdec.storage import any_path


def main(argv: list[str]) -> int:
    """``encdec import --format=hf DIR --out=DIR``.

    Raises:
        ConfigError: the output directory is in use, or the model has an unsupported setting.
        DataError: files are missing, truncated or do not belong together.
    """
    options = _parser().parse_args(argv)
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.interop.import_model import import_model

    started = time.monotonic()
    report = import_model(
        options.source,
        options.out,
        format=options.format,
        vocabulary=options.vocabulary,
        head_dim=options.head_dim,
        param_dtype=options.param_dtype,
        name=options.name,
        overwrite=options.overwrite,
    )
    model = report.model
    print(
        f"{report.family}: {model.num_layers} layers, width {model.d_model}, "
        f"{model.vocab_size:,} ids, up to {report.max_length:,} tokens, {model.param_dtype}, in "
        f"{options.out} ({time.monotonic() - started:.1f} s)"
    )
    for note in report.notes:
        print(note)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="encdec import",
        description="Converts another project's model to a work directory that score, generate and "
        "describe read.",
    )
    parser.add_argument(
        "source",
        type=any_path,
        metavar="PATH",
        help="directory with config.json and *.safetensors, or ORG/NAME[@REVISION] of the Hugging "
        "Face Hub (hf), the paper's model.pt (mu), or a .bin file (llama2c)",
    )
    parser.add_argument(
        "--format",
        choices=("hf", "mu", "llama2c"),
        default="hf",
        help="format of PATH (default %(default)s)",
    )
    parser.add_argument(
        "--out", type=any_path, required=True, metavar="DIR", help="directory to write"
    )
    parser.add_argument(
        "--vocabulary",
        type=any_path,
        metavar="FILE",
        help="the model's vocabulary, as for prepare, or llama2.c's tokenizer.bin (default: PATH's "
        "tokenizer.model or tokenizer.json, or the tok*.bin next to it, if there is one)",
    )
    parser.add_argument(
        "--head_dim",
        type=int,
        metavar="N",
        help="mu: width of a head, for a model.pt without model_config (default 64, the release's)",
    )
    parser.add_argument(
        "--param_dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the stored parameters (default: unchanged; float16 becomes float32)",
    )
    parser.add_argument("--name", help="the model's name in cards (default: PATH's last part)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model in --out")
    return parser
