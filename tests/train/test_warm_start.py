"""A run that starts from another's parameters, and one that ends when it no longer improves."""

from __future__ import annotations

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.data.prepare_command import main as prepare
from encdec.data.records import open_records
from encdec.data.vocabulary import ByteVocabulary, load_vocabulary
from encdec.errors import ConfigError, DataError
from encdec.model import build_model, preset, unroll_params
from encdec.model.parameter_names import path_name
from encdec.saved.lineage import Lineage, lineage
from encdec.saved.saved_config import origin
from encdec.saved.saved_params import load_params_for_inference, saved_steps
from encdec.train.loop import train
from encdec.train.metrics import read_metrics
from encdec.train.run_config import parse_config
from encdec.train.session import out_of_patience
from encdec.train.state import TrainState
from encdec.train.warm_start import SIZES, architecture, plan_start, start_from, with_source_model
from tests.devices import one_device
from tests.model.examples import drawn as drawn_params
from tests.train.conftest import random_pairs, small_run, write_records

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
@one_device()
def pretrained(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    train(small_run(records, steps=2), folder)
    return folder


def test_a_run_starts_where_another_ended(pretrained, records, tmp_path):
    # At a learning rate of next to nothing the parameters stay what they were.
    train(
        small_run(
            records, steps=1, init_from=str(pretrained), seed=5, optimizer={"learning_rate": 1e-30}
        ),
        tmp_path / "run",
    )
    _, before, _ = load_params_for_inference(pretrained)
    _, after, _ = load_params_for_inference(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    report = (tmp_path / "run" / "warm-start.txt").read_text()
    assert "0 dropped, 0 initialized randomly" in report and "embedder/embedding" in report


def test_the_cost_is_of_the_step_that_was_taken(records, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    longer = dict(seed=3)
    train(small_run(records, steps=2, **longer), source)
    tune = small_run(records, steps=1, init_from=str(source), seed=5)
    train(tune, run)
    before = lineage(run, 1)
    assert before.seeds == (5, 3)
    assert before.training_flops == pytest.approx(3 / 2 * lineage(source, 2).training_flops)
    train(small_run(records, steps=6, **longer), source)  # the source trains on
    train(tune, run)  # and the finished run is called again, which keeps what it noted
    assert lineage(run, 1) == before
    config = json.loads((run / "config.json").read_text())
    assert config["started_from"]["step"] == 2 and origin(config) == "trained from source"
    # Runs from before the note: the source's last step, as far as it is there.
    del config["started_from"]
    (run / "config.json").write_text(json.dumps(config))
    assert lineage(run, 1).training_flops == pytest.approx(7 / 3 * before.training_flops)
    shutil.rmtree(source)
    assert lineage(run, 1) == Lineage(None, None)


def plan_of(records, source, **changes):
    """The plan alone: no device work, nothing written."""
    run = with_source_model(parse_config(small_run(records, init_from=str(source), **changes)))
    return plan_start(run, run.model_config(), open_records(records).card)


def started(records, source, **changes):
    """The parameters that a run begins with, as names to arrays, and the account."""
    run = with_source_model(parse_config(small_run(records, init_from=str(source), **changes)))
    model = run.model_config()
    drawn = drawn_params(build_model(model), 7)
    plan = plan_start(run, model, open_records(records).card)
    state, origin = start_from(TrainState(jnp.int32(0), drawn, None), plan, model)
    assert origin.step == 2
    return named(state.params), origin, named(drawn)


def named(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def test_layers_stacked_or_apart_are_the_same_layers(pretrained, records, tmp_path):
    config, params, _ = load_params_for_inference(pretrained)
    apart = {"scan_layers": False, "fuse_projections": True}
    found, origin, _ = started(records, pretrained, model_overrides=apart)
    expected = named(unroll_params(params, config))
    assert found.keys() == expected.keys() == set(origin.loaded)
    assert not origin.initialized and not origin.dropped
    assert set(origin.converted) == {name for name in expected if "/layers_" in name}
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    # And back, by two runs that learn nothing.
    still = {"optimizer": {"learning_rate": 1e-30}, "steps": 1}
    train(
        small_run(records, init_from=str(pretrained), model_overrides=apart, **still),
        tmp_path / "apart",
    )
    assert "converted" in (tmp_path / "apart" / "warm-start.txt").read_text()
    back = plan_of(records, tmp_path / "apart")
    state = TrainState(jnp.int32(0), drawn_params(build_model(config), 7), None)
    state, _ = start_from(state, back, config)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"encoder_layers": 4}, "encoder_layers is 2 there and 4 here"),
        ({"decoder_layers": 2}, "decoder_layers is 1 there and 2 here"),
        ({"d_model": 64}, "d_model is 32 there and 64 here"),
        ({"num_kv_heads": 1}, "num_kv_heads"),
        ({"mlp_dim": 96}, "mlp_dim"),
        ({"head_dim": 16}, "head_dim"),
        ({"vocab_size": 512}, r"vocab_size is 512, and 264 in .*init_grow=True"),
        ({"vocab_size": 260}, r"tables of 264 rows; set --config.model_overrides.vocab_size=264"),
    ],
    ids=str,
)
def test_another_size_is_refused(pretrained, records, tmp_path, changes, words):
    run = small_run(records, init_from=str(pretrained), model_overrides=changes)
    with pytest.raises(ConfigError, match=words):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Every field that changes what is computed from the same sizes, with what else it needs.
