"""``encdec import``: converts another project's model to a work directory."""

from __future__ import annotations

import argparse
import pathlib
import time

from encdec.errors import ConfigError, DataError
from encdec.storage import local_path


def main(argv: list[str]) -> int:
    """``encdec import --from=hf DIR --out=DIR``.

    Raises:
        ConfigError: the output directory is in use, or the model has an unsupported setting.
        DataError: files are missing, truncated or do not belong together.
    """
    options = _parser().parse_args(argv)
    if options.head_dim is not None and options.format != "mu":
        raise ConfigError(
            f"--head_dim={options.head_dim} goes with --from=mu; the other formats state it"
        )
    if options.head_dim is not None and options.head_dim < 1:
        raise ConfigError(
            f"head_dim is {options.head_dim}; expected 1 or more (the width of a head)"
        )
    source, out = pathlib.Path(options.source), pathlib.Path(options.out)
    if not source.exists():
        raise DataError(f"{source} does not exist; give the downloaded file or directory")
    # Imported late: a mistake in the command line is answered at once.
    from encdec.data.chat_template import TEMPLATE_FILE, chat_template_of
    from encdec.data.vocabulary import load_vocabulary
    from encdec.interop.framing import Framing
    from encdec.interop.importing import free_bytes, write_model

    started = time.monotonic()
    vocabulary = load_vocabulary(options.vocabulary) if options.vocabulary else None
    if options.format == "hf":
        from encdec import safetensors
        from encdec.interop import huggingface, own, t5gemma
        from encdec.interop.framing import other_ends, read_eos_ids, read_framing, read_vocabulary

        family = huggingface.model_type(source)
        seq2seq = {t5gemma.MODEL_TYPE: t5gemma, own.MODEL_TYPE: own}.get(family)
        found = (seq2seq or huggingface).read_config(source)
        tensors = safetensors.open_directory(source)
        if seq2seq:
            model, params = seq2seq.convert(found.model, tensors)
        else:
            model, params = (
                found.model,
                huggingface.convert(
                    found.model, found.family, tensors, found.rotated, found.multipliers
                ),
            )
        if vocabulary is None:
            eos_ids = read_eos_ids(source, found.eos_ids)
            vocabulary = read_vocabulary(source, eos_ids)
            if vocabulary and (note := other_ends(vocabulary, eos_ids)):
                print(note)
        family, longest = found.family, found.max_length
        if found.unread:
            print(f"Unknown keys of config.json, ignored: {', '.join(found.unread)}")
        framing = read_framing(
            source,
            found.start_id,
            vocabulary.eos_id if vocabulary else None,
            encoder_decoder=seq2seq is not None,
        )
        needed = sum(tensor.nbytes for tensor in tensors.values())
        if (free := free_bytes(out)) < needed:
            raise DataError(f"{out} has {free:,} bytes free; the model needs about {needed:,}")
    elif options.format == "mu":
        from encdec.interop import mu

        tensors, settings = mu.read_checkpoint(source)
        model, longest = mu.read_config(tensors, settings, options.head_dim)
        params = mu.convert(model, tensors)
        family, framing = "mu", Framing(mu.START_ID)
    else:
        from encdec.interop import llama2c

        model, params, longest = llama2c.read_model(source)
        family, framing = "llama2.c", Framing(llama2c.START_ID)
    stored = write_model(
        out,
        model,
        params,
        source={
            "format": options.format,
            "family": family,
            "name": options.name or source.resolve().name,
        },
        vocabulary=vocabulary,
        framing=framing,
        max_length=longest,
        param_dtype=options.param_dtype,
        overwrite=options.overwrite,
    )
    template = chat_template_of(source) if options.format == "hf" else None
    if template is not None:
        (out / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    print(
        f"{family}: {stored.num_layers} layers, width {stored.d_model}, "
        f"{stored.vocab_size:,} ids, up to {longest:,} tokens, {stored.param_dtype}, in {out} "
        f"({time.monotonic() - started:.1f} s)"
    )
    if vocabulary and not framing.adds_start:
        print(
            f"Its tokenizer adds no start token; here every text begins with "
            f"{vocabulary.piece(framing.start_id)} (id {framing.start_id})"
        )
    if vocabulary is None:
        print(
            "The model's vocabulary could not be read, so it cannot score records or generate "
            f"text; import it again with --vocabulary=FILE --overwrite --out={out}"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="encdec import",
        allow_abbrev=False,
        description="Converts another project's model to a work directory that score, generate and "
        "describe read.",
    )
    parser.add_argument(
        "source",
        type=local_path,
        metavar="PATH",
        help="directory with config.json and *.safetensors (hf), the paper's "
        "model.pt (mu), or a .bin file (llama2c)",
    )
    parser.add_argument(
        "--from",
        dest="format",
        choices=("hf", "mu", "llama2c"),
        default="hf",
        help="format of PATH (default %(default)s)",
    )
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="directory to write"
    )
    parser.add_argument(
        "--vocabulary",
        type=local_path,
        metavar="FILE",
        help="the model's vocabulary, as for prepare (default: PATH's "
        "tokenizer.model or tokenizer.json, if there is one)",
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
