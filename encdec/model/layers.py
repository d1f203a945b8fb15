"""Building blocks with parameters: projections, RMSNorm, MLP, token embedding.

Every parameter carries logical axis names, from which the training side derives its sharding:
``vocab``, ``embed``, ``heads``, ``kv_heads``, ``head_dim``, ``mlp`` (and ``layers`` where stacked).
Parameters are stored in ``config.param_dtype`` and cast to ``config.dtype`` where they are used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from encdec.model.config import ModelConfig

# Names under which remat policies find what is dear to compute again, or small.
NORM_FACTOR, MLP_HIDDEN = "norm_factor", "mlp_hidden"

# As many as are multiplied as ``product_by_parts`` says: of 64 it took 0.75 of the other's time, of
# 512 1.2.
FEW_ROWS = 64

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


class Projection(nn.Module):
    """``einsum(equation, x, kernel) + bias``; the equation's second operand is the kernel."""

    config: ModelConfig
    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias_dims: int = 0  # the bias spans the kernel's last ``bias_dims`` dimensions; 0 for none

    def setup(self) -> None:
        config = self.config
        init, shape = nn.initializers.normal(config.init_std), self.shape
        if config.kernel_parts:
            width = math.prod(shape[: self._summed()])
            shape = parts_shape(math.prod(shape) // width, width, config.kernel_parts)
        else:
            init = nn.with_logical_partitioning(init, self.axes)
        self.kernel = self.param("kernel", init, shape, jnp.dtype(config.param_dtype))
        if self.bias_dims:
            init = nn.with_logical_partitioning(
                nn.initializers.zeros_init(), self.axes[-self.bias_dims :]
            )
            self.bias = self.param(
                "bias", init, self.shape[-self.bias_dims :], jnp.dtype(config.param_dtype)
            )

    def weights(self) -> tuple[jax.Array, jax.Array | None]:
        """Kernel, for ``product``, and bias (None without) in the compute dtype."""
        bias = self.bias.astype(jnp.dtype(self.config.dtype)) if self.bias_dims else None
        return self.kernel, bias

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        if config.kernel_parts:
            y = self._by_parts(x)
        elif config.float32_sums:
            y = jnp.einsum(
                self.equation, x, self.kernel.astype(dtype), preferred_element_type=jnp.float32
            ).astype(dtype)
        else:
            y = product(self.equation, x, self.kernel)
        return y + self.bias.astype(dtype) if self.bias_dims else y

    def _by_parts(self, x: jax.Array) -> jax.Array:
        """The same product with the kernel as ``kernel_in_parts`` lays it out."""
        summed = self._summed()
        into = self.shape[summed:]
        x = x.reshape(*x.shape[: x.ndim - summed], -1)
        y = product_by_parts(x, self.kernel.astype(x.dtype), math.prod(into))
        return y.reshape(*y.shape[:-1], *into)

    def _summed(self) -> int:
        """How many dimensions the product sums over; the kernel begins with them."""
        operands, result = self.equation.split("->")
        return len(set(operands.split(",")[1]) - set(result))


def parts_shape(out: int, width: int, parts: int) -> tuple[int, int, int]:
    """The shape of ``kernel_in_parts``."""
    return parts, -(-out // parts), width


def kernel_in_parts(kernel_OxI: jax.Array, parts: int) -> jax.Array:
    """[P, ceil(O / P), I]: an [out, in] kernel cut into parts of equally many rows, the last one
    filled up with zeros."""
    out, width = kernel_OxI.shape
    shape = parts_shape(out, width, parts)
    return jnp.pad(kernel_OxI, ((0, shape[0] * shape[1] - out), (0, 0))).reshape(shape)


def product_by_parts(
    x: jax.Array, kernel_PxRxI: jax.Array, out: int, dtype: Any = None
) -> jax.Array:
    """``x [..., I]`` times a kernel of ``kernel_in_parts``: [..., out], in ``dtype`` or theirs.

    XLA's CPU compiler gives a matrix-vector product of up to 2 MiB to one core, and runs thunks
    beside each other only where more than eight are ready; but it spreads the rows of a batched
    product over the cores, whatever their size. So one row is multiplied as a batch of parts. A
    few rows are, too, and as columns at the kernel's right, which took a third of the time of the
    kernel at theirs.
    """
    parts, rows, width = kernel_PxRxI.shape
    count = math.prod(x.shape[:-1])
    multiply = functools.partial(jnp.einsum, preferred_element_type=dtype)
    if count == 1:
        copies_PxI = jnp.broadcast_to(x.reshape(width), (parts, width))
        y = multiply("pi,pri->pr", copies_PxI, kernel_PxRxI).reshape(*x.shape[:-1], -1)
    elif count <= FEW_ROWS:
        copies_PxIxN = jnp.broadcast_to(x.reshape(count, width).T, (parts, width, count))
        y_PxRxN = multiply("pri,pin->prn", kernel_PxRxI, copies_PxIxN)
        y = y_PxRxN.reshape(parts * rows, count).T.reshape(*x.shape[:-1], -1)
    else:
        y = multiply("...i,oi->...o", x, kernel_PxRxI.reshape(parts * rows, width))
    return y[..., :out]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis (arXiv 1910.07467), in float32.

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
            "scale",
            nn.with_logical_partitioning(start, (self.axis,)),
            (x.shape[-1],),
            jnp.dtype(config.param_dtype),
        )
        if config.norm_plus_one:
            scale = scale + 1
        x32 = x.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
        normed = x32 * checkpoint_name(factor, NORM_FACTOR)
        if config.norm_cast == "before_scale":
            return normed.astype(dtype) * scale.astype(dtype)
        return (normed * scale.astype(jnp.float32)).astype(dtype)


class Mlp(nn.Module):
    """Position-wise MLP, plain or gated: ``down(act(gate(x)) * up(x))``."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxM: jax.Array) -> jax.Array:
        config = self.config
        into = functools.partial(
            Projection,
            config,
            "btm,mf->btf",
            (config.d_model, config.mlp_dim),
            ("embed", "mlp"),
            bias_dims=int(config.mlp_bias),
        )
        activation, save = (
            ACTIVATIONS[config.mlp_activation],
            (lambda x: checkpoint_name(x, MLP_HIDDEN)),
        )
        if config.mlp_gated:
            gate, up = into(name="gate"), into(name="up")
            if config.fuse_projections:
                kernels, biases = zip(gate.weights(), up.weights())
                # Side by side on a new first axis, which is taken apart without a copy.
                both = product("btm,cmf->cbtf", x_BxTxM, jnp.stack(kernels))
                if config.mlp_bias:
                    both = both + jnp.stack(biases)[:, None, None]
                both = save(both)
                hidden_BxTxF = activation(both[0]) * both[1]
            else:
                hidden_BxTxF = activation(save(gate(x_BxTxM))) * save(up(x_BxTxM))
        else:
            hidden_BxTxF = activation(save(into(name="up")(x_BxTxM)))
        hidden_BxTxF = nn.with_logical_constraint(hidden_BxTxF, ("batch", "length", "mlp"))
        return Projection(
            config,
            "btf,fm->btm",
            (config.mlp_dim, config.d_model),
            ("mlp", "embed"),
            bias_dims=int(config.mlp_bias),
            name="down",
        )(hidden_BxTxF)


class Embedder(nn.Module):
    """Token embedding and vocabulary head, tied or apart; without ``head_too``, a table alone."""

    config: ModelConfig
    head_too: bool = True

    def setup(self) -> None:
        config = self.config
        init, dtype = nn.initializers.normal(config.init_std), jnp.dtype(config.param_dtype)
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(init, ("vocab", "embed")),
            (config.vocab_size, config.d_model),
            dtype,
        )
        if self.head_too and not config.tie_embeddings:
            # Decoding reads it as [out, in], as all its kernels.
            turn = -1 if config.kernel_parts else 1
            self.head = self.param(
                "head",
                nn.with_logical_partitioning(init, ("embed", "vocab")[::turn]),
                (config.d_model, config.vocab_size)[::turn],
                dtype,
            )

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Embeddings [B, T, M] in the compute dtype."""
        dtype = jnp.dtype(self.config.dtype)
        x_BxTxM = rows_of(self.embedding, tokens_BxT).astype(dtype)
        if self.config.embedding_scale:
            x_BxTxM = x_BxTxM * jnp.asarray(self.config.d_model**0.5, dtype)
        return nn.with_logical_constraint(x_BxTxM, ("batch", "length", "embed_act"))

    def logits(self, hidden: jax.Array, start: int = 0, stop: int | None = None) -> jax.Array:
        """Vocabulary scores [..., V], float32 whatever the compute dtype.

        ``start`` and ``stop`` give those of a part of the vocabulary alone.
        """
        dtype = jnp.dtype(self.config.dtype)
        parts, count = self.config.kernel_parts, math.prod(hidden.shape[:-1])
        if self.config.tie_embeddings or parts:
            table = self.embedding if self.config.tie_embeddings else self.head
            table, equation = table[start:stop], "...m,vm->...v"
            if parts and count > 1 and len(table) % parts == 0:  # one row: see its size
                table_PxRxM = table.reshape(parts, -1, table.shape[1]).astype(dtype)
                return self._capped(
                    product_by_parts(hidden.astype(dtype), table_PxRxM, len(table), jnp.float32)
                )
        else:
            table, equation = self.head[:, start:stop], "...m,mv->...v"
        logits = jnp.einsum(
            equation, hidden.astype(dtype), table.astype(dtype), preferred_element_type=jnp.float32
        )
        return self._capped(logits)

    def _capped(self, logits: jax.Array) -> jax.Array:
        cap = self.config.final_logit_cap
        return cap * jnp.tanh(logits / cap) if cap else logits
