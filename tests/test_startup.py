"""What a process sets up for itself: the folder of compiled programs, memory that is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from encdec import startup


def run(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter; a variable given as "" is unset."""
    kept = {k: v for k, v in os.environ.items() if k not in environment} | {
        k: v for k, v in environment.items() if v
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept)
    assert not done.returncode, done.stderr
    return done.stdout


COMPILE = """
from encdec.startup import use_compilation_cache
use_compilation_cache()
import jax
print(jax.jit(lambda x: x + 1)(1))
"""


def test_compiled_programs_are_kept_in_a_folder_of_the_processor(tmp_path):
    unset = {"JAX_COMPILATION_CACHE_DIR": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert run(COMPILE, XDG_CACHE_HOME=str(tmp_path), **unset) == "2\n"
    folder = tmp_path / "encdec" / "jax" / startup.processor_kind()
    assert any(folder.iterdir())
    off = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    assert run(COMPILE, XDG_CACHE_HOME=str(tmp_path / "off"), **unset, **off) == "2\n"
    assert not (tmp_path / "off").exists()


def test_a_folder_that_cannot_be_written_costs_no_answer(tmp_path):
    (tmp_path / "file").write_text("")
    unset = {"JAX_COMPILATION_CACHE_DIR": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert run(COMPILE, XDG_CACHE_HOME=str(tmp_path / "file"), **unset) == "2\n"


def test_a_folder_given_by_the_environment_stays(monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    startup.use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "gs://bucket")  # its standard: relative paths are ignored
    startup.use_compilation_cache()
    home = os.path.expanduser("~/.cache/encdec/jax/")
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(home)


FAULTS = """
import json, resource
from encdec.startup import keep_memory
kept = keep_memory(256 << 20)
import numpy as np
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.zeros(4 << 20, np.uint8).fill(1)
    np.ones(32 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(json.dumps([kept, faults()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults as Linux counts them")
def test_memory_that_was_freed_is_there_again():
    kept, faults = json.loads(run(FAULTS))
    if not kept:
        pytest.skip("not glibc")
    # 36 MiB would be 9,000 pages.
    assert faults < 100
    kept, faults = json.loads(run(FAULTS, **{startup.KEEP_MEMORY: "0"}))
    assert not kept
    assert faults > 1000
