"""encdec's encoder-decoder for transformers: pre-norm RMSNorm blocks, grouped heads, RoPE.

Positions rotate self-attention alone. Cross-attention reads the encoder's normed output as it is
and keeps its keys and values, as self-attention does, in the cache of ``generate``. Merged
(``merged_attention``), both are one sublayer, with one softmax over source and target. No mask is
derived from token ids: without ``attention_mask`` every token is read.

Attention is "sdpa" or "eager" (``attn_implementation``); logits with a cap are eager only.
Arguments that a forward pass does not have are refused by name, as Python refuses them.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
)

from .configuration_encdec import EncdecConfig

# `cache` is what transformers 5.24 made of `past_key_values`; both are taken.
CACHE = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"
# Since transformers 5 tied weights are a mapping from target to source.
TIES_BY_MAPPING = hasattr(PreTrainedModel, "get_expanded_tied_weights_keys")
# What generate hands on to forward passes that take anything.
OF_GENERATE = ("assistant_tokenizer", "cache_position", "tokenizer")


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
            over = config.qk_norm_over_heads  # the norm spans all heads of a token
            self.q_norm = EncdecNorm(config, heads * D if over else D)
            self.k_norm = EncdecNorm(config, kv * D if over else D)

    def heads(self, projection, x, norm=None):
        x, D = projection(x), self.config.head_dim
        if norm is not None and self.config.qk_norm_over_heads:
            x, norm = norm(x), None
        x = x.unflatten(-1, (-1, D))
        return (x if norm is None else norm(x)).transpose(1, 2)

    def keys_values(self, x, table):
        k = self.heads(self.k_proj, x, self.k_norm if self.config.qk_norm else None)
        return (k if table is None else rotate(k, table)), self.heads(self.v_proj, x)

    def of_source(self, source, cache):
        """The source's keys and values, made once where there is a cache."""
        if cache is not None and cache.is_updated.get(self.layer):
            kept = cache.cross_attention_cache.layers[self.layer]
            return kept.keys, kept.values
        k, v = self.keys_values(source, None)
        if cache is not None:
            k, v = cache.cross_attention_cache.update(k, v, self.layer)
            cache.is_updated[self.layer] = True
        return k, v

    def forward(self, x, allowed, table=None, source=None, cache=None, weights=False):
        """Returns outputs [B, T, M] and, where asked for or available, weights [B, H, T, S].

        ``allowed`` [B, 1, T, S] says what is read, None: all; ``source`` given, this is
        cross-attention, or, merged, the source is read before the target.
        """
        config = self.config
        own = source is None or config.merged_attention
        q = self.heads(self.q_proj, x, self.q_norm if config.qk_norm else None)
        q = q if table is None else rotate(q, table)
        pairs = [] if source is None else [self.of_source(source, cache)]
        if own:
            k, v = self.keys_values(x, table)
            if cache is not None:
                k, v = cache.self_attention_cache.update(k, v, self.layer)
            pairs.append((k, v))
        k, v = (y[0] if len(y) == 1 else torch.cat(y, 2) for y in zip(*pairs, strict=True))
        group = config.num_heads // config.num_kv_heads
        if config._attn_implementation == "sdpa" and not (weights or config.attention_logit_cap):
            out, weights = (
                nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=allowed, scale=config.attention_scale, enable_gqa=group > 1
                ),
                None,
            )
        else:
            k, v = (y.repeat_interleave(group, dim=1) for y in (k, v))
            logits = ((q * config.attention_scale) @ k.transpose(2, 3)).float()
            if cap := config.attention_logit_cap:
                logits = cap * torch.tanh(logits / cap)
            if allowed is not None:
                logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
            weights = torch.softmax(logits, -1).to(v.dtype)
            out = weights @ v
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights


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


