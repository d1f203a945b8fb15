"""The Python calls' refusals; docs/python.md's example runs in tests/test_walk.py."""

from __future__ import annotations

import dataclasses

import pytest

from encdec import api
from encdec.errors import ConfigError
from encdec.inference.generator import Generation, TextGenerator


def test_what_cannot_be_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ConfigError, match="no field 'stepps'; did you mean 'steps'"):
        api.train("configs/pretrain.py:test", tmp_path / "run", {"stepps": 3})
    with pytest.raises(ConfigError, match="overrides"):
        api.train({"model": "test"}, tmp_path / "run", {"steps": 3})
    assert not (tmp_path / "run").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        api.export_model(tmp_path / "run", tmp_path / "taken")


class DrawnAnswers(TextGenerator):
    def __init__(self, answers):
        self.answers = answers

    def generate(self, texts, settings):
        return [self.answers]


def test_of_several_answers_the_most_likely_is_given():
    answers = [
        Generation("first", [3, 4], [-2.0, -2.0], "eos"),
        Generation("likeliest", [5, 6, 7, 1], [-1.0] * 4, "eos"),
    ]
    assert api.generate(DrawnAnswers(answers), "x", samples=2, temperature=1.0) == ["likeliest"]
    beams = [dataclasses.replace(one, normalized_log_prob=-x) for x, one in enumerate(answers)]
    assert api.generate(DrawnAnswers(beams), "x", samples=2, beams=2) == ["first"]


def test_a_former_name_says_what_the_function_is_called_now():
    with pytest.warns(FutureWarning, match="api.score is now called store_teacher_logits"):
        assert api.score is api.store_teacher_logits
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        api.scores  # noqa: B018
