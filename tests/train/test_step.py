"""The step: the same on every mesh, in any number of micro-batches, from the seed alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.data.batches import Batches
from encdec.data.records import open_records
from encdec.hardware.hlo import executions, parse, shape_bytes
from encdec.hardware.predict import COLLECTIVES
from encdec.train.program import Program, abstract_batch, build_program
from encdec.train.run_config import parse_config
from encdec.train.sharding import make_mesh
from encdec.train.step import _accumulated
from tests.train.conftest import DECAYING, INPUTS, TARGETS, small_run

ARCHITECTURES = {"encoder_decoder": "test", "decoder_only": "test-dec"}
MODELS = ARCHITECTURES | {"merged": "test"}
STEPS = 10


@functools.cache
def program_on(
    architecture: str,
    data: int,
    fsdp: int,
    tensor: int,
    accumulation: int = 1,
    dropout: float = 0.0,
    scan_layers: bool = True,
    **mesh,
) -> Program:
    run = parse_config(
        small_run(
            model=MODELS[architecture],
            accumulation=accumulation,
            schedule=DECAYING,
            model_overrides={
                "mlp_dropout": dropout,
                "attention_dropout": dropout,
                "scan_layers": scan_layers,
                "merged_attention": architecture == "merged",
            },
            mesh={"data": data, "fsdp": fsdp, "tensor": tensor} | mesh,
        )
    )
    mesh = make_mesh(run.mesh, jax.devices()[: data * fsdp * tensor])
    return build_program(run, run.model_config(), mesh, TARGETS)


@functools.cache
def start(architecture: str):
    """The first state as host arrays; drawn once, since every mesh draws the same."""
    return jax.device_get(program_on(architecture, 1, 1, 1).init())


def batches(architecture: str, records) -> list[dict[str, np.ndarray]]:
    layout = "encoder_decoder" if architecture == "merged" else architecture
    source = Batches(open_records(records), global_batch=8, layout=layout)
    return [source[step] for step in range(STEPS)]


def run_steps(program: Program, state, data) -> tuple[np.ndarray, list]:
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
    state = jax.device_put(state, shardings)
    history = []
    for batch in data:
        state, metrics = program.train_step(state, jax.device_put(batch, program.batch_sharding))
        history.append(jax.device_get(metrics))
    losses = [m.sums.losses.cross_entropy / max(m.sums.losses.weight, 1) for m in history]
    return np.array(losses, np.float64), [history, jax.device_get(state)]


@functools.cache
def on_one_device(architecture: str, records):
    return run_steps(
        program_on(architecture, 1, 1, 1), start(architecture), batches(architecture, records)
    )


@pytest.mark.parametrize(
    "architecture, mesh",
    [("encoder_decoder", (8, 1, 1)), ("encoder_decoder", (2, 2, 2)), ("decoder_only", (2, 2, 2))],
)
def test_every_mesh_gives_the_losses_of_one_device(architecture, mesh, records):
    wanted, (history, _) = on_one_device(architecture, records)
    program = program_on(architecture, *mesh)
    assert not program.unsharded
    losses, (sharded_history, _) = run_steps(
        program, start(architecture), batches(architecture, records)
    )
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert losses[-1] < losses[0]
    for a, b in zip(history, sharded_history):
        assert a.sums.source_tokens == b.sums.source_tokens
        assert a.sums.target_tokens == b.sums.target_tokens


def test_merged_attention_gives_the_losses_of_one_device_on_eight(records):
    data = batches("merged", records)[:3]
    wanted, _ = run_steps(program_on("merged", 1, 1, 1), start("merged"), data)
    losses, _ = run_steps(program_on("merged", 2, 2, 2), start("merged"), data)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


def test_parameters_gathered_at_every_use_give_the_same_losses(records):
    wanted, _ = on_one_device("encoder_decoder", records)
    program = program_on("encoder_decoder", 2, 4, 1, gather="use", reduce_dtype="float32")
    losses, _ = run_steps(program, start("encoder_decoder"), batches("encoder_decoder", records))
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


def test_parameters_are_drawn_alike_on_every_mesh():
    drawn = jax.device_get(program_on("encoder_decoder", 2, 2, 2).init().params)
    jax.tree.map(np.testing.assert_array_equal, drawn, start("encoder_decoder").params)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_four_micro_batches_equal_one_batch(architecture, records):
    data = batches(architecture, records)
    wanted, (_, state) = on_one_device(architecture, records)
    losses, (_, accumulated) = run_steps(
        program_on(architecture, 1, 1, 1, accumulation=4), start(architecture), data
    )
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
        accumulated.params,
        state.params,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_of_the_mean_over_target_tokens(architecture, records):
    """Its norm, from the model's logits, by nothing of the step's own code."""
    params = start(architecture).params
    batch, fields = batches(architecture, records)[0], batches("encoder_decoder", records)[0]
    model = program_on(architecture, 1, 1, 1).model

    def cross_entropy(params):
        logs = jax.nn.log_softmax(model.apply({"params": params}, batch))
        picked = jnp.take_along_axis(logs, batch["decoder_target_tokens"][..., None], axis=-1)
        return -(picked[..., 0] * batch["decoder_loss_weights"]).sum()

    total, gradient = jax.jit(jax.value_and_grad(cross_entropy))(params)
    tokens = (fields["decoder_segment_ids"] > 0).sum()
    assert tokens < 0.8 * fields["decoder_segment_ids"].size  # padding would show
    norm = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in jax.tree.leaves(gradient)))
    seen = on_one_device(architecture, records)[1][0][0]
    np.testing.assert_allclose(seen.gradient_norm, norm / tokens, rtol=1e-4)
    np.testing.assert_allclose(seen.sums.losses.cross_entropy, total, rtol=1e-5)


# Loss, gradient norm and parameter norm of ten steps' first and last. Other numbers mean that
# training has changed: in a change that means to, copy the new ones from the message.
GOLDEN = {
    "encoder_decoder": [[5.54063, 3.55431, 17.53337], [2.48031, 1.20652, 19.88785]],
    "decoder_only": [[5.52338, 4.46521, 15.59313], [2.42158, 1.13830, 18.19511]],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_golden_steps(architecture, records):
    losses, (history, _) = on_one_device(architecture, records)
    seen = [
        [losses[i], float(history[i].gradient_norm), float(history[i].param_norm)] for i in (0, -1)
    ]
    np.testing.assert_allclose(seen, GOLDEN[architecture], rtol=1e-3, err_msg=f"now {seen}")


@pytest.mark.parametrize("mesh, gather", [((1, 2, 2), "step"), ((2, 2, 1), "use")])
def test_micro_batches_on_every_mesh_equal_one_batch(mesh, gather, records):
    wanted, (history, state) = on_one_device("encoder_decoder", records)
    program = program_on("encoder_decoder", *mesh, accumulation=2, gather=gather)
    losses, (accumulated_history, accumulated) = run_steps(
        program, start("encoder_decoder"), batches("encoder_decoder", records)
    )
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    for a, b in zip(history, accumulated_history):
        assert a.sums.source_tokens == b.sums.source_tokens
        assert a.sums.target_tokens == b.sums.target_tokens
        np.testing.assert_allclose(a.gradient_norm, b.gradient_norm, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
        accumulated.params,
        state.params,
    )


def collective_bytes(program: Program) -> tuple[float, float]:
    """Bytes that a step's collectives handle on a device, all and those within loops."""
    batch = abstract_batch(program, 8, INPUTS, TARGETS)
    text = program.train_step.lower(program.abstract_state, batch).compile().as_text()
    found = [
        (e.times, e.times * shape_bytes(e.instruction.shape))
        for body in executions(parse(text))
        for e in body
        if e.instruction.opcode.removesuffix("-start") in COLLECTIVES
    ]
    return sum(size for _, size in found), sum(size for times, size in found if times > 1)