class EncdecBlock(GradientCheckpointingLayer):
    def __init__(self, config, layer, cross):
        super().__init__()
        self.merged = cross and config.merged_attention
        apart = cross and not config.merged_attention
        self.sublayers = ["self_attn", "cross_attn", "mlp"] if apart else ["self_attn", "mlp"]
        for name in self.sublayers:
            self.add_module(
                name, EncdecMlp(config) if name == "mlp" else EncdecAttention(config, layer)
            )
            if not config.omit_pre_norms:
                self.add_module(f"pre_{name}_norm", EncdecNorm(config, config.d_model))
            if config.post_norms:
                self.add_module(f"post_{name}_norm", EncdecNorm(config, config.d_model))

    # What needs gradients is positional: checkpoints that re-enter autograd see no other.
    def forward(
        self, x, allowed, table, source=None, source_allowed=None, cache=None, weights=False
    ):
        """Returns the stream, and the weights of self- and cross-attention where asked for."""
        kept = {}
        for name in self.sublayers:
            y, sublayer = getattr(self, f"pre_{name}_norm", nn.Identity())(x), getattr(self, name)
            if name == "self_attn":
                read = source if self.merged else None
                y, kept[name] = sublayer(y, allowed, table, read, cache=cache, weights=weights)
                if self.merged and kept[name] is not None:
                    sizes = (source.shape[1], kept[name].shape[-1] - source.shape[1])
                    kept["cross_attn"], kept[name] = kept[name].split(sizes, -1)
            elif name == "cross_attn":
                y, kept[name] = sublayer(
                    y, source_allowed, source=source, cache=cache, weights=weights
                )
            else:
                y = sublayer(y)
            if hasattr(self, f"post_{name}_norm"):
                y = getattr(self, f"post_{name}_norm")(y)
            x = x + y
        return x, kept.get("self_attn"), kept.get("cross_attn")


class EncdecPreTrainedModel(PreTrainedModel):
    config_class = EncdecConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncdecBlock"]  # noqa: RUF012 (transformers' own way)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    @property
    def _supports_sdpa(self):  # type: ignore[override]  # theirs is a class attribute
        return not self.config.attention_logit_cap

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, EncdecNorm):
            nn.init.constant_(module.weight, 0.0 if module.plus_one else 1.0)

    def asked(self, output_attentions, output_hidden_states, return_dict):
        """The three settings, the configuration's where a call leaves them out."""
        config = self.config
        return (
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            getattr(config, "return_dict", True) if return_dict is None else return_dict,
        )


