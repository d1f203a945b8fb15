"""encdec's encoder-decoder for transformers: pre-norm RMSNorm blocks, grouped heads, RoPE.

Positions rotate self-attention alone. Cross-attention reads the encoder's normed output as it is
and keeps its keys and values, as self-attention does, in the cache of ``generate``.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .configuration_encdec import EncdecConfig

CACHE = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"


class EncdecNorm(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.eps, self.cast = config.norm_eps, config.norm_cast
        self.plus_one = config.norm_plus_one
        self.weight = nn.Parameter(torch.full((width,), 0.0 if self.plus_one else 1.0))

    def forward(self, x):
        scale = self.weight + 1 if self.plus_one else self.weight
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.cast == "before_scale":
            return normed.to(x.dtype) * scale.to(x.dtype)
        return (normed * scale.float()).to(x.dtype)


def rotate(x, table):
    """Rotates the halves of each head [B, H, T, D] by cosines and sines [B, 1, T, D/2]."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = table
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class EncdecAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        M, D, heads, kv = config.d_model, config.head_dim, config.num_heads, config.num_kv_heads
        self.q_proj = nn.Linear(M, heads * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(M, kv * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(M, kv * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * D, M, bias=config.attention_out_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = EncdecNorm(config, D), EncdecNorm(config, D)

    def heads(self, projection, x, norm=None):
        x = projection(x).unflatten(-1, (-1, self.config.head_dim))
        return (x if norm is None else norm(x)).transpose(1, 2)

    def keys_values(self, x, table):
        k = self.heads(self.k_proj, x, self.k_norm if self.config.qk_norm else None)
        return (k if table is None else rotate(k, table)), self.heads(self.v_proj, x)

    def forward(self, x, mask, table=None, source=None, cache=None):
        """``mask`` is added to the scores; ``source`` given, this is cross-attention."""
        config = self.config
        q = self.heads(self.q_proj, x, self.q_norm if config.qk_norm else None)
        q = q if table is None else rotate(q, table)
        if source is None:
            k, v = self.keys_values(x, table)
            if cache is not None:
                k, v = cache.self_attention_cache.update(k, v, self.layer)
        elif cache is not None and cache.is_updated.get(self.layer):
            kept = cache.cross_attention_cache.layers[self.layer]
            k, v = kept.keys, kept.values
        else:
            k, v = self.keys_values(source, None)
            if cache is not None:
                k, v = cache.cross_attention_cache.update(k, v, self.layer)
                cache.is_updated[self.layer] = True
        group = config.num_heads // config.num_kv_heads
        if config.attention_logit_cap:
            k, v = (y.repeat_interleave(group, dim=1) for y in (k, v))
            scores = (q * config.attention_scale) @ k.transpose(2, 3)
            cap = config.attention_logit_cap
            scores = cap * torch.tanh(scores.float() / cap) + mask
            out = torch.softmax(scores, -1).to(v.dtype) @ v
        else:
            out = nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask.to(q.dtype),
                scale=config.attention_scale,
                enable_gqa=group > 1,
            )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class EncdecMlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        M, F, bias = config.d_model, config.mlp_dim, config.mlp_bias
        self.gate_proj = nn.Linear(M, F, bias=bias) if config.mlp_gated else None
        self.up_proj, self.down_proj = nn.Linear(M, F, bias=bias), nn.Linear(F, M, bias=bias)
        self.activation = ACT2FN[config.mlp_activation]

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class EncdecBlock(nn.Module):
    def __init__(self, config, layer, cross):
        super().__init__()
        self.sublayers = ["self_attn", "cross_attn", "mlp"] if cross else ["self_attn", "mlp"]
        for name in self.sublayers:
            self.add_module(
                name, EncdecMlp(config) if name == "mlp" else EncdecAttention(config, layer)
            )
            self.add_module(f"pre_{name}_norm", EncdecNorm(config, config.d_model))
            if config.post_norms:
                self.add_module(f"post_{name}_norm", EncdecNorm(config, config.d_model))

    def forward(self, x, mask, table, source=None, source_mask=None, cache=None):
        for name in self.sublayers:
            y, sublayer = getattr(self, f"pre_{name}_norm")(x), getattr(self, name)
            if name == "self_attn":
                y = sublayer(y, mask, table, cache=cache)
            elif name == "cross_attn":
                y = sublayer(y, source_mask, source=source, cache=cache)
            else:
                y = sublayer(y)
            if hasattr(self, f"post_{name}_norm"):
                y = getattr(self, f"post_{name}_norm")(y)
            x = x + y
        return x


class EncdecPreTrainedModel(PreTrainedModel):
    config_class = EncdecConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["EncdecBlock"]  # noqa: RUF012 (transformers' own way)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, EncdecNorm):
            nn.init.constant_(module.weight, 0.0 if module.plus_one else 1.0)


class EncdecStack(EncdecPreTrainedModel):
    def __init__(self, config, layers, cross):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(EncdecBlock(config, i, cross) for i in range(layers))
        self.norm = EncdecNorm(config, config.d_model)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def embed(self, input_ids):
        x = self.embed_tokens(input_ids)
        return (
            x * torch.tensor(self.config.d_model**0.5, dtype=x.dtype)
            if (self.config.embedding_scale)
            else x
        )

    def rope(self, positions):
        frequencies = torch.tensor(self.config.rope_frequencies, device=positions.device)
        angles = positions.float()[:, None, :, None] * frequencies
        magnitude = self.config.rope_magnitude
        return angles.cos() * magnitude, angles.sin() * magnitude

    @staticmethod
    def additive(allowed):
        """0 where attention is allowed, the least float elsewhere."""
        mask = torch.zeros(allowed.shape, dtype=torch.float32, device=allowed.device)
        return mask.masked_fill(~allowed, torch.finfo(torch.float32).min / 2)


class EncdecEncoder(EncdecStack):
    def __init__(self, config):
        super().__init__(config, config.encoder_layers, cross=False)

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, return_dict=True, **kwargs
    ):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = torch.ones(x.shape[:2], device=x.device)
        mask = self.additive(attention_mask[:, None, None, :].bool())
        mask = mask.expand(-1, -1, x.shape[1], -1)
        table = self.rope(torch.arange(x.shape[1], device=x.device)[None])
        for layer in self.layers:
            x = layer(x, mask, table)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class EncdecDecoder(EncdecStack):
    def __init__(self, config):
        super().__init__(config, config.decoder_layers, cross=True)

    def forward(self, input_ids, source, source_mask, attention_mask=None, cache=None):
        x = self.embed(input_ids)
        past = cache.get_seq_length() if cache is not None else 0
        places = torch.arange(past, past + x.shape[1], device=x.device)
        allowed = (torch.arange(past + x.shape[1], device=x.device) <= places[:, None])[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, :].bool()
        mask = self.additive(allowed.expand(x.shape[0], -1, -1, -1))
        if source_mask is None:
            source_mask = torch.ones(source.shape[:2], device=x.device)
        source_mask = self.additive(source_mask[:, None, None, :].bool())
        source_mask = source_mask.expand(-1, -1, x.shape[1], -1)
        table = self.rope(places[None])
        for layer in self.layers:
            x = layer(x, mask, table, source, source_mask, cache)
        return self.norm(x)


class EncdecForConditionalGeneration(EncdecPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        tied = {}
        if config.tie_word_embeddings:
            tied["lm_head.weight"] = "decoder.embed_tokens.weight"
        if config.share_embeddings:
            tied["encoder.embed_tokens.weight"] = "decoder.embed_tokens.weight"
        self._tied_weights_keys = tied
        super().__init__(config)
        self.encoder, self.decoder = EncdecEncoder(config), EncdecDecoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, modality=None):
        return self.encoder

    def get_decoder(self):
        return self.decoder

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        cache=None,
        labels=None,
        use_cache=None,
        return_dict=True,
        **kwargs,
    ):
        # `cache` is what transformers 5.24 made of `past_key_values`.
        cache = past_key_values if cache is None else cache
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        source = encoder_outputs[0]
        if labels is not None and decoder_input_ids is None:
            start = self.config.decoder_start_token_id
            decoder_input_ids = torch.cat(
                [torch.full_like(labels[:, :1], start), labels[:, :-1].clamp(min=0)], 1
            )
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        hidden = self.decoder(
            decoder_input_ids, source, attention_mask, decoder_attention_mask, cache
        )
        logits = self.lm_head(hidden).float()
        if cap := self.config.final_logit_cap:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100
            )
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, encoder_last_hidden_state=source, **{CACHE: cache}
        )
