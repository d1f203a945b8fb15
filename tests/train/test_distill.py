"""Training on a teacher's stored distributions: objective, refusals, meshes, processes, cost."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.cost.flops import training_flops
from encdec.data.batches import Batches
from encdec.data.mixing import mix_records
from encdec.data.records import open_records
from encdec.data.teacher_rows import open_teacher
from encdec.distill.cost import student_cost
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.errors import CheckpointError, ConfigError, DataError
from encdec.model import build_model, preset
from encdec.saved.saved_params import load_params_for_inference
from encdec.train.job import prepare_job
from encdec.train.loop import train
from encdec.train.metrics import read_metrics
from encdec.train.program import abstract_batch, build_program
from encdec.train.run_config import parse_config
from encdec.train.run_fields import DistillConfig, LossConfig
from encdec.train.sharding import make_mesh
from encdec.train.step import batch_metrics
from tests.devices import one_device
from tests.distill.conftest import stored, teacher  # noqa: F401
from tests.model.examples import drawn
from tests.train.conftest import DECAYING, TARGETS, random_pairs, small_run, write_records

ARCHITECTURES = {"encoder_decoder": "test", "decoder_only": "test-dec"}


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records") / "distill", random_pairs(42, 0))


def student(records, stored, **changes):
    distill = {"teacher": str(stored)} | changes.pop("distill", {})
    return small_run(records, **({"distill": distill} | changes))


def batch_of(records, stored, architecture):
    opened = open_records(records)
    return Batches(
        opened, global_batch=8, layout=architecture, columns=[open_teacher(stored, opened)]
    )[0]


@functools.cache
def model_of(architecture, **changes):
    model = build_model(preset(ARCHITECTURES[architecture], vocab_size=264, **changes))
    return model, jax.tree.map(lambda x: 10 * x, drawn(model, 1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_objective_is_what_its_definition_says(architecture, records, stored):
    """Token by token over the pairs as stored, in numpy and float64; both layouts."""
    batch = batch_of(records, stored, architecture)
    model, params = model_of(architecture)
    forward = jax.jit(
        lambda params, batch: (
            model.apply({"params": params}, batch),
            batch_metrics(
                model,
                params,
                batch,
                LossConfig(z_loss=0.0),
                TARGETS,
                None,
                DistillConfig("x"),
                jnp.float32(0.7),
            ),
        )
    )
    logits, metrics = forward(params, batch)
    logits, losses = np.asarray(logits, np.float64), metrics.losses
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    divergence = cross_entropy = entropy = tokens = 0.0
    for row in range(8):
        places = np.flatnonzero(batch["decoder_loss_weights"][row])
        tokens += len(places)
        entropy += batch["teacher_entropy"][row].sum()
        divergence -= batch["teacher_entropy"][row].sum()
        for place in places:
            cross_entropy -= log_probs[row, place, batch["decoder_target_tokens"][row, place]]
        for weight, where, token in zip(
            *(batch[f"teacher_{name}"][row] for name in ("weights", "positions", "ids"))
        ):
            divergence -= weight * log_probs[row, places[where], token]
    assert losses.weight == tokens
    np.testing.assert_allclose(losses.cross_entropy, cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(losses.teacher.divergence, divergence, rtol=1e-5)
    np.testing.assert_allclose(losses.teacher.entropy, entropy, rtol=1e-5)
    np.testing.assert_allclose(losses.objective, 0.7 * divergence + 0.3 * cross_entropy, rtol=1e-5)


def test_vocabulary_tiles_change_neither_loss_nor_gradient(records, teacher, tmp_path):
    """Top-k rows, a tail, reverse KL and a temperature: everything that a tile has to bring."""
    store_teacher_logits(
        teacher=teacher, records=records, out=tmp_path / "top", method="top_k", k=7, temperature=1.7
    )
    batch = batch_of(records, tmp_path / "top", "encoder_decoder")
    distill = DistillConfig("x", "reverse_kl", temperature=1.7)
    model, params = model_of("encoder_decoder")

    def gradients(tile):
        def objective(params):
            metrics = batch_metrics(
                model,
                params,
                batch,
                LossConfig(0.1, 0.1, tile),
                TARGETS,
                None,
                distill,
                jnp.float32(0.7),
            )
            return metrics.losses.objective, metrics.losses

        return jax.jit(jax.grad(objective, has_aux=True))(params)

    (wanted, sums), (tiled, tiled_sums) = gradients(0), gradients(100)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), sums, tiled_sums)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale), wanted, tiled
    )


def test_four_identical_examples_are_learned_to_a_divergence_of_a_tenth(teacher, tmp_path):
    """The authors' own acceptance, 0.9 KL + 0.1 CE; they allow 512 epochs, here are 256."""
    same = write_records(tmp_path / "same", [[("abcdefgh", "hgfedc")]] * 4)
    store_teacher_logits(teacher=teacher, records=same, out=tmp_path / "stored", method="full")
    run = parse_config(
        student(same, tmp_path / "stored", batch_size=4, steps=256, schedule=DECAYING)
    )
    program = build_program(
        run, run.model_config(), make_mesh(run.mesh, jax.devices()[:1]), TARGETS
    )
    opened = open_records(same)
    batch = Batches(opened, global_batch=4, columns=[open_teacher(tmp_path / "stored", opened)])[0]
    batch, state = jax.device_put(batch, program.batch_sharding), program.init()
    for _ in range(run.steps):
        state, metrics = program.train_step(state, batch)
    losses = metrics.sums.losses
    assert losses.teacher.divergence / losses.weight <= 0.1
    assert metrics.alpha == np.float32(0.9)
    # A teacher that has hardly learned leaves the gold targets unlikely, as it should.
    assert losses.cross_entropy / losses.weight > 0.3


