"""Checkpoints: what is kept, what other meshes read, and what damage does."""

from __future__ import annotations

import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from encdec.data.records import open_records
from encdec.distill.rollout import ON_POLICY, _identity
from encdec.distill.teachers import teacher_model
from encdec.errors import CheckpointError, ConfigError
from encdec.saved.fingerprint import fingerprints, mismatches
from encdec.saved.saved_config import origin, read_config
from encdec.saved.saved_params import load_params_for_inference, saved_steps
from encdec.train.checkpoints import Checkpoints, kept_steps
from encdec.train.evaluator import Evaluator
from encdec.train.loop import train
from encdec.train.program import build_program
from encdec.train.run_config import parse_config
from encdec.train.run_fields import CheckpointConfig, MeshConfig
from encdec.train.sharding import make_mesh
from encdec.train.state import TrainState
from tests.train.conftest import small_run

SPECS = [
    PartitionSpec(),
    PartitionSpec("data"),
    PartitionSpec("fsdp", "tensor"),
    PartitionSpec(("data", "fsdp"), None, "tensor"),
    PartitionSpec(None, ("tensor",)),
]


# Fingerprints.


def test_a_fingerprint_does_not_depend_on_where_the_array_lies():
    values = np.random.default_rng(0).normal(size=(8, 16, 4)).astype(np.float32)
    wanted = fingerprints({"x": jnp.asarray(values)})
    for shape in ((2, 2, 2), (1, 4, 2)):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"))
        for spec in SPECS:
            placed = jax.device_put(values, NamedSharding(mesh, spec))
            assert fingerprints({"x": placed}) == wanted, (shape, spec)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.int8, np.bool_])
def test_every_single_bit_counts(dtype):
    random = np.random.default_rng(1)
    values = (random.normal(size=37) * 50).astype(dtype)
    values[0] = 0
    wanted = fingerprints(jnp.asarray(values))
    if dtype is np.bool_:
        flips = [(place, 0) for place in range(37)]
    else:
        bits = 8 * values.dtype.itemsize
        flips = [(random.integers(37), bit) for bit in range(bits)]
    for place, bit in flips:
        changed = values.copy()
        raw = changed.view(np.uint8).reshape(37, -1)
        raw[place, bit // 8] ^= np.uint8(1 << bit % 8)
        assert mismatches(fingerprints(jnp.asarray(changed)), wanted), (place, bit)
    swapped = values.copy()
    a, b = np.flatnonzero(values != values[0])[0], 0
    swapped[[a, b]] = swapped[[b, a]]
    assert fingerprints(jnp.asarray(swapped)) != wanted


# What is kept.

CONFIGS = st.builds(
    CheckpointConfig,
    keep=st.integers(0, 4),
    keep_best=st.integers(0, 3),
    keep_every=st.sampled_from([0, 3, 10]),
)


# Losses of the same steps, some of them equal, some unknown.
STEPS_AND_LOSSES = st.dictionaries(
    st.integers(1, 60), st.one_of(st.none(), st.integers(0, 5)), min_size=1
)


@given(STEPS_AND_LOSSES, CONFIGS)
def test_newest_best_and_periodic_ones_stay(drawn, config):
    steps, losses = set(drawn), {s: float(x) for s, x in drawn.items() if x is not None}
    kept = kept_steps(list(steps), config, losses | {99: 0.0})
    if not config.keep:
        assert kept == steps
        return
    newest = set(sorted(steps)[-config.keep :])
    periodic = {step for step in steps if config.keep_every and step % config.keep_every == 0}
    # Lowest loss first, of equal ones the earlier; said without sorting by both.
    better = lambda step: {
        s for s in losses if losses[s] < losses[step] or losses[s] == losses[step] and s < step
    }
    best = {step for step in losses if len(better(step)) < config.keep_best}
    assert kept == newest | periodic | best


@pytest.mark.usefixtures("one_device")
def test_a_loss_that_is_not_finite_is_never_the_best():
    config = CheckpointConfig(keep=1, keep_best=1)
    assert kept_steps([1, 2, 3, 4], config, {1: math.nan, 2: 1.5, 3: math.nan}) == {2, 4}
    assert kept_steps([1, 2], config, {1: math.nan}) == {2}


def test_a_run_keeps_its_best(records, eval_records, tmp_path, monkeypatch):
    losses = {2: 5.0, 4: 1.0, 6: 4.0, 8: 3.0, 10: 2.0, 12: 6.0}
    measured = iter(losses.values())
    evaluate = lambda self, params, notice: {"eval/loss": next(measured)}
    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    config = small_run(
        records,
        steps=12,
        eval={"every": 2},
        data={"eval_records": str(eval_records)},
        checkpoint={"every": 2, "keep": 1, "keep_best": 1, "keep_every": 6},
    )
    train(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [4, 6, 12]


def test_a_best_that_nobody_measures_is_refused(records):
    for changes in (
        {"checkpoint": {"keep_best": 1}},
        {
            "checkpoint": {"keep_best": 1, "every": 5},
            "eval": {"every": 10},
            "data": {"eval_records": "x"},
        },
    ):
        with pytest.raises(ConfigError, match="config.checkpoint.keep_best is 1"):
            parse_config(small_run(records, **changes))


# Other meshes.


@pytest.mark.parametrize("mesh", [(2, 2, 1), (1, 1, 8)])
def test_a_state_saved_on_4x2_is_read_on_other_meshes(mesh, saved_on_4x2):
    workdir, wanted = saved_on_4x2
    run = parse_config(small_run(mesh=dict(zip(("data", "fsdp", "tensor"), mesh))))
    devices = jax.devices()[: np.prod(mesh)]
    program = build_program(run, run.model_config(), make_mesh(run.mesh, devices), 12)
    checkpoints = Checkpoints(workdir)
    state, step = checkpoints.restore(program.abstract_state)
    checkpoints.close()
    assert step == 3 and int(state.step) == 3
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), wanted
    )
    jax.tree.map(
        lambda x, place: x.sharding == place.sharding or pytest.fail(str(x.sharding)),
        state,
        program.abstract_state,
    )