def test_devices_add_up_micro_batches_before_they_talk():
    one, _ = collective_bytes(program_on("encoder_decoder", 2, 2, 1, scan_layers=False))
    two, looped = collective_bytes(
        program_on("encoder_decoder", 2, 2, 1, accumulation=2, scan_layers=False)
    )
    matrices = sum(
        x.size
        for x in jax.tree.leaves(program_on("encoder_decoder", 1, 1, 1).abstract_state.params)
    )
    assert one > 4 * matrices  # gradients and parameters do travel, and it is seen
    assert two < 1.05 * one and looped < 0.01 * one


def test_shards_of_micro_batches_have_dropout_masks_of_their_own(records):
    """The same row in every place: equal masks would give equal losses in all places."""
    batch = batches("encoder_decoder", records)[0]
    alike = {name: np.repeat(x[:1], 8, axis=0) for name, x in batch.items()}
    losses = [
        run_steps(
            program_on("encoder_decoder", *mesh, accumulation=2, dropout=0.3),
            start("encoder_decoder"),
            [alike],
        )[0][0]
        for mesh in [(1, 1, 1), (2, 1, 1)]
    ]
    assert len(set(losses)) == 2


def test_micro_batches_have_dropout_keys_of_their_own():
    """Of a gradient that is nothing but what its key draws, from one row in every place."""
    drawn = lambda params, batch, key, alpha: (jax.random.uniform(key, (5,)), batch["rows"].sum())
    batch, params, key = {"rows": jnp.ones((4, 2))}, jnp.zeros(5), jax.random.key(3)
    sums, _ = _accumulated(drawn, params, batch, key, None, pieces=4, apart=False)
    keys = [jax.random.fold_in(key, index) for index in range(4)]
    expected = sum(np.asarray(jax.random.uniform(k, (5,))) for k in keys)
    np.testing.assert_allclose(sums, expected, rtol=1e-6)


