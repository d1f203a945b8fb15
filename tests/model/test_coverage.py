"""A new field of ModelConfig is refused by all but the plain modules, until they know it."""

from __future__ import annotations

import dataclasses

import pytest

from encdec.errors import ConfigError
from encdec.export import formats
from encdec.model import ModelConfig, build_model, coverage, kernels

# As an attention variant would add it.
Longer = dataclasses.make_dataclass(
    "ModelConfig", [("attention_sink", bool, False)], bases=(ModelConfig,), frozen=True
)
SIZE = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 8, "num_heads": 1, "num_kv_heads": 1}


def test_a_new_field_is_off_by_default_and_entries_are_of_fields_that_exist():
    """The default passes everywhere, so it must leave the model as it was."""
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    assert coverage.EVERYWHERE <= fields.keys()
    new = {name: fields[name] for name in fields.keys() - coverage.EVERYWHERE}
    assert all(known <= new.keys() for known in coverage.ALSO.values())
    assert all(value in (0, "", "none", ()) for value in new.values()), new


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_refuses_a_field_that_it_does_not_know(name, tmp_path, monkeypatch):
    config = Longer(**SIZE)
    formats.check(name, config)
    config = config.replace(attention_sink=True)
    with pytest.raises(
        ConfigError, match=r"attention_sink is True, which the export to .* does not"
    ):
        formats.write(name, tmp_path / "x", formats.Export(config, {}, None))
    assert not (tmp_path / "x").exists()
    monkeypatch.setitem(coverage.ALSO, name, frozenset({"attention_sink"}))
    formats.check(name, config)


@pytest.mark.parametrize("where, kernel", [("tpu", "splash"), ("gpu", "cudnn")])
def test_fused_kernels_leave_it_to_xla_or_refuse_it(where, kernel, monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: where)
    choose = lambda config: kernels.resolve_kernel(config, segments=True, dropout=False)
    config = Longer(**SIZE)
    assert choose(config) == kernel
    config = config.replace(attention_sink=True)
    assert choose(config) == "xla"
    with pytest.raises(ConfigError, match="attention_sink"):
        choose(config.replace(attention_kernel=kernel))


def test_cpu_layouts_refuse_it():
    config = Longer(**SIZE, attention_sink=True).replace(attention_block=4, scan_layers=False)
    with pytest.raises(ConfigError, match="attention_sink is True, which the CPU layout"):
        build_model(config)
