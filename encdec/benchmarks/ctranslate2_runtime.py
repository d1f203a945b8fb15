"""The same weights in CTranslate2: a peer of our own paths.

Its Transformer has all that the paper's model has (RMS norms before each sublayer, rotated
self-attention, cross-attention without places, fewer key heads than query heads, biases), so that
the model is written by its own specification, without a detour by another library's model.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import threading
from typing import Any

import numpy as np

from encdec.benchmarks.generation import START_ID
from encdec.benchmarks.transformers_runtime import StreamedAnswer
from encdec.errors import ConfigError
from encdec.export import equivalents
from encdec.machine import available_cores
from encdec.model import ModelConfig, Params
from encdec.packages import install_hint

PRECISIONS = ("float32", "bfloat16", "int8")
# What its Transformer computes as we do, and execution, which changes no result.
_EXPRESSED = frozenset(
    """
    architecture vocab_size encoder_layers decoder_layers d_model num_heads num_kv_heads head_dim
    mlp_dim kv_pairing qkv_bias attention_out_bias attention_scale rope_theta encoder_positions
    mlp_gated mlp_activation mlp_bias norm_eps norm_cast norm_plus_one tie_embeddings
    share_embeddings attention_dropout mlp_dropout residual_dropout init_std dtype param_dtype
    execution
    """.split()
)
_ACTIVATIONS = {"gelu_tanh": "GELUTanh", "gelu": "GELU", "silu": "SWISH", "relu": "RELU"}


def missing(precision: str) -> str:
    """Why CTranslate2 cannot run here in one of PRECISIONS; empty where it can."""
    if importlib.util.find_spec("ctranslate2") is None:
        return f"ctranslate2 is not installed: {install_hint('peers')}"
    import ctranslate2

    if precision not in (have := ctranslate2.get_supported_compute_types("cpu")):
        return f"CTranslate2 has no {precision} on this CPU, only {', '.join(sorted(have))}"
    return ""


def artefact(config: ModelConfig, params: Any, folder: pathlib.Path) -> pathlib.Path:
    """The model in float32, written now unless it is there; CTranslate2 quantises as it loads."""
    out = folder / "ctranslate2"
    if not (out / "config.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        spec = specification(config, params)
        spec.validate()
        spec.optimize()
        spec.save(str(out))
    return out


def specification(config: ModelConfig, params: Any) -> Any:
    """The model as CTranslate2's ``TransformerSpec``; tokens are named by their numbers.

    Raises:
        ConfigError: a field is set that its Transformer does not have.
    """
    from ctranslate2.specs import common_spec, transformer_spec

    for field in dataclasses.fields(config):
        if field.name not in _EXPRESSED and getattr(config, field.name) != field.default:
            raise ConfigError(
                f"ModelConfig.{field.name} is {getattr(config, field.name)!r}, which is not "
                f"written for CTranslate2; expected {field.default!r}"
            )
    config, params = equivalents.on_host(config, params)
    config, params = equivalents.norms_around(config, params, plus_one=False)
    config, params = equivalents.plain_attention_scale(config, params)
    common = dict(
        num_heads=config.num_heads,
        activation=common_spec.Activation[_ACTIVATIONS[config.mlp_activation]],
        ffn_glu=config.mlp_gated,
        rms_norm=True,
        rotary_dim=config.head_dim,
        rotary_interleave=False,
        rotary_base=config.rope_theta,
        num_heads_kv=config.num_kv_heads if config.num_kv_heads < config.num_heads else None,
        head_dim=config.head_dim,
    )
    spec = transformer_spec.TransformerSpec(
        transformer_spec.TransformerEncoderSpec(config.encoder_layers, **common),
        transformer_spec.TransformerDecoderSpec(config.decoder_layers, **common),
    )
    spec.config.layer_norm_epsilon = config.norm_eps
    names = [str(token) for token in range(config.vocab_size)]
    for register in (spec.register_source_vocabulary, spec.register_target_vocabulary):
        register(names)
    for name in ("bos_token", "eos_token", "unk_token", "decoder_start_token"):
        setattr(spec.config, name, names[START_ID])
    table = params["embedder"]["embedding"]
    own = params["embedder" if config.share_embeddings else "encoder_embedder"]["embedding"]
    for side, stack, embedding in (
        ("encoder", spec.encoder, own),
        ("decoder", spec.decoder, table),
    ):
        stack.scale_embeddings = False
        place = stack.embeddings[0] if side == "encoder" else stack.embeddings
        place.weight = embedding
        stack.layer_norm.gamma = params[side]["final_norm"]["scale"]
        for index, layer in enumerate(stack.layer):
            _set_layer(layer, params[side][f"layers_{index}"], config)
    head = table if config.tie_embeddings else np.ascontiguousarray(params["embedder"]["head"].T)
    spec.decoder.projection.weight = head
    return spec


def _set_layer(spec: Any, layer: Params, config: ModelConfig) -> None:
    sublayers: list[tuple[str, Any, tuple[str, ...]]] = [
        ("self_attention", spec.self_attention, ("qkv", "o"))
    ]
    if "encoder_attention" in layer:
        sublayers.append(("encoder_attention", spec.attention, ("q", "kv", "o")))
    for name, attention, products in sublayers:
        norm = "self_attention_norm" if name == "self_attention" else "cross_attention_norm"
        attention.layer_norm.gamma = layer[norm]["scale"]
        for linear, projections in zip(attention.linear, products):
            parts = [layer[name][one] for one in projections]
            rows = config.attention_width if projections == "o" else config.d_model
            _set_linear(linear, *((one["kernel"].reshape(rows, -1), one) for one in parts))
    mlp = layer["mlp"]
    spec.ffn.layer_norm.gamma = layer["mlp_norm"]["scale"]
    first = "gate" if config.mlp_gated else "up"
    _set_linear(spec.ffn.linear_0, (mlp[first]["kernel"], mlp[first]))
    if config.mlp_gated:
        _set_linear(spec.ffn.linear_0_noact, (mlp["up"]["kernel"], mlp["up"]))
    _set_linear(spec.ffn.linear_1, (mlp["down"]["kernel"], mlp["down"]))


def _set_linear(spec: Any, *parts: tuple[np.ndarray, Params]) -> None:
    """Kernels [in, out], joined along out, as [out, in], and their biases."""
    spec.weight = np.ascontiguousarray(np.concatenate([kernel for kernel, _ in parts], axis=1).T)
    if "bias" in parts[0][1]:
        spec.bias = np.concatenate([params["bias"].reshape(-1) for _, params in parts])


class Ctranslate2Model:
    """Greedy answers by CTranslate2's ``Translator``, with its cache; EOS ends nothing.

    Args:
        directory: of ``artefact``.
        precision: float32, bfloat16, or int8 (weights by output channel, activations as they come).
    """

    def __init__(self, directory: pathlib.Path, precision: str):
        from ctranslate2 import Translator

        self._translator = Translator(
            str(directory), compute_type=precision, intra_threads=available_cores()
        )

    def start(self, tokens_BxS: np.ndarray, count: int) -> StreamedAnswer:
        """Runs up to the first of ``count`` (2 or more) new tokens of the first row."""
        answer = StreamedAnswer()
        answer.put(None)  # transformers' streamer gets the prompt first

        def go_on(step: Any) -> bool:
            answer.put(step)
            return False  # nothing is to end

        call = lambda answer: self.translate(tokens_BxS, count, callback=go_on)
        threading.Thread(target=answer.run, args=[call]).start()
        answer.wait(answer.begun)
        return answer

    def translate(self, tokens_BxS: np.ndarray, count: int, **more: Any) -> Any:
        """CTranslate2's results, one per row, of ``count`` new tokens whatever they are."""
        return self._translator.translate_batch(
            [[str(token) for token in tokens_S] for tokens_S in tokens_BxS],
            beam_size=1,
            max_input_length=0,
            max_decoding_length=count,
            min_decoding_length=count,
            **more,
        )

    def finish(self, answer: StreamedAnswer) -> np.ndarray:
        """All new tokens [B, count]."""
        answer.go_on.set()
        answer.wait(answer.done)
        return np.array([[int(token) for token in one.hypotheses[0]] for one in answer.tokens])