def test_dropout_follows_from_seed_and_step_alone(records):
    program = program_on("encoder_decoder", 1, 1, 1, accumulation=2, dropout=0.3)
    data = batches("encoder_decoder", records)
    same = [data[0]] * 2
    first = run_steps(program, start("encoder_decoder"), same)[0]
    assert (first == run_steps(program, start("encoder_decoder"), same)[0]).all()
    later = start("encoder_decoder").replace(step=np.int32(7))
    assert run_steps(program, later, same)[0][0] != first[0]


def test_a_batch_without_targets_gives_no_nan(records):
    empty = jax.tree.map(np.zeros_like, batches("encoder_decoder", records)[0])
    program = program_on("encoder_decoder", 1, 1, 1)
    history, state = run_steps(program, start("encoder_decoder"), [empty])[1]
    assert history[0].gradient_norm == 0 and np.isfinite(history[0].param_norm)
    assert history[0].sums.target_tokens == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_is_not_counted_and_both_architectures_count_alike(architecture, records):
    batch = batches("encoder_decoder", records)[0]
    metrics = on_one_device(architecture, records)[1][0][0]
    assert metrics.sums.source_tokens == (batch["encoder_segment_ids"] > 0).sum()
    assert metrics.sums.target_tokens == (batch["decoder_segment_ids"] > 0).sum()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_paid_per_target_token(architecture):
    program = program_on(architecture, 1, 1, 1)
    batch = abstract_batch(program, 8, INPUTS, TARGETS)
    text = str(jax.make_jaxpr(program.train_step)(program.abstract_state, batch))
    assert f"f32[8,{TARGETS},264]" in text
    assert f"f32[8,{INPUTS + TARGETS},264]" not in text


def test_the_state_is_donated(records):
    program = program_on("encoder_decoder", 1, 1, 1)
    state = jax.device_put(
        start("encoder_decoder"), jax.tree.map(lambda x: x.sharding, program.abstract_state)
    )
    batch = batches("encoder_decoder", records)[0]
    program.train_step(state, jax.device_put(batch, program.batch_sharding))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
