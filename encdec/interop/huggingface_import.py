"""Hugging Face causal language models as our decoder-only model: configuration and tensors.

Families: Llama 2 and 3, SmolLM2 (``llama``), SmolLM3, Mistral, Ministral, Phi-3, 3.5 and 4-mini
(``phi3``), Qwen 2 and 2.5 (``qwen2``), Qwen 3, Gemma 1, 2 and 3 (text), Granite, OLMo 2 and 3,
EXAONE 3 and 4, GLM 4, Seed-OSS, Ministral 3 (text), VaultGemma, ERNIE 4.5, Helium, InternLM 3,
HyperCLOVA X, CWM, IQuest-Coder, MiniCPM 1, 2 and 4; and the text models of ``image_models``. An
unsupported setting is refused by name. Read from ``config.json`` alone, as written by
transformers 4 and 5.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from encdec.errors import DataError
from encdec.interop.families import FAMILIES, HARMLESS, SPECIAL, Family
from encdec.interop.image_models import of_images, text_values
from encdec.interop.layout import (
    MLP_NAMES,
    Entry,
    attention_entries,
    check_tied,
    mlp_entries,
    qk_norm_entries,
    to_ours,
)
from encdec.interop.multipliers import multiplied, read_multipliers
from encdec.interop.rope import check_rope_kinds, read_rope, required, unknown_rope_keys
from encdec.model import ExecutionConfig, ModelConfig

Tensors = Mapping[str, np.ndarray]
AS_TEACHER = (
    ". As a teacher, transformers may run it as it is: encdec distill logits --backend=torch "
    "--teacher=DIR"
)


class _Read(dict):
    """A configuration that records which of its keys were read."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__(values)
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def unread(self) -> tuple[str, ...]:
        """Keys that have a value, were not read, and are not known to be harmless."""
        known = self.seen.union(*(keys.split() for keys in HARMLESS.values()))
        says = {key for key, value in self.items() if value not in (None, False, [], {})}
        return tuple(sorted(says - known))


_ALL_LOCAL = ("mistral", "ministral3", "phi3")  # read no layer_types
# Required keys; Gemma has defaults for some.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
ACTIVATIONS: dict[str, Any] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Imported:
    """The model that a Hugging Face config.json describes.

    Attributes:
        family: its model_type.
        model: our configuration, layers unrolled.
        max_length: the longest sequence for which the imported model is exact.
        start_id: the token before the first one: BOS, else EOS.
        eos_ids: ids that end a text.
        unread: keys that were not read and that may matter.
        rotated: how many of a head's first dimensions RoPE rotates; 0: all of them.
        multipliers: Granite's multipliers, which are folded into weights.
    """

    family: str
    model: ModelConfig
    max_length: int
    start_id: int
    eos_ids: tuple[int, ...]
    unread: tuple[str, ...] = ()
    rotated: int = 0
    multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)


def ids_of(value: Any) -> tuple[int, ...]:
    """Token ids that a configuration gives as a list, as one number or not at all."""
    ids = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    return tuple(map(int, ids))


def local_layers(
    kinds: Sequence[str], layers: int, refuse: Callable[..., DataError], where: str = ""
) -> list[bool]:
    """Which layers have a sliding window, by the ``layer_types`` of ``where``."""
    if unknown := sorted(set(kinds) - {"sliding_attention", "full_attention"}):
        raise refuse(f"{where}layer_types", unknown[0], "not sliding_attention or full_attention")
    if len(kinds) != layers:
        raise refuse(f"{where}num_hidden_layers", layers, f"but {len(kinds)} layer_types")
    return [kind == "sliding_attention" for kind in kinds]


