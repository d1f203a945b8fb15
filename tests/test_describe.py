"""``encdec describe``: the numbers are the formulas', the words are the configuration's."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from encdec.cost.flops import (
    cache_bytes,
    count_parameters,
    forward_flops,
    generation_flops,
    training_flops,
)
from encdec.describe import architecture, describe, find_model, main, show
from encdec.errors import CheckpointError, ConfigError
from encdec.model import ModelConfig, preset, preset_names
from encdec.saved.saved_config import CONFIG_FILE, FORMAT_VERSION


def described(capsys, *arguments: str) -> dict:
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def shown(name: str, config, inputs: int = 1024, targets: int = 256) -> str:
    console = Console(width=150)
    with console.capture() as capture:
        show(describe(name, config, inputs, targets), console)
    return capture.get()


def test_json_holds_the_formulas_numbers_at_the_lengths_asked_for(capsys):
    result = described(capsys, "quickstart", "--inputs_length=96", "--targets_length=32")
    assert (result["inputs"], result["targets"]) == (96, 32)
    model, config = result["models"][0], preset("quickstart")
    assert model["name"] == "quickstart" and model["matched_by"] is None
    assert ModelConfig.from_dict(model["config"]) == config
    assert model["parameters"]["total"] == count_parameters(config).total
    assert model["forward_flops"]["total"] == forward_flops(config, 96, 32).total
    assert model["training_flops"] == training_flops(config, 96, 32)
    for kind, cached in (("cached", True), ("uncached", False)):
        expected = generation_flops(config, 96, 32, cached=cached)
        assert model["generation_flops"][kind]["total"] == expected.total
        assert model["generation_flops"][kind]["first_token"] == expected.first_token.total
    assert model["weight_bytes"]["float32"] == 4 * model["parameters"]["total"]
    assert model["weight_bytes"]["bfloat16"] == 2 * model["parameters"]["total"]
    assert model["cache_bytes"] == cache_bytes(config, 96, 32)


def test_peers_are_matched_at_the_lengths_asked_for(capsys):
    result = described(capsys, "330m", "--inputs_length=512", "--targets_length=512")
    ours, equal_size, equal_cost = result["models"]
    assert [equal_size["matched_by"], equal_cost["matched_by"]] == ["parameters", "training_flops"]
    assert equal_size["parameters"]["total"] == pytest.approx(332_042_240, rel=0.005)
    assert equal_cost["training_flops"] == pytest.approx(ours["training_flops"], rel=0.005)
    assert equal_size["name"] == "330m-dec"
    assert equal_cost["name"] != "330m-dec-flops"  # which is matched at 1024 + 256


def test_peers_at_the_default_lengths_are_the_presets_peers(capsys):
    names = [model["name"] for model in described(capsys, "330m")["models"]]
    assert names == ["330m", "330m-dec", "330m-dec-flops"]


def test_a_decoder_only_model_stands_alone(capsys):
    assert len(described(capsys, "test-dec")["models"]) == 1


def test_a_peer_that_cannot_be_is_left_out_with_the_reason():
    config = preset("test", mlp_dim=8, decoder_layers=1, encoder_layers=1)
    description = describe("odd", config, 8, 8)
    assert len(description.models) + len(description.left_out) == 3 and description.left_out
    assert "Left out: no decoder-only model matches" in shown("odd", config, 8, 8)


def test_the_table_of_the_papers_model():
    text = shown("330m", preset("330m"))
    for expected in (
        "20 encoder + 10 decoder",
        "6 heads x 64 = 384",
        "332,042,240",
        "191,545,344",
        "107,597,824",
        "506.6 GFLOP",
        "819.6 GFLOP  +62 %",
        "633.3 MiB",
        "330m-dec-flops",
        "encoder centred",
    ):
        assert expected in text, expected
    assert "test" not in text


def test_every_preset_can_be_described():
    for name in preset_names():
        assert describe(name, preset(name), 128, 32).models[0].name == name


def test_words_follow_the_fields():
    plain = architecture(preset("test"))
    changed = architecture(
        preset(
            "test",
            mlp_gated=True,
            mlp_activation="silu",
            num_kv_heads=4,
            tie_embeddings=False,
            qk_norm=True,
            post_norms=True,
            attention_logit_cap=50.0,
            mlp_dropout=0.1,
            mlp_bias=False,
            cross_attention_rope="continued",
            rope_scaling="ntk",
            rope_factor=4.0,
            rope_length=4096,
        )
    )
    assert changed["MLP"] == "128 gated, silu"
    assert plain["kv heads"] == "2, tiled" and changed["kv heads"] == "4"
    assert "apart" in changed["vocabulary"] and "tied" in plain["vocabulary"]
    assert "query-key norm" in changed["attention"] and "post-norms" in changed["norm"]
    assert (plain["logit caps"], changed["logit caps"]) == ("none", "attention 50")
    assert (plain["dropout"], changed["dropout"]) == ("none", "MLP 0.1")
    assert changed["biases"] == "q k v, attention out"
    assert "ntk x4" in changed["positions"] and "cross continued" in changed["positions"]


def test_a_work_directory_is_described_by_its_run(tmp_path, capsys):
    model = preset("test", mlp_gated=True, decoder_layers=3)
    content = {"format_version": FORMAT_VERSION, "model": model.to_dict()}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    assert find_model(str(tmp_path)) == (tmp_path.name, model)
    seen = described(capsys, str(tmp_path))["models"][0]["config"]
    assert ModelConfig.from_dict(seen) == model


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json.*encdec train"):
        main([str(tmp_path)])
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        main([str(tmp_path)])


def test_an_unknown_preset_names_the_nearest_and_lists_them_all():
    with pytest.raises(ConfigError) as caught:
        main(["quikstart"])
    assert "did you mean 'quickstart'?" in str(caught.value)
    assert all(name in str(caught.value) for name in preset_names())


def test_a_length_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="targets_length is 0"):
        main(["test", "--targets_length=0"])


def test_describing_needs_no_tensorflow_and_no_device():
    program = (
        "import sys; from encdec.describe import main; main(['test']); "
        "assert 'tensorflow' not in sys.modules"
    )
    environment = os.environ | {"JAX_PLATFORMS": "absent"}  # so that asking for a device fails
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
