"""The decoder-only peer, made of the same blocks: one causal stack over [inputs; targets]."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import linen as nn

from encdec.model.attention import packed_self_attention
from encdec.model.cache import CachePlaces, cached_self_attention
from encdec.model.encoder_decoder import Batch
from encdec.model.layers import Embedder
from encdec.model.model_config import ModelConfig
from encdec.model.stacks import LayerInputs, Stack


class DecoderOnly(nn.Module):
    """Maps a packed batch of the five ``decoder_*`` record fields to next-token logits."""

    config: ModelConfig
    embedder_type = Embedder
    decoder_type: ClassVar[type[Stack]] = Stack

    def setup(self) -> None:
        self.embedder = self.embedder_type(self.config)
        self.decoder = self.decoder_type(self.config, self.config.decoder_layers)

    def __call__(self, batch: Batch, deterministic: bool = True) -> jax.Array:
        """Logits [B, T, V] float32 of the next token at every position."""
        return self.logits(self.hidden(batch, deterministic))

    def logits(self, hidden: jax.Array, start: int = 0, stop: int | None = None) -> jax.Array:
        """Vocabulary head: activations [..., M] to float32 logits [..., V], or a part of them."""
        return self.embedder.logits(hidden, start, stop)

    def hidden(self, batch: Batch, deterministic: bool = True) -> jax.Array:
        """The stack's normed output [B, T, M] under teacher forcing, on packed rows."""
        config = self.config
        positions, segments = batch["decoder_positions"], batch["decoder_segment_ids"]
        attention, local = packed_self_attention(config, segments, positions, causal=True)
        inputs = LayerInputs(attention, local_attention=local, deterministic=deterministic)
        return self.decoder(self.embedder(batch["decoder_input_tokens"]), inputs)[0]

    def decode_cached(
        self,
        tokens_BxN: jax.Array,
        positions_BxN: jax.Array,
        cache: Any,
        source: None = None,
        from_start: bool = False,
        places: CachePlaces | None = None,
    ) -> tuple[jax.Array, Any]:
        """The next N tokens of every row, prompt or answer: see EncoderDecoder.decode_cached."""
        attention, local = cached_self_attention(
            self.config, cache, positions_BxN, from_start=from_start, places=places
        )
        inputs = LayerInputs(attention, local_attention=local)
        return self.decoder(self.embedder(tokens_BxN), inputs, None, cache)
