"""Rules: what they give, what they refuse, what they report."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from encdec.errors import ConfigError
from encdec.model import abstract_params, build_model, logical_axes, preset
from encdec.train.across_mesh import compute_params
from encdec.train.feed import host_slice
from encdec.train.program import build_program
from encdec.train.run_config import parse_config
from encdec.train.run_fields import MeshConfig
from encdec.train.sharding import ShardingRules, make_mesh, param_shardings
from tests.train.conftest import small_run


def test_specs():
    rules = ShardingRules()
    assert rules.spec(("embed", "heads", "head_dim")) == PartitionSpec("fsdp", "tensor", None)
    assert rules.spec(("batch", "length")) == PartitionSpec(("data", "fsdp"), None)
    assert rules.spec((None, "vocab")) == PartitionSpec(None, "tensor")


def test_collisions_are_refused_by_name():
    rules = ShardingRules(embed=("tensor",))
    with pytest.raises(ConfigError, match="'embed' and 'mlp'.*'tensor'"):
        rules.spec(("embed", "mlp"))
    with pytest.raises(ConfigError, match="'embed' and 'kv_heads'"):
        build_program(parse_config(small_run()), preset("test"), make_mesh(MeshConfig()), 8, rules)


def test_parameters_are_put_together_once_a_step_in_the_dtype_that_travels():
    axes = {"kernel": ("layers", "embed", "mlp"), "scale": ("layers", "embed"), "bias": ("mlp",)}
    shapes = {"kernel": (3, 8, 4), "scale": (3, 8), "bias": (4,)}
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rules = ShardingRules()
    masters = {
        name: jax.device_put(
            jnp.full(shape, 1 + 2.0**-10), NamedSharding(mesh, rules.parameter_spec(axes[name]))
        )
        for name, shape in shapes.items()
    }
    assert masters["scale"].sharding.spec == PartitionSpec(None, None)  # norms stay whole

    def prepared(**changes):
        config = MeshConfig(**changes)
        prepare = compute_params(config, "bfloat16", rules, mesh, axes)
        total = lambda p: sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(prepare(p)))
        return jax.jit(prepare)(masters), jax.jit(jax.grad(total))(masters)

    params, gradients = prepared()
    assert params["kernel"].sharding.spec == PartitionSpec(None, None, "tensor")
    assert {name: x.dtype.name for name, x in params.items()} == {
        "kernel": "bfloat16",
        "scale": "float32",
        "bias": "float32",
    }
    for name, gradient in gradients.items():
        assert gradient.dtype == jnp.float32
        assert gradient.sharding.is_equivalent_to(masters[name].sharding, gradient.ndim)
        assert (gradient == 1).all()
    params, _ = prepared(gather="use", reduce_dtype="float32")
    assert params["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert params["kernel"].dtype == jnp.float32 and (params["kernel"] == 1 + 2.0**-10).all()


def test_unknown_axes_are_refused():
    with pytest.raises(ConfigError, match="'hedas'"):
        ShardingRules().spec(("hedas",))


def test_what_does_not_divide_stays_whole_and_is_reported():
    model = build_model(preset("330m"))  # 6 query heads, 3 kv heads
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    shardings, fitted, unsharded = param_shardings(
        ShardingRules(), mesh, abstract_params(model), logical_axes(model)
    )
    q, k = (shardings["decoder"]["layers"]["self_attention"][name]["kernel"].spec for name in "qk")
    assert q == PartitionSpec(None, "fsdp", "tensor", None)
    assert k == PartitionSpec(None, "fsdp", None, None)
    assert fitted.kv_heads == () and fitted.heads == ("tensor",)
    names = {item.parameter for item in unsharded}
    assert "decoder/layers/encoder_attention/k/kernel" in names
    assert "encoder/layers/self_attention/v/bias" in names
    assert not any("/q/" in name or "/mlp/" in name for name in names)
    assert "length 3 is not divisible by 2 (tensor)" in str(unsharded[0])


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_moments_lie_where_their_parameters_lie(name):
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    run = parse_config(small_run(optimizer={"name": name}, mesh=mesh))
    program = build_program(run, run.model_config(), make_mesh(run.mesh), 12)
    params = {
        x.shape: x.sharding.spec
        for x in jax.tree.leaves(program.abstract_state.params)
        if x.ndim > 2
    }
    moments = [x for x in jax.tree.leaves(program.abstract_state.opt_state) if x.shape in params]
    assert all(x.sharding.spec == params[x.shape] for x in moments)
    matrices = len([x for x in jax.tree.leaves(program.abstract_state.params) if x.ndim > 2])
    # Below 64 rows and columns Adafactor factors nothing, so each has at least one moment.
    assert len(moments) >= matrices


@pytest.mark.parametrize(
    "batch, accumulation, words",
    [(12, 1, ["12", "multiple of 8"]), (16, 4, ["16", "4 micro-batches", "multiple of 32"])],
)
def test_batches_that_do_not_split_over_the_mesh(batch, accumulation, words):
    run = parse_config(small_run(batch_size=batch, accumulation=accumulation))
    with pytest.raises(ConfigError) as error:
        build_program(run, run.model_config(), make_mesh(run.mesh), 12)
    for word in words:
        assert word in str(error.value), str(error.value)


class _Sharding:
    """Stands for the sharding of one process among several."""

    def __init__(self, *slices):
        self._slices = slices

    def addressable_devices_indices_map(self, shape):
        return {i: (slice(*s), slice(None)) for i, s in enumerate(self._slices)}


def test_a_process_reads_the_rows_its_devices_hold():
    mesh = make_mesh(MeshConfig())
    assert host_slice(NamedSharding(mesh, PartitionSpec("data")), 16) == (0, 1)
    assert host_slice(_Sharding((8, 12), (12, 16)), 16) == (1, 2)
    # Devices that differ in the tensor axis hold the same rows.
    assert host_slice(_Sharding((4, 8), (4, 8)), 16) == (1, 4)
    with pytest.raises(ConfigError, match="contiguous"):
        host_slice(_Sharding((0, 4), (8, 12)), 16)
