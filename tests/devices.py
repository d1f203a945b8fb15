"""How many of the eight fake devices a run takes whose config names no mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Runs as on a machine with a single device, for tests of what no mesh changes.

    A step that eight devices share takes twice as long to compile and to run. As a decorator for
    fixtures that train; tests use the fixture of this name.
    """
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_, **__: first)
        patch.setattr(jax, "local_devices", lambda *_, **__: first)
        yield
