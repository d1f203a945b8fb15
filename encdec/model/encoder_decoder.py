"""The encoder-decoder: a bidirectional encoder read by a causal decoder through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from encdec.model.attention import (
    AttentionInputs,
    merged_inputs,
    packed_attention,
    packed_self_attention,
)
from encdec.model.cache import CachePlaces, cached_self_attention
from encdec.model.layers import Embedder
from encdec.model.model_config import ModelConfig
from encdec.model.positions import Rotation, encoder_rope_positions, rope_table
from encdec.model.stacks import LayerInputs, Stack

Batch = Mapping[str, jax.Array]


class Source(flax.struct.PyTreeNode):
    """An encoded source, ready to be decoded from again and again.

    Attributes:
        cross_kv: every layer's cross-attention keys and values (see ``Stack``).
        mask_BxS: True where the source has a token.
    """

    cross_kv: Any
    mask_BxS: jax.Array


class EncoderDecoder(nn.Module):
    """Maps a packed batch of record fields to target logits; see ``encdec.data.records``."""

    config: ModelConfig
    embedder_type = Embedder
    decoder_type: ClassVar[type[Stack]] = Stack

    def setup(self) -> None:
        config = self.config
        self.embedder = self.embedder_type(config)
        if not config.share_embeddings:
            self.encoder_embedder = Embedder(config, with_head=False)
        self.encoder = self.make_encoder()
        self.decoder = self.decoder_type(config, config.decoder_layers, cross_attention=True)

    def make_encoder(self) -> Stack:
        return Stack(self.config, self.config.encoder_layers, stack="encoder")

    def __call__(self, batch: Batch, deterministic: bool = True) -> jax.Array:
        """Logits [B, T, V] float32 of the next target token at every decoder position."""
        return self.logits(self.hidden(batch, deterministic))

    def logits(self, hidden: jax.Array, start: int = 0, stop: int | None = None) -> jax.Array:
        """Vocabulary head: activations [..., M] to float32 logits [..., V], or a part of them."""
        return self.embedder.logits(hidden, start, stop)

    def encode(
        self,
        tokens_BxS: jax.Array,
        segments_BxS: jax.Array,
        positions_BxS: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """The encoder's normed output [B, S, M]."""
        places = encoder_rope_positions(self.config, positions_BxS, segments_BxS)
        attention, local = packed_self_attention(
            self.config, segments_BxS, positions_BxS, causal=False, places_BxT=places
        )
        inputs = LayerInputs(attention, local_attention=local, deterministic=deterministic)
        return self.encoder(self.embed_source(tokens_BxS), inputs)[0]

    def embed_source(self, tokens_BxS: jax.Array) -> jax.Array:
        """The encoder's input embeddings [B, S, M]."""
        embed = self.embedder if self.config.share_embeddings else self.encoder_embedder
        return embed(tokens_BxS)

    def hidden(self, batch: Batch, deterministic: bool = True) -> jax.Array:
        """The decoder's normed output [B, T, M] under teacher forcing, on packed rows."""
        source_segments, source_positions = batch["encoder_segment_ids"], batch["encoder_positions"]
        target_segments, positions = batch["decoder_segment_ids"], batch["decoder_positions"]
        encoded_BxSxM = self.encode(
            batch["encoder_input_tokens"], source_segments, source_positions, deterministic
        )
        cross = packed_attention(target_segments, source_segments, None, None)
        # The length of the source that each target token belongs to.
        source_lengths_BxT = jnp.sum(cross.mask_BxTxS, axis=-1, dtype=jnp.int32)
        source_rope = self._source_rope(source_positions)
        cross = self._cross_attention(
            cross.mask_BxTxS, positions, source_lengths_BxT, source_rope
        ).replace(segments=cross.segments)
        attention, local = packed_self_attention(
            self.config,
            target_segments,
            positions,
            causal=True,
            places_BxT=positions + self._own_offset(source_lengths_BxT),
        )
        if self.config.merged_attention:
            attention = merged_inputs(attention, cross, source_rope)
            if local is not None:
                local_rope = self._source_rope(source_positions, local=True)
                local = merged_inputs(local, cross, local_rope)
        inputs = LayerInputs(attention, cross, encoded_BxSxM, local, deterministic=deterministic)
        return self.decoder(self.embedder(batch["decoder_input_tokens"]), inputs)[0]

    def source(
        self, tokens_BxS: jax.Array, segments_BxS: jax.Array, positions_BxS: jax.Array
    ) -> Source:
        """Encodes one unpacked source per row (segment 1, padding 0) and keys it for decoding."""
        encoded_BxSxM = self.encode(tokens_BxS, segments_BxS, positions_BxS)
        mask_BxS = segments_BxS > 0
        rope = self._source_rope(positions_BxS)
        local_rope = self._source_rope(positions_BxS, local=True)
        cross_kv = self.decoder.cross_key_values(encoded_BxSxM, rope, local_rope)
        return Source(cross_kv, mask_BxS)

    def decode_cached(
        self,
        tokens_BxN: jax.Array,
        positions_BxN: jax.Array,
        cache: Any,
        source: Source,
        from_start: bool = False,
        places: CachePlaces | None = None,
    ) -> tuple[jax.Array, Any]:
        """The next N tokens of every row: normed output [B, N, M] and the updated cache.

        A token's position is also its cache slot, without ``places``. A row may be padded on the
        right by tokens whose positions are overwritten later: nothing reads a slot beyond its own
        position. ``from_start`` says that the positions are 0 to N - 1, which can save work.
        """
        batch, length = tokens_BxN.shape
        cross_mask = jnp.broadcast_to(
            source.mask_BxS[:, None], (batch, length, source.mask_BxS.shape[1])
        )
        source_lengths = jnp.sum(source.mask_BxS, axis=-1, dtype=jnp.int32)[:, None]
        cross = self._cross_attention(cross_mask, positions_BxN, source_lengths)
        attention, local = cached_self_attention(
            self.config,
            cache,
            positions_BxN,
            from_start=from_start,
            places=places,
            offset=self._own_offset(source_lengths),
        )
        if self.config.merged_attention:
            attention = merged_inputs(attention, cross)
            local = merged_inputs(local, cross) if local is not None else None
        inputs = LayerInputs(attention, cross, local_attention=local)
        return self.decoder(self.embedder(tokens_BxN), inputs, source.cross_kv, cache)

    def _cross_attention(
        self,
        mask_BxTxS: jax.Array,
        positions_BxT: jax.Array,
        source_lengths_BxT: jax.Array,
        kv_rope: Rotation | None = None,
    ) -> AttentionInputs:
        """Cross-attention's mask and rotations; ``kv_rope`` where keys are made, too.

        Targets count from zero or continue where their source ends. Merged with self-attention,
        queries are rotated once, as those of self-attention.
        """
        style, q_rope = self.config.cross_attention_rope, None
        if style != "none" and not self.config.merged_attention:
            offset = source_lengths_BxT if style == "continued" else 0
            q_rope = rope_table(self.config, positions_BxT + offset)
        return AttentionInputs(mask_BxTxS, q_rope, kv_rope)

    def _own_offset(self, source_lengths_BxT: jax.Array) -> jax.Array | int:
        """How many positions targets are moved on in self-attention: merged with cross-attention,
        its queries serve both."""
        config = self.config
        continued = config.merged_attention and config.cross_attention_rope == "continued"
        return source_lengths_BxT if continued else 0

    def _source_rope(self, positions_BxS: jax.Array, local: bool = False) -> Rotation | None:
        """The rotation of cross-attention's keys, or of those that local layers read in merged
        attention: sources count from zero whatever the encoder's own choice."""
        if self.config.cross_attention_rope == "none":
            return None
        return rope_table(self.config, positions_BxS, local and self.config.merged_attention)
