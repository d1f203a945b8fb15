"""``jax.jit`` for programs that decode, with the compiler's options for this machine.

Not for those that read the source: an encoder's products of hundreds of rows take 1.2 to 1.3 times
as long with them (330M, 512 tokens).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# A product of a few rows with panels of a kernel (``encdec.model.cpu_products``) reads the rows
# where they are; by default the compiler first copies them once for every panel. 8 rows of the 330M
# model's MLP then take 1.2 to 1.4 times as long as one, otherwise 1.6 times.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


@functools.cache
def compiler_options() -> dict[str, str]:
    """What ``jax.jit`` is given; empty on accelerators, and where jaxlib does not know it."""
    if jax.default_backend() != "cpu":
        return {}
    scalar = jax.ShapeDtypeStruct((), "float32")
    try:
        jax.jit(lambda x: x + 1, compiler_options=_CPU).lower(scalar).compile()
    except (jax.errors.JaxRuntimeError, ValueError):
        return {}
    return dict(_CPU)


class LazilyCompiled:
    """A function as ``jax.jit`` compiles it, with ``compiler_options``: these depend on the
    machine's devices, which are looked for at the first call rather than on import."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self._function, self._options = function, options

    @functools.cached_property
    def jitted(self) -> Any:
        return jax.jit(self._function, compiler_options=compiler_options(), **self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self.jitted.lower(*args, **kwargs)

    def clear_cache(self) -> None:
        """Forgets what was compiled."""
        self.jitted.clear_cache()