FUNCTION = {
    "kv_pairing": {"kv_pairing": "grouped"},
    "qkv_bias": {"qkv_bias": False},
    "attention_out_bias": {"attention_out_bias": False},
    "qk_norm": {"qk_norm": True},
    "qk_norm_over_heads": {"qk_norm": True, "qk_norm_over_heads": True},
    "merged_attention": {"merged_attention": True},
    "encoder_window": {"attention_window": 8, "scan_layers": False, "encoder_window": (3, 2)},
    "encoder_unrotated_layers": {"scan_layers": False, "encoder_unrotated_layers": (0,)},
    "decoder_unrotated_layers": {"scan_layers": False, "decoder_unrotated_layers": (0,)},
    "attention_scale": {"attention_scale": 0.5},
    "attention_logit_cap": {"attention_logit_cap": 50.0},
    "rope_theta": {"rope_theta": 5e5},
    "rope_scaling": {"rope_scaling": "linear"},
    "rope_factor": {"rope_scaling": "linear", "rope_factor": 2.0},
    "rope_max_length": {"rope_max_length": 4096},
    "rope_length": {"rope_scaling": "ntk", "rope_factor": 2.0, "rope_length": 4096},
    "rope_divisors": {"rope_scaling": "per_pair", "rope_divisors": (2.0,) * 4},
    "rope_magnitude": {
        "rope_scaling": "per_pair",
        "rope_divisors": (2.0,) * 4,
        "rope_magnitude": 1.5,
    },
    "encoder_positions": {"encoder_positions": "from_zero"},
    "cross_attention_rope": {"cross_attention_rope": "continued"},
    "mlp_gated": {"mlp_gated": True},
    "mlp_activation": {"mlp_activation": "silu"},
    "mlp_bias": {"mlp_bias": False},
    "norm_eps": {"norm_eps": 1e-5},
    "norm_cast": {"norm_cast": "after_scale"},
    "norm_plus_one": {"norm_plus_one": True},
    "post_norms": {"post_norms": True},
    "omit_pre_norms": {"post_norms": True, "omit_pre_norms": True},
    "tie_embeddings": {"tie_embeddings": False},
    "share_embeddings": {"share_embeddings": False},
    "embedding_scale": {"embedding_scale": True},
    "final_logit_cap": {"final_logit_cap": 30.0},
    "encoder_global_layers": {
        "attention_window": 8,
        "scan_layers": False,
        "encoder_global_layers": (0,),
    },
    "decoder_global_layers": {
        "attention_window": 8,
        "scan_layers": False,
        "decoder_global_layers": (0,),
    },
}
# Tried on decoder-only models.
WINDOWS = {
    "attention_window": {"attention_window": 8, "scan_layers": False},
    "global_layer_every": {"attention_window": 8, "scan_layers": False, "global_layer_every": 2},
    "local_rope_theta": {"attention_window": 8, "scan_layers": False, "local_rope_theta": 1e3},
}


