"""Rounds: each student starts where the last one ended and reads what that one wrote."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from encdec.cli import main
from encdec.data.records import read_card
from encdec.data.teacher_rows import read_teacher_card
from encdec.distill.rollout import Answering
from encdec.distill.rounds import Shares, _Part, _round, distill_in_rounds
from encdec.errors import CheckpointError, ConfigError
from encdec.inference.generation_settings import GenerationSettings
from encdec.saved.saved_config import read_config
from encdec.saved.saved_params import load_params_for_inference
from encdec.train.run_config import parse_config
from tests.train.conftest import small_run


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_two_rounds_are_chained_and_repeating_them_changes_nothing(records, teacher, tmp_path):
    run = small_run(
        records,
        model="test",
        steps=4,
        checkpoint={"every": 4},
        eval={"every": 0},
        model_overrides={"scan_layers": False, "init_std": 0.1},
        distill={"alpha": 0.5, "temperature": 1.5},
    )
    said = []

    def go():
        return distill_in_rounds(
            run,
            teacher,
            tmp_path,
            2,
            shares=Shares(1, 0.5, 2),
            logits={"draws": 8},
            answering=Answering(rows=16),
            say=said.append,
        )

    students = go()
    assert [path.parent.name for path in students] == ["round-000", "round-001", "round-002"]
    for number, student in enumerate(students):
        content = read_config(student)["run"]
        assert content["seed"] == number and content["distill"]["alpha"] == 0.5
        assert content["init_from"] == (str(students[number - 1]) if number else "")
        # Gold, the teacher's and, from the first round on, the last student's targets.
        rates = [part.rpartition("=")[2] for part in content["data"]["records"].split(",")]
        assert rates == ["1", "0.5", "2"][: 2 + bool(number)]
    for number in (1, 2):
        place = tmp_path / f"round-{number:03d}"
        card = read_teacher_card(place / "scored")
        assert card.records_fingerprint == read_card(place / "written").fingerprint
        assert card.format.draws == 8 and card.format.temperature == 1.5
        assert "loaded" in (place / "student" / "warm-start.txt").read_text()
    # The students differ from round to round: they were drawn from and trained on other targets.
    written = [read_card(tmp_path / f"round-{n:03d}" / "written").fingerprint for n in (1, 2)]
    assert written[0] != written[1]
    before = [load_params_for_inference(path)[1] for path in students]
    assert [str(path) for path in go()] == [str(path) for path in students]
    for path, params in zip(students, before):
        jax.tree.map(np.testing.assert_array_equal, load_params_for_inference(path)[1], params)


@pytest.mark.parametrize(
    "shares, message",
    [
        ({"gold": 0, "teacher": 0}, "both 0"),
        ({"student": 0}, "nothing to alternate"),
        ({"gold": -1}, "share of gold targets is -1"),
        ({"gold": float("nan")}, "is nan"),
    ],
)
def test_shares_without_sense_are_refused(shares, message):
    with pytest.raises(ConfigError, match=message):
        Shares(**shares)


def test_bad_settings_are_refused_before_anything_is_written(records, teacher, tmp_path):
    refuse = lambda run, rounds=1, **given: distill_in_rounds(
        run, teacher, tmp_path / "out", rounds, **given
    )
    with pytest.raises(ConfigError, match=r"--rounds is 0"):
        refuse(small_run(records), 0)
    with pytest.raises(ConfigError, match=r"config.data.records is empty"):
        refuse(small_run(""))
    with pytest.raises(ConfigError, match=r"leave it out"):
        refuse(small_run(records, distill={"teacher": "x"}))
    with pytest.raises(ConfigError, match=r"mixture"):
        refuse(small_run(f"{records}=1,{records}=2"))
    beams, late = GenerationSettings(beams=2), GenerationSettings(temperature=1, seed=2**32 - 1)
    for answering, message in (
        (Answering(beams, draft="lookup"), "no effect in beam search"),
        (Answering(rows=0), "rows is 0"),
        (Answering(block_rows=0), "block_rows is 0"),
        (Answering(GenerationSettings(beams=2, samples=2)), "samples is 2"),
        (Answering(draft=str(tmp_path / "none")), "none"),
        (Answering(late), "seed is 4294967296"),
        (Answering(GenerationSettings(max_tokens=999)), "max_tokens is 999, but the rows of"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            refuse(small_run(records), answering=answering)
    with pytest.raises(ConfigError, match=r"draws is 0"):
        refuse(small_run(records), logits={"draws": 0}, shares=Shares(gold=0, teacher=1))
    # What training would refuse once the teacher has read the gold records.
    with pytest.raises(ConfigError, match=r"distill.loss is 'reverse_kl', but the teacher's rows"):
        refuse(small_run(records, distill={"loss": "reverse_kl"}))
    with pytest.raises(ConfigError, match=r"temperature is 2.0, but .* was stored at 1.0"):
        refuse(small_run(records, distill={"temperature": 2.0}), logits={"temperature": 1.0})
    assert not (tmp_path / "out").exists()


def test_rounds_of_a_models_directory_continue_from_their_own_students(records, teacher, tmp_path):
    run = parse_config(small_run(records, model=str(teacher), model_overrides={}))
    part, student = _Part(1.0, records, tmp_path / "scored"), str(tmp_path / "student")
    first = parse_config(_round(run, [part], run.init_from, 0))
    assert first.model == first.init_from == str(teacher)
    later = parse_config(_round(run, [part], student, 1))
    assert later.model == later.init_from == student


def test_the_command_names_what_it_wants(capsys):
    assert main(["distill", "laps"]) == ConfigError.exit_code
    assert "expected `encdec distill logits`, `rollout` or `rounds`" in capsys.readouterr().err
    assert (
        main(["distill", "rollout", "--checkpoint=a", "--records=b", "--out=c", "--config.steps=3"])
        == ConfigError.exit_code
    )
    assert "trains nothing" in capsys.readouterr().err
