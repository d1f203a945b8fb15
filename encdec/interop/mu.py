"""The paper's authors' PyTorch checkpoint as our encoder-decoder.

A file of theirs is a dict with ``model_state_dict`` and, as their training saves it,
``model_config``; names are those of their public release (microsoft/encoder-decoder-slm). Every
field of the latter is obeyed or refused. Settings that no file states are as published: RoPE in
self-attention alone, encoder positions centred, norms that leave float32 before they are scaled,
an ungated tanh-GELU MLP.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from encdec.errors import ConfigError, DataError
from encdec.interop.layout import Entry, attention_entries, mlp_entries, to_ours
from encdec.model import ExecutionConfig, ModelConfig
from encdec.packages import install_hint

START_ID = 1  # BOS of their tokenizer
HEAD_DIM = 64  # of the release, which has no model_config
# Their fields with the defaults that absent fields get.
FIELDS: dict[str, Any] = {
    "n_encoder_layer": 20,
    "n_decoder_layer": 10,
    "n_embd": 1024,
    "qkv_embd": 384,
    "is_interleaved": False,
    "hidden_dim": 4096,
    "n_head": 6,
    "n_kv_head": 3,
    "block_size": 1024,
    "dropout": 0.1,
    "rope_theta": 10_000,
    "rope_factor": 1.0,
    "pad_token_id": 0,
    "vocab_size": 32_128,
}
_ATTENTION = ("q_linear", "k_linear", "v_linear", "out_linear")
MLP = "transformer.h.0.mlp.fc1"
STACKS = (("encoder", "e"), ("decoder", "h"))


def read_checkpoint(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Tensors of a checkpoint and its ``model_config``, None where it has none.

    The file is read as weights alone: nothing in it is executed.

    Raises:
        ConfigError: torch is not installed.
        DataError: the file holds more than weights, is damaged or has no ``model_state_dict``, or
            its ``model_config`` is not a dict.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"--format=mu reads a PyTorch file and needs torch: {install_hint('hf')}"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever zip and pickle raised
        raise DataError(
            f"{path} cannot be read as a file of weights: {str(error).splitlines()[0]}; give the "
            "model.pt of the release"
        ) from error
    state = content.get("model_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(torch.is_tensor(x) for x in state.values()):
        seen = sorted(map(str, content))[:5] if isinstance(content, Mapping) else type(content)
        raise DataError(
            f"{path} has no 'model_state_dict' of tensors (it has {seen}); give the "
            "model.pt of the release"
        )
    settings = content.get("model_config")
    if settings is not None and not isinstance(settings, Mapping):
        raise DataError(
            f"{path} has model_config {settings!r}, which is not a dict of the model's fields; "
            "give the file written by the authors' training code"
        )
    tensors = {name.removeprefix("module."): _numpy(x) for name, x in state.items()}
    return tensors, None if settings is None else dict(settings)


def _numpy(tensor: Any) -> np.ndarray:
    """A view; NumPy has no bfloat16, so those tensors are viewed as 16-bit integers."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def read_config(
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any] | None = None,
    head_dim: int | None = None,
) -> tuple[ModelConfig, int]:
    """The model that a checkpoint describes, and the longest source and target together.

    Args:
        tensors: of the checkpoint.
        settings: its ``model_config``. Without one, the sizes follow from names and shapes, and the
            rest is as in the release.
        head_dim: width of a head where ``settings`` does not state it; by default the release's.

    Raises:
        ConfigError: ``head_dim`` contradicts ``settings``.
        DataError: tensors that determine the sizes are missing or contradict ``settings``, or a
            field of ``settings`` is not supported.
    """
    layers, sizes = _sizes(tensors)
    given = _checked(settings, layers, sizes) if settings is not None else dict(FIELDS)
    if settings is not None:
        width = given["qkv_embd"] // given["n_head"]
        if head_dim not in (None, width):
            raise ConfigError(
                f"--head_dim={head_dim}, but the checkpoint's model_config says {width} "
                f"(qkv_embd {given['qkv_embd']}, n_head {given['n_head']}); leave --head_dim out"
            )
        head_dim = width
    head_dim = head_dim or HEAD_DIM
    if sizes["queries"] % head_dim or sizes["keys"] % head_dim or not all(layers.values()):
        raise DataError(
            f"the checkpoint has {layers} layers, queries {sizes['queries']} and keys "
            f"{sizes['keys']} wide; expected layers in both and multiples of {head_dim}"
        )
    head = tensors.get("lm_head.weight")
    tied = head is None or np.array_equal(head, tensors["transformer.wte.weight"])
    longest = given["block_size"]
    stretched = given["rope_factor"] > 1
    model = ModelConfig(
        vocab_size=sizes["vocabulary"],
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        d_model=sizes["width"],
        num_heads=sizes["queries"] // head_dim,
        num_kv_heads=sizes["keys"] // head_dim,
        head_dim=head_dim,
        mlp_dim=sizes["mlp"],
        # Their "interleaved" says which key head a query head reads, not how heads are rotated.
        kv_pairing="grouped" if given["is_interleaved"] else "tiled",
        qkv_bias="transformer.h.0.causal_attn.q_linear.bias" in tensors,
        attention_out_bias="transformer.h.0.causal_attn.out_linear.bias" in tensors,
        mlp_bias=f"{MLP}.bias" in tensors,
        encoder_positions="centred",
        norm_cast="before_scale",
        tie_embeddings=tied,
        rope_theta=float(given["rope_theta"]),
        # Theirs rescales for each sequence longer than block_size: up to there both are the same.
        rope_scaling="ntk" if stretched else "none",
        rope_factor=float(given["rope_factor"]) if stretched else 1.0,
        rope_max_length=longest,
        rope_length=longest if stretched else 0,
        attention_dropout=float(given["dropout"]),
        mlp_dropout=float(given["dropout"]),
        execution=ExecutionConfig(scan_layers=False),
    )
    return model, 2 * longest


