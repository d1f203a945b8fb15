"""Building blocks with parameters: projections, RMSNorm, MLP, token embedding.

Every parameter carries logical axis names, from which the training side derives its sharding:
``vocab``, ``embed``, ``heads``, ``kv_heads``, ``head_dim``, ``mlp`` (and ``layers`` where stacked).
Parameters are stored in ``config.param_dtype`` and cast to ``config.dtype`` where they are used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from encdec.model.model_config import ModelConfig

# Checkpoint names for values that are expensive to recompute, or cheap to keep.
NORM_FACTOR, MLP_HIDDEN = "norm_factor", "mlp_hidden"

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "silu": nn.silu,
}


def product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``einsum(equation, x, kernel)`` in the dtype of ``x``.

    The kernel's gradient leaves the product in the kernel's own dtype, never rounded to a smaller
    one in between; so it depends on the dtype of what the model is run with in which gradients
    are summed over devices.
    """
    if kernel.dtype == x.dtype:
        return jnp.einsum(equation, x, kernel)
    return _mixed_product(equation, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed_product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, kernel.astype(x.dtype))


def _mixed_forward(equation: str, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return _mixed_product(equation, x, kernel), (x, kernel)


def _mixed_backward(equation: str, saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    operands, result = equation.split("->")
    left, right = operands.split(",")
    return (
        jnp.einsum(f"{result},{right}->{left}", gradient, kernel.astype(x.dtype)),
        jnp.einsum(f"{left},{result}->{right}", x, gradient, preferred_element_type=kernel.dtype),
    )


_mixed_product.defvjp(_mixed_forward, _mixed_backward)


@jax.custom_vjp
def rows_of(table_VxM: jax.Array, tokens: jax.Array) -> jax.Array:
    """``table[tokens]``, whose gradient is added up in float32 whatever the table's dtype: the
    commonest tokens occur thousands of times in a batch."""
    return jnp.take(table_VxM, tokens, axis=0)


def _rows_forward(table_VxM: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any]:
    return rows_of(table_VxM, tokens), (table_VxM, tokens)


def _rows_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, None]:
    table_VxM, tokens = saved
    sums = jnp.zeros(table_VxM.shape, jnp.float32)
    return sums.at[tokens].add(gradient.astype(jnp.float32)).astype(table_VxM.dtype), None


rows_of.defvjp(_rows_forward, _rows_backward)


@jax.custom_vjp
def plus(x: jax.Array, bias: jax.Array) -> jax.Array:
    """``x + bias`` in the dtype of ``x``; gradients of the bias, of every token, are added up in
    float32, as in ``times`` those of the scale: sums of thousands would stop growing."""
    return x + bias.astype(x.dtype)


def _plus_backward(bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, _summed(gradient, bias)


plus.defvjp(lambda x, bias: (plus(x, bias), bias), _plus_backward)


@jax.custom_vjp
def times(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x * scale`` in the dtype of ``x``."""
    return x * scale.astype(x.dtype)


def _times_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale = saved
    return gradient * scale.astype(x.dtype), _summed(gradient.astype(jnp.float32) * x, scale)


times.defvjp(lambda x, scale: (times(x, scale), (x, scale)), _times_backward)


def _summed(x: jax.Array, like: jax.Array) -> jax.Array:
    """The sum over all along which ``like`` was broadcast, with its shape and dtype."""
    before = x.ndim - like.ndim
    axes = [i for i, n in enumerate(x.shape) if i < before or like.shape[i - before] != n]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.sum(x, axes, dtype=wide).reshape(like.shape).astype(like.dtype)


def with_axes(init: nn.initializers.Initializer, axes: tuple[str, ...]) -> Callable[..., Any]:
    """``init`` with logical axis names; modules see the array itself, not the named box."""
    return nn.with_logical_partitioning(init, axes)


class Projection(nn.Module):
    """``einsum(equation, x, kernel) + bias``; the equation's second operand is the kernel."""

    config: ModelConfig
    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias_dims: int = 0  # the bias spans the kernel's last ``bias_dims`` dimensions; 0 for none

    def setup(self) -> None:
        self.kernel = self.make_kernel()
        if self.bias_dims:
            axes, shape = self.axes[-self.bias_dims :], self.shape[-self.bias_dims :]
            init = with_axes(nn.initializers.zeros_init(), axes)
            self.bias = self.param("bias", init, shape, jnp.dtype(self.config.param_dtype))

    def make_kernel(self) -> jax.Array:
        init = with_axes(nn.initializers.normal(self.config.init_std), self.axes)
        return self.param("kernel", init, self.shape, jnp.dtype(self.config.param_dtype))

    def weights(self) -> tuple[jax.Array, jax.Array | None]:
        """Kernel, for ``product``, and bias (None without), for ``plus``."""
        return self.kernel, self.bias if self.bias_dims else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.multiplied(x)
        return plus(y, self.bias) if self.bias_dims else y

    def multiplied(self, x: jax.Array) -> jax.Array:
        """The product without the bias."""
        return product(self.equation, x, self.kernel)


class RMSNorm(nn.Module):
    """Root-mean-square normalization of the last axis (arXiv 1910.07467), in float32.

    ``norm_cast`` says whether the result returns to the compute dtype before or after it is
    scaled; ``norm_plus_one`` scales by ``1 + w`` with ``w`` starting at 0.
    """

    config: ModelConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        initializers = nn.initializers
        start = initializers.zeros_init() if config.norm_plus_one else initializers.ones_init()
        scale = self.param(
            "scale", with_axes(start, (self.axis,)), (x.shape[-1],), jnp.dtype(config.param_dtype)
        )
        if config.norm_plus_one:
            scale = scale.astype(jnp.float32) + 1
        x32 = x.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
        normed = x32 * checkpoint_name(factor, NORM_FACTOR)
        if config.norm_cast == "before_scale":
            return times(normed.astype(dtype), scale)
        return (normed * scale.astype(jnp.float32)).astype(dtype)


class Mlp(nn.Module):
    """Position-wise MLP, plain or gated: ``down(act(gate(x)) * up(x))``."""

    config: ModelConfig
    projection_type = Projection

    @nn.compact
    def __call__(self, x_BxTxM: jax.Array) -> jax.Array:
        config = self.config
        into = functools.partial(
            self.projection_type,
            config,
            "btm,mf->btf",
            (config.d_model, config.mlp_dim),
            ("embed", "mlp"),
            bias_dims=int(config.mlp_bias),
        )
        save = lambda x: checkpoint_name(x, MLP_HIDDEN)
        if config.mlp_gated:
            gate, up = into(name="gate"), into(name="up")
            if config.execution.fuse_projections:
                (gate_kernel, gate_bias), (up_kernel, up_bias) = gate.weights(), up.weights()
                # Stacked along a new first axis, so that splitting the result copies nothing.
                both = product("btm,cmf->cbtf", x_BxTxM, jnp.stack((gate_kernel, up_kernel)))
                if gate_bias is not None and up_bias is not None:
                    both = plus(both, jnp.stack((gate_bias, up_bias))[:, None, None])
                both = save(both)
                hidden_BxTxF = self.activate(both[0]) * both[1]
            else:
                hidden_BxTxF = self.activate(save(gate(x_BxTxM))) * save(up(x_BxTxM))
        else:
            hidden_BxTxF = self.activate(save(into(name="up")(x_BxTxM)))
        hidden_BxTxF = nn.with_logical_constraint(hidden_BxTxF, ("batch", "length", "mlp"))
        return self.projection_type(
            config,
            "btf,fm->btm",
            (config.mlp_dim, config.d_model),
            ("mlp", "embed"),
            bias_dims=int(config.mlp_bias),
            name="down",
        )(hidden_BxTxF)

    def activate(self, x: jax.Array) -> jax.Array:
        """The activation, in the dtype of ``x``."""
        return ACTIVATIONS[self.config.mlp_activation](x)


class Embedder(nn.Module):
    """Token embedding and vocabulary head, tied or separate."""

    config: ModelConfig
    with_head: bool = True  # False: the table alone

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.d_model)
        self.embedding = self.table("embedding", shape, ("vocab", "embed"))
        if self.with_head and not self.config.tie_embeddings:
            self.head = self.make_head()

    def table(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> jax.Array:
        init = with_axes(nn.initializers.normal(self.config.init_std), axes)
        return self.param(name, init, shape, jnp.dtype(self.config.param_dtype))

    def make_head(self) -> jax.Array:
        shape = (self.config.d_model, self.config.vocab_size)
        return self.table("head", shape, ("embed", "vocab"))

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Embeddings [B, T, M] in the compute dtype."""
        dtype = jnp.dtype(self.config.dtype)
        x_BxTxM = self.rows(tokens_BxT).astype(dtype)
        if self.config.embedding_scale:
            x_BxTxM = x_BxTxM * jnp.asarray(self.config.d_model**0.5, dtype)
        return nn.with_logical_constraint(x_BxTxM, ("batch", "length", "embed_act"))

    def rows(self, tokens_BxT: jax.Array) -> jax.Array:
        """Rows of the table [B, T, M]."""
        return rows_of(self.embedding, tokens_BxT)

    def logits(self, hidden: jax.Array, start: int = 0, stop: int | None = None) -> jax.Array:
        """Logits [..., V], float32 whatever the compute dtype.

        ``start`` and ``stop`` select a range of the vocabulary.
        """
        hidden = hidden.astype(jnp.dtype(self.config.dtype))
        logits, cap = self.uncapped_logits(hidden, start, stop), self.config.final_logit_cap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def uncapped_logits(self, hidden: jax.Array, start: int, stop: int | None) -> jax.Array:
        """Logits before their cap; ``hidden`` is in the compute dtype."""
        if self.config.tie_embeddings:
            table, equation = self.embedding[start:stop], "...m,vm->...v"
        else:
            table, equation = self.head[:, start:stop], "...m,mv->...v"
        table = table.astype(hidden.dtype)
        return jnp.einsum(equation, hidden, table, preferred_element_type=jnp.float32)