@pytest.fixture(scope="module")
def saved_on_4x2(tmp_path_factory):
    """A state spread over data 4 x tensor 2, saved; and its values."""
    workdir = tmp_path_factory.mktemp("meshes")
    run = parse_config(small_run(mesh={"data": 4, "tensor": 2}))
    program = build_program(run, run.model_config(), make_mesh(MeshConfig(data=4, tensor=2)), 12)
    state = program.init()
    checkpoints = Checkpoints(workdir)
    checkpoints.save(3, state)
    checkpoints.close()
    return workdir, jax.device_get((state.params, state.opt_state))


# Damage.


def small_state(step: int) -> TrainState:
    random = np.random.default_rng(step)
    place = NamedSharding(jax.make_mesh((4, 2), ("data", "tensor")), PartitionSpec("data"))
    array = lambda *shape: jax.device_put(random.normal(size=shape).astype(np.float32), place)
    return TrainState(
        jax.device_put(jnp.int32(step), NamedSharding(place.mesh, PartitionSpec())),
        {"a": array(8, 40), "b": {"c": array(4)}},
        (array(8, 40), {"count": array(4)}),
    )


def save_two(workdir: pathlib.Path) -> dict[int, TrainState]:
    states = {step: small_state(step) for step in (1, 2)}
    checkpoints = Checkpoints(workdir)
    for step, state in states.items():
        checkpoints.save(step, state)
    checkpoints.close()
    return states


def restore(workdir: pathlib.Path, like: TrainState) -> tuple[TrainState, int, list[str]]:
    said: list[str] = []
    checkpoints = Checkpoints(workdir, say=said.append)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    try:
        state, step = checkpoints.restore(abstract)
        return state, step, said
    finally:
        checkpoints.close()


def same(a: TrainState, b: TrainState) -> bool:
    equal = jax.tree.map(lambda x, y: np.array_equal(*jax.device_get((x, y))), a, b)
    return all(jax.tree.leaves(equal))


def damage(path: pathlib.Path, how: str, random: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "truncated":
        content = content[: random.integers(len(content))] if content else content
    elif how == "bit-flipped":
        content[random.integers(len(content))] ^= 1 << random.integers(8)
    else:
        content[:] = random.bytes(len(content))
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "deleted", "bit-flipped", "overwritten"])
def test_a_damaged_file_is_found_and_the_last_good_step_is_used(how, tmp_path):
    """Every file of a checkpoint in turn: what is trained on is, to the bit, what was saved."""
    states = save_two(tmp_path / "whole")
    random = np.random.default_rng(0)
    names = sorted(
        p.relative_to(tmp_path / "whole" / "checkpoints" / "2")
        for p in (tmp_path / "whole" / "checkpoints" / "2").rglob("*")
        if p.is_file()
    )
    found = []
    for name in names:
        workdir = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", workdir)
        damage(workdir / "checkpoints" / "2" / name, how, random)
        state, step, said = restore(workdir, states[1])
        assert same(state, states[step]), name
        if step == 1:
            found.append(name)
            assert any("checkpoint 2 is damaged" in line for line in said), said
            assert any("falling back to checkpoint 1" in line for line in said), said
            assert (workdir / "damaged" / "2").is_dir() and saved_steps(workdir) == [1]
        else:
            assert not said, said
        shutil.rmtree(workdir)
    # Files that nobody needs (notes of times, records of superseded trees) may be damaged unseen;
    # what holds the arrays may not.
    assert {name.parts[0] for name in found} >= {"params", "optimizer", "fingerprints"}
    if how == "deleted":
        assert any(name.parts[:2] == ("params", "d") for name in found)


