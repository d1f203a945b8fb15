"""Models laid out for inference on CPUs: the same functions, computed as XLA's CPU compiler does
them fastest.

``build_model`` takes these modules when ``ExecutionConfig`` asks for them, which
``encdec.inference.ready`` does. There are three layouts:

* In blocks (``attention_block``): parameters as trained; many queries attend block after block,
  keys and values are kept heads first, and an encoder may compute in another dtype than the
  decoder (``encoder_dtype``).
* In panels (``cpu_panels``), in addition: every decoder kernel is kept as
  ``encdec.model.cpu_products`` reads it fastest for a few rows; one kernel makes the queries, keys
  and values of self-attention. ``panels_for_cpu`` converts parameters.
* In shards (``cpu_shards``), the same for large decoder-only models, which read their inputs by
  these kernels, too; a separate head is kept as [V, M]. ``shards_for_cpu`` converts parameters.

All are for inference: there is no dropout on attention probabilities.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from encdec.errors import ConfigError
from encdec.model.attention import Attention, AttentionInputs, KeyValues, joined
from encdec.model.coverage import refuse_unknown
from encdec.model.cpu_attention import attend_block, attention_in_blocks, heads_first
from encdec.model.cpu_products import (
    PANEL,
    panelled_kernel,
    panelled_shape,
    product_by_panels,
    product_by_shards,
    rows_of_panels,
    sharded_kernel,
    sharded_shape,
)
from encdec.model.decoder_only import DecoderOnly
from encdec.model.encoder_decoder import EncoderDecoder
from encdec.model.layers import Embedder, Mlp, Projection
from encdec.model.model_config import ModelConfig
from encdec.model.positions import Rotation
from encdec.model.stacks import Block, Stack


class CpuProjection(Projection):
    """May add up products of bfloat16 numbers in float32 (``accumulate_in_float32``)."""

    def multiplied(self, x: jax.Array) -> jax.Array:
        if not self.config.execution.accumulate_in_float32:
            return super().multiplied(x)
        kernel = self.kernel.astype(x.dtype)
        y = jnp.einsum(self.equation, x, kernel, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)


class LaidOutProjection(CpuProjection):
    """The same product with a ``panelled_kernel`` or a ``sharded_kernel``."""

    def make_kernel(self) -> jax.Array:
        width, config = math.prod(self.shape[: self._summed()]), self.config
        out = math.prod(self.shape) // width
        if config.execution.cpu_panels:
            shape = panelled_shape(out, width)
        else:
            shape = sharded_shape(out, width, config.execution.cpu_shards)
        init = nn.initializers.normal(config.init_std)
        return self.param("kernel", init, shape, jnp.dtype(config.param_dtype))

    def multiplied(self, x: jax.Array) -> jax.Array:
        summed = self._summed()
        into = self.shape[summed:]
        x = x.reshape(*x.shape[: x.ndim - summed], -1)
        by_panels = self.config.execution.cpu_panels
        multiply = product_by_panels if by_panels else product_by_shards
        y = multiply(x, self.kernel.astype(x.dtype), math.prod(into))
        return y.reshape(*y.shape[:-1], *into)

    def _summed(self) -> int:
        """How many dimensions the product sums over; the kernel begins with them."""
        operands, result = self.equation.split("->")
        return len(set(operands.split(",")[1]) - set(result))


class CpuAttention(Attention):
    """Attention whose keys and values are kept heads first; many queries attend in blocks."""

    projection_type = CpuProjection

    def attend(
        self,
        q_BxTxHxD: jax.Array,
        key_values: KeyValues,
        inputs: AttentionInputs,
        dropout_key: jax.Array | None = None,
        prefix: KeyValues | None = None,
    ) -> jax.Array:
        before, (k, v) = 0, key_values
        if prefix is not None:
            before = prefix[0].shape[-1]
            k, v = joined([prefix[0], k], axis=-1), joined([prefix[1], v], axis=2)
        return attention_in_blocks(
            self.config, q_BxTxHxD, k, v, inputs.mask_BxTxS, inputs.causal, before
        )

    def key_values(self, x_BxSxM: jax.Array, rope: Rotation | None) -> KeyValues:
        """Keys [B, K, D, S] (normed and rotated) and values [B, K, S, D] of a sequence."""
        return heads_first(super().key_values(x_BxSxM, rope))

    def written(self, cache: KeyValues, new: KeyValues, slots_BxT: jax.Array) -> KeyValues:
        """The cache with new keys and values [B, T, K, D] in their slots."""
        rows_Bx1 = jnp.arange(slots_BxT.shape[0])[:, None]
        keys, values = (x.astype(old.dtype) for x, old in zip(new, cache))
        return (
            cache[0].at[rows_Bx1, :, :, slots_BxT].set(keys),
            cache[1].at[rows_Bx1, :, slots_BxT].set(values),
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
        if not deterministic and self.config.attention_dropout:
            raise ConfigError(
                f"ModelConfig.attention_dropout is {self.config.attention_dropout} in a model laid "
                "out for inference on CPUs, which has no dropout on attention probabilities; "
                "expected attention_block=0, or attention_dropout=0.0"
            )
        if key_values is not None:
            q = self._query(self.q(x_BxTxM), inputs.q_rope)
            return self.o(self.attend(q, key_values, inputs, prefix=prefix)), cache
        q, k, v = self.projected(x_BxTxM)
        q, new = self._query(q, inputs.q_rope), (self._key(k, inputs.kv_rope), v)
        if cache is not None and (q.shape[1] == 1 or not inputs.causal):
            return self._step(q, new, cache, inputs, prefix)
        if cache is None:
            key_values = heads_first(new)
        else:
            assert inputs.slots_BxT is not None  # a cache comes with slots
            cache = key_values = self.written(cache, new, inputs.slots_BxT)
        return self.o(self.attend(q, key_values, inputs, prefix=prefix)), cache

    def _step(
        self,
        q_BxTxHxD: jax.Array,
        new: KeyValues,
        cache: KeyValues,
        inputs: AttentionInputs,
        prefix: KeyValues | None,
    ) -> tuple[jax.Array, KeyValues]:
        """New tokens, in order, in slots one after the other: they read the cache as it was and
        each other, and are written afterwards.

        XLA's CPU compiler writes in place only what is not read later; in the other order it
        copied every layer's cache at every step. Adding ``0 * out`` creates the data dependency
        that makes the write wait for the read.
        """
        assert inputs.slots_BxT is not None  # a cache comes with slots
        slots_BxT, mask_BxTxS = inputs.slots_BxT, inputs.mask_BxTxS
        k_BxTxKxD, v_BxTxKxD = (x.astype(old.dtype) for x, old in zip(new, cache))
        own = k_BxTxKxD, v_BxTxKxD
        parts = [cache] if prefix is None else [prefix, cache]
        places_BxT = slots_BxT + (0 if prefix is None else prefix[0].shape[-1])
        before_BxTxS = mask_BxTxS & (jnp.arange(mask_BxTxS.shape[-1]) < places_BxT[:, :1, None])
        own_mask_BxTxT = None
        if q_BxTxHxD.shape[1] > 1:
            earlier_BxTxT = slots_BxT[:, None] <= slots_BxT[..., None]
            inside_BxTxT = jnp.take_along_axis(mask_BxTxS, places_BxT[:, None], 2, mode="clip")
            own_mask_BxTxT = earlier_BxTxT & inside_BxTxT
        out = attend_block(self.config, q_BxTxHxD, parts, before_BxTxS, own, own_mask_BxTxT)
        wait = 0 * out[:, :, :1, :1]
        cache = self.written(cache, (k_BxTxKxD + wait, v_BxTxKxD + wait), slots_BxT)
        return self.o(out), cache


class LaidOutAttention(CpuAttention):
    projection_type = LaidOutProjection


class LaidOutSelfAttention(LaidOutAttention):
    """Queries, keys and values come from one kernel, which holds them one after the other."""

    def make_projections(self) -> None:
        config = self.config
        width = config.attention_width + 2 * config.kv_width
        self.qkv = LaidOutProjection(
            config, "btm,mf->btf", (config.d_model, width), ("embed", "heads"), int(config.qkv_bias)
        )

    def projected(self, x_BxTxM: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        config = self.config
        cuts = (config.attention_width, config.attention_width + config.kv_width)
        parts = jnp.split(self.qkv(x_BxTxM), cuts, axis=-1)
        q, k, v = (x.reshape(*x.shape[:-1], -1, config.head_dim) for x in parts)
        return q, k, v

    def key_values(self, x_BxSxM: jax.Array, rope: Rotation | None) -> KeyValues:
        """Keys [B, K, D, S] (normed and rotated) and values [B, K, S, D] of a source: the product
        with their part of the kernel alone."""
        config, kernel = self.config, self.qkv.kernel
        start, width = config.attention_width, config.attention_width + 2 * config.kv_width
        # Only an encoder-decoder has a source.
        rows_OxI = rows_of_panels(kernel)[start:width].astype(x_BxSxM.dtype)
        both = jnp.einsum("...i,oi->...o", x_BxSxM, rows_OxI)
        if config.qkv_bias:
            both = both + self.qkv.bias[start:].astype(both.dtype)
        k, v = (x.reshape(*x.shape[:-1], -1, config.head_dim) for x in jnp.split(both, 2, axis=-1))
        return heads_first((self._key(k, rope), v))


class CpuMlp(Mlp):
    """May compute the activation in float32 (``accumulate_in_float32``): XLA rounds each operation
    on bfloat16 numbers to bfloat16, which takes a CPU three times as long (processor time)."""

    projection_type = CpuProjection

    def activate(self, x: jax.Array) -> jax.Array:
        if not self.config.execution.accumulate_in_float32:
            return super().activate(x)
        return super().activate(x.astype(jnp.float32)).astype(x.dtype)


class LaidOutMlp(Mlp):
    projection_type = LaidOutProjection


class CpuBlock(Block):
    self_attention_type = CpuAttention
    cross_attention_type = CpuAttention
    mlp_type = CpuMlp


class LaidOutBlock(Block):
    self_attention_type = LaidOutSelfAttention
    cross_attention_type = LaidOutAttention
    mlp_type = LaidOutMlp


class CpuStack(Stack):
    block_type = CpuBlock


class LaidOutStack(Stack):
    block_type = LaidOutBlock


class LaidOutEmbedder(Embedder):
    """The head is kept in panels, or as [V, M] and multiplied by shards. A tied head in panels is
    the table, too."""

    def table(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> jax.Array:
        if name != self._in_panels():
            return super().table(name, shape, axes)
        config, init = self.config, nn.initializers.normal(self.config.init_std)
        return self.param(name, init, panelled_shape(*shape), jnp.dtype(config.param_dtype))

    def _in_panels(self) -> str:
        """The parameter that is, if any."""
        if not self.config.execution.cpu_panels:
            return ""
        return "embedding" if self.config.tie_embeddings else "head"

    def rows(self, tokens_BxT: jax.Array) -> jax.Array:
        if self._in_panels() != "embedding":
            return super().rows(tokens_BxT)
        return self.embedding[tokens_BxT // PANEL, :, tokens_BxT % PANEL]

    def make_head(self) -> jax.Array:
        shape = (self.config.vocab_size, self.config.d_model)
        return self.table("head", shape, ("vocab", "embed"))

    def uncapped_logits(self, hidden: jax.Array, start: int, stop: int | None) -> jax.Array:
        table = self.embedding if self.config.tie_embeddings else self.head
        if self._in_panels():
            table, out = table.astype(hidden.dtype), self.config.vocab_size
            return product_by_panels(hidden, table, out, jnp.float32)[..., start:stop]
        table, shards = table[start:stop].astype(hidden.dtype), self.config.execution.cpu_shards
        # A single row reads the table at full speed without shards, because of its size.
        if math.prod(hidden.shape[:-1]) > 1 and len(table) % shards == 0:
            table_PxRxM = table.reshape(shards, -1, table.shape[1])
            return product_by_shards(hidden, table_PxRxM, len(table), jnp.float32)
        return jnp.einsum("...m,vm->...v", hidden, table, preferred_element_type=jnp.float32)


class CpuEncoderDecoder(EncoderDecoder):
    """Its encoder may compute in another dtype, of whose products the sums are float32."""

    decoder_type: ClassVar[type[Stack]] = CpuStack

    def make_encoder(self) -> Stack:
        config, dtype = self.config, self.config.execution.encoder_dtype
        if dtype:
            config = config.replace(dtype=dtype, accumulate_in_float32=True)
        return CpuStack(config, config.encoder_layers, stack="encoder")

    def embed_source(self, tokens_BxS: jax.Array) -> jax.Array:
        dtype = self.config.execution.encoder_dtype or self.config.dtype
        return super().embed_source(tokens_BxS).astype(dtype)

    def encode(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The encoder's normed output [B, S, M] in the decoder's dtype."""
        return super().encode(*args, **kwargs).astype(self.config.dtype)