@pytest.mark.usefixtures("one_device")
def test_the_run_reports_resumes_and_refuses_another_teacher(records, stored, teacher, tmp_path):
    run = student(
        records,
        stored,
        steps=4,
        log_every=1,
        accumulation=1,
        distill={"alpha_schedule": "warmup", "warmup_steps": 4},
    )
    train(run, tmp_path / "whole")
    train(run, tmp_path / "work", stop_at=2)
    train(run, tmp_path / "work")
    whole, work = (read_metrics(tmp_path / name) for name in ("whole", "work"))
    timing = (
        "time",
        "train/step_seconds",
        "train/source_tokens_per_second",
        "train/target_tokens_per_second",
    )
    plain = lambda lines: [
        {k: v for k, v in x.items() if k not in timing and not k.startswith("goodput/")}
        for x in lines
    ]
    assert plain(whole) == plain(work)
    np.testing.assert_allclose(
        [x["train/alpha"] for x in whole], [0.225, 0.45, 0.675, 0.9], rtol=1e-6
    )
    for line in whole:
        soft = line["train/alpha"] * line["train/distill_loss"]
        hard = (1 - line["train/alpha"]) * line["train/loss"]
        np.testing.assert_allclose(line["train/objective"], soft + hard, rtol=1e-5)
        assert line["train/teacher_entropy"] > 0
    store_teacher_logits(
        teacher=teacher, records=records, out=tmp_path / "others", draws=20, seed=1
    )
    with pytest.raises(CheckpointError, match="teacher.fingerprint"):
        train(
            student(
                records,
                tmp_path / "others",
                steps=4,
                distill=run["distill"] | {"teacher": str(tmp_path / "others")},
            ),
            tmp_path / "work",
        )


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"distill": {"loss": "reverse_kl"}}, ConfigError, "--method=top_k"),
        ({"distill": {"temperature": 2.0}}, ConfigError, "was stored at 1.0.*--temperature=2.0"),
        ({"distill": {"teacher": "/nowhere"}}, DataError, "/nowhere does not exist"),
        ({"distill": {"alpha": 1.5}}, ConfigError, "config.distill.alpha is 1.5"),
        (
            {"distill": {"alpha_schedule": "warmup"}},
            ConfigError,
            "config.distill.warmup_steps is 0",
        ),
        ({"distill": {"loss": "forward"}}, ConfigError, "'forward_kl'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes, error, message, records, stored, tmp_path
):
    with pytest.raises(error, match=message):
        prepare_job(student(records, stored, **changes), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_mixture_has_a_teacher_for_each_part(records, stored, teacher, tmp_path):
    other = write_records(tmp_path / "other", random_pairs(10, 9))
    store_teacher_logits(teacher=teacher, records=other, out=tmp_path / "other-stored", draws=9)
    mixture = mix_records([records, other], [1, 1])
    column = open_teacher(f"{stored},{tmp_path / 'other-stored'}", mixture)
    got = column.fields([3, -1, 42 + 7])
    first = open_teacher(stored, open_records(records)).fields([3])
    second = open_teacher(tmp_path / "other-stored", open_records(other)).fields([7])
    for row, wanted in ((0, first), (2, second)):
        for name, value in wanted.items():
            width = value.shape[1]
            np.testing.assert_array_equal(got[name][row, :width], value[0])
            assert (got[name][row, width:] == 0).all()
    assert all((value[1] == 0).all() for value in got.values())
    with pytest.raises(ConfigError, match="give one for each part"):
        open_teacher(stored, mixture)
    with pytest.raises(DataError, match="read other records"):
        open_teacher(f"{stored},{stored}", mixture)


def test_two_hosts_read_one_hosts_teacher_in_halves(records, stored):
    """With test_processes.py's runs of several processes: those learn from a teacher as one does,
    since the step is the same program and this is all that differs."""
    opened = open_records(records)
    column = open_teacher(stored, opened)
    make = lambda index, count: Batches(
        opened, global_batch=8, columns=[column], seed=3, host_index=index, host_count=count
    )[1]
    whole, first, second = make(0, 1), make(0, 2), make(1, 2)
    assert any(name.startswith("teacher_") for name in whole)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([first[name], second[name]]))


