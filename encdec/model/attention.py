"""Segment-aware attention with grouped key-value heads, for packed rows and for cached decoding."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from encdec.model.kernels import (
    cudnn_attention,
    named_inputs,
    platform,
    resolve_kernel,
    splash_attention,
)
from encdec.model.layers import Projection, RMSNorm, plus, product
from encdec.model.model_config import ModelConfig
from encdec.model.positions import Rotation, apply_rope, rope_table

# Keys and values, each [B, S, K, D] (``cpu_layout`` orders the axes otherwise).
KeyValues = tuple[jax.Array, jax.Array]


def segment_mask(
    q_segments_BxT: jax.Array, kv_segments_BxS: jax.Array, *, causal: bool = False
) -> jax.Array:
    """True where a query may read a key: the same packed segment and, if causal, not later.

    Padding (segment 0) reads padding only, so no real token ever sees it and no row is empty
    in self-attention. Causality is by place in the row: segments are in order.

    Returns:
        [B, T, S] bool.
    """
    mask_BxTxS = q_segments_BxT[:, :, None] == kv_segments_BxS[:, None, :]
    if causal:
        mask_BxTxS &= jnp.tri(q_segments_BxT.shape[1], kv_segments_BxS.shape[1], dtype=bool)
    return mask_BxTxS


def window_mask(q_places_BxT: jax.Array, kv_places_BxS: jax.Array, window: int) -> jax.Array:
    """True where a key is fewer than ``window`` places before its query; [B, T, S] bool."""
    return q_places_BxT[..., :, None] - kv_places_BxS[..., None, :] < window


def dot_product_attention(
    config: ModelConfig,
    q_BxTxHxD: jax.Array,
    k_BxSxKxD: jax.Array,
    v_BxSxKxD: jax.Array,
    mask_BxTxS: jax.Array,
    dropout_key: jax.Array | None = None,
    prefix: KeyValues | None = None,
) -> jax.Array:
    """Softmax attention in plain XLA; logits and softmax in float32. Returns [B, T, H, D].

    Queries have been multiplied by ``config.attention_logit_scale``. One softmax spans ``prefix``
    [B, P, K, D], where there is one, and the other keys; the mask's last axis is P + S then. Logits
    are concatenated, which are small while decoding; keys and values are not.

    Query head h reads kv head ``h // (H/K)`` when ``kv_pairing`` is "grouped" and ``h % K`` when
    it is "tiled": only the order in which the head axis is split differs; nothing is copied.
    """
    q_BxTxHxD, *flat = named_inputs(q_BxTxHxD, *(prefix or ()), k_BxSxKxD, v_BxSxKxD)
    parts = list(zip(flat[::2], flat[1::2], strict=True))
    batch, length, heads, dim = q_BxTxHxD.shape
    kv_heads, group = k_BxSxKxD.shape[2], heads // k_BxSxKxD.shape[2]
    # The head axis splits into (kv head, member of its group), or the other way round.
    split, pair = (
        ((kv_heads, group), "kg") if config.kv_pairing == "grouped" else ((group, kv_heads), "gk")
    )
    q = q_BxTxHxD.reshape(batch, length, *split, dim)
    logits = joined(
        [
            jnp.einsum(f"bt{pair}d,bskd->b{pair}ts", q, k, preferred_element_type=jnp.float32)
            for k, _ in parts
        ]
    )
    if config.attention_logit_cap:
        logits = config.attention_logit_cap * jnp.tanh(logits / config.attention_logit_cap)
    # Finite, so that a query without any key (padding in cross-attention) yields no NaN.
    logits = jnp.where(mask_BxTxS[:, None, None], logits, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(logits, axis=-1)
    if dropout_key is not None:
        keep = 1.0 - config.attention_dropout
        kept = jax.random.bernoulli(dropout_key, keep, probabilities.shape)
        probabilities = jnp.where(kept, probabilities / keep, 0.0)
    probabilities = probabilities.astype(v_BxSxKxD.dtype)
    sums = f"b{pair}ts,bskd->bt{pair}d"
    if len(parts) == 1:
        out = jnp.einsum(sums, probabilities, v_BxSxKxD)
    else:
        add = functools.partial(jnp.einsum, sums, preferred_element_type=jnp.float32)
        before, own = jnp.split(probabilities, [parts[0][0].shape[1]], axis=-1)
        out = (add(before, parts[0][1]) + add(own, v_BxSxKxD)).astype(v_BxSxKxD.dtype)
    return out.reshape(batch, length, heads, dim)


def joined(parts: Sequence[jax.Array], axis: int = -1) -> jax.Array:
    """The concatenation of one part or several; one alone is not copied."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)


