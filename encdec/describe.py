"""``encdec describe``: a model's architecture and cost, next to its decoder-only peers."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import sys
from collections.abc import Callable
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from encdec.buckets import is_address
from encdec.cost.flops import (
    cache_bytes,
    count_parameters,
    forward_flops,
    generation_flops,
    training_flops,
    weight_bytes,
)
from encdec.cost.peers import PeerMatch, match_decoder_only
from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.model import ModelConfig, preset, preset_names
from encdec.storage import as_path, directory_name, user_place

WEIGHT_DTYPES = ("float32", "bfloat16", "int8")

# Labels of tables: matched quantities of peers, parts of the parameters, stages of generation.
_PEERS: dict[PeerMatch, str] = {
    "parameters": "equal parameters",
    "training_flops": "equal training FLOPs",
}
_PARTS = {
    "embedding": "embedding",
    "encoder": "encoder",
    "decoder": "decoder",
    "head": "head",
    "total": "total",
    "of these cross-attention": "cross_attention",
    "of these norms": "norms",
    "of these biases": "biases",
}
_STAGES = {"first token": "first_token", "each later token": "per_later_token", "all": "total"}

Pick = Callable[[dict[str, Any]], float]


def _at(*path: str) -> Pick:
    """Picks the value below these keys."""

    def pick(costs: Any) -> Any:
        return functools.reduce(operator.getitem, path, costs)

    return pick


@dataclasses.dataclass(frozen=True)
class ModelColumn:
    """One column of the table: a model, the quantity matched, and its costs as plain values."""

    name: str
    matched_by: PeerMatch | Literal[""]  # "" for the described model, else a key of _PEERS
    config: ModelConfig
    costs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Description:
    """The described model, then its peers, at ``inputs`` source and ``targets`` target tokens."""

    inputs: int
    targets: int
    models: list[ModelColumn]
    left_out: list[str]  # peers that could not be matched, and why


def main(argv: list[str]) -> None:
    """Describes a preset or the model of a work directory.

    Raises:
        ConfigError: unknown preset, or an invalid length.
        CheckpointError: the directory holds no run.
    """
    parser = Parser(
        prog="encdec describe",
        description="Shows a model's architecture, parameters, FLOPs and bytes, next to "
        "decoder-only models with equal parameters and with equal training FLOPs.",
        epilog="presets: " + ", ".join(preset_names()),
    )
    parser.add("model", "a preset, or a run's work directory", metavar="PRESET")
    for name, tokens, kind, lowest in (
        ("inputs_length", 1024, "source", 0),
        ("targets_length", 256, "target", 1),
    ):
        parser.add(f"--{name}", f"{kind} tokens", int, tokens, least=lowest)
    parser.add("--json", "print JSON instead of tables", default=False)
    arguments = parser.parse_args(argv)
    name, config = find_model(arguments.model)
    description = describe(name, config, arguments.inputs_length, arguments.targets_length)
    if arguments.json:
        print(json.dumps(as_json(description), indent=2))
    else:
        # If the width is unknown, as in a pipe, a wide table is better than a wrapped one.
        show(description, Console(width=None if sys.stdout.isatty() else 150))


def find_model(name: str) -> tuple[str, ModelConfig]:
    """A model's name and configuration, from a preset or from a work directory's config.json."""
    place = user_place("the model", name)
    if name in preset_names() or not (is_address(place) or as_path(place).is_dir()):
        return name, preset(name)
    # Imported here, so that describing a preset does not load the training packages.
    from encdec.saved.saved_config import model_config_of, read_config

    return directory_name(place), model_config_of(read_config(place))


def describe(name: str, config: ModelConfig, inputs: int, targets: int) -> Description:
    """The model and, for an encoder-decoder, its peers, with their costs at the given lengths.

    Raises:
        ConfigError: an invalid length.
    """
    models, left_out = [ModelColumn(name, "", config, costs(config, inputs, targets))], []
    if config.is_encoder_decoder:
        for by in _PEERS:
            try:
                peer = match_decoder_only(config, by=by, inputs=inputs, targets=targets)
            except ConfigError as error:  # the model is still shown alone
                left_out.append(str(error))
                continue
            peer_name = _preset_like(peer) or "decoder-only"
            models.append(ModelColumn(peer_name, by, peer, costs(peer, inputs, targets)))
    return Description(inputs, targets, models, left_out)


def _preset_like(config: ModelConfig) -> str | None:
    for name in preset_names():
        if "-dec" in name and preset(name).replace(execution=config.execution) == config:
            return name
    return None


def costs(config: ModelConfig, inputs: int, targets: int) -> dict[str, Any]:
    """Parameters, FLOPs and bytes of one model as plain nested values.

    FLOPs are of one row; causal self-attention counts half, and the head is paid per target token.
    Bytes of the cache are of one row in the compute dtype.
    """
    count, forward = count_parameters(config), forward_flops(config, inputs, targets)
    generation: dict[str, Any] = {}
    for kind, cached in (("cached", True), ("uncached", False)):
        flops = generation_flops(config, inputs, targets, cached=cached)
        generation[kind] = {
            "first_token": flops.first_token.total,
            "per_later_token": flops.per_later_token,
            "total": flops.total,
        }
    return {
        "parameters": dataclasses.asdict(count) | {"total": count.total},
        # Attention's keys as in the JSON of earlier versions.
        "forward_flops": {
            name.replace("attention", "scores"): value
            for name, value in (dataclasses.asdict(forward) | {"total": forward.total}).items()
        },
        "training_flops": training_flops(config, inputs, targets),
        "generation_flops": generation,
        "weight_bytes": {dtype: weight_bytes(config, dtype) for dtype in WEIGHT_DTYPES},
        "cache_bytes": cache_bytes(config, inputs, targets),
    }


def as_json(description: Description) -> dict[str, Any]:
    """The output of ``--json``: FLOPs of one row, bytes, and every field of the configurations."""
    return {
        "inputs": description.inputs,
        "targets": description.targets,
        "notes": description.left_out,
        "models": [
            {
                "name": model.name,
                "matched_by": model.matched_by or None,
                "config": model.config.to_dict(),
            }
            | model.costs
            for model in description.models
        ],
    }


def architecture(config: ModelConfig) -> dict[str, str]:
    """The choices of a configuration in words, without those that only change speed."""
    encoder = f"{config.encoder_layers} encoder + " if config.is_encoder_decoder else ""
    pairing = f", {config.kv_pairing}" if config.num_kv_heads < config.num_heads else ""
    rope = f"RoPE {config.rope_theta:g}"
    if config.rope_scaling != "none":
        rope += f", {config.rope_scaling} x{config.rope_factor:g}"
    if config.is_encoder_decoder:
        rope += f", encoder {config.encoder_positions.replace('_', ' ')}"
        merged = "merged " * config.merged_attention
        rope += f", {merged}cross {config.cross_attention_rope.replace('_', ' ')}"
    biases = {
        "q k v": config.qkv_bias,
        "attention out": config.attention_out_bias,
        "MLP": config.mlp_bias,
    }
    norm = f"RMSNorm {config.norm_eps:g}, cast {config.norm_cast.replace('_', ' ')}"
    norm += ", plus one" * config.norm_plus_one + ", post-norms" * config.post_norms
    norm += ", no pre-norms" * config.omit_pre_norms
    caps = {"attention": config.attention_logit_cap, "head": config.final_logit_cap}
    dropout = {
        "attention": config.attention_dropout,
        "MLP": config.mlp_dropout,
        "residual": config.residual_dropout,
    }
    return {
        "layers": f"{encoder}{config.decoder_layers} decoder",
        "model width": str(config.d_model),
        "attention": f"{config.num_heads} heads x {config.head_dim} = {config.attention_width}"
        + ", query-key norm" * config.qk_norm,
        "kv heads": f"{config.num_kv_heads}{pairing}",
        "MLP": f"{config.mlp_dim} {'gated' if config.mlp_gated else 'plain'}, "
        f"{config.mlp_activation}",
        "vocabulary": f"{config.vocab_size:,}, {'tied' if config.tie_embeddings else 'apart'}"
        + ", scaled" * config.embedding_scale,
        "positions": rope,
        "norm": norm,
        "biases": ", ".join(name for name, on in biases.items() if on) or "none",
        "logit caps": _settings(caps),
        "dropout": _settings(dropout),
        "dtypes": f"{config.dtype}, parameters {config.param_dtype}",
    }


def _settings(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if value) or "none"


def show(description: Description, console: Console) -> None:
    """Prints the tables: one column per model, peers with their difference from the first."""
    models = description.models
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("")
    for model in models:
        note = f"\n[dim]{_PEERS[model.matched_by]}[/dim]" if model.matched_by else ""
        table.add_column(escape(model.name) + note, overflow="fold")

    def section(title: str) -> None:
        table.add_row(*[""] * (1 + len(models)))
        table.add_row(f"[bold]{title}[/bold]", *[""] * len(models))

    def row(label: str, pick: Pick, form: Callable[[float], str], compare: bool = True) -> None:
        values = [pick(model.costs) for model in models]
        if any(values):
            cells = [form(value) if value else "-" for value in values]
            if compare:
                cells[1:] = [
                    cell + _difference(value, values[0])
                    for cell, value in zip(cells[1:], values[1:])
                ]
            table.add_row(label, *cells)

    choices = [architecture(model.config) for model in models]
    for label in choices[0]:
        table.add_row(label, *(choice[label] for choice in choices))
    section("Parameters")
    for label, part in _PARTS.items():
        row(label, _at("parameters", part), "{:,}".format, compare=part == "total")
    section("Training, FLOPs")
    row("forward", lambda c: c["forward_flops"]["total"], _flops)
    row("forward and backward", lambda c: c["training_flops"], _flops)
    section("Generation, FLOPs")
    for label, part in _STAGES.items():
        row(label, _at("generation_flops", "cached", part), _flops)
    row("all, without a cache", lambda c: c["generation_flops"]["uncached"]["total"], _flops)
    section("Bytes")
    for dtype in WEIGHT_DTYPES:
        row(f"weights, {dtype}", _at("weight_bytes", dtype), _bytes)
    row("key-value cache", lambda c: c["cache_bytes"], _bytes)
    console.print(table)
    console.print(
        f"\nOne row of {description.inputs:,} source and {description.targets:,} target tokens. "
        "Causal attention counts half, the head is counted per target token."
    )
    for note in description.left_out:
        console.print(f"Left out: {escape(note)}")


def _difference(value: float, base: float) -> str:
    if not base:
        return ""
    percent = round(100 * (value / base - 1))
    return f"  [dim]{percent:+d} %[/dim]" if percent else "  [dim]=[/dim]"


def _scaled(value: float, units: tuple[str, ...], step: float) -> str:
    for unit in units[:-1]:
        if abs(value) < step:
            return f"{value:.4g} {unit}"
        value /= step
    return f"{value:.4g} {units[-1]}"


def _flops(value: float) -> str:
    return _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"), 1000.0)


def _bytes(value: float) -> str:
    return _scaled(value, ("B", "KiB", "MiB", "GiB", "TiB"), 1024.0)
