"""Exports read by each major version of transformers that setup.py allows, as users read them."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from encdec.export import formats, huggingface_export
from encdec.model import build_model
from tests.export.examples import MODELS, PROMPTS, pair

torch = pytest.importorskip("torch", reason="needs torch (extra hf)")
transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")

# Padding and the start token are one id, as in every model that is trained here.
STARTS_WITH_PADDING = dataclasses.replace(PROMPTS, decoder_start_id=0)
SOURCE, TARGET = (9, 6), (7, 5)  # lengths of two rows
OTHER = os.environ.get("ENCDEC_OTHER_TRANSFORMERS") or str(
    pathlib.Path(sys.prefix) / "transformers-4.57" / "bin" / "python"
)


def reference(name: str) -> dict[str, np.ndarray]:
    """Ids of two rows, -1 and -100 behind their ends, and our logits for the labels."""
    config, params = pair(name)
    rng = np.random.default_rng(1)
    source = rng.integers(3, 259, (2, max(SOURCE)))
    labels = rng.integers(3, 259, (2, max(TARGET)))
    fields = {}
    target = np.concatenate([np.zeros((2, 1), int), labels[:, :-1]], 1)
    sides = (("encoder", source, SOURCE), ("decoder", target, TARGET))
    for side, tokens, lengths in sides[not config.is_encoder_decoder :]:
        places = np.tile(np.arange(tokens.shape[1]), (2, 1))
        inside = places < np.array(lengths)[:, None]
        fields |= {
            f"{side}_input_tokens": np.where(inside, tokens, 0),
            f"{side}_segment_ids": inside.astype(np.int32),
            f"{side}_positions": np.where(inside, places, 0),
        }
    apply = jax.jit(lambda params, fields: build_model(config).apply({"params": params}, fields))
    source[1, SOURCE[1] :], labels[1, TARGET[1] :] = -1, -100
    return {
        "source": source,
        "labels": labels,
        "logits": np.asarray(apply(params, fields), np.float32),
    }


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, pathlib.Path]:
    made = {}
    for name in MODELS:
        made[name] = tmp_path_factory.mktemp("exports") / name.replace(" ", "_")
        export = formats.Export(*pair(name), STARTS_WITH_PADDING, targets_length=12)
        formats.write("hf", made[name], export)
        np.savez(made[name] / "reference.npz", **reference(name))
    return made


@pytest.mark.parametrize("name", MODELS)
def test_the_installed_version_reads_every_export(exports, name):
    from tests.export import reader

    assert reader.check(exports[name])


def test_the_other_major_version_reads_every_export(exports):
    if not pathlib.Path(OTHER).is_file():
        pytest.skip(
            f"no other version of transformers: {OTHER} is missing; make transformers-4.57, or "
            "name an interpreter in ENCDEC_OTHER_TRANSFORMERS"
        )
    script = pathlib.Path(__file__).parent / "reader.py"
    read = [
        str(exports[name])
        for name in ("paper", "windowed pair", "t5gemma", "t5gemma of gemma 2", "llama")
    ]
    done = subprocess.run(
        [OTHER, str(script), *read],
        capture_output=True,
        text=True,
        env=os.environ | {"USE_TF": "0", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("transformers ")]
    assert len(lines) == len(read)
    versions = {line.split()[1] for line in lines}
    assert not versions & {transformers.__version__}
    assert versions <= set(huggingface_export.TRANSFORMERS["tested"])


def test_older_versions_are_refused_and_the_tested_ones_stated(exports):
    config = transformers.AutoConfig.from_pretrained(exports["paper"], trust_remote_code=True)
    assert transformers.__version__ in config.transformers_versions["tested"]
    check_version = vars(sys.modules[type(config).__module__])["check_version"]
    check_version(**huggingface_export.TRANSFORMERS, installed="4.57.0")
    with pytest.raises(ImportError, match="transformers 4.57 or newer .* and 4.9.2 is installed"):
        check_version(**huggingface_export.TRANSFORMERS, installed="4.9.2")
    for path in exports.values():
        stated = json.loads((path / "config.json").read_text())
        assert stated["transformers_versions"] == huggingface_export.TRANSFORMERS
