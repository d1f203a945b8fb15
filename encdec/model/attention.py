"""Segment-aware attention with grouped key-value heads, for packed rows and for cached decoding."""

from __future__ import annotations

import functools

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from encdec.model.config import ModelConfig
from encdec.model.kernels import (
    cudnn_attention,
    named_inputs,
    platform,
    resolve_kernel,
    splash_attention,
)
from encdec.model.layers import Projection, RMSNorm, product
from encdec.model.positions import Rotation, apply_rope

# Groups of query blocks that a causal attention by blocks compiles for: each stops at another key.
CAUSAL_SPANS = 8

# Keys and values, each [B, S, K, D]; kept for decoding by parts (``ModelConfig.kernel_parts``),
# they lie as one-row products read them without a copy: keys [B, K, D, S], values [B, K, S, D].
KeyValues = tuple[jax.Array, jax.Array]


def segment_mask(
    q_segments_BxT: jax.Array, kv_segments_BxS: jax.Array, *, causal: bool = False
) -> jax.Array:
    """True where a query may read a key: the same packed segment and, if causal, not later.

    Padding (segment 0) reads padding only, so no real token ever sees it and no row is empty
    in self-attention. Causality is by place in the row: segments lie in order.

    Returns:
        [B, T, S] bool.
    """
    mask_BxTxS = q_segments_BxT[:, :, None] == kv_segments_BxS[:, None, :]
    if causal:
        mask_BxTxS &= jnp.tri(q_segments_BxT.shape[1], kv_segments_BxS.shape[1], dtype=bool)
    return mask_BxTxS


def window_mask(q_places_BxT: jax.Array, kv_places_BxS: jax.Array, window: int) -> jax.Array:
    """True where a key lies fewer than ``window`` places before its query; [B, T, S] bool."""
    return q_places_BxT[..., :, None] - kv_places_BxS[..., None, :] < window


