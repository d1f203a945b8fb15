"""Fused attention: splash (Pallas) on TPUs, cuDNN on NVIDIA GPUs, and the choice between them.

Both take packed segments instead of a mask, so that logits are never held in memory, and compute
what ``encdec.model.attention.dot_product_attention`` computes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from encdec.errors import ConfigError
from encdec.model.coverage import refuse_unknown, unknown_fields
from encdec.model.model_config import ModelConfig

# Query and key tiles of the splash kernel. At 1,024 keys one tile of keys holds them all, so that
# the fused backward pass has no partial query gradients to add up.
BLOCK_Q, BLOCK_KV, BLOCK_KV_COMPUTE = 512, 1024, 512
LANES = 128  # lengths are padded to a multiple: the kernel's smallest tile
# Names under which remat policies find queries, keys and values, and what the kernel made of them.
ATTENTION_INPUTS, CONTEXT = "attention_inputs", "attention_context"


def named_inputs(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays under the name by which remat policies keep queries, keys and values."""
    return tuple(checkpoint_name(x, ATTENTION_INPUTS) for x in arrays)


def platform() -> str:
    """Where what is being traced will run: the mesh's devices, else this machine's backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def resolve_kernel(config: ModelConfig, *, segments: bool, dropout: bool) -> str:
    """ "xla", "splash" or "cudnn" for one attention sublayer.

    Without segments (cached decoding, windows) and with dropout on the probabilities, plain XLA
    is the only one that can; "auto" then means it.

    Raises:
        ConfigError: a kernel that cannot run there, or cannot drop out, was asked for by name.
    """
    kernel, where = config.execution.attention_kernel, platform()
    if kernel == "xla" or not segments:
        return "xla"
    if kernel == "auto":
        fused = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(where, "xla")
        half = config.dtype == "bfloat16"
        capped = config.attention_logit_cap and fused == "cudnn"
        unknown = unknown_fields(config, fused)
        return "xla" if dropout or capped or unknown or not half else fused
    refuse_unknown(config, kernel, f"ExecutionConfig.attention_kernel {kernel!r}")
    if dropout:
        raise ConfigError(
            f"ExecutionConfig.attention_kernel is {kernel!r}, which has no dropout on attention "
            f"probabilities, and attention_dropout is {config.attention_dropout}; expected "
            "attention_dropout=0.0, or attention_kernel='xla' or 'auto'"
        )
    if kernel == "cudnn":
        if where not in ("gpu", "cuda"):
            raise ConfigError(
                f"ExecutionConfig.attention_kernel is 'cudnn' on {where}; use an NVIDIA GPU, or "
                "attention_kernel='auto'"
            )
        if config.attention_logit_cap or config.dtype != "bfloat16":
            raise ConfigError(
                "ExecutionConfig.attention_kernel is 'cudnn', which supports no "
                "attention_logit_cap and only bfloat16; expected attention_logit_cap=0 and "
                "dtype='bfloat16', or attention_kernel='xla'"
            )
    return kernel


def cudnn_attention(
    config: ModelConfig,
    q_BxTxHxD: jax.Array,
    k_BxSxKxD: jax.Array,
    v_BxSxKxD: jax.Array,
    mask_BxTxS: jax.Array,
) -> jax.Array:
    """cuDNN's flash attention under a mask; returns [B, T, H, D]. Needs an NVIDIA GPU."""
    q_BxTxHxD, k_BxSxKxD, v_BxSxKxD = named_inputs(
        _grouped(config, q_BxTxHxD), k_BxSxKxD, v_BxSxKxD
    )
    out = jax.nn.dot_product_attention(
        q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, mask=mask_BxTxS[:, None], scale=1.0, implementation="cudnn"
    )
    return _ungrouped(config, out)