class LaidOutEncoderDecoder(CpuEncoderDecoder):
    embedder_type = LaidOutEmbedder
    decoder_type = LaidOutStack


class CpuDecoderOnly(DecoderOnly):
    decoder_type: ClassVar[type[Stack]] = CpuStack


class LaidOutDecoderOnly(DecoderOnly):
    embedder_type = LaidOutEmbedder
    decoder_type = LaidOutStack


def cpu_model(config: ModelConfig) -> EncoderDecoder | DecoderOnly:
    """The module of ``config`` in the layout that its ``execution`` names."""
    refuse_unknown(
        config, "cpu", "the CPU layout (ExecutionConfig.attention_block, cpu_panels, cpu_shards)"
    )
    if config.is_encoder_decoder and config.execution.cpu_shards:
        raise ConfigError(
            f"ExecutionConfig.cpu_shards is {config.execution.cpu_shards} in an encoder-decoder; "
            "expected 0: its kernels are laid out in panels (cpu_panels)"
        )
    kinds: tuple[type[EncoderDecoder], type[DecoderOnly]]
    if config.execution.laid_out:
        kinds = LaidOutEncoderDecoder, LaidOutDecoderOnly
    else:
        kinds = CpuEncoderDecoder, CpuDecoderOnly
    return kinds[0 if config.is_encoder_decoder else 1](config)


