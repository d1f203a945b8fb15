"""Where each parameter of an adapted model comes from, and its values.

The encoder is the source's stack read in both directions, the decoder the same stack with
cross-attention between self-attention and MLP, as in T5Gemma (arXiv 2504.06225).
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from encdec.errors import ConfigError
from encdec.markup import aligned
from encdec.model import ExecutionConfig, ModelConfig, abstract_params, build_model
from encdec.model.parameter_names import path_name

CrossAttention = Literal["self", "zero", "random", "merged"]
Embeddings = Literal["shared", "separate"]
Flat = dict[str, np.ndarray]

# Fields in which the sources of the two sides may differ: what is left is one for both stacks.
_OF_EACH_SIDE = (
    "decoder_layers",
    "tie_embeddings",
    "global_layer_every",
    "decoder_global_layers",
    "decoder_unrotated_layers",
    "execution",
    "dtype",
    "param_dtype",
    "init_std",
    "encoder_positions",
    "attention_dropout",
    "mlp_dropout",
    "residual_dropout",
    "final_logit_cap",
)
_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")


@dataclasses.dataclass(frozen=True)
class Choice:
    """How the adapted model is made from its sources.

    Attributes:
        encoder_layers: numbers of the encoder source's layers, in order.
        decoder_layers: numbers of the decoder source's layers.
        cross_attention: where it starts from. ``self``: the decoder's self-attention, its norms
            included. ``zero``: so too, but adding nothing at first, so that the decoder computes
            what its source does; its keys and values are those that self-attention would make of
            the encoder's output. ``random``: drawn. ``merged``: it is one with self-attention
            (T5Gemma 2, arXiv 2512.14856) and has no parameters of its own.
        embeddings: one table for both sides, or one each.
        seed: of what is drawn.
    """

    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    cross_attention: CrossAttention = "self"
    embeddings: Embeddings = "shared"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ParameterOrigin:
    """Where one parameter comes from.

    Attributes:
        name: of the adapted model's parameter.
        shape: its shape.
        how: "copied"; "shared", copied and read by both sides; "scaled", copied for inputs of the
            encoder's final norm in place of the layer's own; "drawn"; or "constant" (biases and
            scales that start at one value).
        side: which source it is of, "encoder" or "decoder"; "" if of none.
        source: the parameter's name there; of what is not copied, how it starts.
    """

    name: str
    shape: tuple[int, ...]
    how: Literal["copied", "shared", "scaled", "drawn", "constant"]
    side: str
    source: str


def adapted_config(decoder: ModelConfig, encoder: ModelConfig, choice: Choice) -> ModelConfig:
    """The encoder-decoder's configuration; layers unrolled.

    Args:
        decoder: the model whose layers, head and embeddings the decoder takes.
        encoder: the model whose layers the encoder takes; may be the same.
        choice: what is taken.

    Raises:
        ConfigError: the two differ in what both stacks share.
    """
    _check_alike(decoder, encoder)
    reads_all = {
        "encoder": [not encoder.is_local(layer) for layer in choice.encoder_layers],
        "decoder": [not decoder.is_local(layer) for layer in choice.decoder_layers],
    }
    windows: dict[str, Any] = {"global_layer_every": 0}
    if decoder.attention_window and not all(map(all, reads_all.values())):
        windows |= {
            f"{stack}_global_layers": tuple(np.flatnonzero(flags).tolist())
            for stack, flags in reads_all.items()
        }
    else:
        windows |= {
            "attention_window": 0,
            "local_rope_theta": 0.0,
            "encoder_global_layers": (),
            "decoder_global_layers": (),
        }
    unrotated = {
        f"{stack}_unrotated_layers": tuple(
            place for place, layer in enumerate(chosen) if not source.is_rotated(layer)
        )
        for stack, source, chosen in (
            ("encoder", encoder, choice.encoder_layers),
            ("decoder", decoder, choice.decoder_layers),
        )
    }
    return decoder.replace(
        architecture="encoder_decoder",
        encoder_layers=len(choice.encoder_layers),
        decoder_layers=len(choice.decoder_layers),
        # Every attention turns by differences of positions, so that counting from 0, as the
        # source does, is as good as any other place to count from.
        encoder_positions="from_zero",
        share_embeddings=choice.embeddings == "shared",
        merged_attention=choice.cross_attention == "merged",
        execution=ExecutionConfig(scan_layers=False),
        **windows,
        **unrotated,
    )


def _check_alike(decoder: ModelConfig, encoder: ModelConfig) -> None:
    ours, theirs = decoder.to_dict(), encoder.to_dict()
    differ = [
        f"{name} is {theirs[name]!r} in the encoder's and {ours[name]!r} in the decoder's"
        for name in ours
        if ours[name] != theirs[name] and name not in _OF_EACH_SIDE
    ]
    if differ:
        raise ConfigError(
            f"the two sources are incompatible: {'; '.join(differ)}. Both stacks of a model share "
            "these fields: give two sources that agree in them, or only one"
        )


def origins(config: ModelConfig, choice: Choice) -> list[ParameterOrigin]:
    """The origin of every parameter of ``config``, made by ``adapted_config``, in order."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(build_model(config)))
    return [_origin(path_name(path), tuple(leaf.shape), config, choice) for path, leaf in leaves]