def _sizes(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, int], dict[str, int]]:
    """Layers of each stack, and the widths that shapes tell."""
    layers = {
        stack: len(
            {m[1] for name in tensors if (m := re.match(rf"transformer\.{letter}\.(\d+)\.", name))}
        )
        for stack, letter in STACKS
    }
    sizes = {}
    for what, name, axis in (
        ("vocabulary", "transformer.wte.weight", 0),
        ("width", "transformer.wte.weight", 1),
        ("queries", "transformer.h.0.causal_attn.q_linear.weight", 0),
        ("keys", "transformer.h.0.causal_attn.k_linear.weight", 0),
        ("mlp", f"{MLP}.weight", 0),
    ):
        if name not in tensors or tensors[name].ndim != 2:
            raise DataError(
                f"the checkpoint has no matrix {name}, which determines the model's {what}; "
                "give the model.pt of the release"
            )
        sizes[what] = tensors[name].shape[axis]
    return layers, sizes


def _checked(
    settings: Mapping[str, Any], layers: Mapping[str, int], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Every field of a ``model_config``, checked for its type and against the tensors.

    Raises:
        DataError: a field is unknown, of another type, contradicts the tensors, or
            is not supported.
    """
    given = dict(settings)
    refuse = lambda key, why: DataError(
        f"the checkpoint's model_config has {key} {given[key]!r}, {why}; this model cannot be "
        "imported"
    )
    if unknown := sorted(set(given) - set(FIELDS)):
        raise refuse(unknown[0], f"which is not one of {', '.join(FIELDS)}")
    given = FIELDS | given
    if given["qkv_embd"] is None:
        given["qkv_embd"] = given["n_embd"]
    for key, default in FIELDS.items():
        value = given[key]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise refuse(key, "expected true or false")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise refuse(key, "expected a number")
        elif isinstance(default, int) and key != "rope_theta" and value != int(value):
            raise refuse(key, "expected a whole number")
        elif key not in ("dropout", "pad_token_id", "rope_factor") and value <= 0:
            raise refuse(key, "expected a positive number")
    if given["pad_token_id"] != 0:
        raise refuse("pad_token_id", "but encdec's padding id is 0")
    if not 0 <= given["dropout"] < 1:
        raise refuse("dropout", "expected a rate in [0, 1)")
    if given["qkv_embd"] % given["n_head"]:
        raise refuse("n_head", f"expected a divisor of qkv_embd {given['qkv_embd']}")
    if given["n_head"] % given["n_kv_head"]:
        raise refuse("n_kv_head", f"expected a divisor of n_head {given['n_head']}")
    found = {
        "n_encoder_layer": layers["encoder"],
        "n_decoder_layer": layers["decoder"],
        "n_embd": sizes["width"],
        "qkv_embd": sizes["queries"],
        "n_kv_head": sizes["keys"] * given["n_head"] // given["qkv_embd"],
        "hidden_dim": sizes["mlp"],
        "vocab_size": sizes["vocabulary"],
    }
    for key, value in found.items():
        if given[key] != value:
            raise refuse(key, f"but its tensors have {value}")
    return given


def layout(config: ModelConfig) -> list[Entry]:
    """Their names of our parameters."""
    entries = [Entry("transformer.wte.weight", "embedder/embedding")]
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", "embedder/head", "matrix"))
    for (stack, letter), count in zip(
        STACKS, (config.encoder_layers, config.decoder_layers), strict=True
    ):
        final = "ln_e" if stack == "encoder" else "ln_f"
        entries.append(Entry(f"transformer.{final}.weight", f"{stack}/final_norm/scale"))
        for layer in range(count):
            theirs, ours = f"transformer.{letter}.{layer}", f"{stack}/layers_{layer}"
            norms = ["self_attention_norm", "mlp_norm"]
            itself = "attn" if stack == "encoder" else "causal_attn"
            entries += attention_entries(
                config, f"{theirs}.{itself}", f"{ours}/self_attention", _ATTENTION
            )
            if stack == "decoder":
                norms.insert(1, "cross_attention_norm")
                entries += attention_entries(
                    config, f"{theirs}.cross_attn", f"{ours}/encoder_attention", _ATTENTION
                )
            entries += mlp_entries(
                config, f"{theirs}.mlp", f"{ours}/mlp", {"up": "fc1", "down": "fc2"}
            )
            entries += [
                Entry(f"{theirs}.ln{number}.weight", f"{ours}/{norm}/scale")
                for number, norm in enumerate(norms, 1)
            ]
    return entries


def convert(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our unrolled parameters as views of the tensors.

    Raises:
        DataError: tensors are missing, unexpected or of the wrong shape.
    """
    ignored = ["lm_head.weight"] if config.tie_embeddings else []
    return to_ours(layout(config), config, tensors, ignored)