def after_prefix(prefix: KeyValues | None, key_values: KeyValues) -> KeyValues:
    """Keys and values of both, one after the other along the axis of tokens."""
    if prefix is None:
        return key_values
    k, v = (jnp.concatenate(pair, axis=1) for pair in zip(prefix, key_values, strict=True))
    return k, v


class AttentionInputs(flax.struct.PyTreeNode):
    """What one attention sublayer needs in addition to its input and keys; the same in every layer.

    Attributes:
        mask_BxTxS: True where a query may read a key.
        q_rope: rotation of the queries, from ``rope_table``; None for no rotation.
        kv_rope: rotation of the keys; None for no rotation.
        slots_BxT: the cache slots that new keys and values are written to; None without a cache.
        segments: segment ids of queries [B, T] and of keys [B, S] where the mask is no more than
            ``segment_mask`` of them, which lets fused kernels do without it; else None.
        causal: whether the mask hides, whatever else it does, every key of a later place than the
            query's own.
        source_rope: rotation of a source's keys that are read before its own; None for none.

    Where attention reads a source before its own sequence (``ModelConfig.merged_attention``), mask
    and segment ids of keys are those of the source, then its own; ``causal`` concerns its own.
    """

    mask_BxTxS: jax.Array
    q_rope: Rotation | None = None
    kv_rope: Rotation | None = None
    slots_BxT: jax.Array | None = None
    segments: tuple[jax.Array, jax.Array] | None = None
    source_rope: Rotation | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def unrotated(self) -> AttentionInputs:
        """The same without any rotation."""
        return self.replace(q_rope=None, kv_rope=None, source_rope=None)


def packed_attention(
    q_segments_BxT: jax.Array,
    kv_segments_BxS: jax.Array,
    q_rope: Rotation | None,
    kv_rope: Rotation | None,
    *,
    causal: bool = False,
) -> AttentionInputs:
    """The inputs of attention among packed segments."""
    return AttentionInputs(
        segment_mask(q_segments_BxT, kv_segments_BxS, causal=causal),
        q_rope,
        kv_rope,
        segments=(q_segments_BxT, kv_segments_BxS),
        causal=causal,
    )


def packed_self_attention(
    config: ModelConfig,
    segments_BxT: jax.Array,
    positions_BxT: jax.Array,
    *,
    causal: bool,
    places_BxT: jax.Array | None = None,
) -> tuple[AttentionInputs, AttentionInputs | None]:
    """The inputs of self-attention on packed rows, in layers that read all and in local ones.

    Args:
        config: the model.
        segments_BxT: segment ids.
        positions_BxT: places within the segments, from 0.
        causal: no query reads a later key; otherwise windows are an encoder's: they reach as far
            ahead as back, as T5Gemma has them (arXiv 2504.06225), or as ``encoder_window`` says.
        places_BxT: what rotates queries and keys; by default the positions.

    Returns:
        The second is None in a model without an attention window.
    """
    places = positions_BxT if places_BxT is None else places_BxT
    rope = rope_table(config, places)
    attention = packed_attention(segments_BxT, segments_BxT, rope, rope, causal=causal)
    if not config.attention_window:
        return attention, None
    back, ahead = config.attention_window, config.attention_window
    if not causal and config.encoder_window:
        back, ahead = (reach + 1 for reach in config.encoder_window)
    near_BxTxT = window_mask(positions_BxT, positions_BxT, back)
    if not causal:
        near_BxTxT &= window_mask(positions_BxT, positions_BxT, ahead).swapaxes(-1, -2)
    rope = rope_table(config, places, local=True)
    return attention, AttentionInputs(attention.mask_BxTxS & near_BxTxT, rope, rope)