def _origin(
    name: str, shape: tuple[int, ...], config: ModelConfig, choice: Choice
) -> ParameterOrigin:
    if name == "embedder/embedding" and config.share_embeddings:
        return ParameterOrigin(name, shape, "shared", "decoder", name)
    if name.startswith("embedder/") or name == "decoder/final_norm/scale":
        return ParameterOrigin(name, shape, "copied", "decoder", name)
    if name.startswith("encoder_embedder/"):
        return ParameterOrigin(name, shape, "copied", "encoder", name.removeprefix("encoder_"))
    if name == "encoder/final_norm/scale":
        return ParameterOrigin(name, shape, "copied", "encoder", "decoder/final_norm/scale")
    match = _LAYER.fullmatch(name)
    if not match:
        raise ConfigError(f"adapt has no source for the parameter {name}")
    stack, number, rest = match[1], int(match[2]), match[3]
    taken = choice.encoder_layers if stack == "encoder" else choice.decoder_layers
    layer = f"decoder/layers_{taken[number]}"
    if not rest.startswith(("encoder_attention/", "cross_attention_")):
        return ParameterOrigin(name, shape, "copied", stack, f"{layer}/{rest}")
    if choice.cross_attention == "random":
        return _drawn(name, shape, config)
    own = rest.replace("encoder_attention/", "self_attention/", 1)
    own = own.replace("cross_attention_", "self_attention_", 1)
    copy = ParameterOrigin(name, shape, "copied", stack, f"{layer}/{own}")
    if choice.cross_attention == "self":
        return copy
    # To add nothing, the output projection is zero. Where its output is normed afterwards, zeros
    # would stay zeros, but the smallest step away from them would be blown up to the norm's full
    # size; so there the norm's scale is zero instead.
    if rest == "cross_attention_post_norm/scale":
        return ParameterOrigin(name, shape, "constant", "", "-1" if config.norm_plus_one else "0")
    if rest.startswith("encoder_attention/o/") and not config.post_norms:
        return ParameterOrigin(name, shape, "constant", "", "0")
    if rest in ("encoder_attention/k/kernel", "encoder_attention/v/kernel"):
        return dataclasses.replace(copy, how="scaled")
    return copy


def _drawn(name: str, shape: tuple[int, ...], config: ModelConfig) -> ParameterOrigin:
    """A cross-attention parameter without a source."""
    one = 0.0 if config.norm_plus_one else 1.0  # the stored scale that multiplies by 1
    if name.endswith(("/scale", "/bias")):
        start = one if name.endswith("/scale") else 0.0
        return ParameterOrigin(name, shape, "constant", "", f"{start:g}")
    return ParameterOrigin(name, shape, "drawn", "", f"N(0, {config.init_std:g})")