def splash_attention(
    config: ModelConfig,
    q_BxTxHxD: jax.Array,
    k_BxSxKxD: jax.Array,
    v_BxSxKxD: jax.Array,
    segments: tuple[jax.Array, jax.Array],
    causal: bool,
    prefix: int = 0,
) -> jax.Array:
    """Splash attention among packed segments; returns [B, T, H, D].

    On a mesh each device runs the kernel on its own rows and heads. Away from a TPU the kernel
    is interpreted, slowly, for tests.

    Args:
        config: pairing of heads and cap of the logits.
        q_BxTxHxD: queries, multiplied by the scale of the logits.
        k_BxSxKxD: keys.
        v_BxSxKxD: values.
        segments: segment ids of queries [B, T] and of keys [B, S]; each reads its equals.
        causal: no query reads a later key.
        prefix: how many of the first keys are of a source, which no query comes before.
    """
    q_BxHxTxD = _grouped(config, q_BxTxHxD).swapaxes(1, 2)
    k_BxKxSxD, v_BxKxSxD = k_BxSxKxD.swapaxes(1, 2), v_BxSxKxD.swapaxes(1, 2)
    length = q_BxHxTxD.shape[2]
    # Padding belongs to a segment of its own and reads itself; it is cut off below.
    q_segments, kv_segments = (_padded(ids, 1, -1) for ids in segments)
    # Named as the kernel takes them: what is saved then needs no work before the backward kernel.
    q_BxHxTxD, k_BxKxSxD, v_BxKxSxD = named_inputs(
        *(_padded(x, 2, 0) for x in (q_BxHxTxD, k_BxKxSxD, v_BxKxSxD))
    )
    function = functools.partial(
        _splash,
        causal=causal,
        prefix=prefix,
        cap=config.attention_logit_cap or None,
        interpret=platform() != "tpu",
    )
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        spec = lambda *axes: nn.logical_to_mesh_axes(axes) or PartitionSpec()
        heads, kv_heads = spec("batch", "heads", None, None), spec("batch", "kv_heads", None, None)
        if heads != kv_heads:
            # A device would hold query heads of which it lacks the keys, or the other way round.
            group = q_BxHxTxD.shape[1] // k_BxKxSxD.shape[1]
            k_BxKxSxD, v_BxKxSxD = (jnp.repeat(x, group, axis=1) for x in (k_BxKxSxD, v_BxKxSxD))
            kv_heads = heads
        rows = spec("batch", None)
        function = jax.shard_map(
            function,
            in_specs=(heads, kv_heads, kv_heads, rows, rows),
            out_specs=heads,
            check_vma=False,
        )
    out = function(q_BxHxTxD, k_BxKxSxD, v_BxKxSxD, q_segments, kv_segments)
    return _ungrouped(config, out[:, :, :length].swapaxes(1, 2))


def _splash(
    q_BxHxTxD: jax.Array,
    k_BxKxSxD: jax.Array,
    v_BxKxSxD: jax.Array,
    q_segments_BxT: jax.Array,
    kv_segments_BxS: jax.Array,
    *,
    causal: bool,
    prefix: int,
    cap: float | None,
    interpret: bool,
) -> jax.Array:
    """The kernel on one device's rows and heads; query heads grouped by key head."""
    # Here, because the import takes Pallas along, which most uses of the models never need.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads, (length, kv_length) = q_BxHxTxD.shape[1], (q_BxHxTxD.shape[2], k_BxKxSxD.shape[2])
    shape = length, kv_length
    one = splash.CausalMask(shape, offset=prefix) if causal else splash.FullMask(shape)
    block_q = _block(length, BLOCK_Q)
    block_kv, compute = _block(kv_length, BLOCK_KV), _block(kv_length, BLOCK_KV_COMPUTE)
    compute = compute if block_kv % compute == 0 else block_kv
    kernel = splash.make_splash_mha(
        splash.splash_attention_mask.MultiHeadMask([one] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=compute,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=compute,
            use_fused_bwd_kernel=True,
        ),
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=CONTEXT,
        interpret=interpret,
    )
    with jax.named_scope("causal" if causal else "full"):
        return jax.vmap(kernel)(
            q_BxHxTxD, k_BxKxSxD, v_BxKxSxD, splash.SegmentIds(q_segments_BxT, kv_segments_BxS)
        )


def _block(length: int, largest: int) -> int:
    """The largest multiple of the smallest tile that divides ``length`` and is not too large."""
    return next(n for n in range(min(largest, length), 0, -LANES) if length % n == 0)


def _padded(x: jax.Array, axis: int, value: int) -> jax.Array:
    missing = -x.shape[axis] % LANES
    if not missing:
        return x
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def _grouped(config: ModelConfig, q_BxTxHxD: jax.Array) -> jax.Array:
    """Query heads in the order in which kernels pair them: h reads h // (H/K)."""
    return _swap_heads(config, q_BxTxHxD, config.num_heads // config.num_kv_heads)


def _ungrouped(config: ModelConfig, out_BxTxHxD: jax.Array) -> jax.Array:
    return _swap_heads(config, out_BxTxHxD, config.num_kv_heads)


def _swap_heads(config: ModelConfig, x_BxTxHxD: jax.Array, rows: int) -> jax.Array:
    """The heads, as a matrix of ``rows`` rows, transposed; as they are where they are grouped."""
    if config.kv_pairing == "grouped" or config.num_kv_heads in (1, config.num_heads):
        return x_BxTxHxD
    batch, length, heads, dim = shape = x_BxTxHxD.shape
    x = x_BxTxHxD.reshape(batch, length, rows, heads // rows, dim)
    return x.swapaxes(2, 3).reshape(shape)