def test_eight_devices_learn_as_one_device(records, stored, tmp_path):
    changes = {"model_overrides": {"scan_layers": False, "encoder_layers": 1}}
    run = student(records, stored, batch_size=16, accumulation=2, steps=3, log_every=1, **changes)
    with one_device():
        train(run, tmp_path / "one")
    train(run | {"mesh": {"data": 4, "fsdp": 2}}, tmp_path / "eight")
    one, eight = (read_metrics(tmp_path / name) for name in ("one", "eight"))
    assert len(one) == len(eight) == 3
    for a, b in zip(one, eight):
        for name in ("train/loss", "train/distill_loss", "train/objective", "train/gradient_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    _, params_one, _ = load_params_for_inference(tmp_path / "one")
    _, params_eight, _ = load_params_for_inference(tmp_path / "eight")
    embeddings = [p["embedder"]["embedding"] for p in (params_one, params_eight)]
    # Where a gradient is next to nothing, its rounding says which way a step of 0.01 goes.
    np.testing.assert_allclose(*embeddings, rtol=1e-4, atol=3e-5)


def test_at_330m_the_teacher_costs_less_than_a_tenth_of_the_step():
    """By XLA's own count of the lowered program: everything that the teacher adds, over the
    model's FLOPs; and no array of the size of the logits next to those that plain training has."""
    inputs, targets, rows = 1024, 256, 8
    model = preset("330m")

    def lowered(**distill):
        run = parse_config({"model": "330m", "batch_size": rows, "distill": distill})
        program = build_program(run, model, make_mesh(run.mesh, jax.devices()[:1]), targets)
        pairs = 20 * targets if distill else 0
        batch = abstract_batch(program, rows, inputs, targets, teacher_pairs=pairs)
        return program.train_step.lower(program.abstract_state, batch)

    plain, taught = lowered(), lowered(teacher="somewhere")
    counts = [lower.cost_analysis() for lower in (plain, taught)]
    extra = counts[1]["flops"] - counts[0]["flops"]
    assert 0 < extra < 0.001 * training_flops(model, inputs, targets, batch_size=rows)
    card = types.SimpleNamespace(rows=rows, inputs_length=inputs, targets_length=targets)
    np.testing.assert_allclose(student_cost(model, card, 20).extra_flops, extra, rtol=0.02)
    # Every operation's operands and results, before fusion, of one layer's body of the scans.
    read = [count["bytes accessed"] for count in counts]
    assert read[0] < read[1] < 1.1 * read[0]
    dots = [lower.as_text().count("stablehlo.dot_general") for lower in (plain, taught)]
    assert dots[0] == dots[1]
    assert "f32[8,256,32128]" not in str(taught.in_avals)