class EncdecStack(EncdecPreTrainedModel):
    global_layers: set[int]
    unrotated_layers: set[int]

    def __init__(self, config, layers, cross):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(EncdecBlock(config, i, cross) for i in range(layers))
        self.norm = EncdecNorm(config, config.d_model)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def embed(self, input_ids, inputs_embeds, prefix=""):
        """Embeddings [B, T, M], scaled; given ones are the table's rows, not yet scaled."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"give one of {prefix}input_ids and {prefix}inputs_embeds"
                + (", or labels, from which the decoder's inputs are made" if prefix else "")
            )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.embedding_scale:
            x = x * torch.tensor(self.config.d_model**0.5, dtype=x.dtype)
        return x

    def rope(self, positions, local=False):
        frequencies, magnitude = self.config.rope_frequencies, self.config.rope_magnitude
        if local and (theta := self.config.local_rope_theta):
            dim, magnitude = self.config.head_dim, 1.0
            frequencies = [theta ** (-pair / dim) for pair in range(0, dim, 2)]
        frequencies = torch.tensor(frequencies, device=positions.device)
        angles = positions.float()[:, None, :, None] * frequencies
        return angles.cos() * magnitude, angles.sin() * magnitude

    @staticmethod
    def padding(attention_mask, x, name):
        """What may be read [B, 1, 1, S] by a mask [B, S] of ones; None reads all."""
        if attention_mask is None:
            return None
        if attention_mask.ndim != 2:
            raise ValueError(
                f"{name} has shape {tuple(attention_mask.shape)}; expected [batch, length]"
            )
        return attention_mask.to(x.device)[:, None, None, :].bool()

    def near(self, allowed, distances, batch):
        """What local layers may read [B, 1, T, S] of what others may; distances [T, S] to keys."""
        reach = self.config.attention_window - 1
        back, ahead = reach, reach
        if self.is_encoder and self.config.encoder_window:
            back, ahead = self.config.encoder_window
        near = ((distances <= back) & (distances >= -ahead))[None, None]
        return (near if allowed is None else allowed & near).expand(batch, -1, -1, -1)

    def run(self, x, allowed, table, hidden, weights, *more, cache=None, local=None):
        """The layers and the last norm; what is asked for of their states and weights.

        ``local``: mask and rotation of layers that read a window; None where there are none.
        """
        states, own, cross = [x], [], []
        for index, layer in enumerate(self.layers):
            is_local = local is not None and index not in self.global_layers
            mask, turn = local if is_local else (allowed, table)
            turn = None if index in self.unrotated_layers else turn
            x, own_weights, cross_weights = layer(
                x, mask, turn, *more, cache=cache, weights=weights
            )
            states.append(x)
            own.append(own_weights)
            cross.append(cross_weights)
        states[-1] = x = self.norm(x)
        return (
            x,
            tuple(states) if hidden else None,
            tuple(own) if weights else None,
            tuple(cross) if weights else None,
        )


class EncdecEncoder(EncdecStack):
    def __init__(self, config):
        super().__init__(config, config.encoder_layers, cross=False)
        self.is_encoder, self.global_layers = True, set(config.encoder_global_layers)
        self.unrotated_layers = set(config.encoder_unrotated_layers)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        weights, hidden, named = self.asked(output_attentions, output_hidden_states, return_dict)
        x = self.embed(input_ids, inputs_embeds)
        allowed = self.padding(attention_mask, x, "attention_mask")
        if allowed is not None:
            allowed = allowed.expand(-1, -1, x.shape[1], -1)
        places = torch.arange(x.shape[1], device=x.device)
        local = None
        if self.config.attention_window:
            distances = places[:, None] - places
            near = self.near(allowed, distances, x.shape[0])
            local = near, self.rope(places[None], local=True)
        x, states, weights, _ = self.run(
            x, allowed, self.rope(places[None]), hidden, weights, local=local
        )
        out = BaseModelOutput(last_hidden_state=x, hidden_states=states, attentions=weights)
        return out if named else out.to_tuple()


class EncdecDecoder(EncdecStack):
    def __init__(self, config):
        super().__init__(config, config.decoder_layers, cross=True)
        self.is_encoder, self.global_layers = False, set(config.decoder_global_layers)
        self.unrotated_layers = set(config.decoder_unrotated_layers)

    def causal(self, attention_mask, x, places, length):
        """What each of the inputs [B, T] may read of ``length`` keys; None: everything."""
        if attention_mask is not None and attention_mask.ndim == 4:  # generate's, for static caches
            return attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        allowed = self.padding(attention_mask, x, "decoder_attention_mask")
        if x.shape[1] > 1 or length is not None:
            span = length if length is not None else int(places[-1]) + 1
            causal = (torch.arange(span, device=x.device) <= places[:, None])[None, None]
            if allowed is not None:
                missing = span - allowed.shape[-1]
                if missing and length is None:
                    raise ValueError(
                        f"decoder_attention_mask is {allowed.shape[-1]} long; expected {span}, "
                        "what is cached and what is new"
                    )
                allowed = nn.functional.pad(allowed, (0, missing), value=True)
            allowed = causal if allowed is None else allowed & causal
        return None if allowed is None else allowed.expand(x.shape[0], -1, x.shape[1], -1)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache=None,
    ):
        weights, hidden, named = self.asked(output_attentions, output_hidden_states, return_dict)
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states must be given: every layer reads them")
        x = self.embed(input_ids, inputs_embeds, "decoder_")
        cache = self.cache(past_key_values, cache, use_cache)
        past = 0 if cache is None else cache.self_attention_cache.get_seq_length()
        places = past + torch.arange(x.shape[1], device=x.device)
        allowed = self.causal(attention_mask, x, places, static_length(cache))
        local = None
        if self.config.attention_window:
            length = static_length(cache) or int(places[-1]) + 1
            distances = places[:, None] - torch.arange(length, device=x.device)
            near = self.near(allowed, distances, x.shape[0])
            local = near, self.rope(places[None], local=True)
        source_allowed = self.padding(encoder_attention_mask, x, "attention_mask")
        if source_allowed is not None:
            source_allowed = source_allowed.expand(-1, -1, x.shape[1], -1)
        if self.config.merged_attention:
            join = lambda mask: self.merged(source_allowed, mask, encoder_hidden_states, x, past)
            allowed = join(allowed)
            local = local and (join(local[0]), local[1])
        x, states, own, cross = self.run(
            x,
            allowed,
            self.rope(places[None]),
            hidden,
            weights,
            encoder_hidden_states,
            source_allowed,
            cache=cache,
            local=local,
        )
        out = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x,
            hidden_states=states,
            attentions=own,
            cross_attentions=cross,
            **{CACHE: cache},
        )
        return out if named else out.to_tuple()

    @staticmethod
    def merged(source_allowed, allowed, source, x, past):
        """One mask for the source's keys, then the target's; None: everything is read."""
        if allowed is None and source_allowed is None:
            return None
        shape = (x.shape[0], 1, x.shape[1])
        if source_allowed is None:
            source_allowed = x.new_ones((*shape, source.shape[1]), dtype=torch.bool)
        if allowed is None:  # one token, which reads all that is cached
            allowed = x.new_ones((*shape, past + 1), dtype=torch.bool)
        return torch.cat([source_allowed, allowed], -1)

    def cache(self, past_key_values, cache, use_cache):
        """The cache to fill: the one given under either name, a new one, or None."""
        if past_key_values is not None and cache is not None:
            raise ValueError(
                "past_key_values and cache are the same argument; give only one of them"
            )
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None:
            return EncoderDecoderCache(DynamicCache(), DynamicCache()) if use_cache else None
        if isinstance(cache, DynamicCache):
            cache = EncoderDecoderCache(cache, DynamicCache())
        if not isinstance(cache, EncoderDecoderCache):
            raise TypeError(
                f"past_key_values is a {type(cache).__name__}; expected an EncoderDecoderCache"
            )
        replayed = any(layer.gradient_checkpointing for layer in self.layers)
        if replayed and self.training and torch.is_grad_enabled():
            raise ValueError(
                "past_key_values cannot be used with gradient checkpointing, which runs each layer "
                "twice; leave one out"
            )
        return cache


def static_length(cache):
    """Keys that a cache of fixed size holds, filled or not; None where it grows."""
    if cache is None:
        return None
    kept = cache.self_attention_cache
    if not getattr(kept, "layers", ()):
        return None
    length = kept.get_max_length() if CACHE == "cache" else kept.get_max_cache_shape()
    if length is None or length < 0:
        return None
    if CACHE != "cache":
        raise ValueError(
            f"a {type(kept).__name__} needs a transformers whose outputs have 'cache' (5.24 has); "
            "leave cache_implementation out"
        )
    return length


class EncdecForConditionalGeneration(EncdecPreTrainedModel, GenerationMixin):
    accepts_loss_kwargs = True  # Trainer gives num_items_in_batch

    def __init__(self, config):
        tied = {}
        if config.tie_word_embeddings:
            tied["lm_head.weight"] = "decoder.embed_tokens.weight"
        if config.share_embeddings:
            tied["encoder.embed_tokens.weight"] = "decoder.embed_tokens.weight"
        keys = tied if TIES_BY_MAPPING else list(tied)
        self._tied_weights_keys = keys  # type: ignore[assignment]  # by version of transformers
        super().__init__(config)
        self.encoder, self.decoder = EncdecEncoder(config), EncdecDecoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def _tie_weights(self):
        """What transformers 4 calls, after it tied the head to the encoder's table."""
        if self.config.share_embeddings:
            self.encoder.embed_tokens.weight = self.decoder.embed_tokens.weight
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    def get_encoder(self, modality=None):
        return self.encoder

    def get_decoder(self):
        return self.decoder

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value
        if self.config.share_embeddings:
            self.decoder.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        resized = super()._resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        if not self.config.share_embeddings:
            old = self.decoder.embed_tokens
            new = self._get_resized_embeddings(
                old, resized.weight.shape[0], mean_resizing=mean_resizing
            )
            self.decoder.embed_tokens = new.requires_grad_(old.weight.requires_grad)
        return resized

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in OF_GENERATE}

    def prepare_decoder_input_ids_from_labels(self, labels):
        """The labels one place to the right, after the start token; ignored ones are padding."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError("the configuration has no decoder_start_token_id or no pad_token_id")
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
        return shifted.masked_fill(shifted == -100, pad)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache=None,
        num_items_in_batch=None,
    ):
        """The loss is the mean over labels that are not -100, or, given ``num_items_in_batch``,
        their sum divided by it."""
        asked = {"output_attentions": output_attentions, "return_dict": True}
        asked["output_hidden_states"] = output_hidden_states
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds=inputs_embeds, **asked
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            names = ("last_hidden_state", "hidden_states", "attentions")
            encoder_outputs = BaseModelOutput(**dict(zip(names, encoder_outputs, strict=False)))
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs.last_hidden_state,
            attention_mask,
            past_key_values,
            decoder_inputs_embeds,
            use_cache,
            cache=cache,
            **asked,
        )
        logits = self.lm_head(decoded.last_hidden_state).float()
        if cap := self.config.final_logit_cap:
            logits = cap * torch.tanh(logits / cap)
        out = Seq2SeqLMOutput(
            loss=None if labels is None else token_loss(logits, labels, num_items_in_batch),
            logits=logits,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **{CACHE: decoded[CACHE] if CACHE in decoded else None},
        )
        return out if self.asked(None, None, return_dict)[2] else out.to_tuple()


def token_loss(logits, labels, num_items_in_batch):
    """Cross-entropy in nats, a mean over the labels or a sum divided by a count of the caller's."""
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten().to(logits.device),
        ignore_index=-100,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch
