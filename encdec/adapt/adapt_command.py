"""``encdec adapt``: an encoder-decoder that starts from a decoder-only model's parameters."""

from __future__ import annotations

import time
from typing import Any

from encdec.adapt.layer_choice import FORMS, chosen_layers
from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.storage import absolute, any_path, as_path


def main(argv: list[str]) -> int:
    """``encdec adapt SOURCE --out=DIR``.

    Raises:
        ConfigError: a source that is an encoder-decoder, layers that it does not have, sources that
            do not go together, or an output directory in use. Nothing was written.
        DataError: sources with different vocabularies.
        CheckpointError: a source that is not a work directory, or a damaged checkpoint.
    """
    options = _parser().parse_args(argv)
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.adapt.adapting import TABLE_FILE, make_plan, write
    from encdec.adapt.parameters import Choice
    from encdec.adapt.sources import open_source
    from encdec.interop.importing import check_out
    from encdec.model import abstract_params, build_model, parameter_count

    started = time.monotonic()
    out = as_path(options.out)
    decoder = open_source(as_path(options.source), options.step, "the source")
    encoder = decoder
    if options.encoder_source:
        encoder = open_source(
            as_path(options.encoder_source),
            options.encoder_step,
            "--encoder_source",
            "--encoder_step",
        )
    embeddings: Any = options.embeddings or ("separate" if options.encoder_source else "shared")
    if options.encoder_source and embeddings == "shared":
        raise ConfigError(
            "--embeddings=shared with --encoder_source: the encoder would read a table that its "
            "layers were not trained with; expected --embeddings=separate"
        )
    layers = [
        chosen_layers(choice, source.config.decoder_layers, flag, str(source.directory))
        for choice, source, flag in (
            (options.encoder_layers, encoder, "--encoder_layers"),
            (options.decoder_layers, decoder, "--decoder_layers"),
        )
    ]
    choice = Choice(layers[0], layers[1], options.cross_attention, embeddings, options.seed)
    plan = make_plan(decoder, encoder, choice, options.extra_ids)
    if options.seed and not plan.is_random:
        raise ConfigError(f"--seed={options.seed}, but nothing is random here; leave --seed out")
    for source in (decoder, encoder):
        place = str(absolute(out))
        if source.place == place or source.place.startswith(f"{place}/"):
            raise ConfigError(f"--out={out} is a source, or holds one; give another directory")
    check_out(out, options.overwrite)
    name = options.name or f"{decoder.name}-adapted"
    config = write(plan, out, name=name, overwrite=options.overwrite)
    print(plan.summary())
    count = lambda model: parameter_count(abstract_params(build_model(model)))
    print(
        f"{config.encoder_layers} + {config.decoder_layers} layers, width {config.d_model}, "
        f"{count(config):,} parameters ({config.param_dtype}; SOURCE has "
        f"{count(decoder.config):,}), in {out} ({time.monotonic() - started:.1f} s)"
    )
    print(f"The origin of every parameter: {out / TABLE_FILE}")
    print(
        f"Train it: encdec train --config=configs/adapt.py --config.init_from={out} "
        "--config.data.records=RECORDS --workdir=DIR"
    )
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="encdec adapt",
        description="Turns a decoder-only model into an encoder-decoder: its layers, read both "
        "ways, are the encoder, and with cross-attention added the decoder (T5Gemma, arXiv "
        "2504.06225). The result is a work directory that train (--config.init_from), distill, "
        "generate and export read.",
    )
    parser.add(
        "source",
        "work directory of `encdec train` or `encdec import` with a decoder-only model",
        any_path,
        metavar="SOURCE",
    )
    parser.add("--out", "directory to write", any_path, required=True)
    parser.add("--step", "SOURCE's checkpoint (default: last)", int, least=0)
    for side in ("encoder", "decoder"):
        parser.add(
            f"--{side}_layers",
            f"layers that the {side} takes: {FORMS}",
            default="all",
            metavar="LAYERS",
        )
    parser.add(
        "--encoder_source",
        "another model for the encoder, of SOURCE's widths and vocabulary",
        any_path,
    )
    parser.add(
        "--encoder_step", "--encoder_source's checkpoint", int, least=0, needs="--encoder_source"
    )
    parser.add(
        "--cross_attention",
        "start from the decoder's self-attention; from it, but adding nothing at first (the "
        "decoder computes what SOURCE does; for deep models without post-norms); drawn; or merged "
        "with self-attention, without parameters of its own, as in T5Gemma 2",
        default="self",
        choices=("self", "zero", "random", "merged"),
    )
    parser.add(
        "--embeddings",
        "one token table for both sides (default), or one each (with --encoder_source); the "
        "head is tied to the decoder's as in SOURCE",
        choices=("shared", "separate"),
    )
    parser.add(
        "--extra_ids",
        "number of sentinels in the vocabulary, which UL2 needs (default: SOURCE's)",
        int,
        0,
        least=0,
    )
    parser.add("--seed", "seed of random parameters", int, 0, least=0)
    parser.add("--name", "the model's name in cards (default: SOURCE's-adapted)")
    parser.add("--overwrite", "replace a model in --out", default=False)
    return parser