def merged_inputs(
    own: AttentionInputs, cross: AttentionInputs, source_rope: Rotation | None = None
) -> AttentionInputs:
    """The inputs of attention that reads a source (``cross``) before its own sequence;
    ``source_rope`` rotates the source's keys where they are made, too."""
    segments = None
    if own.segments is not None and cross.segments is not None:
        segments = own.segments[0], joined([cross.segments[1], own.segments[1]])
    mask = joined([cross.mask_BxTxS, own.mask_BxTxS])
    return own.replace(mask_BxTxS=mask, segments=segments, source_rope=source_rope)


class Attention(nn.Module):
    """Multi-head attention whose keys come from its own input, an encoder, or a cache."""

    config: ModelConfig
    projection_type = Projection

    def setup(self) -> None:
        config = self.config
        self.make_projections()
        self.o = self.projection_type(
            config,
            "bthd,hdm->btm",
            (config.num_heads, config.head_dim, config.d_model),
            ("heads", "head_dim", "embed"),
            int(config.attention_out_bias),
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(config, axis="head_dim")
            self.k_norm = RMSNorm(config, axis="head_dim")

    def normed(self, norm: RMSNorm, x_BxTxHxD: jax.Array) -> jax.Array:
        """Queries or keys, each head normed by itself or all of a token's together."""
        if not self.config.qk_norm_over_heads:
            return norm(x_BxTxHxD)
        return norm(x_BxTxHxD.reshape(*x_BxTxHxD.shape[:2], -1)).reshape(x_BxTxHxD.shape)

    def make_projections(self) -> None:
        """Sets up the projections to queries, keys and values."""
        config, bias_dims = self.config, 2 * int(self.config.qkv_bias)

        def into(heads: int, axis: str) -> Projection:
            shape, axes = (config.d_model, heads, config.head_dim), ("embed", axis, "head_dim")
            return self.projection_type(config, "btm,mhd->bthd", shape, axes, bias_dims)

        self.q = into(config.num_heads, "heads")
        self.k = into(config.num_kv_heads, "kv_heads")
        self.v = into(config.num_kv_heads, "kv_heads")

    def key_values(self, x_BxSxM: jax.Array, rope: Rotation | None) -> KeyValues:
        """Keys (normed and rotated) and values of a sequence."""
        return self._key(self.k(x_BxSxM), rope), self.v(x_BxSxM)

    def projected(self, x_BxTxM: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, D], keys and values [B, T, K, D] of one sequence."""
        if self.config.execution.fuse_projections:
            return self._projected_together(x_BxTxM)
        return self.q(x_BxTxM), self.k(x_BxTxM), self.v(x_BxTxM)

    def _query(self, q: jax.Array, rope: Rotation | None) -> jax.Array:
        """Queries normed, rotated, and multiplied by the scale of the logits.

        The scale is applied within the rotation where there is one: a separate pass would cost
        another read and write.
        """
        q = self.normed(self.q_norm, q) if self.config.qk_norm else q
        scale = self.config.attention_logit_scale
        if rope is None:
            return q * scale
        return apply_rope(q, rope, scale, by_product=platform() == "tpu")

    def _key(self, k: jax.Array, rope: Rotation | None) -> jax.Array:
        k = self.normed(self.k_norm, k) if self.config.qk_norm else k
        return apply_rope(k, rope, by_product=platform() == "tpu")

    def _projected_together(self, x_BxTxM: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``projected`` by one product.

        The kernels are concatenated per key head, so that key heads can be sharded over devices
        without moving anything.
        """
        group = self.config.num_heads // self.config.num_kv_heads
        weights = [part.weights() for part in (self.q, self.k, self.v)]
        query_kernel, *kernels = [kernel for kernel, _ in weights]
        biases = [bias for _, bias in weights if bias is not None]  # of all three or of none
        kernel = jnp.concatenate(
            [self._by_key_head(query_kernel)] + [x[:, :, None] for x in kernels], axis=2
        )
        together = product("btm,mkgd->btkgd", x_BxTxM, kernel)
        if biases:
            by_head = [self._by_key_head(biases[0][None])[0]] + [x[:, None] for x in biases[1:]]
            together = plus(together, jnp.concatenate(by_head, axis=1))
        # Not by slices: their gradients would be padded and added up instead of concatenated.
        q, k, v = jax.lax.split(together, (group, 1, 1), axis=3)
        q = q if self.config.kv_pairing == "grouped" else q.swapaxes(2, 3)
        q = q.reshape(*q.shape[:2], self.config.num_heads, self.config.head_dim)
        return q, k[..., 0, :], v[..., 0, :]

    def _by_key_head(self, x_XxHxD: jax.Array) -> jax.Array:
        """[X, H, D] to [X, K, H/K, D]: every query head with those that share its key head."""
        outer, _, dim = x_XxHxD.shape
        kv_heads = self.config.num_kv_heads
        if self.config.kv_pairing == "grouped":
            return x_XxHxD.reshape(outer, kv_heads, -1, dim)
        return x_XxHxD.reshape(outer, -1, kv_heads, dim).swapaxes(1, 2)

    def written(self, cache: KeyValues, new: KeyValues, slots_BxT: jax.Array) -> KeyValues:
        """The cache with the keys and values of new tokens in their slots."""
        rows_Bx1 = jnp.arange(slots_BxT.shape[0])[:, None]
        write = lambda old, x: old.at[rows_Bx1, slots_BxT].set(x.astype(old.dtype))
        return write(cache[0], new[0]), write(cache[1], new[1])

    def attend(
        self,
        q_BxTxHxD: jax.Array,
        key_values: KeyValues,
        inputs: AttentionInputs,
        dropout_key: jax.Array | None = None,
        prefix: KeyValues | None = None,
    ) -> jax.Array:
        """Softmax attention [B, T, H, D] by the implementation that ``resolve_kernel`` names.

        ``prefix`` is read before ``key_values``, by the same softmax.
        """
        config, (k, v) = self.config, key_values
        kernel = resolve_kernel(
            config, segments=inputs.segments is not None, dropout=dropout_key is not None
        )
        if kernel == "splash":
            assert inputs.segments is not None  # or resolve_kernel would have refused it
            before = prefix[0].shape[1] if prefix is not None else 0
            k, v = after_prefix(prefix, key_values)
            return splash_attention(config, q_BxTxHxD, k, v, inputs.segments, inputs.causal, before)
        if kernel == "cudnn":
            k, v = after_prefix(prefix, key_values)
            return cudnn_attention(config, q_BxTxHxD, k, v, inputs.mask_BxTxS)
        return dot_product_attention(
            config, q_BxTxHxD, k, v, inputs.mask_BxTxS, dropout_key, prefix
        )

    def __call__(
        self,
        x_BxTxM: jax.Array,
        inputs: AttentionInputs,
        *,
        key_values: KeyValues | None = None,
        cache: KeyValues | None = None,
        prefix: KeyValues | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Attends from ``x`` and returns the output [B, T, M] and the updated cache.

        Args:
            x_BxTxM: the queries' input.
            inputs: masks, rotations and cache slots.
            key_values: keys and values made before (cross-attention); otherwise made from ``x``.
            cache: keys and values so far, with S the capacity; the new ones are written to
                ``inputs.slots_BxT`` and the mask spans the whole capacity.
            prefix: a source's keys and values, read before the others by the same softmax.
            deterministic: False applies dropout (needs a "dropout" rng).
        """
        if key_values is None:
            q, k, v = self.projected(x_BxTxM)
            key_values = self._key(k, inputs.kv_rope), v
        else:
            q = self.q(x_BxTxM)
        q = self._query(q, inputs.q_rope)
        if cache is not None:
            assert inputs.slots_BxT is not None  # a cache comes with slots
            cache = key_values = self.written(cache, key_values, inputs.slots_BxT)
        dropout = self.config.attention_dropout and not deterministic
        dropout_key = self.make_rng("dropout") if dropout else None
        out = self.attend(q, key_values, inputs, dropout_key, prefix)
        out = nn.with_logical_constraint(out, ("batch", "length", "heads", "head_dim"))
        return self.o(out), cache