def model_type(directory: pathlib.Path) -> str | None:
    """The model_type in the directory's config.json; None if there is none."""
    try:
        return json.loads((directory / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_config(directory: pathlib.Path) -> Imported:
    """Translates a model's config.json.

    Raises:
        DataError: the file does not exist, or the family or a setting is not supported.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise DataError(
            f"{directory} has no config.json; give the directory of a Hugging Face "
            "causal language model (config.json and *.safetensors)"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(
            f"{path} contains a JSON {type(values).__name__}, expected an object; give a "
            "Hugging Face model's directory"
        )
    quantized = values.get("quantization_config")
    values = text_values(values, path)
    name = values.get("model_type")
    if name not in FAMILIES:
        raise DataError(
            f"{path} has model_type {name!r}; supported: {', '.join(FAMILIES)}{AS_TEACHER}"
        )
    values = _Read(values)
    if quantized or values.get("quantization_config"):
        raise DataError(
            f"{path} has quantization_config, but quantized weights cannot be read; give the "
            f"unquantized model{AS_TEACHER}"
        )
    found = translate(name, values, path)
    return dataclasses.replace(found, unread=(*values.unread(), *unknown_rope_keys(values)))


def _given(family: Family, values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A key's value by its name or the family's own; absent and null mean the family's default.

    A special key that the family does not have means nothing, and stays unread.
    """
    if key in SPECIAL and key not in family.defaults:
        return default
    for name in (key, family.aliases.get(key)):
        if name is not None and values.get(name) is not None:
            return values[name]
    return family.defaults.get(key, default)


def translate(
    name: str, values: Mapping[str, Any], path: pathlib.Path, hint: str = AS_TEACHER
) -> Imported:
    """The model that a family's configuration describes.

    Args:
        name: the family, one of ``FAMILIES``.
        values: config.json's, or those of a stack within it.
        path: of the file, for messages.
        hint: how refusals end.

    Raises:
        DataError: a setting is not supported.
    """
    family = FAMILIES[name]
    given = functools.partial(_given, family, values)
    refuse = lambda key, value, why: DataError(
        f"{path} has {key} {value!r}, {why}; this model cannot be imported{hint}"
    )
    sizes = {key: required({key: given(key)}, key, path) for key in _SIZES}
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    head_dim = required({"head_dim": given("head_dim", width // heads)}, "head_dim", path)
    activation = given("hidden_activation", given("hidden_act", "silu"))
    if name.startswith(("gemma2", "gemma3", "vaultgemma")):
        activation = given("hidden_activation", "gelu_pytorch_tanh")
    if name == "gemma" and activation == "gelu":  # as its first releases call the approximation
        activation = "gelu_pytorch_tanh"
    if activation not in ACTIVATIONS:
        raise refuse("hidden_act", activation, f"not one of {', '.join(ACTIVATIONS)}")
    if values.get("use_bidirectional_attention"):
        raise refuse("use_bidirectional_attention", True, "but encdec's decoders are always causal")
    for key in family.never:
        if values.get(key):
            raise refuse(key, values[key], f"which encdec does not support in {name}")
    check_rope_kinds(values, name in ("gemma3_text", "olmo3"), refuse)
    biases = [bool(given(key)) if isinstance(key, str) else key for key in family.biases]
    rope, max_length, rotated = read_rope(values, given, head_dim, refuse, path)
    rotated = rotated or head_dim * family.interleaved
    key_heads = "num_key_value_heads"
    fields: dict[str, Any] = {
        "architecture": "decoder_only",
        "vocab_size": sizes["vocab_size"],
        "encoder_layers": 0,
        "decoder_layers": sizes["num_hidden_layers"],
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": required({key_heads: given(key_heads, heads)}, key_heads, path),
        "head_dim": head_dim,
        "mlp_dim": sizes["intermediate_size"],
        "kv_pairing": "grouped",
        "qkv_bias": biases[0],
        "attention_out_bias": biases[1],
        "mlp_gated": True,
        "mlp_activation": ACTIVATIONS[activation],
        "mlp_bias": biases[2],
        "norm_eps": float(given("rms_norm_eps", 1e-6)),
        "norm_cast": "before_scale",
        "tie_embeddings": bool(given("tie_word_embeddings", False)),
        "attention_logit_cap": _cap(values, family, "attn_logit_softcapping"),
        "final_logit_cap": _cap(values, family, "final_logit_softcapping"),
        "execution": ExecutionConfig(scan_layers=False),
    }
    if scalar := given("query_pre_attn_scalar"):
        fields["attention_scale"] = float(scalar) ** -0.5
    multipliers = read_multipliers(name, fields, given, refuse, path)
    fields |= rope | _window(name, values, family, given, refuse, rope) | dict(family.fields)
    if name == "hyperclovax":
        fields["post_norms"] = bool(given("use_post_norm"))
    fields["decoder_unrotated_layers"] = _unrotated(name, values, given, refuse, fields)
    eos = ids_of(given("eos_token_id"))
    start = int(given("bos_token_id", eos[0] if eos else 0))
    return Imported(name, ModelConfig(**fields), max_length, start, eos, (), rotated, multipliers)


def _cap(values: Mapping[str, Any], family: Family, key: str) -> float:
    """A soft cap; unlike elsewhere, an explicit null switches it off."""
    if key not in family.defaults:
        return 0.0
    return float(values.get(key, family.defaults.get(key)) or 0.0)


def _window(
    name: str,
    values: Mapping[str, Any],
    family: Family,
    given: Callable[..., Any],
    refuse: Callable[..., DataError],
    rope: Mapping[str, Any],
) -> dict[str, Any]:
    """Our fields for sliding-window layers."""
    if "sliding_window" not in family.defaults:
        return {}
    window = values.get("sliding_window", family.defaults["sliding_window"])
    types = values.get("layer_types")
    optional = name.startswith("qwen") or name == "smollm3" and not types
    if not window or (optional and not values.get("use_sliding_window")):
        return {}
    layers = values["num_hidden_layers"]
    if types:
        local = local_layers(types, layers, refuse)
        if name in _ALL_LOCAL and not all(local):
            raise refuse("layer_types", types, f"but all layers of a {name} have its window")
    elif name == "cwm":
        local = [layer % 4 != 0 for layer in range(layers)]
    elif name == "smollm3":
        local = [not rotated for rotated in _rotates(given, layers, refuse)]
    elif every := given("sliding_window_pattern"):
        if not isinstance(every, int):
            raise refuse("sliding_window_pattern", every, "without layer_types")
        local = [(layer + 1) % every != 0 for layer in range(layers)]
    elif name.startswith("qwen"):
        local = [layer >= given("max_window_layers", 28) for layer in range(layers)]
    else:
        local = [True] * layers
    if not any(local):
        return {}
    fields: dict[str, Any] = {"attention_window": int(window)}
    every = next((layer + 1 for layer, is_local in enumerate(local) if not is_local), 0)
    if local == [not every or (layer + 1) % every != 0 for layer in range(layers)]:
        fields["global_layer_every"] = every
    else:
        reads_all = [layer for layer in range(layers) if not local[layer]]
        fields["decoder_global_layers"] = tuple(reads_all)
    base = given("rope_local_base_freq")
    parameters = values.get("rope_parameters") or {}
    own = parameters.get("sliding_attention")
    if own is not None and own == parameters.get("full_attention"):
        base = None
    elif own is not None:
        if own.get("rope_type", "default") != "default":
            raise refuse(
                "rope_parameters", own, "but RoPE scaling of local layers alone is not supported"
            )
        base = own.get("rope_theta", base)
    elif name == "olmo3":
        # As transformers 4 wrote it: the scaling is of the other layers.
        base = rope["rope_theta"] if rope.get("rope_scaling", "none") != "none" else None
    if base is not None:
        fields["local_rope_theta"] = float(base)
    return fields


def _rotates(
    given: Callable[..., Any], layers: int, refuse: Callable[..., DataError]
) -> list[bool]:
    """Which layers of a SmolLM3 have RoPE."""
    listed, every = given("no_rope_layers"), given("no_rope_layer_interval")
    if listed is not None:
        if len(listed) < layers:
            raise refuse("num_hidden_layers", layers, f"but {len(listed)} no_rope_layers")
        return [bool(rotated) for rotated in listed[:layers]]
    return [(layer + 1) % every != 0 for layer in range(layers)]


def _unrotated(
    name: str,
    values: Mapping[str, Any],
    given: Callable[..., Any],
    refuse: Callable[..., DataError],
    fields: Mapping[str, Any],
) -> tuple[int, ...]:
    """Layers without RoPE."""
    layers = fields["decoder_layers"]
    if name == "smollm3":
        rotates = _rotates(given, layers, refuse)
        return tuple(layer for layer in range(layers) if not rotates[layer])
    if name == "exaone4" and values.get("sliding_window", True):  # RoPE in local layers alone
        every, listed = fields.get("global_layer_every"), fields.get("decoder_global_layers", ())
        local = "attention_window" in fields
        return tuple(
            i for i in range(layers) if not local or i in listed or every and (i + 1) % every == 0
        )
    return ()


def convert(
    config: ModelConfig,
    family: str,
    tensors: Tensors,
    rotated: int = 0,
    multipliers: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Our parameter tree (unrolled) as views of the tensors, in their dtype.

    Where only the first ``rotated`` dimensions of a head rotate, they are ordered as our pairs
    are; ``multipliers``, and a rotation's magnitude, are folded into weights, then float32. All
    of these copy the tensors that they change.

    Raises:
        DataError: tensors are missing, unexpected or of the wrong shape.
    """
    tensors = _renamed(tensors, FAMILIES[family].renamed)
    found = [name for name in tensors if name.endswith("embed_tokens.weight")]
    if len(found) != 1:
        raise DataError(
            f"the checkpoint has {len(found)} tensors called *embed_tokens.weight; "
            "expected one, as in a causal language model"
        )
    prefix = found[0].removesuffix("embed_tokens.weight")
    # Next to the stack: "lm_head" where that is "model.", with the same prefix as both.
    head = prefix.removesuffix("model.") + "lm_head.weight"
    head = head if head in tensors else "lm_head.weight"
    ignored = [
        name
        for name in tensors
        if name.endswith("rotary_emb.inv_freq") or config.tie_embeddings and name == head
    ]
    ignored += of_images(tensors, prefix)
    if config.tie_embeddings:
        check_tied(tensors, found[0], head)
    if FAMILIES[family].fused:
        tensors = _split_fused(config, prefix, tensors)
    if multipliers and any(value != 1 for key, value in multipliers.items() if key != "tied"):
        tensors = multiplied(config, prefix, head, tensors, multipliers)
    params = to_ours(layout(config, family, prefix, head), config, tensors, ignored)
    if rotated:
        first = np.arange(config.head_dim)
        turning, still = np.split(first, [rotated])
        if FAMILIES[family].interleaved:
            turning = np.concatenate([turning[::2], turning[1::2]])
        halves = [np.split(part, 2) for part in (turning, still)]
        order = np.concatenate([halves[0][0], halves[1][0], halves[0][1], halves[1][1]])
        for layer in range(config.decoder_layers):
            attention = params["decoder"][f"layers_{layer}"]["self_attention"]
            for x in "qk":
                attention[x] = {name: value[..., order] for name, value in attention[x].items()}
            if config.rope_magnitude != 1:  # of what turns alone, and ours multiplies all
                back = np.ones(config.head_dim, np.float32)
                back[rotated:] = config.rope_magnitude**-2
                attention["q"] = {
                    name: np.asarray(value, np.float32) * back[order]
                    for name, value in attention["q"].items()
                }
    return params


def _renamed(tensors: Tensors, pairs: Mapping[str, str]) -> Tensors:
    """Tensors under the names that Llama's have; ``pairs`` are parts of names, ours by theirs."""
    if not pairs:
        return tensors
    named = {}
    for name, tensor in tensors.items():
        for theirs, ours in pairs.items():
            name = name.replace(theirs, ours)
        named[name] = tensor
    return named


def layout(config: ModelConfig, family: str, prefix: str, head: str) -> list[Entry]:
    """Their names of our parameters; parts of a fused tensor are named as by ``_split_fused``."""
    form = FAMILIES[family]
    apart = ("q_proj", "k_proj", "v_proj")
    attention = (*(_QKV if "attention" in form.fused else apart), "o_proj")
    mlp = MLP_NAMES | (dict(zip(("gate", "up"), _GATE_UP)) if "mlp" in form.fused else {})
    norms: Mapping[str, str] = {
        "self_attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    if config.post_norms:
        norms = {
            "self_attention_norm": "input_layernorm",
            "self_attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    if form.norms and config.post_norms == any("post" in name for name in form.norms):
        norms = form.norms
    entries = [
        Entry(f"{prefix}embed_tokens.weight", "embedder/embedding"),
        Entry(f"{prefix}norm.weight", "decoder/final_norm/scale"),
    ]
    if not config.tie_embeddings:
        entries.append(Entry(head, "embedder/head", "matrix"))
    for layer in range(config.decoder_layers):
        theirs, ours = f"{prefix}layers.{layer}", f"decoder/layers_{layer}"
        entries += attention_entries(
            config, f"{theirs}.self_attn", f"{ours}/self_attention", attention
        )
        entries += mlp_entries(config, f"{theirs}.mlp", f"{ours}/mlp", mlp)
        entries += [
            Entry(f"{theirs}.{name}.weight", f"{ours}/{our_name}/scale")
            for our_name, name in norms.items()
        ]
        if config.qk_norm:
            entries += qk_norm_entries(f"{theirs}.self_attn", f"{ours}/self_attention")
    return entries


_QKV = ("qkv_proj[q]", "qkv_proj[k]", "qkv_proj[v]")
_GATE_UP = ("gate_up_proj[gate]", "gate_up_proj[up]")


def _split_fused(config: ModelConfig, prefix: str, tensors: Tensors) -> dict[str, np.ndarray]:
    """Fused projections as views of their parts, each under a name of its own."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = {
        "self_attn.qkv_proj": (_QKV, (queries, queries + keys)),
        "mlp.gate_up_proj": (_GATE_UP, (config.mlp_dim,)),
    }
    split = dict(tensors)
    for layer in range(config.decoder_layers):
        for name, (names, places) in parts.items():
            whole = split.pop(f"{prefix}layers.{layer}.{name}.weight", None)
            if whole is not None:
                folder = f"{prefix}layers.{layer}.{name.split('.')[0]}"
                split |= {
                    f"{folder}.{part}.weight": x
                    for part, x in zip(names, np.split(whole, places), strict=True)
                }
    return split
