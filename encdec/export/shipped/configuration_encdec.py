"""Configuration of encdec's encoder-decoder for transformers; see modeling_encdec.py."""

from transformers import PretrainedConfig


class EncdecConfig(PretrainedConfig):
    """Sizes and choices of one model.

    ``rope_frequencies`` are radians per position of each rotated pair of a head's halves, and
    ``rope_magnitude`` multiplies the rotated vectors. A cap of 0 is off.
    """

    model_type = "encdec"
    is_encoder_decoder = True
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers' own way)
    attribute_map = {  # noqa: RUF012
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "decoder_layers",
        "hidden_size": "d_model",
    }

    def __init__(
        self,
        vocab_size=32_128,
        encoder_layers=20,
        decoder_layers=10,
        d_model=1024,
        num_heads=6,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=4096,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        mlp_gated=False,
        mlp_activation="gelu_pytorch_tanh",
        norm_eps=1e-6,
        norm_plus_one=False,
        norm_cast="after_scale",
        post_norms=False,
        qk_norm=False,
        attention_scale=0.125,
        attention_logit_cap=0.0,
        final_logit_cap=0.0,
        embedding_scale=False,
        share_embeddings=True,
        tie_word_embeddings=True,
        rope_frequencies=(),
        rope_magnitude=1.0,
        use_cache=True,
        **kwargs,
    ):
        values = dict(locals())
        for name in ("self", "kwargs", "__class__", "tie_word_embeddings"):
            values.pop(name, None)
        for name, value in values.items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        kwargs.setdefault("pad_token_id", 0)
        kwargs.pop("is_encoder_decoder", None)
        super().__init__(is_encoder_decoder=True, tie_word_embeddings=tie_word_embeddings, **kwargs)