def test_every_field_of_a_model_is_compared_or_known_to_be_execution():
    named = set(FUNCTION) | set(WINDOWS) | set(SIZES)
    assert set(architecture(preset("test"))) == named


@pytest.mark.parametrize("name", FUNCTION)
def test_another_function_of_the_same_sizes_is_refused(pretrained, records, name):
    with pytest.raises(ConfigError, match=rf"\b{name} is .* there and .* here"):
        plan_of(records, pretrained, model_overrides=FUNCTION[name])


@pytest.mark.parametrize("name", WINDOWS)
def test_another_window_is_refused(records, tmp_path, name):
    """The source's configuration is all that is read before that."""
    source = json.loads(json.dumps({"model": preset("test-dec", vocab_size=264).to_dict()}))
    vocabulary = open_records(records).card.vocabulary.to_dict()
    content = {"format_version": 1, "data": {"vocabulary": vocabulary}} | source
    (tmp_path / "config.json").write_text(json.dumps(content))
    plan_of(records, tmp_path, model="test-dec")
    with pytest.raises(ConfigError, match=rf"\b{name} is "):
        plan_of(records, tmp_path, model="test-dec", model_overrides=WINDOWS[name])


def test_the_sources_architecture_is_taken_over_where_asked(pretrained, records, tmp_path):
    other = {"rope_theta": 5e5, "mlp_activation": "silu", "encoder_layers": 1}
    other |= {"attention_dropout": 0.0, "residual_dropout": 0.2}
    train(small_run(records, steps=1, model_overrides=other), tmp_path / "source")
    tune = small_run(
        records,
        steps=2,
        init_from=str(tmp_path / "source"),
        init_architecture="source",
        model_overrides={"mlp_dropout": 0.3},
    )
    # A directory as the model says it all: where from, as what, with the source's own dropout.
    named = small_run(records, steps=2, model=str(tmp_path / "source"), model_overrides={})
    begun = with_source_model(parse_config(named), tmp_path / "run")
    assert (begun.init_from, begun.model_config().rope_theta) == (str(tmp_path / "source"), 5e5)
    assert (
        plan_start(begun, begun.model_config(), open_records(records).card).origin.initialized == ()
    )
    train(tune, tmp_path / "run", stop_at=1)
    model = load_params_for_inference(tmp_path / "run")[0]
    assert (model.rope_theta, model.mlp_activation, model.encoder_layers) == (5e5, "silu", 1)
    # Dropout is the source's (the preset has 0.1 and 0), unless the run says otherwise, and told.
    assert (model.attention_dropout, model.residual_dropout, model.mlp_dropout) == (0.0, 0.2, 0.3)
    report = (tmp_path / "run" / "warm-start.txt").read_text()
    assert "0 dropped, 0 initialized randomly" in report
    assert "mlp_dropout is 0.0 there and 0.3 here" in report
    (tmp_path / "source").rename(tmp_path / "gone")
    assert train(tune, tmp_path / "run").step == 2
    with pytest.raises(ConfigError, match=r"model_overrides.encoder_layers is 2.*has 1"):
        plan_of(
            records,
            tmp_path / "gone",
            init_architecture="source",
            model_overrides={"encoder_layers": 2},
        )


def test_a_model_stored_in_bfloat16_is_trained_in_float32(records, tmp_path):
    model = preset("test", vocab_size=264, param_dtype="bfloat16").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"format_version": 1, "model": model}))

    def trained(workdir=None, **overrides):
        run = small_run(records, model=str(tmp_path), model_overrides=overrides)
        return with_source_model(parse_config(run), workdir).model_config().param_dtype

    assert trained() == "float32" and trained(param_dtype="bfloat16") == "bfloat16"
    assert trained(tmp_path) == "bfloat16"  # as it began


