"""``encdec benchmark edge``: every path makes the same tokens, and the numbers add up."""

from __future__ import annotations

import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from encdec.benchmarks import edge_benchmark, edge_paths
from encdec.benchmarks.device_rates import DeviceRates, OthersLoad, peak_memory
from encdec.benchmarks.edge_benchmark import PATHS, evaluate, main
from encdec.benchmarks.generation import GenerationTiming
from encdec.cost.flops import cache_bytes, generation_flops
from encdec.errors import ConfigError
from encdec.model import preset

for package in ("ai_edge_litert", "onnx", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs {package}: the extra litert,onnx of setup.py")


# In a process of its own: torch's threads stay with the process that has loaded it.
SAME_TOKENS = """
import json, pathlib, sys
import jax, numpy as np
from encdec.benchmarks import edge_paths
from encdec.model import build_model, init_params, preset
config = preset("test", scan_layers=False, tie_embeddings=False, init_std=0.3)
params = init_params(build_model(config), jax.random.key(0))
answers = {}
for name in sys.argv[2:]:
    first, rest = edge_paths.load_path(name, config, params, pathlib.Path(sys.argv[1]), 6)
    answers[name] = rest(first(np.arange(3, 12)), 6).tolist()
print(json.dumps(answers))
"""


def test_float32_paths_make_the_same_tokens(tmp_path):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"needs {package}: the extra hf of setup.py")
    names = ("jax-float32", "litert-float32", "onnx-float32", "transformers-float32")
    done = subprocess.run(
        [sys.executable, "-c", SAME_TOKENS, str(tmp_path), *names], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert list(answers) == list(names) and len(answers["jax-float32"][0]) == 6
    assert len(set(answers["jax-float32"][0])) > 1
    assert all(answer == answers["jax-float32"] for answer in answers.values())


def test_every_path_is_measured_and_written(tmp_path, capsys):
    paths = ("jax", "litert-int8", "litert-int4", "onnx-int8")
    assert (
        main(
            [
                "--model=test",
                f"--paths={','.join(paths)}",
                "--inputs_length=8,4",
                "--outputs=3",
                "--repeats=1",
                f"--artefacts={tmp_path}",
                f"--out={tmp_path}",
                "--no_memory",
            ]
        )
        == 0
    )
    assert "other processes took" in capsys.readouterr().out
    report = json.loads((tmp_path / "edge.json").read_text())
    assert [(m["path"], m["inputs"]) for m in report["measured"]] == [
        (name, length) for length in (8, 4) for name in paths
    ]
    assert all(m["first_token_seconds"]["low"] > 0 for m in report["measured"])


def test_disturbed_timings_are_taken_again_but_not_for_ever(monkeypatch):
    """Others take everything in every second timing, then in all."""
    shares = iter([0.9, 0.0] * 3 + [0.9] * 1000)
    monkeypatch.setattr(edge_benchmark.OthersLoad, "others", lambda self: next(shares))
    ran = []
    runs = {"jax": (lambda tokens: ran.append(len(tokens)), lambda state, count: None)}
    for again in (3, 21):  # then 7 times the repeats
        rates = itertools.count(1)
        [(timing, around, _)], found = edge_benchmark.measure(
            runs, preset("test"), [4], 2, 3, calm=0.1, read_rate=rates.__next__
        )
        assert found == again and len(timing.total_seconds) == len(around) == 3
        # Of the timings that stand, the mean of the bandwidth before and after.
        assert around == ((3.5, 7.5, 11.5) if again == 3 else (43.5, 45.5, 47.5))
    assert len(ran) == 1 + 6 + 1 + 24


def test_floors_are_of_the_bytes_that_are_read():
    config, rates = preset("test"), DeviceRates(1e6, 1e7)
    later = generation_flops(config, 16, 5).later_tokens
    cache = 4 * cache_bytes(config, 16, 2, dtype="float32")
    mlps = 4 * 1 * 2 * config.d_model * config.mlp_dim  # tokens x layers x two matrices
    for name, mlp, other in (("jax", 4, 4), ("onnx-int8", 1, 1), ("litert-int4", 0.5, 1)):
        timing = GenerationTiming(name, True, 16, 5, 1, (0.5,), (2.5,))
        found = evaluate(timing, [2e6], config, rates, DeviceRates(1e6, 2e7))
        weights = mlps * mlp + ((later.decoder + later.head) / 2 - mlps) * other
        assert found.decode_floor_share == pytest.approx((weights + cache) / 1e6 / 2.0)
        assert found.neighbouring_floor_share.median == pytest.approx(found.decode_floor_share / 2)
        assert name in PATHS


def test_peak_memory_is_of_a_process_of_its_own():
    """A child of a process that has held much reports what it held itself."""
    held = np.ones(2**27)  # 1 GiB
    parent = peak_memory()
    assert parent > held.nbytes
    del held
    child = int(
        subprocess.run(
            [
                sys.executable,
                "-c",
                "from encdec.benchmarks.device_rates import peak_memory\n"
                "held = bytearray(2**26)\nprint(peak_memory())",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert 2**26 < child < parent - 2**29


def test_peak_memory_without_proc_is_the_kernel_s_own(monkeypatch):
    def missing(self):
        raise FileNotFoundError(self)

    counted = peak_memory()
    monkeypatch.setattr(pathlib.Path, "read_text", missing)
    assert peak_memory() >= 0.9 * counted


def test_what_others_take_is_a_share():
    busy = OthersLoad()
    sum(range(200_000))
    assert 0 <= busy.others() <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--paths=tflite"], "--paths has 'tflite'; expected some of jax"),
        (["--model=330m-dec"], "expected an encoder-decoder"),
        (["--repeats=0"], "repeats is 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        main(arguments)


def test_peers_that_cannot_run_here_are_left_out_unless_asked_for(monkeypatch):
    """One line for each reason."""
    for kind, without in (("transformers", ("bfloat16",)), ("openvino", ("float32", "int8"))):
        monkeypatch.setattr(
            edge_paths.PEERS[kind],
            "missing",
            lambda precision, without=without: "no such products" * (precision in without),
        )
    monkeypatch.setattr(edge_paths.ctranslate2_runtime, "missing", lambda precision: "not here")
    paths, left_out = edge_paths.chosen_paths(None)
    assert "transformers-int8" in paths and "transformers-bfloat16" not in paths
    assert "openvino-int4" in paths and not any("ctranslate2" in path for path in paths)
    assert left_out == [
        "transformers-bfloat16, openvino-float32, openvino-int8 are left out: no such products",
        "ctranslate2-float32, ctranslate2-bfloat16, ctranslate2-int8 are left out: not here",
    ]
    with pytest.raises(ConfigError, match="transformers-bfloat16, but no such products"):
        edge_paths.chosen_paths(["jax", "transformers-bfloat16"])
    with pytest.raises(ConfigError, match="'torch'; expected some of jax, .*transformers-int8"):
        edge_paths.chosen_paths(["torch"])


def test_tokens_are_alike_up_to_the_first_that_differs():
    assert edge_benchmark.alike(np.array([[1, 2, 3, 4]]), np.array([[1, 2, 9, 4]])) == 2
    assert edge_benchmark.alike(np.array([[1, 2]]), np.array([[1, 2]])) == 2