def _scaled(
    one: ParameterOrigin, sources: Mapping[str, Mapping[str, Any]], config: ModelConfig
) -> np.ndarray:
    """A kernel for inputs behind the encoder's final norm that was trained behind a layer's.

    Both norms divide by the root mean square and multiply by a scale of their own, which may
    differ by orders of magnitude (SmolLM2-135M: 1.8 and, in its first layer, 0.03): the quotient
    of the scales, a number per input, goes into the kernel.
    """
    kernel = np.asarray(sources[one.side][one.source])
    plus = 1.0 if config.norm_plus_one else 0.0
    scale = lambda side, name: np.asarray(sources[side][name], np.float32) + np.float32(plus)
    theirs = scale("encoder", "decoder/final_norm/scale")
    own = one.source.split("/self_attention/")[0] + "/self_attention_norm/scale"
    ours = scale(one.side, own) if own in sources[one.side] else np.ones_like(theirs)
    # An input that the encoder's norm mutes cannot be restored.
    ratio = np.divide(ours, theirs, out=np.zeros_like(ours), where=theirs != 0)
    return (kernel.astype(np.float32) * ratio[:, None, None]).astype(kernel.dtype)


def values(
    table: Sequence[ParameterOrigin],
    sources: Mapping[str, Mapping[str, Any]],
    config: ModelConfig,
    seed: int,
) -> Flat:
    """The parameters by name.

    Args:
        table: from ``origins``.
        sources: by side, its flat parameters with unrolled layers.
        config: of the adapted model; its ``param_dtype`` is that of what is drawn.
        seed: of what is drawn; each parameter's draw depends on it and on its name alone.
    """
    dtype = jnp.dtype(config.param_dtype)
    result: Flat = {}
    for one in table:
        if one.how == "scaled":
            result[one.name] = _scaled(one, sources, config)
        elif one.side:
            result[one.name] = np.asarray(sources[one.side][one.source])
        elif one.how == "constant":
            result[one.name] = np.full(one.shape, float(one.source), dtype)
        else:
            draw = np.random.default_rng([seed, zlib.crc32(one.name.encode())])
            drawn = draw.standard_normal(one.shape, np.float32) * np.float32(config.init_std)
            result[one.name] = drawn.astype(dtype)
    return result


def table_text(table: Sequence[ParameterOrigin], sources: Mapping[str, str]) -> str:
    """The origins as aligned text, with the number of scalars of each kind at the end."""
    rows = [("parameter", "shape", "how", "from")]
    for one in table:
        where = f"{sources[one.side]}: {one.source}" if one.side else one.source
        rows.append((one.name, "x".join(map(str, one.shape)), one.how, where))
    return "\n".join([*aligned(rows), "", _totals(table)]) + "\n"


def summary_text(table: Sequence[ParameterOrigin], sources: Mapping[str, str]) -> str:
    """The origins by module: parameters of all its layers, and which layers they are from."""
    groups: dict[tuple[str, ...], list[ParameterOrigin]] = {}
    for one in table:
        # Outside of layers a source's name says enough, drawn values have none.
        origin = _module(one.source)[0] if one.side else one.source
        groups.setdefault((_module(one.name)[0], one.how, one.side, origin), []).append(one)
    rows = [("module", "layers", "parameters", "how", "from")]
    for (module, how, side, origin), members in groups.items():
        ours, theirs = (
            dict.fromkeys(_module(name)[1] for name in names)
            for names in ([one.name for one in members], [one.source for one in members])
        )
        where = f"{sources[side]}: {origin}" if side else origin
        if side and None not in theirs:
            where += f" {_ranges(theirs)}"
        count = f"{sum(int(np.prod(one.shape)) for one in members):,}"
        rows.append((module, "" if None in ours else _ranges(ours), count, how, where))
    return "\n".join([*aligned(rows), "", _totals(table)]) + "\n"


def _module(name: str) -> tuple[str, int | None]:
    """A parameter's module, norms with the sublayer that they belong to, and its layer if any."""
    if not (match := _LAYER.fullmatch(name)):
        return name, None
    module = match[3].split("/")[0].removesuffix("_norm").removesuffix("_post")
    return f"{match[1]} {module.replace('encoder_attention', 'cross_attention')}", int(match[2])


def _ranges(numbers: Iterable[int | None]) -> str:
    """Numbers as ``0-3, 5``."""
    parts: list[list[int]] = []
    for number in sorted(x for x in numbers if x is not None):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _totals(table: Sequence[ParameterOrigin]) -> str:
    totals: dict[str, int] = {}
    for one in table:
        totals[one.how] = totals.get(one.how, 0) + int(np.prod(one.shape))
    counts = ", ".join(f"{number:,} {how}" for how, number in totals.items())
    return f"{sum(totals.values()):,} parameters: {counts}"