def test_a_run_may_keep_another_function_where_asked(pretrained, records, tmp_path):
    plan = plan_of(
        records, pretrained, init_architecture="run", model_overrides={"rope_theta": 5e5}
    )
    assert plan.origin.differences == ("rope_theta is 10000.0 there and 500000.0 here",)
    framed = plan_of(write_records(tmp_path / "framed", random_pairs(8, 0), start_id=3), pretrained)
    assert framed.origin.differences == ("decoder_start_id is 0 there and 3 here",)
    with pytest.raises(ConfigError, match=r"embedder/head would be initialized randomly"):
        plan_of(
            records, pretrained, init_architecture="run", model_overrides={"tie_embeddings": False}
        )


@pytest.mark.parametrize("scanned", [True, False])
def test_a_partial_start_takes_all_but_what_its_patterns_name(pretrained, records, scanned):
    changes = {
        "model_overrides": {"encoder_layers": 1, "decoder_layers": 2, "scan_layers": scanned}
    }
    with pytest.raises(ConfigError, match=r"decoder/layers_1/.* would be initialized randomly"):
        plan_of(records, pretrained, init_partial="encoder/*", **changes)
    with pytest.raises(ConfigError, match=r"encoder/layers_1/.* would be dropped"):
        plan_of(records, pretrained, init_partial="decoder/layers_1/*", **changes)
    found, origin, drawn = started(
        records, pretrained, init_partial="encoder/layers_1/*, decoder/layers_1/*", **changes
    )
    config, params, _ = load_params_for_inference(pretrained)
    there = named(unroll_params(params, config))
    name, stack = "decoder/layers_{}/mlp/up/kernel", "decoder/layers/mlp/up/kernel"
    layers = lambda tree: [tree[stack][i] if scanned else tree[name.format(i)] for i in range(2)]
    np.testing.assert_array_equal(layers(found)[0], there[name.format(0)])
    np.testing.assert_array_equal(layers(found)[1], layers(drawn)[1])
    assert name.format(1) in origin.initialized and name.format(0) not in origin.initialized
    assert any(item.startswith("encoder/layers_1/mlp/up/kernel: shape") for item in origin.dropped)


def test_tables_grow_where_asked_and_extra_ids_keep_their_numbers(
    pretrained, records, tmp_path, capsys
):
    table = "embedder/embedding"
    before = named(load_params_for_inference(pretrained)[1])[table]
    found, origin, drawn = started(
        records, pretrained, init_grow=True, model_overrides={"vocab_size": 280}
    )
    assert origin.initialized == (f"{table}, rows 264-279",) and not origin.dropped
    np.testing.assert_array_equal(found[table][:264], before)
    np.testing.assert_array_equal(found[table][264:], drawn[table][264:])

    # Two extra ids, then four: the two are the last again.
    two, four = (
        write_records(tmp_path / str(n), random_pairs(8, 0), ByteVocabulary(extra_ids=n))
        for n in (2, 4)
    )
    untied = {"tie_embeddings": False, "vocab_size": 261}
    train(small_run(two, steps=2, model_overrides=untied), tmp_path / "source")
    grown = {"model_overrides": untied | {"vocab_size": 263}, "init_grow": True}
    found, origin, drawn = started(four, tmp_path / "source", **grown)
    there = named(load_params_for_inference(tmp_path / "source")[1])
    assert origin.initialized == (f"{table}, rows 259-260", "embedder/head, rows 259-260")
    for name, axis in ((table, 0), ("embedder/head", 1)):
        rows = functools.partial(np.take, axis=axis)
        first, new, last = np.arange(259), [259, 260], [261, 262]
        np.testing.assert_array_equal(rows(found[name], first), rows(there[name], first))
        np.testing.assert_array_equal(rows(found[name], last), rows(there[name], [259, 260]))
        np.testing.assert_array_equal(rows(found[name], new), rows(drawn[name], new))


