"""``encdec config`` and completion: what a run is set to, what a command line may continue with."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from encdec import cli
from encdec.completion import SCRIPTS, candidates
from encdec.config_command import meanings, model_table, run_table
from encdec.train.run_config import RunConfig, load_config, parse_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = f"{ROOT}/configs/pretrain.py:330m"


def test_it_prints_what_train_reads(capsys):
    more = ["--config.steps=2000", "--config.model_overrides.d_model=512"]
    assert cli.main(["config", f"--config={CONFIG}", *more, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    run = parse_config(load_config(CONFIG, more))
    assert parse_config(content["run"]) == run
    assert content["model"] == json.loads(json.dumps(run.model_config().to_dict()))
    assert cli.main(["config", f"--config={CONFIG}", *more]) == 0
    shown = capsys.readouterr().out
    assert "* steps                        2000             optimizer steps of the whole" in shown
    assert "* d_model                      512" in shown and "  num_heads " in shown
    assert "schedule.warmup_steps        20 " in shown and "(0.01\n" in shown
    assert cli.main(["config", f"--config={CONFIG}", "--config.stepss=3"]) == 2


def test_a_value_of_another_type_is_refused_in_words(capsys):
    given = ["config", f"--config={CONFIG}"]
    for override, message in (
        ("steps=1e3", "config.steps is '1e3'; expected a whole number"),
        ("optimizer.learning_rate=fast", "learning_rate is 'fast'; expected a number"),
        ("init_grow=maybe", "config.init_grow is 'maybe'; expected True or False"),
    ):
        assert cli.main([*given, f"--config.{override}"]) == 2
        assert message in capsys.readouterr().err


def test_every_field_has_a_line_and_a_meaning():
    run = parse_config(RunConfig())
    groups = [type(getattr(run, name)) for name in vars(run)]
    kinds = [RunConfig, *(kind for kind in groups if hasattr(kind, "__dataclass_fields__"))]
    for kind in kinds:
        for name, about in meanings(kind).items():
            grouped = hasattr(getattr(kind(), name), "__dataclass_fields__")
            assert about or grouped or name == "model_overrides", (kind, name)
    names = {line.split()[0] for line in run_table(run) if not line.startswith("   ")}
    assert {"data.records", "optimizer.b1", "model", "checkpoint.keep"} <= names
    assert any("num_heads * head_dim" in line for line in model_table(run))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["da"], ["data"]),
        (["data", "v"], ["verify"]),
        (["data", "show", "--sp"], ["--split"]),
        (["train", "--config.optimizer.b"], ["--config.optimizer.b1=", "--config.optimizer.b2="]),
        (["train", "--stop"], ["--stop_at"]),
        (["distill", "r"], ["rollout", "rounds"]),
        (["distill", "logits", "--dr"], ["--draws", "--dry_run"]),
        (["benchmark", "serv"], ["serving"]),
        (["train", "--config=configs/"], []),
        (["nothing", "--"], []),
    ],
)
def test_words_that_may_follow(words, found):
    assert candidates(words) == found


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_script_completes_in_bash(tmp_path):
    program = tmp_path / "encdec"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m encdec "$@"\n')
    program.chmod(0o755)
    script = SCRIPTS["bash"] + (
        'COMP_LINE="encdec train --config.mesh.f"; COMP_POINT=${#COMP_LINE}\n'
        "COMP_WORDS=(encdec train --config.mesh.f); COMP_CWORD=2; compopt() { :; }\n"
        '_encdec; echo "${COMPREPLY[@]}"\n'
    )
    found = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        timeout=120,
        check=True,
    )
    assert found.stdout.split() == ["--config.mesh.fsdp="], found.stderr


def test_a_command_line_that_is_wrong_needs_no_jax():
    """Wrong fields and help are answered in the time of plain Python."""
    code = (
        "import sys; from encdec import cli\n"
        f"train = ['train', '--config={CONFIG}', '--workdir=x']\n"
        "assert cli.main([*train, '--config.stepss=1']) == 2\n"
        "assert cli.main([*train, '--config.steps=-1']) == 2\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'flax', 'numpy', 'tensorflow'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
