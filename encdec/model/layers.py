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
        jnp.einsum(f"{left},{result}->{right}", x, gradient, preferred_element_type=kernel.dtype))


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
        if not config.kernel_parts:
            init = nn.with_logical_partitioning(nn.initializers.normal(config.init_std), self.axes)
            self.kernel = self.param("kernel", init, self.shape, jnp.dtype(config.param_dtype))
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
            y = jnp.einsum(self.equation, x, self.kernel.astype(dtype),
                           preferred_element_type=jnp.float32).astype(dtype)
        else:
            y = product(self.equation, x, self.kernel)
        return y + self.bias.astype(dtype) if self.bias_dims else y

    def _by_parts(self, x: jax.Array) -> jax.Array:
        """The same product with the kernel as [out, in] in parts, each a parameter of its own."""
        # The equation's second operand begins with the dimensions that are summed over.
        summed = len(set(self.equation.split("->")[0].split(",")[1])
                     - set(self.equation.split("->")[1]))
        width, into = math.prod(self.shape[:summed]), self.shape[summed:]
        x = x.reshape(*x.shape[: x.ndim - summed], width)
        return apply_parts(self, "kernel", x, math.prod(into), width).reshape(*x.shape[:-1], *into)


def part_sizes(config: ModelConfig, out: int, width: int) -> list[int]:
    """Rows of each part of an [out, width] kernel; one that is read in no time stays whole."""
    parts = config.kernel_parts if out * width >= config.d_model**2 // 4 else 1
    return [out // parts + (i < out % parts) for i in range(min(parts, out))]


def apply_parts(
    module: nn.Module, name: str, x: jax.Array, out: int, width: int
) -> jax.Array:
    """``x [..., width] @ kernel.T`` with the kernel's rows in parameters ``name_0``, ``name_1`` ...

    XLA's CPU compiler gives a matrix-vector product to one core, but runs independent ones at the
    same time: two halves are read at twice the rate.
    """
    config = module.config
    init, dtype = nn.initializers.normal(config.init_std), jnp.dtype(config.dtype)
    pieces = [
        jnp.einsum("...i,oi->...o", x, module.param(
            f"{name}_{i}", init, (rows, width), jnp.dtype(config.param_dtype)).astype(dtype))
        for i, rows in enumerate(part_sizes(config, out, width))]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)


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
            Projection, config, "btm,mf->btf", (config.d_model, config.mlp_dim), ("embed", "mlp"),
            bias_dims=int(config.mlp_bias),
        )
        activation, save = ACTIVATIONS[config.mlp_activation], (
            lambda x: checkpoint_name(x, MLP_HIDDEN))
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
            config, "btf,fm->btm", (config.mlp_dim, config.d_model), ("mlp", "embed"),
            bias_dims=int(config.mlp_bias), name="down",
        )(hidden_BxTxF)


class Embedder(nn.Module):
    """Token embedding and vocabulary head, tied or apart; without ``head_too``, a table alone."""

    config: ModelConfig
    head_too: bool = True

    def setup(self) -> None:
        config = self.config
        init, dtype = nn.initializers.normal(config.init_std), jnp.dtype(config.param_dtype)
        self.embedding = self.param(
            "embedding", nn.with_logical_partitioning(init, ("vocab", "embed")),
            (config.vocab_size, config.d_model), dtype,
        )
        if self.head_too and not config.tie_embeddings and not config.kernel_parts:
            self.head = self.param(
                "head", nn.with_logical_partitioning(init, ("embed", "vocab")),
                (config.d_model, config.vocab_size), dtype,
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
        if self.config.kernel_parts:
            return self._capped(self._logits_by_parts(hidden)[..., start:stop])
        if self.config.tie_embeddings:
            table, equation = self.embedding[start:stop], "...m,vm->...v"
        else:
            table, equation = self.head[:, start:stop], "...m,mv->...v"
        logits = jnp.einsum(
            equation, hidden.astype(dtype), table.astype(dtype), preferred_element_type=jnp.float32
        )
        return self._capped(logits)

    @nn.compact
    def _logits_by_parts(self, hidden: jax.Array) -> jax.Array:
        config = self.config
        return apply_parts(self, "head", hidden, config.vocab_size, config.d_model).astype(
            jnp.float32)

    def _capped(self, logits: jax.Array) -> jax.Array:
        cap = self.config.final_logit_cap
        return cap * jnp.tanh(logits / cap) if cap else logits
