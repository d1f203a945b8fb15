"""Attention with the operands and the order of work that XLA's CPU compiler computes fastest."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from encdec.model.attention import KeyValues, joined
from encdec.model.model_config import ModelConfig

# Groups of query blocks that causal attention compiles for, each with another number of keys.
CAUSAL_SPANS = 8


def heads_first(key_values: KeyValues) -> KeyValues:
    """Keys and values [B, S, K, D] as [B, K, D, S] and [B, K, S, D]."""
    k_BxSxKxD, v_BxSxKxD = key_values
    return k_BxSxKxD.transpose(0, 2, 3, 1), v_BxSxKxD.swapaxes(1, 2)


def attention_in_blocks(
    config: ModelConfig,
    q_BxTxHxD: jax.Array,
    k_BxKxDxS: jax.Array,
    v_BxKxSxD: jax.Array,
    mask_BxTxS: jax.Array,
    causal: bool = False,
    prefix: int = 0,
) -> jax.Array:
    """``dot_product_attention`` of keys and values from ``heads_first``; returns [B, T, H, D].

    Queries are multiplied by ``config.attention_logit_scale`` already. Both products are batched
    over key heads, each with the N = T * H / K queries that read it, and take their operands in the
    order of axes that XLA's CPU compiler needs: it copies neither keys nor values.

    More than ``attention_block`` queries are processed in blocks: the logits of all of them, four
    bytes for each query, key and head, would be written to memory and read again at every step of
    the softmax. ``causal`` says that the mask hides every key that comes after its query's place:
    blocks are then grouped into up to ``CAUSAL_SPANS`` spans, and each span only multiplies keys
    up to its own end: with eight spans that is 9/16 of the full work (1/2 is the minimum). The
    first ``prefix`` keys are of a source, which no query comes before.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        return attend_block(config, q, [(k, v)], mask)

    (batch, length), limit = q_BxTxHxD.shape[:2], config.execution.attention_block
    if not limit or length <= limit:
        return attend(q_BxTxHxD, k_BxKxDxS, v_BxKxSxD, mask_BxTxS)
    count = -(-length // limit)
    block = -(-length // count)  # blocks of equal size need the least padding

    def blocks_first(x: jax.Array) -> jax.Array:
        """[B, T, ...] as [count, B, block, ...]; padding queries are zeros that read nothing."""
        fill = ((0, 0), (0, count * block - length)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, fill).reshape(batch, count, block, *x.shape[2:]).swapaxes(0, 1)

    blocks = blocks_first(q_BxTxHxD), blocks_first(mask_BxTxS)
    spans = min(count, CAUSAL_SPANS) if causal else 1
    ends = [count * (i + 1) // spans for i in range(spans)]
    outs = []
    for first, last in zip([0, *ends], ends):
        # Not a slice by ``last * block`` when nothing is hidden: keys may be more than queries.
        seen = k_BxKxDxS.shape[-1]
        seen = min(prefix + last * block, seen) if causal else seen
        k, v = k_BxKxDxS[..., :seen], v_BxKxSxD[:, :, :seen]
        outs.append(
            jax.lax.map(
                lambda part, k=k, v=v, seen=seen: attend(part[0], k, v, part[1][..., :seen]),
                tuple(x[first:last] for x in blocks),
            )
        )
    out = jnp.concatenate(outs)
    return out.swapaxes(0, 1).reshape(batch, count * block, *out.shape[3:])[:, :length]


def attend_block(
    config: ModelConfig,
    q_BxTxHxD: jax.Array,
    parts: Sequence[KeyValues],
    mask_BxTxS: jax.Array,
    own: KeyValues | None = None,
    own_mask_BxTxT: jax.Array | None = None,
) -> jax.Array:
    """Attention of one block.

    ``parts`` are keys [B, K, D, S_i] and values [B, K, S_i, D], read one after the other under one
    mask: their logits are concatenated, they are not. ``own`` holds the keys and values
    [B, T, K, D] of the queries themselves, which they read in addition to the others, each as its
    mask says.
    """
    batch, length, heads, dim = q_BxTxHxD.shape
    kv_heads = parts[0][0].shape[1]
    group, value_dtype = heads // kv_heads, parts[0][1].dtype
    grouped = config.kv_pairing == "grouped"
    split, pair = ((kv_heads, group), "kg") if grouped else ((group, kv_heads), "gk")
    q = q_BxTxHxD.reshape(batch, length, *split, dim)
    q_BxKxNxD = jnp.einsum(f"bt{pair}d->bkgtd", q).reshape(batch, kv_heads, group * length, dim)
    cap = config.attention_logit_cap
    capped = lambda logits: cap * jnp.tanh(logits / cap) if cap else logits
    logits_of = lambda k: jnp.einsum(
        "bknd,bkds->bkns", q_BxKxNxD, k, preferred_element_type=jnp.float32
    )
    logits = capped(joined([logits_of(k) for k, _ in parts]))
    logits = logits.reshape(batch, kv_heads, group, length, -1)
    logits = jnp.where(mask_BxTxS[:, None, None], logits, jnp.finfo(jnp.float32).min)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    if own is not None:
        own_logits = capped(
            jnp.einsum("bknd,bukd->bknu", q_BxKxNxD, own[0], preferred_element_type=jnp.float32)
        ).reshape(batch, kv_heads, group, length, length)
        if own_mask_BxTxT is not None:
            hidden = jnp.finfo(jnp.float32).min
            own_logits = jnp.where(own_mask_BxTxT[:, None, None], own_logits, hidden)
        highest = jnp.maximum(highest, jnp.max(own_logits, axis=-1, keepdims=True))
    # Divide the D numbers of each output by the sum, rather than the S probabilities.
    weights = jnp.exp(logits - highest)
    sums_BxKxNx1 = jnp.sum(weights, axis=-1).reshape(batch, kv_heads, group * length, 1)
    weights = weights.astype(value_dtype).reshape(batch, kv_heads, group * length, -1)
    out, start = jnp.float32(0), 0
    for _, v in parts:
        part = weights if len(parts) == 1 else weights[..., start : start + v.shape[2]]
        summed = jnp.einsum("bkns,bksd->bknd", part, v, preferred_element_type=jnp.float32)
        out, start = (out + summed if start else summed), start + v.shape[2]
    if own is not None:
        own_weights = jnp.exp(own_logits - highest).reshape(batch, kv_heads, -1, length)
        sums_BxKxNx1 += jnp.sum(own_weights, axis=-1, keepdims=True)
        out += jnp.einsum("bknu,bukd->bknd", own_weights, own[1].astype(jnp.float32))
    out = (out / sums_BxKxNx1).astype(value_dtype)
    out = jnp.einsum(f"bkgtd->bt{pair}d", out.reshape(batch, kv_heads, group, length, dim))
    return out.reshape(batch, length, heads, dim)
