"""Layouts for CPUs, and an encoder in bfloat16, are the same model."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.errors import ConfigError
from encdec.inference import ready
from encdec.inference.decoding import (
    DecodingPlan,
    advance_compiled,
    decode_step,
    prefill,
    start_compiled,
)
from encdec.inference.decoding_compiler import LazilyCompiled, compiler_options
from encdec.inference.ready import ready_for_decoding
from encdec.inference.sampling import Choosing, greedy_rows
from encdec.model import build_model, check_params, for_decoding, preset
from encdec.model.attention import dot_product_attention
from encdec.model.cpu_attention import attention_in_blocks, heads_first
from encdec.model.cpu_layout import CpuMlp
from encdec.model.cpu_products import (
    BATCHED_ROWS,
    FEW_ROWS,
    PANEL,
    PANEL_ROWS,
    panelled_kernel,
    product_by_panels,
    product_by_shards,
    rows_of_panels,
    sharded_kernel,
)
from encdec.model.layers import Mlp
from encdec.serving.slots import SlotPlan, empty, insert_compiled, read_compiled
from tests.export.examples import batch, pair
from tests.inference.examples import START, laid_out

PREFILL = jax.jit(prefill, static_argnums=0, static_argnames=("start_id", "capacity"))
STEP = jax.jit(decode_step, static_argnums=0)
TOKENS = np.random.default_rng(0).integers(3, 250, (2, 9)).astype(np.int32)


def two_steps(config, params, rows=2):
    """Logits after prefill and after one step more; one row takes other products than two."""
    lengths = jnp.array([9, 5])[:rows]
    logits, memory = PREFILL(config, params, TOKENS[:rows], lengths, start_id=START, capacity=2)
    later, _ = STEP(config, params, memory, jnp.array([7, 8])[:rows])
    return np.stack([logits, later])


@pytest.mark.parametrize(
    "name, rows, shards",
    [
        ("paper", 1, 0),
        ("paper", 2, 0),
        ("unrolled", 1, 0),
        ("t5gemma", 2, 0),
        ("windowed", 1, 3),
        ("windowed", 2, 0),
        ("merged", 1, 0),
        ("of later families", 1, 0),
    ],
)
def test_kernels_in_panels_and_shards_compute_the_same(name, rows, shards):
    """Tied and separate heads, both MLPs, both pairings of heads, norms of queries and keys;
    sizes that do not divide."""
    config, params = pair(name)
    plain = two_steps(*for_decoding(config, params), rows)
    config, params = laid_out(*for_decoding(config, params), shards)
    kernel = params["decoder"]["layers_0"]["mlp"]["down"]["kernel"]
    if not shards:
        assert kernel.shape == (1, 128, PANEL) and not kernel[0, :, 32:].any()
    else:
        assert kernel.shape == (3, 11, 128) and not kernel[2, 10].any()
    check_params(params, config)
    rounding = 3e-6 * max(10, np.abs(plain).max())  # merged's logits reach 27, others' 10
    np.testing.assert_allclose(two_steps(config, params, rows), plain, atol=rounding)


@pytest.mark.parametrize("shape", [(1,), (2,), (5, 2), (FEW_ROWS,), (FEW_ROWS + 1,)])
def test_products_by_shards_are_products_for_any_number_of_rows(shape):
    draw = np.random.default_rng(0).normal
    x, kernel = draw(size=(*shape, 6)).astype(np.float32), draw(size=(11, 6)).astype(np.float32)
    found = product_by_shards(jnp.array(x), sharded_kernel(jnp.array(kernel), 3), 11)
    np.testing.assert_allclose(found, x @ kernel.T, atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (5, 2), (7, 5), (BATCHED_ROWS + 1,)])
@pytest.mark.parametrize("out", [PANEL, 2 * PANEL + 3])
def test_products_by_panels_are_products_for_any_number_of_rows(shape, out):
    draw = np.random.default_rng(0).normal
    x, kernel = draw(size=(*shape, 6)).astype(np.float32), draw(size=(out, 6)).astype(np.float32)
    panels = panelled_kernel(jnp.array(kernel))
    found = LazilyCompiled(product_by_panels, static_argnums=2)(jnp.array(x), panels, out)
    np.testing.assert_allclose(found, x @ kernel.T, atol=1e-5)
    np.testing.assert_array_equal(rows_of_panels(panels)[:out], kernel)


@pytest.mark.parametrize("rows", [8, 2 * PANEL_ROWS, BATCHED_ROWS + 1])
def test_programs_that_decode_copy_no_rows_for_panels(rows):
    """Where the compiler knows the option; the rows are broadcast within the product's fusion, or
    multiplied with the whole kernel."""
    if jax.default_backend() != "cpu" or not compiler_options():
        pytest.skip("this compiler reads rows in another way")
    x, panels = jnp.ones((rows, 96)), jnp.ones((5, 96, PANEL))
    program = (
        LazilyCompiled(product_by_panels, static_argnums=2).lower(x, panels, 5 * PANEL).compile()
    )
    # Without what is fused: the entry and the bodies of loops.
    parts = program.as_text().split("\n\n")
    steps = "".join(part for part in parts if not re.match(r"\s*%(fused|wrapped)_", part))
    made = re.findall(r"= f32\[([\d,]+)\]\S* (?:fusion|broadcast|copy)\(", steps)
    assert made and not {f"5,{count},96" for count in (rows, PANEL_ROWS)} & set(made), made


@pytest.mark.parametrize(
    "name, layout",
    [
        ("paper", ""),
        ("unrolled", "panels"),
        ("t5gemma", "panels"),
        ("windowed", ""),
        ("windowed", "shards"),
    ],
)
def test_attention_by_blocks_of_queries_computes_the_same(name, layout):
    """Nine inputs in three blocks; ten of a decoder-only model, so that the last is filled up."""
    config, params = pair(name)
    plain = two_steps(*for_decoding(config, params))
    config, params = for_decoding(config.replace(attention_block=4), params)
    if layout:
        config, params = laid_out(config, params, 3 if layout == "shards" else 0)
    lowered = jax.jit(prefill, static_argnums=0, static_argnames=("start_id", "capacity")).lower(
        config, params, TOKENS, jnp.array([9, 5]), start_id=START, capacity=2
    )
    assert "stablehlo.while" in lowered.as_text()  # blocks after one another
    np.testing.assert_allclose(two_steps(config, params), plain, atol=3e-5)


@pytest.mark.parametrize("length, prefix", [(20, 0), (21, 3), (37, 0)])
def test_causal_blocks_read_no_keys_behind_their_span(length, prefix):
    """Their NaN would reach every query that multiplies with them, hidden or not."""
    config = preset("test").replace(attention_block=2)
    draw = np.random.default_rng(0).normal
    q = draw(size=(2, length, config.num_heads, config.head_dim)).astype(np.float32)
    keys = prefix + length
    k, v = draw(size=(2, 2, keys, config.num_kv_heads, config.head_dim)).astype(np.float32)
    places = np.arange(keys)
    mask = np.tile(places[prefix:, None] >= places, (2, 1, 1)) & (places != 3)
    attend = jax.jit(
        lambda k, v: attention_in_blocks(
            config, q, *heads_first((k, v)), mask, causal=True, prefix=prefix
        )
    )
    wanted = dot_product_attention(config, q, k, v, mask)
    np.testing.assert_allclose(attend(k, v), wanted, atol=1e-5)
    half = length // 2 + 2  # a span of the eighth part ends at most 6 places before
    k[:, prefix + half :] = v[:, prefix + half :] = np.nan
    found = attend(k, v)
    np.testing.assert_allclose(found[:, : half - 6], wanted[:, : half - 6], atol=1e-5)
    assert np.isnan(found[:, half:]).all()


@pytest.mark.parametrize(
    "name, shards", [("paper", 0), ("unrolled", 0), ("windowed", 2), ("windowed", 0), ("merged", 0)]
)
def test_cached_steps_in_another_layout_are_the_full_forward_pass(name, shards):
    config, params = laid_out(*for_decoding(*pair(name)), shards)
    answer = np.array([[START, 7, 9, 11, 3]], np.int32)
    prompt = (
        answer
        if config.is_encoder_decoder
        else np.concatenate([answer[:, :1], TOKENS[:1], answer[:, 1:]], axis=1)
    )
    fields = batch(config, TOKENS[:1], prompt)
    model = build_model(config)
    hidden = model.apply({"params": params}, fields, method="hidden")
    whole = model.apply({"params": params}, hidden, method="logits")[0, -5:]
    logits, memory = PREFILL(config, params, TOKENS[:1], jnp.array([9]), start_id=START, capacity=4)
    steps = [logits[0]]
    for token in answer[0, 1:]:
        logits, memory = STEP(config, params, memory, jnp.array([token]))
        steps.append(logits[0])
    np.testing.assert_allclose(np.stack(steps), whole, rtol=1e-5, atol=1e-4)  # logits of about 10


@pytest.mark.parametrize("name", ["unrolled", "windowed", "merged"])
def test_a_step_copies_no_cache(name):
    """What is kept has a width that nothing else in the program has."""
    config, params = laid_out(*for_decoding(*pair(name)), 2)
    capacity, lengths = 37, jnp.array([9])
    plan, settings = (
        DecodingPlan(Choosing(config.vocab_size), capacity, START),
        greedy_rows(1, capacity),
    )
    begun = start_compiled(config, plan, params, TOKENS[:1], lengths, settings)
    width = jax.tree.leaves(begun.memory.cache)[0].shape[-1]
    text = advance_compiled.lower(config, plan, params, begun, jnp.int32(5)).compile().as_text()
    kept = re.compile(
        rf"f32\[1,{config.num_kv_heads},({config.head_dim},{width}|{width},"
        rf"{config.head_dim})\]"
    )
    lines = [line for line in text.splitlines() if kept.search(line)]
    assert any("dynamic-update-slice" in line for line in lines)
    assert not [line for line in lines if re.search(r"= \S+ copy\(", line)]


@pytest.mark.parametrize("name", ["paper", "windowed", "merged"])
def test_a_server_s_slots_hold_what_was_kept_heads_first(name):
    """Read at a narrow width, inserted into a wider slot, and gone on from there."""
    config, params = laid_out(*for_decoding(*pair(name)), 2)
    plan = SlotPlan(DecodingPlan(Choosing(config.vocab_size), 3, START), 2, 12)
    prefilled = read_compiled(config, plan, params, TOKENS[:1], jnp.array(9))
    running = insert_compiled(
        config,
        plan,
        empty(config, plan, params),
        jnp.array(1),
        prefilled,
        jnp.zeros(3, jnp.int32),
        greedy_rows(1, 3),
    )
    running = advance_compiled(config, plan.decoding, params, running, jnp.int32(2))
    alone = advance_compiled(
        config,
        plan.decoding,
        params,
        start_compiled(
            config, plan.decoding, params, TOKENS[:1], jnp.array([9]), greedy_rows(1, 3)
        ),
        jnp.int32(2),
    )
    assert running.tokens_RxN[1].tolist() == alone.tokens_RxN[0].tolist()
    np.testing.assert_allclose(running.log_probs_RxN[1], alone.log_probs_RxN[0], atol=3e-5)


@pytest.mark.parametrize(
    "name, size, panels, shards",
    [
        ("paper", "small", False, 0),
        ("paper", "middle", True, 0),
        ("paper", "large", True, 0),
        ("windowed", "small", False, 0),
        ("windowed", "middle", True, 0),
        ("windowed", "large", False, 2),
    ],
)
def test_models_on_cpus_get_the_layout_of_their_size(name, size, panels, shards, monkeypatch):
    config, params = pair(name)
    if size != "small":
        monkeypatch.setattr(ready, "PANELS_FROM", 1)
        monkeypatch.setattr(ready, "PANELS_FROM_DECODER_ONLY", 1)
    if size == "large":
        monkeypatch.setattr(ready, "LARGE_KERNEL", 1)
    monkeypatch.setattr(ready, "available_cores", lambda: 2)
    made, kernels = ready_for_decoding(config, params)
    how = made.execution
    assert (how.cpu_panels, how.cpu_shards) == (panels, shards)
    assert how.encoder_dtype == ""  # it was trained in float32
    plain = two_steps(*for_decoding(config, params))
    np.testing.assert_allclose(two_steps(made, kernels), plain, atol=3e-5)
    # A batch split over devices keeps kernels whole.
    monkeypatch.setattr(ready, "on_one_device", lambda params: False)
    assert not ready_for_decoding(config, params)[0].execution.laid_out


def test_a_model_of_bfloat16_encodes_in_it_where_the_cpu_can(monkeypatch):
    config, params = pair("paper")
    config = config.replace(dtype="bfloat16")
    monkeypatch.setattr(ready, "LARGE_KERNEL", 1)
    plain = two_steps(*ready_for_decoding(config, params, "float32"))
    for able, dtype in ((True, "bfloat16"), (False, "")):
        monkeypatch.setattr(ready, "cpu_has_bfloat16", lambda able=able: able)
        made, kernels = ready_for_decoding(config, params)
        assert (made.dtype, made.execution.encoder_dtype) == ("float32", dtype)
        up = jax.tree.leaves(kernels["encoder"]["layers_0"]["mlp"]["up"])
        assert {x.dtype.name for x in up} == {dtype or "float32"}
        apart = np.abs(two_steps(made, kernels) - plain).max() / np.abs(plain).max()
        assert apart < (0.02 if able else 1e-5)


def test_an_encoder_in_bfloat16_rounds_its_activation_once():
    config = pair("paper")[0].replace(dtype="bfloat16", accumulate_in_float32=True)
    x = jnp.linspace(-3, -0.1, 500, dtype=jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    true = wide / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    apart = [
        np.abs(np.asarray(made, np.float64) / true - 1).max()
        for made in (CpuMlp(config).activate(x), Mlp(config).activate(x))
    ]
    assert apart[0] < 2**-8 < 0.1 < apart[1]  # bfloat16 has 8 bits; tanh nears -1


def test_inference_on_cpus_attends_by_blocks_and_training_does_not():
    config, params = pair("paper")
    assert config.execution.attention_block == 0
    made = ready_for_decoding(config, params)[0].execution
    assert made.attention_block == ready.ATTENTION_BLOCK > 0
    with pytest.raises(ConfigError, match="attention_block is -1"):
        config.replace(attention_block=-1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cpu_shards": 2, "scan_layers": True}, "cpu_shards 2 with scan_layers=True; expected"),
        ({"cpu_panels": True, "scan_layers": True}, "cpu_panels is True .* scan_layers=True"),
        ({"cpu_shards": 2, "cpu_panels": True, "scan_layers": False}, "one of the two"),
    ],
)
def test_layouts_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        preset("test", **changes)


def test_an_encoder_decoder_has_panels_alone():
    with pytest.raises(ConfigError, match="cpu_shards is 2 in an encoder-decoder"):
        build_model(preset("test", cpu_shards=2, scan_layers=False))
