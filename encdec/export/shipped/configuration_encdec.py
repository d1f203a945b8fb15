"""Configuration of encdec's encoder-decoder for transformers; see modeling_encdec.py."""

import re

import transformers
from transformers import PretrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)


def check_version(least, tested, installed=transformers.__version__):
    """ImportError for versions below ``least``; a warning for majors newer than all ``tested``."""
    numbers = lambda version: tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers(installed) < numbers(least):
        raise ImportError(
            f"this model is read by transformers {least} or newer (tested with "
            f"{', '.join(tested)}), and {installed} is installed; upgrade it: "
            f"pip install 'transformers>={least}'"
        )
    if numbers(installed)[0] > max(numbers(version)[0] for version in tested):
        logger.warning(
            f"this model was tested with transformers {', '.join(tested)}, not with {installed}"
        )


class EncdecConfig(PretrainedConfig):
    """Sizes and choices of one model.

    ``rope_frequencies`` are radians per position of each rotated pair of a head's halves, and
    ``rope_magnitude`` multiplies the rotated vectors. A cap of 0 is off. Layers read
    ``attention_window`` tokens back, their own included, and in the encoder as many ahead, or what
    ``encoder_window`` says (back, ahead), but for the global ones that are listed; 0: all read
    everything. Unrotated layers have no RoPE. Such local layers rotate by frequencies of
    ``local_rope_theta``; 0: as all others.
    ``transformers_versions`` says with which versions of transformers the files were tested.
    """

    model_type = "encdec"
    is_encoder_decoder = True
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers' own way)
    attribute_map = {  # noqa: RUF012
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
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
        qk_norm_over_heads=False,
        omit_pre_norms=False,
        merged_attention=False,
        attention_scale=0.125,
        attention_logit_cap=0.0,
        final_logit_cap=0.0,
        embedding_scale=False,
        share_embeddings=True,
        tie_word_embeddings=True,
        rope_frequencies=(),
        rope_magnitude=1.0,
        attention_window=0,
        encoder_global_layers=(),
        decoder_global_layers=(),
        encoder_window=(),
        encoder_unrotated_layers=(),
        decoder_unrotated_layers=(),
        local_rope_theta=0.0,
        initializer_range=0.02,
        use_cache=True,
        transformers_versions=None,
        **kwargs,
    ):
        values = dict(locals())
        for name in ("self", "kwargs", "__class__", "tie_word_embeddings"):
            values.pop(name, None)
        if transformers_versions:
            check_version(**transformers_versions)
        for name, value in values.items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        kwargs.setdefault("pad_token_id", 0)
        kwargs.pop("is_encoder_decoder", None)
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(is_encoder_decoder=True, **kwargs)
