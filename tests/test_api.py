"""The Python calls' refusals; docs/python.md's example runs in tests/test_walk.py."""

from __future__ import annotations

import pytest

from encdec import api
from encdec.errors import ConfigError


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


def test_a_former_name_says_what_the_function_is_called_now():
    with pytest.warns(FutureWarning, match="api.score is now called store_teacher_logits"):
        assert api.score is api.store_teacher_logits
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        api.scores  # noqa: B018
