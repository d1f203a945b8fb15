"""Small models with random weights, as work directories."""

from __future__ import annotations

import functools

import numpy as np

from encdec.data.vocabulary import ByteVocabulary
from encdec.inference.text_io import PromptFormat
from encdec.model import ModelConfig, preset
from tests.inference.examples import START
from tests.inference.examples import model as random_model

TINY = preset("test", vocab_size=264)
MODELS: dict[str, ModelConfig] = {
    # The paper's shape: no family of transformers has it.
    "paper": TINY,
    # One table for both stacks and a head of its own: what transformers does not tie.
    "untied head": TINY.replace(tie_embeddings=False),
    "unrolled": TINY.replace(
        scan_layers=False,
        mlp_gated=True,
        mlp_activation="silu",
        qk_norm=True,
        post_norms=True,
        attention_logit_cap=5.0,
        final_logit_cap=8.0,
        norm_plus_one=True,
        embedding_scale=True,
        tie_embeddings=False,
        share_embeddings=False,
        rope_scaling="linear",
        rope_factor=2.0,
        norm_cast="after_scale",
        attention_scale=0.3,
    ),
    # T5Gemmas: as near as ours come, and with everything that is folded into weights.
    "t5gemma": TINY.replace(
        kv_pairing="grouped",
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        mlp_gated=True,
        post_norms=True,
        norm_plus_one=True,
        embedding_scale=True,
        norm_cast="after_scale",
        encoder_positions="from_zero",
        tie_embeddings=True,
    ),
    "t5gemma folded": TINY.replace(
        scan_layers=False,
        mlp_bias=False,
        attention_out_bias=False,
        mlp_gated=True,
        post_norms=True,
        attention_scale=0.5,
        final_logit_cap=9.0,
        mlp_activation="silu",
    ),
    # T5Gemma 2's decoder.
    "merged": TINY.replace(
        scan_layers=False,
        decoder_layers=2,
        merged_attention=True,
        attention_window=4,
        decoder_global_layers=(1,),
        qk_norm=True,
        post_norms=True,
        norm_plus_one=True,
        mlp_gated=True,
    ),
    # With what a SmolLM3 and an OLMo 2 have, and a window that reaches farther back than ahead.
    "of later families": TINY.replace(
        scan_layers=False,
        decoder_layers=2,
        attention_window=4,
        encoder_window=(3, 1),
        encoder_global_layers=(1,),
        encoder_unrotated_layers=(0,),
        decoder_unrotated_layers=(1,),
        qk_norm=True,
        qk_norm_over_heads=True,
        post_norms=True,
        omit_pre_norms=True,
        tie_embeddings=False,
    ),
    "t5gemma2": TINY.replace(
        scan_layers=False,
        decoder_layers=2,
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        mlp_gated=True,
        post_norms=True,
        norm_plus_one=True,
        embedding_scale=True,
        qk_norm=True,
        merged_attention=True,
        attention_window=5,
        encoder_window=(2, 2),
        encoder_global_layers=(1,),
        decoder_global_layers=(0,),
        local_rope_theta=100.0,
        rope_scaling="linear",
        rope_factor=2.0,
        attention_scale=0.25,
        final_logit_cap=9.0,
    ),
    # Windows shorter than texts, and longer than any: those alone can be a T5Gemma's.
    "windowed pair": TINY.replace(
        scan_layers=False,
        encoder_layers=2,
        decoder_layers=2,
        attention_window=4,
        encoder_global_layers=(0,),
        local_rope_theta=100.0,
        attention_logit_cap=5.0,
        qk_norm=True,
        tie_embeddings=False,
    ),
    "t5gemma of gemma 2": TINY.replace(
        scan_layers=False,
        kv_pairing="grouped",
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        mlp_gated=True,
        post_norms=True,
        norm_plus_one=True,
        embedding_scale=True,
        norm_cast="after_scale",
        encoder_positions="from_zero",
        attention_window=64,
        encoder_global_layers=(1,),
        attention_logit_cap=5.0,
        final_logit_cap=9.0,
    ),
    "llama": TINY.replace(
        architecture="decoder_only",
        tie_embeddings=False,  # tied ones repeat what they read last, which is EOS
        encoder_layers=0,
        decoder_layers=2,
        mlp_gated=True,
        mlp_activation="silu",
        norm_plus_one=True,
        embedding_scale=True,
        attention_scale=0.5,
        attention_out_bias=False,
        rope_scaling="ntk",
        rope_factor=2.0,
        rope_max_length=4,
        rope_length=40,
    ),
}
# For graphs alone: no format but ONNX and LiteRT has all of these.
MODELS_OF_GRAPHS = MODELS | {
    # Cross-attention that knows places: counted from zero, and on from the source's end.
    "from zero": TINY.replace(cross_attention_rope="from_zero"),
    "merged, continued": TINY.replace(
        scan_layers=False,
        decoder_layers=3,
        merged_attention=True,
        cross_attention_rope="continued",
        attention_window=4,
        local_rope_theta=100.0,
        decoder_global_layers=(1,),
        decoder_unrotated_layers=(2,),
        qk_norm=True,
    ),
    "stretched": TINY.replace(
        rope_scaling="ntk", rope_factor=2.0, rope_max_length=4, rope_length=40
    ),
    # What local layers are spared.
    "stretched by pairs": TINY.replace(
        scan_layers=False,
        encoder_layers=2,
        decoder_layers=2,
        attention_window=4,
        encoder_global_layers=(0,),
        decoder_global_layers=(1,),
        local_rope_theta=100.0,
        rope_scaling="per_pair",
        rope_divisors=tuple(1.0 + i / 2 for i in range(TINY.head_dim // 2)),
        rope_magnitude=1.1,
        cross_attention_rope="continued",
    ),
    "windowed": MODELS["llama"].replace(
        scan_layers=False,
        attention_window=5,
        global_layer_every=2,
        local_rope_theta=100.0,
        qk_norm=True,
        final_logit_cap=9.0,
    ),
}
# One id less than the models have rows.
PROMPTS = PromptFormat(ByteVocabulary(4), decoder_start_id=START, max_input_tokens=64)


@functools.cache
def pair(name: str) -> tuple[ModelConfig, dict]:
    """Configuration and parameters of one of the models."""
    from tests.inference import examples

    examples.CONFIGS[f"export {name}"] = MODELS_OF_GRAPHS[name]
    return random_model(f"export {name}", std=0.15)


def batch(config: ModelConfig, source: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """Record fields of whole rows, without padding."""
    places = lambda x: np.tile(np.arange(x.shape[1]), (len(x), 1))
    fields = {}
    for side, tokens in (("encoder", source), ("decoder", target)):
        fields |= {
            f"{side}_input_tokens": tokens,
            f"{side}_segment_ids": np.ones_like(tokens),
            f"{side}_positions": places(tokens),
        }
    if not config.is_encoder_decoder:
        fields = {k: v for k, v in fields.items() if k.startswith("decoder_")}
    return fields