def panels_for_cpu(
    config: ModelConfig, params: dict[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """An unrolled model with its decoder's kernels and its head in panels.

    Args:
        config: the model, with ``scan_layers`` False.
        params: its parameters, as trained.
    """
    config, embedder = config.replace(cpu_panels=True), _embedder(config, params)
    head = "embedding" if config.tie_embeddings else "head"
    embedder[head] = panelled_kernel(embedder[head])
    decoder = _with_kernels(panelled_kernel, params["decoder"])
    return config, params | {"embedder": embedder, "decoder": decoder}


def shards_for_cpu(
    config: ModelConfig, params: dict[str, Any], shards: int
) -> tuple[ModelConfig, dict[str, Any]]:
    """The same in shards, for a decoder-only model; as many as cores read in parallel."""
    lay_out = functools.partial(sharded_kernel, shards=shards)
    laid_out = {
        "embedder": _embedder(config, params),
        "decoder": _with_kernels(lay_out, params["decoder"]),
    }
    return config.replace(cpu_shards=shards), params | laid_out


def _embedder(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Its parameters, a separate head as [V, M]."""
    embedder = dict(params["embedder"])
    if not config.tie_embeddings:
        embedder["head"] = embedder["head"].T
    return embedder


def _with_kernels(
    lay_out: Callable[[jax.Array], jax.Array], params: dict[str, Any]
) -> dict[str, Any]:
    """A subtree with every ``kernel`` [out, in] laid out so, those of self-attention's queries,
    keys and values concatenated."""
    result = {}
    for name, value in params.items():
        if name == "self_attention":
            flat = [
                {k: x.reshape(-1, x.shape[-2] * x.shape[-1]) for k, x in value[part].items()}
                for part in "qkv"
            ]
            joined = {k: jnp.concatenate([one[k] for one in flat], axis=1) for k in flat[0]}
            if "bias" in joined:
                joined["bias"] = joined["bias"][0]
            value = {k: v for k, v in value.items() if k not in ("q", "k", "v")}
            value["qkv"] = joined
        if isinstance(value, dict):
            result[name] = _with_kernels(lay_out, value)
            if "kernel" in value:
                kernel = value["kernel"]
                # Only attention's output sums over two dimensions, heads and head width.
                width = kernel.shape[0] if name != "o" else kernel.shape[0] * kernel.shape[1]
                result[name]["kernel"] = lay_out(kernel.reshape(width, -1).T)
        else:
            result[name] = value
    return result