def test_values_that_were_exchanged_are_found_though_every_file_is_sound(tmp_path):
    states = save_two(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(checkpoints / "2" / "params")
    shutil.copytree(checkpoints / "1" / "params", checkpoints / "2" / "params")
    state, step, said = restore(tmp_path, states[1])
    assert step == 1 and same(state, states[1])
    assert "not what was saved (fingerprints differ)" in said[0]


def test_where_nothing_is_whole_nothing_is_moved(tmp_path):
    states = save_two(tmp_path)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "params" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact .*step 2.*step 1"):
        restore(tmp_path, states[1])
    assert saved_steps(tmp_path) == [1, 2] and not (tmp_path / "damaged").exists()


def test_what_cannot_be_read_for_the_moment_is_not_called_damaged(tmp_path, monkeypatch):
    states = save_two(tmp_path)
    import orbax.checkpoint as ocp

    for error in (PermissionError("no"), ValueError("UNAVAILABLE: try later")):

        def refuse(*arguments, error=error, **more):
            raise error

        monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", refuse)
        with pytest.raises(CheckpointError, match="cannot be read now"):
            restore(tmp_path, states[1])
    assert saved_steps(tmp_path) == [1, 2] and not (tmp_path / "damaged").exists()


def test_unfinished_folders_are_passed_over_and_cleared_away(tmp_path):
    states = save_two(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    left = checkpoints / "3.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints / "2", left)
    assert saved_steps(tmp_path) == [1, 2]
    state, step, said = restore(tmp_path, states[1])
    assert step == 2 and same(state, states[2]) and not said
    later = Checkpoints(tmp_path)
    later.save(3, small_state(3))
    later.close()
    assert not left.exists() and saved_steps(tmp_path) == [2, 3]


@pytest.mark.usefixtures("one_device")
def test_a_run_goes_back_to_its_last_good_step_and_ends_in_the_same_bits(records, tmp_path, capsys):
    config = small_run(records, steps=9, checkpoint={"every": 3, "keep": 3})
    train(config, tmp_path / "straight")
    train(config, tmp_path / "run", stop_at=6)
    for path in (tmp_path / "run" / "checkpoints" / "6" / "optimizer" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    # The parameters are whole: who needs them alone does not mind the optimizer's state.
    assert load_params_for_inference(tmp_path / "run")[2] == 6
    assert train(config, tmp_path / "run").step == 9
    said = capsys.readouterr().err
    assert "checkpoint 6 is damaged" in said and "falling back to checkpoint 3" in said
    _, wanted, _ = load_params_for_inference(tmp_path / "straight")
    _, got, _ = load_params_for_inference(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.usefixtures("one_device")
def test_inference_refuses_damaged_parameters(records, tmp_path):
    train(small_run(records, steps=2, checkpoint={"every": 1}), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "params" / "d")
    with pytest.raises(CheckpointError, match=r"2 is damaged: .*; other steps there: 1"):
        load_params_for_inference(tmp_path)
    assert load_params_for_inference(tmp_path, step=1)[2] == 1


# Averages.


@pytest.mark.usefixtures("one_device")
def test_the_last_checkpoints_are_averaged(records, tmp_path, capsys):
    from encdec.cli import main

    run = small_run(records, steps=4, checkpoint={"every": 1, "keep": 3})
    train(run, tmp_path / "run")
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "mean"
    assert main(["average", f"--checkpoint={tmp_path / 'run'}", "--last=3", f"--out={out}"]) == 0
    assert "steps 2, 3, 4" in capsys.readouterr().out
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    config, mean, step = load_params_for_inference(out)
    each = [load_params_for_inference(tmp_path / "run", step=s)[1] for s in (2, 3, 4)]
    assert step == 4 and config == load_params_for_inference(tmp_path / "run")[0]
    jax.tree.map(
        lambda got, *of: np.testing.assert_allclose(
            got, np.mean(np.stack(of).astype(np.float64), axis=0), rtol=1e-7, atol=0
        ),
        mean,
        *each,
    )
    assert origin(read_config(out)) == "mean of steps 2, 3, 4 of run"
    # As a teacher or a writer it is not the run, whose last step it has.
    opened, both = open_records(records), (out, tmp_path / "run")
    teachers = [teacher_model(model, opened).identity for model in both]
    assert teachers[0]["step"] == teachers[1]["step"] == 4
    writers = [_identity(read_config(model), 4, opened, ON_POLICY) for model in both]
    assert teachers[0]["fingerprint"] != teachers[1]["fingerprint"] and writers[0] != writers[1]
    # It is a model to start from, not a run to continue.
    with pytest.raises(CheckpointError, match="config.init_from="):
        train(run, out)
    train(
        small_run(records, steps=1, init_from=str(out), optimizer={"learning_rate": 1e-30}),
        tmp_path / "next",
    )
    jax.tree.map(
        np.testing.assert_array_equal, mean, load_params_for_inference(tmp_path / "next")[1]
    )
    base = ["average", f"--checkpoint={tmp_path / 'run'}"]
    for more, code in (
        (["--last=4", "--out=x"], 4),
        (["--steps=2,9", "--out=x"], 4),
        (["--last=1", "--out=x"], 2),
        (["--steps=2,b", "--out=x"], 2),
        (["--last=2", f"--out={out}"], 2),
    ):
        assert main([*base, *more]) == code
    with pytest.raises(SystemExit, match="2"):
        main([*base, "--last=2", "--out=hf://b/x"])
