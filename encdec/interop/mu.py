"""The paper's authors' PyTorch checkpoint as our encoder-decoder.

A file of theirs is a dict with ``model_state_dict``; names are those of their public release
(microsoft/encoder-decoder-slm). What names and shapes do not tell is as published: heads 64 wide
and tiled, RoPE of base 10,000 in self-attention alone, encoder positions centred, norms that leave
float32 before they are scaled, an ungated tanh-GELU MLP.
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
from encdec.model import ModelConfig

START_ID = 1  # BOS of their tokenizer
MAX_LENGTH = 2048  # 1,024 source tokens and as many of ours; they trained on 1,024 and 256
HEAD_DIM = 64
_ATTENTION = ("q_linear", "k_linear", "v_linear", "out_linear")
MLP = "transformer.h.0.mlp.fc1"
STACKS = (("encoder", "e"), ("decoder", "h"))


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint, read as weights alone: nothing in the file is executed.

    Raises:
        ConfigError: torch is not installed.
        DataError: the file holds more than weights, is damaged or has no ``model_state_dict``.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            "--from=mu reads a PyTorch file; install torch with pip install 'encdec[hf]'"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever zip and pickle raised
        raise DataError(
            f"{path} cannot be read as weights alone: {str(error).splitlines()[0]}; "
            "give the model.pt of the release"
        ) from error
    state = content.get("model_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(torch.is_tensor(x) for x in state.values()):
        seen = sorted(map(str, content))[:5] if isinstance(content, Mapping) else type(content)
        raise DataError(
            f"{path} has no 'model_state_dict' of tensors (it has {seen}); give the "
            "model.pt of the release"
        )
    return {name.removeprefix("module."): _numpy(x) for name, x in state.items()}


def _numpy(tensor: object) -> np.ndarray:
    """A view; NumPy has no bfloat16 of its own, so that passes as 16 bits."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def read_config(tensors: Mapping[str, np.ndarray], head_dim: int = HEAD_DIM) -> ModelConfig:
    """The model that the tensors' names and shapes describe.

    Raises:
        DataError: tensors that say the sizes are missing, or sizes at odds with ``head_dim``.
    """
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
                f"the checkpoint has no matrix {name}, which says the model's {what}; "
                "give the model.pt of the release"
            )
        sizes[what] = tensors[name].shape[axis]
    if sizes["queries"] % head_dim or sizes["keys"] % head_dim or not all(layers.values()):
        raise DataError(
            f"the checkpoint has {layers} layers, queries {sizes['queries']} and keys "
            f"{sizes['keys']} wide; wanted layers in both and multiples of {head_dim}"
        )
    head = tensors.get("lm_head.weight")
    tied = head is None or np.array_equal(head, tensors["transformer.wte.weight"])
    return ModelConfig(
        vocab_size=sizes["vocabulary"],
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        d_model=sizes["width"],
        num_heads=sizes["queries"] // head_dim,
        num_kv_heads=sizes["keys"] // head_dim,
        head_dim=head_dim,
        mlp_dim=sizes["mlp"],
        kv_pairing="tiled",
        qkv_bias="transformer.h.0.causal_attn.q_linear.bias" in tensors,
        attention_out_bias="transformer.h.0.causal_attn.out_linear.bias" in tensors,
        mlp_bias=f"{MLP}.bias" in tensors,
        encoder_positions="centred",
        norm_cast="before_scale",
        tie_embeddings=tied,
        scan_layers=False,
    )


def layout(config: ModelConfig) -> list[Entry]:
    """What our parameters are called there."""
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
        DataError: tensors are missing, superfluous or misshapen.
    """
    ignored = ["lm_head.weight"] if config.tie_embeddings else []
    return to_ours(layout(config), config, tensors, ignored)
