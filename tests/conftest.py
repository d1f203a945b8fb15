"""Shared test set-up: eight fake CPU devices, one compilation cache, and the optional corpora."""

from __future__ import annotations

import os
import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
CACHE = pathlib.Path(
    os.environ.get("ENCDEC_TEST_CACHE", pathlib.Path.home() / ".cache" / "encdec" / "jax-tests")
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read by jax here and by every process a test starts.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def corpora() -> pathlib.Path:
    """The folder of real corpora; skips the test, saying so, where it is absent."""
    path = pathlib.Path(os.environ.get("ENCDEC_CORPORA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real corpora not found at {path}; set ENCDEC_CORPORA to their folder")
    return path