def dot_product_attention(
    config: ModelConfig,
    q_BxTxHxD: jax.Array,
    k_BxSxKxD: jax.Array,
    v_BxSxKxD: jax.Array,
    mask_BxTxS: jax.Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention in plain XLA; scores and softmax in float32. Returns [B, T, H, D].

    Queries have been multiplied by ``config.scores_scale``.

    Query head h reads kv head ``h // (H/K)`` when ``kv_pairing`` is "grouped" and ``h % K`` when
    it is "tiled": only the order in which the head axis splits differs, nothing is copied.
    """
    q_BxTxHxD, k_BxSxKxD, v_BxSxKxD = named_inputs(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD)
    batch, length, heads, dim = q_BxTxHxD.shape
    kv_heads, group = k_BxSxKxD.shape[2], heads // k_BxSxKxD.shape[2]
    # The head axis splits into (kv head, member of its group), or the other way round.
    split, pair = (
        ((kv_heads, group), "kg") if config.kv_pairing == "grouped" else ((group, kv_heads), "gk")
    )
    q = q_BxTxHxD.reshape(batch, length, *split, dim)
    scores = jnp.einsum(
        f"bt{pair}d,bskd->b{pair}ts", q, k_BxSxKxD, preferred_element_type=jnp.float32
    )
    if config.attention_logit_cap:
        scores = config.attention_logit_cap * jnp.tanh(scores / config.attention_logit_cap)
    # Finite, so that a query without any key (padding in cross-attention) yields no NaN.
    scores = jnp.where(mask_BxTxS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if dropout_key is not None:
        keep = 1.0 - config.attention_dropout
        kept = jax.random.bernoulli(dropout_key, keep, probabilities.shape)
        probabilities = jnp.where(kept, probabilities / keep, 0.0)
    out = jnp.einsum(
        f"b{pair}ts,bskd->bt{pair}d",
        probabilities.astype(v_BxSxKxD.dtype),
        v_BxSxKxD,
        preferred_element_type=jnp.float32 if config.float32_sums else None,
    )
    return out.astype(v_BxSxKxD.dtype).reshape(batch, length, heads, dim)


def heads_first(key_values: KeyValues) -> KeyValues:
    """Keys and values [B, S, K, D] as [B, K, D, S] and [B, K, S, D]."""
    k_BxSxKxD, v_BxSxKxD = key_values
    return k_BxSxKxD.transpose(0, 2, 3, 1), v_BxSxKxD.swapaxes(1, 2)


def heads_first_attention(
    config: ModelConfig,
    q_BxTxHxD: jax.Array,
    k_BxKxDxS: jax.Array,
    v_BxKxSxD: jax.Array,
    mask_BxTxS: jax.Array,
    causal: bool = False,
) -> jax.Array:
    """``dot_product_attention`` of keys and values from ``heads_first``; returns [B, T, H, D].

    Both products are batches over key heads, of the N = T * H / K queries that read each, with
    the operands as XLA's CPU compiler wants them: it copies neither keys nor values. More than
    ``config.attention_block`` queries go block after block: the scores of all of them, four bytes
    for each query, key and head, would be written to memory and read again at every step of the
    softmax. ``causal`` says that the mask hides every key that comes after its query's place:
    blocks then go in up to ``CAUSAL_SPANS`` spans, each of which multiplies with the keys up to
    its end alone, 9/16 of all at eight spans, where half is the least.
    """
    attend = functools.partial(_heads_first_block, config)
    (batch, length), limit = q_BxTxHxD.shape[:2], config.attention_block
    if not limit or length <= limit:
        return attend(q_BxTxHxD, k_BxKxDxS, v_BxKxSxD, mask_BxTxS)
    count = -(-length // limit)
    block = -(-length // count)  # blocks of one size, which leaves the least to fill up

    def blocks_first(x: jax.Array) -> jax.Array:
        """[B, T, ...] as [count, B, block, ...]; surplus queries are zeros that read nothing."""
        fill = ((0, 0), (0, count * block - length)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, fill).reshape(batch, count, block, *x.shape[2:]).swapaxes(0, 1)

    blocks = blocks_first(q_BxTxHxD), blocks_first(mask_BxTxS)
    spans = min(count, CAUSAL_SPANS) if causal else 1
    ends = [count * (i + 1) // spans for i in range(spans)]
    outs = []
    for first, last in zip([0, *ends], ends):
        # Not a slice by ``last * block`` when nothing is hidden: keys may be more than queries.
        seen = min(last * block, k_BxKxDxS.shape[-1]) if causal else k_BxKxDxS.shape[-1]
        k, v = k_BxKxDxS[..., :seen], v_BxKxSxD[:, :, :seen]
        outs.append(
            jax.lax.map(
                lambda part, k=k, v=v, seen=seen: attend(part[0], k, v, part[1][..., :seen]),
                tuple(x[first:last] for x in blocks),
            )
        )
    out = jnp.concatenate(outs)
    return out.swapaxes(0, 1).reshape(batch, count * block, *out.shape[3:])[:, :length]


def _heads_first_block(
    config: ModelConfig,
    q_BxTxHxD: jax.Array,
    k_BxKxDxS: jax.Array,
    v_BxKxSxD: jax.Array,
    mask_BxTxS: jax.Array,
    own: KeyValues | None = None,
) -> jax.Array:
    """``own``: keys and values [B, 1, K, D] of the one query (T = 1) itself, which it reads beside
    the others."""
    batch, length, heads, dim = q_BxTxHxD.shape
    kv_heads, group = k_BxKxDxS.shape[1], heads // k_BxKxDxS.shape[1]
    grouped = config.kv_pairing == "grouped"
    split, pair = ((kv_heads, group), "kg") if grouped else ((group, kv_heads), "gk")
    q = q_BxTxHxD.reshape(batch, length, *split, dim)
    q_BxKxNxD = jnp.einsum(f"bt{pair}d->bkgtd", q).reshape(batch, kv_heads, group * length, dim)
    capped = lambda scores: (
        scores
        if not config.attention_logit_cap
        else (config.attention_logit_cap * jnp.tanh(scores / config.attention_logit_cap))
    )
    scores = capped(
        jnp.einsum("bknd,bkds->bkns", q_BxKxNxD, k_BxKxDxS, preferred_element_type=jnp.float32)
    )
    scores = scores.reshape(batch, kv_heads, group, length, -1)
    scores = jnp.where(mask_BxTxS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    if own is not None:
        own_score_BxKxNx1 = capped(
            jnp.einsum("bknd,bukd->bknu", q_BxKxNxD, own[0], preferred_element_type=jnp.float32)
        )
        highest = jnp.maximum(highest, own_score_BxKxNx1[:, :, :, None])
    # Sums divide the D numbers of each output, not the S probabilities behind it.
    weights = jnp.exp(scores - highest)
    sums_BxKxNx1 = jnp.sum(weights, axis=-1).reshape(batch, kv_heads, group * length, 1)
    weights = weights.astype(v_BxKxSxD.dtype).reshape(batch, kv_heads, group * length, -1)
    out = jnp.einsum("bkns,bksd->bknd", weights, v_BxKxSxD, preferred_element_type=jnp.float32)
    if own is not None:
        own_weight_BxKxNx1 = jnp.exp(own_score_BxKxNx1 - highest[..., 0])
        sums_BxKxNx1 += own_weight_BxKxNx1
        out += own_weight_BxKxNx1 * own[1].swapaxes(1, 2).astype(jnp.float32)
    out = (out / sums_BxKxNx1).astype(v_BxKxSxD.dtype)
    out = jnp.einsum(f"bkgtd->bt{pair}d", out.reshape(batch, kv_heads, group, length, dim))
    return out.reshape(batch, length, heads, dim)


@flax.struct.dataclass
class AttentionInputs:
    """What one attention sublayer needs beside its input and its keys; the same in every layer.

    Attributes:
        mask_BxTxS: True where a query may read a key.
        q_rope: rotation of the queries, from ``rope_table``; None for no rotation.
        kv_rope: rotation of the keys; None for no rotation.
        slots_BxT: the cache slots that new keys and values are written to; None without a cache.
        segments: segment ids of queries [B, T] and of keys [B, S] where the mask is no more than
            ``segment_mask`` of them, which lets fused kernels do without it; else None.
        causal: whether the mask hides, whatever else it does, every key of a later place than the
            query's own.
    """

    mask_BxTxS: jax.Array
    q_rope: Rotation | None = None
    kv_rope: Rotation | None = None
    slots_BxT: jax.Array | None = None
    segments: tuple[jax.Array, jax.Array] | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)


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


class Attention(nn.Module):
    """Multi-head attention whose keys come from its own input, an encoder, or a cache.

    ``of_itself`` says that it never reads an encoder: by parts (``ModelConfig.kernel_parts``),
    queries, keys and values then come from one kernel.
    """

    config: ModelConfig
    of_itself: bool = False

    def setup(self) -> None:
        config = self.config
        into = "btm,mhd->bthd"
        q_shape = (config.d_model, config.num_heads, config.head_dim)
        kv_shape = (config.d_model, config.num_kv_heads, config.head_dim)
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        bias = 2 * int(config.qkv_bias)
        if config.kernel_parts and self.of_itself:
            width = config.attention_width + 2 * config.kv_width
            self.qkv = Projection(
                config, "btm,mf->btf", (config.d_model, width), ("embed", "heads"), bias // 2
            )
        else:
            self.q = Projection(config, into, q_shape, q_axes, bias)
            self.k = Projection(config, into, kv_shape, kv_axes, bias)
            self.v = Projection(config, into, kv_shape, kv_axes, bias)
        self.o = Projection(
            config,
            "bthd,hdm->btm",
            (q_shape[1], q_shape[2], q_shape[0]),
            ("heads", "head_dim", "embed"),
            int(config.attention_out_bias),
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(config, axis="head_dim")
            self.k_norm = RMSNorm(config, axis="head_dim")

    def key_values(self, x_BxSxM: jax.Array, rope: Rotation | None) -> KeyValues:
        """Keys (normed and rotated) and values of a sequence, as they are kept."""
        key_values = self._new_key_values(x_BxSxM, rope)
        return heads_first(key_values) if self.config.kernel_parts else key_values

    def _new_key_values(self, x_BxSxM: jax.Array, rope: Rotation | None) -> KeyValues:
        """The same, each [B, S, K, D]."""
        return self._key(self.k(x_BxSxM), rope), self.v(x_BxSxM)

    def _written(self, cache: KeyValues, new: KeyValues, slots_BxT: jax.Array) -> KeyValues:
        """The cache with new keys and values [B, T, K, D] in their slots."""
        rows_Bx1 = jnp.arange(slots_BxT.shape[0])[:, None]
        keys, values = (x.astype(old.dtype) for x, old in zip(new, cache))
        if self.config.kernel_parts:
            return (
                cache[0].at[rows_Bx1, :, :, slots_BxT].set(keys),
                cache[1].at[rows_Bx1, :, slots_BxT].set(values),
            )
        return (
            cache[0].at[rows_Bx1, slots_BxT].set(keys),
            cache[1].at[rows_Bx1, slots_BxT].set(values),
        )

    def _query(self, q: jax.Array, rope: Rotation | None) -> jax.Array:
        """Queries normed, rotated, and multiplied by the scale of the scores: with the rotation,
        where there is one, because a pass of its own costs a read and a write."""
        q = self.q_norm(q) if self.config.qk_norm else q
        scale = self.config.scores_scale
        if rope is None:
            return q * scale
        return apply_rope(q, rope, scale, by_product=platform() == "tpu")

    def _key(self, k: jax.Array, rope: Rotation | None) -> jax.Array:
        k = self.k_norm(k) if self.config.qk_norm else k
        return apply_rope(k, rope, by_product=platform() == "tpu")

    def _projected_together(self, x_BxTxM: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, D], keys and values [B, T, K, D] of one sequence by one product.

        The kernels lie side by side for each key head, so that key heads can be split over
        devices without moving anything.
        """
        group = self.config.num_heads // self.config.num_kv_heads
        weights = [part.weights() for part in (self.q, self.k, self.v)]
        query_kernel, query_bias = weights[0]
        kernel = jnp.concatenate(
            [self._by_key_head(query_kernel)] + [x[:, :, None] for x, _ in weights[1:]], axis=2
        )
        together = product("btm,mkgd->btkgd", x_BxTxM, kernel)
        if query_bias is not None:
            biases = [self._by_key_head(query_bias[None])[0]] + [x[:, None] for _, x in weights[1:]]
            together = together + jnp.concatenate(biases, axis=1)
        # Not by slices: their gradients would be padded and added up instead of joined.
        q, k, v = jax.lax.split(together, (group, 1, 1), axis=3)
        q = q if self.config.kv_pairing == "grouped" else q.swapaxes(2, 3)
        q = q.reshape(*q.shape[:2], self.config.num_heads, self.config.head_dim)
        return q, k[..., 0, :], v[..., 0, :]

    def _from_one_kernel(self, x_BxTxM: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The same of a kernel that holds queries, keys and values one after the other."""
        config = self.config
        cuts = (config.attention_width, config.attention_width + config.kv_width)
        parts = jnp.split(self.qkv(x_BxTxM), cuts, axis=-1)
        return tuple(x.reshape(*x.shape[:-1], -1, config.head_dim) for x in parts)

    def _by_key_head(self, x_XxHxD: jax.Array) -> jax.Array:
        """[X, H, D] to [X, K, H/K, D], every query head beside those that share its key head."""
        outer, _, dim = x_XxHxD.shape
        kv_heads = self.config.num_kv_heads
        if self.config.kv_pairing == "grouped":
            return x_XxHxD.reshape(outer, kv_heads, -1, dim)
        return x_XxHxD.reshape(outer, -1, kv_heads, dim).swapaxes(1, 2)

    def _step_by_parts(
        self, q_Bx1xHxD: jax.Array, new: KeyValues, cache: KeyValues, inputs: AttentionInputs
    ) -> tuple[jax.Array, KeyValues]:
        """One new token: it reads the cache as it was and itself, and is written afterwards.

        XLA's CPU compiler writes in place only what nobody reads later; the other way round it
        copied every layer's cache at every step. That the writing waits for the reading is said
        by adding zero times what was read.
        """
        k_Bx1xKxD, v_Bx1xKxD = (x.astype(old.dtype) for x, old in zip(new, cache))
        places_S = jnp.arange(inputs.mask_BxTxS.shape[-1])
        others_Bx1xS = inputs.mask_BxTxS & (places_S != inputs.slots_BxT[..., None])
        out = _heads_first_block(
            self.config, q_Bx1xHxD, *cache, others_Bx1xS, (k_Bx1xKxD, v_Bx1xKxD)
        )
        wait = 0 * out[:, :, :1, :1]
        cache = self._written(cache, (k_Bx1xKxD + wait, v_Bx1xKxD + wait), inputs.slots_BxT)
        return self.o(out), cache

    def __call__(
        self,
        x_BxTxM: jax.Array,
        inputs: AttentionInputs,
        *,
        key_values: KeyValues | None = None,
        cache: KeyValues | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Attends from ``x`` and returns the output [B, T, M] and the updated cache.

        Args:
            x_BxTxM: the queries' input.
            inputs: masks, rotations and cache slots.
            key_values: keys and values made before (cross-attention); otherwise made from ``x``.
            cache: keys and values so far, with S the capacity; the new ones are written to
                ``inputs.slots_BxT`` and the mask spans the whole capacity.
            deterministic: False applies dropout (needs a "dropout" rng).
        """
        new = None
        if self.config.kernel_parts and self.of_itself:
            q, k, v = self._from_one_kernel(x_BxTxM)
            new = self._key(k, inputs.kv_rope), v
        elif key_values is None and self.config.fuse_projections:
            q, k, v = self._projected_together(x_BxTxM)
            new = self._key(k, inputs.kv_rope), v
        else:
            q = self.q(x_BxTxM)
            if key_values is None:
                new = self._new_key_values(x_BxTxM, inputs.kv_rope)
        q = self._query(q, inputs.q_rope)
        if cache is not None and self.config.kernel_parts and q.shape[1] == 1:
            return self._step_by_parts(q, new, cache, inputs)
        if cache is not None:
            cache = key_values = self._written(cache, new, inputs.slots_BxT)
        elif new is not None:
            key_values = heads_first(new) if self.config.kernel_parts else new
        k, v = key_values
        key = None
        if self.config.attention_dropout and not deterministic:
            key = self.make_rng("dropout")
        kernel = resolve_kernel(
            self.config,
            segments=inputs.segments is not None and cache is None,
            dropout=key is not None,
        )
        if self.config.kernel_parts:
            out = heads_first_attention(self.config, q, k, v, inputs.mask_BxTxS, inputs.causal)
        elif kernel == "splash":
            out = splash_attention(self.config, q, k, v, inputs.segments, inputs.causal)
        elif kernel == "cudnn":
            out = cudnn_attention(self.config, q, k, v, inputs.mask_BxTxS)
        elif 0 < self.config.attention_block < q.shape[1] and key is None:
            out = heads_first_attention(
                self.config, q, *heads_first((k, v)), inputs.mask_BxTxS, inputs.causal
            )
        else:
            out = dot_product_attention(self.config, q, k, v, inputs.mask_BxTxS, key)
        out = nn.with_logical_constraint(out, ("batch", "length", "heads", "head_dim"))
        return self.o(out), cache
