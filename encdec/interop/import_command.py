"""``encdec import``: converts another project's model to a work directory."""

from __future__ import annotations

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
    for remark in report.remarks:
        print(remark)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="encdec import",
        description="Converts another project's model to a work directory that distill, generate "
        "and describe read.",
    )
    parser.add(
        "source",
        "directory with config.json and *.safetensors, or ORG/NAME[@REVISION] of the Hugging "
        "Face Hub (hf), the paper's model.pt (mu), or a .bin file (llama2c)",
        any_path,
        metavar="PATH",
    )
    parser.add("--format", "format of PATH", default="hf", choices=("hf", "mu", "llama2c"))
    parser.add("--out", "directory to write", any_path, required=True)
    parser.add(
        "--vocabulary",
        "the model's vocabulary, as for prepare, or llama2.c's tokenizer.bin (default: PATH's "
        "tokenizer.model or tokenizer.json, or the tok*.bin next to it, if there is one)",
        any_path,
        metavar="FILE",
    )
    parser.add(
        "--head_dim",
        "mu: width of a head, for a model.pt without model_config (default 64, the release's)",
        int,
        least=1,
        needs="--format=mu",
    )
    parser.add(
        "--param_dtype",
        "dtype of the stored parameters (default: unchanged; float16 becomes float32)",
        choices=("float32", "bfloat16"),
    )
    parser.add("--name", "the model's name in cards (default: PATH's last part)")
    parser.add("--overwrite", "replace a model in --out", default=False)
    return parser
