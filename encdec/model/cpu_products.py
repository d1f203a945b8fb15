"""Products of few rows with large kernels, in the layouts that XLA's CPU compiler reads fastest.

A kernel [out, in] of a decoder is kept either in panels [out / PANEL, in, PANEL], the fastest for
some dozen rows, or in shards [shards, out / shards, in], for any number of rows. Both
are multiplied as a batch: XLA's CPU compiler (jaxlib 0.10.2) runs a matrix-vector product of up to
2 MiB on one core, and runs thunks concurrently only where more than eight are ready; but it spreads
the rows of a batched product over the cores, whatever their size.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

# Columns of a panel: four vectors of 16 numbers. Of 32, 64 and 128, the fastest for 8 rows.
PANEL = 64
# Rows multiplied by panels at once: more of a wide product may take several times as long.
PANEL_ROWS = 16
# More rows than this are multiplied with panels that were put together again first.
BATCHED_ROWS = 128
# Up to this many rows are multiplied by shards: at 64 rows that takes 0.75x the time of the plain
# product, at 512 rows 1.2x.
FEW_ROWS = 64


def panelled_shape(out: int, width: int) -> tuple[int, int, int]:
    """The shape of ``panelled_kernel``."""
    return -(-out // PANEL), width, PANEL


def panelled_kernel(kernel_OxI: jax.Array) -> jax.Array:
    """[P, I, PANEL]: columns of an [out, in] kernel, the last panel padded with zeros."""
    panels, width, columns = panelled_shape(*kernel_OxI.shape)
    padded = jnp.pad(kernel_OxI, ((0, panels * columns - len(kernel_OxI)), (0, 0)))
    return padded.reshape(panels, columns, width).swapaxes(1, 2)


def rows_of_panels(kernel_PxIxR: jax.Array) -> jax.Array:
    """The kernel [out, in], padding included."""
    return kernel_PxIxR.swapaxes(1, 2).reshape(-1, kernel_PxIxR.shape[1])


def product_by_panels(
    x: jax.Array, kernel_PxIxR: jax.Array, out: int, dtype: Any = None
) -> jax.Array:
    """``x [..., I]`` times a ``panelled_kernel``: [..., out], in ``dtype`` or theirs.

    A panel is read in the order of its addresses, once for up to PANEL_ROWS rows, and multiplies
    them without being rearranged first. Copies of ``x`` are not made where the program is compiled
    with ``encdec.inference.decoding_compiler``. More rows follow one another in batches; so many
    that rearranging the kernel costs little in comparison are multiplied as a whole.
    """
    panels, width, columns = kernel_PxIxR.shape
    count = math.prod(x.shape[:-1])
    rows_NxI = x.reshape(count, width)
    if count == 1:  # of two rows XLA makes a faster program than of one
        y = _batch_by_panels(jnp.pad(rows_NxI, ((0, 1), (0, 0))), kernel_PxIxR, dtype)[:1]
    elif count <= PANEL_ROWS:
        y = _batch_by_panels(rows_NxI, kernel_PxIxR, dtype)
    elif count <= BATCHED_ROWS:
        batches = -(-count // PANEL_ROWS)
        rows = -(-count // batches)
        padded_NxI = jnp.pad(rows_NxI, ((0, batches * rows - count), (0, 0)))
        y = jax.lax.map(
            lambda batch_NxI: _batch_by_panels(batch_NxI, kernel_PxIxR, dtype),
            padded_NxI.reshape(batches, rows, width),
        )
        y = y.reshape(batches * rows, panels * columns)[:count]
    else:
        y = jnp.einsum("ni,pir->npr", rows_NxI, kernel_PxIxR, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], panels * columns)[..., :out]


def _batch_by_panels(x_NxI: jax.Array, kernel_PxIxR: jax.Array, dtype: Any) -> jax.Array:
    """[N, P, PANEL]."""
    copies_PxNxI = jnp.broadcast_to(x_NxI, (len(kernel_PxIxR), *x_NxI.shape))
    y_PxNxR = jnp.einsum("pni,pir->pnr", copies_PxNxI, kernel_PxIxR, preferred_element_type=dtype)
    return y_PxNxR.swapaxes(0, 1)


def sharded_shape(out: int, width: int, shards: int) -> tuple[int, int, int]:
    """The shape of ``sharded_kernel``."""
    return shards, -(-out // shards), width


def sharded_kernel(kernel_OxI: jax.Array, shards: int) -> jax.Array:
    """[P, ceil(O / P), I]: an [out, in] kernel cut into P shards of equally many rows, the last
    one padded with zeros."""
    out, width = kernel_OxI.shape
    shape = sharded_shape(out, width, shards)
    return jnp.pad(kernel_OxI, ((0, shape[0] * shape[1] - out), (0, 0))).reshape(shape)


def product_by_shards(
    x: jax.Array, kernel_PxRxI: jax.Array, out: int, dtype: Any = None
) -> jax.Array:
    """``x [..., I]`` times a ``sharded_kernel``: [..., out], in ``dtype`` or theirs.

    A few rows are multiplied as columns to the right of the kernel, which takes a third of the
    time of the kernel to the right of them.
    """
    shards, rows, width = kernel_PxRxI.shape
    count = math.prod(x.shape[:-1])
    multiply = functools.partial(jnp.einsum, preferred_element_type=dtype)
    if count == 1:
        copies_PxI = jnp.broadcast_to(x.reshape(width), (shards, width))
        y = multiply("pi,pri->pr", copies_PxI, kernel_PxRxI).reshape(*x.shape[:-1], -1)
    elif count <= FEW_ROWS:
        copies_PxIxN = jnp.broadcast_to(x.reshape(count, width).T, (shards, width, count))
        y_PxRxN = multiply("pri,pin->prn", kernel_PxRxI, copies_PxIxN)
        y = y_PxRxN.reshape(shards * rows, count).T.reshape(*x.shape[:-1], -1)
    else:
        y = multiply("...i,oi->...o", x, kernel_PxRxI.reshape(shards * rows, width))
    return y[..., :out]