def test_every_message_about_extra_ids_leads_on(pretrained, tmp_path):
    """What each error asks for is done, until the run goes."""
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": "a short text of words " * 4}) for _ in range(9)))
    make = ["--text", str(text), "--objective=span_corruption", "--inputs_length=24"]
    make += ["--targets_length=12", f"--vocabulary={pretrained}"]
    with pytest.raises(ConfigError, match=r"give --extra_ids=(\d+) or more") as error:
        prepare([*make, f"--out={tmp_path / 'no'}"])
    count = re.search(r"--extra_ids=(\d+)", str(error.value))[1]
    records = tmp_path / "records"
    assert prepare([*make, f"--extra_ids={count}", f"--out={records}"]) == 0
    run = small_run(records, steps=1, init_from=str(pretrained))
    run["model_overrides"]["vocab_size"] = 259  # as the source's vocabulary would have it
    asked = []
    for _ in range(5):
        try:
            assert train(run, tmp_path / "run").step == 1
            break
        except (ConfigError, DataError) as error:
            field, value = re.search(r"--config\.([\w.]+)=(\w+)", str(error)).groups()
            asked.append(field)
            group, _, name = field.rpartition(".")
            (run[group] if group else run)[name] = True if value == "True" else int(value)
    assert asked == ["model_overrides.vocab_size", "model_overrides.vocab_size", "init_grow"]
    assert "rows 259" in (tmp_path / "run" / "warm-start.txt").read_text()


def test_another_vocabulary_is_refused(pretrained, records, tmp_path):
    other = write_records(tmp_path / "other", random_pairs(8, 0), ByteVocabulary(extra_ids=4))
    train(small_run(other, steps=1), tmp_path / "more")
    with pytest.raises(DataError, match=r"4 extra ids, the records 0; prepare the records with"):
        plan_of(records, tmp_path / "more")
    with pytest.raises(DataError, match=r"--extra_ids=2, but .* has 4 already"):
        load_vocabulary(tmp_path / "more", extra_ids=2)


def test_start_fields_without_a_source_are_refused(records):
    for name, value in (
        ("init_architecture", "run"),
        ("init_partial", "encoder/*"),
        ("init_grow", True),
    ):
        with pytest.raises(ConfigError, match=rf"config.{name} is .* without config.init_from"):
            parse_config(small_run(records, **{name: value}))


def test_patience_counts_evaluations_without_a_lower_loss():
    assert not out_of_patience([3, 2, 2], 2)
    assert out_of_patience([3, 2, 2, 2.5], 2)
    assert not out_of_patience([3, 2, 2.5, 1.9], 2)
    assert not out_of_patience([3, 4, 5], 0)


def test_a_run_ends_when_patience_does_and_keeps_its_best(records, eval_records, tmp_path):
    # A learning rate of next to nothing: no evaluation after the first is lower.
    config = small_run(
        records,
        steps=50,
        eval={"every": 1, "patience": 2},
        checkpoint={"every": 1, "keep": 3},
        data={"records": str(records), "eval_records": str(eval_records)},
        optimizer={"learning_rate": 1e-30},
    )
    assert train(config, tmp_path / "run").step == 3
    assert saved_steps(tmp_path / "run") == [1, 2, 3]
    assert train(config, tmp_path / "run").step == 3  # and has nothing more to do
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3


def test_a_start_can_be_evaluated_before_its_first_step(
    pretrained, records, eval_records, tmp_path
):
    # The loss of the start counts for patience as any other's does. An earlier process has been
    # killed before it saved a step: what it wrote is written once again, and not twice.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 9.0}\n')
    config = small_run(
        records,
        steps=9,
        init_from=str(pretrained),
        eval={"every": 1, "patience": 1, "at_start": True},
        checkpoint={"every": 1, "keep": 2},
        data={"records": str(records), "eval_records": str(eval_records)},
        optimizer={"learning_rate": 1e-30},
    )
    assert train(config, tmp_path / "run").step == 1
    lines = [line for line in read_metrics(tmp_path / "run") if "eval/loss" in line]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["eval/loss"] == lines[1]["eval/loss"]


def test_patience_without_evaluations_is_refused(records):
    with pytest.raises(ConfigError, match=r"config\.eval\.patience is 2"):
        parse_config(small_run(records, eval={"patience": 2}))
    with pytest.raises(ConfigError, match=r"config\.checkpoint\.keep is 2"):
        parse_config(
            {
                "data": {"eval_records": "x"},
                "eval": {"every": 5, "patience": 3},
                "checkpoint": {"every": 5, "keep": 2},
            }
        )
