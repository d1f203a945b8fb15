"""Transformer blocks and the stacks made of them: scanned or unrolled, with or without remat."""

from __future__ import annotations

import functools
from typing import Any

import flax
import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from encdec.model.attention import Attention, AttentionInputs, KeyValues
from encdec.model.kernels import ATTENTION_INPUTS, CONTEXT, platform
from encdec.model.layers import MLP_HIDDEN, NORM_FACTOR, Mlp, RMSNorm
from encdec.model.model_config import ModelConfig, StackName
from encdec.model.positions import Rotation

UNROLLED = 12  # layers of a stack
RESIDUAL = "residual"  # the running activations between a layer's sublayers
_saved = jax.checkpoint_policies.save_only_these_names
REMAT_POLICIES = {
    # Keeps what every matrix product and attention kernel gave, recomputes what is cheap.
    "dots": _saved(NORM_FACTOR, ATTENTION_INPUTS, CONTEXT, RESIDUAL, MLP_HIDDEN),
    # The MLP's hidden activations are most of that, and take one product to recompute.
    "attention": _saved(NORM_FACTOR, ATTENTION_INPUTS, CONTEXT, RESIDUAL),
    # Norms keep one number per token.
    "full": _saved(NORM_FACTOR),
}


class LayerInputs(flax.struct.PyTreeNode):
    """What every layer of a stack reads in addition to the running activations.

    Attributes:
        self_attention: mask and rotations of self-attention; merged with cross-attention, its mask
            is that of the source and then its own.
        cross_attention: the same of cross-attention; None in stacks without it, and without use
            where it is merged.
        encoded_BxSxM: the encoder's output, read by cross-attention when its keys and values
            have not been made beforehand.
        local_attention: ``self_attention`` of layers that read a window only; None if there are
            none.
        deterministic: False applies dropout.
    """

    self_attention: AttentionInputs
    cross_attention: AttentionInputs | None = None
    encoded_BxSxM: jax.Array | None = None
    local_attention: AttentionInputs | None = None
    deterministic: bool = flax.struct.field(pytree_node=False, default=True)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention if asked for, MLP.

    With ``merged_attention``, the two attentions are one sublayer, with the parameters of
    self-attention. With ``post_norms``, each sublayer's output is normed too before it joins the
    residual; with ``omit_pre_norms``, that alone.
    """

    config: ModelConfig
    cross_attention: bool = False
    self_attention_type = Attention
    cross_attention_type = Attention
    mlp_type = Mlp

    def setup(self) -> None:
        config = self.config
        norm = (lambda: _unchanged) if config.omit_pre_norms else functools.partial(RMSNorm, config)
        self.self_attention_norm = norm()
        self.self_attention = self.self_attention_type(config)
        self.crosses_apart = self.cross_attention and not config.merged_attention
        if self.crosses_apart:
            self.cross_attention_norm = norm()
            self.encoder_attention = self.cross_attention_type(config)
        self.mlp_norm = norm()
        self.mlp = self.mlp_type(config)
        if config.post_norms:
            self.self_attention_post_norm = RMSNorm(config)
            if self.crosses_apart:
                self.cross_attention_post_norm = RMSNorm(config)
            self.mlp_post_norm = RMSNorm(config)
        self.residual_dropout = nn.Dropout(config.residual_dropout)
        self.mlp_dropout = nn.Dropout(config.mlp_dropout)

    def __call__(
        self,
        x_BxTxM: jax.Array,
        inputs: LayerInputs,
        cross_kv: KeyValues | None,
        cache: KeyValues | None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """One layer: activations in, activations and the updated self-attention cache out."""
        post_norms, deterministic = self.config.post_norms, inputs.deterministic
        if self.cross_attention and cross_kv is None:
            cross, encoded_BxSxM = inputs.cross_attention, inputs.encoded_BxSxM
            # A stack with cross-attention is given its inputs, and keys and values or their input.
            assert cross is not None and encoded_BxSxM is not None
            rope = cross.kv_rope if self.crosses_apart else inputs.self_attention.source_rope
            cross_kv = self.cross_key_values(None, encoded_BxSxM, rope)[1]
        y, cache = self.self_attention(
            self.self_attention_norm(x_BxTxM),
            inputs.self_attention,
            cache=cache,
            prefix=None if self.crosses_apart else cross_kv,
            deterministic=deterministic,
        )
        y = self.self_attention_post_norm(y) if post_norms else y
        x_BxTxM = x_BxTxM + self.residual_dropout(y, deterministic=deterministic)
        x_BxTxM = checkpoint_name(x_BxTxM, RESIDUAL)
        if self.crosses_apart:
            assert inputs.cross_attention is not None
            y, _ = self.encoder_attention(
                self.cross_attention_norm(x_BxTxM),
                inputs.cross_attention,
                key_values=cross_kv,
                deterministic=deterministic,
            )
            y = self.cross_attention_post_norm(y) if post_norms else y
            x_BxTxM = x_BxTxM + self.residual_dropout(y, deterministic=deterministic)
            x_BxTxM = checkpoint_name(x_BxTxM, RESIDUAL)
        y = self.mlp(self.mlp_norm(x_BxTxM))
        y = self.mlp_post_norm(y) if post_norms else y
        x_BxTxM = x_BxTxM + self.mlp_dropout(y, deterministic=deterministic)
        x_BxTxM = nn.with_logical_constraint(x_BxTxM, ("batch", "length", "embed_act"))
        return x_BxTxM, cache

    def cross_key_values(
        self, carry: None, encoded_BxSxM: jax.Array, rope: Rotation | None
    ) -> tuple[None, KeyValues]:
        """Cross-attention's keys and values; the encoder's output is read as it is, un-normed."""
        reader = self.encoder_attention if self.crosses_apart else self.self_attention
        return carry, reader.key_values(encoded_BxSxM, rope)


def _unchanged(x: jax.Array) -> jax.Array:
    """In place of a norm that a model does not have."""
    return x


class Stack(nn.Module):
    """``num_layers`` blocks and a final norm.

    Scanned, parameters are under ``layers`` with a leading layer axis, and so do caches; unrolled,
    under ``layers_0``, ``layers_1``, ..., and caches are tuples with one entry per layer.
    """

    config: ModelConfig
    num_layers: int
    cross_attention: bool = False
    stack: StackName = "decoder"
    block_type = Block

    def setup(self) -> None:
        config, block, how = self.config, self.block_type, self.config.execution
        if how.remat != "none":
            # CSE cannot undo remat across the iterations of a loop, so its barrier is left out.
            looped = how.scan_layers and unrolled(self.num_layers) == 1
            block = nn.remat(block, policy=REMAT_POLICIES[how.remat], prevent_cse=not looped)
        if how.scan_layers:
            lifted = {
                "variable_axes": {"params": 0},
                "split_rngs": {"params": True, "dropout": True},
                "length": self.num_layers,
                "metadata_params": {nn.PARTITION_NAME: "layers"},
                "unroll": unrolled(self.num_layers),
            }
            methods = {"__call__": lifted | {"in_axes": (nn.broadcast, 0, 0)}}
            if self.cross_attention:
                methods["cross_key_values"] = lifted | {"in_axes": (nn.broadcast, nn.broadcast)}
            self.layers: Any = nn.scan(block, methods=methods)(config, self.cross_attention)
        else:
            self.layers = [block(config, self.cross_attention) for _ in range(self.num_layers)]
        self.final_norm = RMSNorm(config)
        self.embedding_dropout = nn.Dropout(config.residual_dropout)

    def __call__(
        self, x_BxTxM: jax.Array, inputs: LayerInputs, cross_kv: Any = None, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        """Runs all layers; returns the normed activations [B, T, M] and the updated cache."""
        x_BxTxM = self.embedding_dropout(x_BxTxM, deterministic=inputs.deterministic)
        if self.config.execution.scan_layers:
            x_BxTxM, cache = self.layers(x_BxTxM, inputs, cross_kv, cache)
        else:
            nothing = (None,) * self.num_layers
            caches = []
            local = inputs.replace(self_attention=inputs.local_attention)
            for index, (layer, layer_kv, layer_cache) in enumerate(
                zip(self.layers, cross_kv or nothing, cache or nothing, strict=True)
            ):
                layer_inputs = local if self.config.is_local(index, self.stack) else inputs
                if not self.config.is_rotated(index, self.stack):
                    layer_inputs = layer_inputs.replace(
                        self_attention=layer_inputs.self_attention.unrotated()
                    )
                x_BxTxM, layer_cache = layer(x_BxTxM, layer_inputs, layer_kv, layer_cache)
                caches.append(layer_cache)
            cache = tuple(caches) if cache is not None else None
        return self.final_norm(x_BxTxM), cache

    def cross_key_values(
        self, encoded_BxSxM: jax.Array, rope: Rotation | None, local_rope: Rotation | None
    ) -> Any:
        """Every layer's cross-attention keys and values, made once per source.

        ``local_rope`` is the rotation of what local layers read in merged attention.
        """
        if self.config.execution.scan_layers:
            return self.layers.cross_key_values(None, encoded_BxSxM, rope)[1]
        merged, config = self.config.merged_attention, self.config
        ropes = (
            None
            if merged and not config.is_rotated(layer)
            else local_rope
            if config.is_local(layer)
            else rope
            for layer in range(self.num_layers)
        )
        return tuple(
            layer.cross_key_values(None, encoded_BxSxM, layer_rope)[1]
            for layer, layer_rope in zip(self.layers, ropes, strict=True)
        )


def unrolled(layers: int) -> int:
    """How many of a scan's layers are compiled one after the other.

    All of them on a CPU, up to UNROLLED: its compiler neither writes a loop's gradients in place
    nor lays out its slices as products read them. More would compile for minutes.
    """
    return layers if layers <= UNROLLED and platform() == "cpu" else 1
