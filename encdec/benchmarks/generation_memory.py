"""Peak memory while generating, each model in its own process.

``python -m encdec.benchmarks.generation_memory`` reads one request as JSON from standard input and
writes the peaks as JSON to standard output; ``measure_peaks`` runs it.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from encdec.model import ModelConfig

Workload = tuple[int, int, int]  # rows, input tokens, output tokens


def measure_peaks(
    configs: Mapping[str, ModelConfig], settings: Sequence[Workload], dtype: str
) -> dict[tuple[str, Workload], int]:
    """Bytes by model and setting, of cached greedy generation.

    On a CPU the most physical memory that the process held during a second run (the first one
    compiles), Python and the compiled programs included. On an accelerator the most device memory
    until the end of the setting: settings go in the order of their tokens.

    Raises:
        RuntimeError: a process that failed, with the end of what it said.
    """
    found: dict[tuple[str, Workload], int] = {}
    for name, config in configs.items():
        peaks = peaks_by_process(
            "encdec.benchmarks.generation_memory",
            name,
            settings,
            {"config": config.to_dict(), "dtype": dtype},
        )
        found |= {(name, setting): peak for setting, peak in peaks.items()}
    return found


def peaks_by_process(
    module: str, name: str, settings: Sequence[Workload], request: Mapping[str, Any]
) -> dict[Workload, int]:
    """Bytes by setting, as measured by a separate process.

    Args:
        module: run with ``python -m``; reads ``request`` and the settings as JSON from standard
            input, and its last line is a list of bytes.
        name: of the model, for errors.
        settings: to be measured; the order in which they go is described above.
        request: all else that the module asks for.

    Raises:
        RuntimeError: the process failed, with the end of what it said.
    """
    ordered = sorted(settings, key=lambda setting: (setting[0] * sum(setting[1:]), setting))
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps({**request, "settings": ordered}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed: {done.stderr[-1000:]}")
    return dict(zip(ordered, json.loads(done.stdout.splitlines()[-1]), strict=True))


def _peaks(config: ModelConfig, settings: Sequence[Workload], dtype: str) -> list[int]:
    import jax
    import jax.numpy as jnp

    from encdec.benchmarks.device_rates import peak_memory
    from encdec.benchmarks.generation import cached_run, random_params
    from encdec.inference.ready import ready_for_decoding

    config, params = ready_for_decoding(config, random_params(config), dtype)
    found = []
    for batch, inputs, outputs in settings:
        first, rest = cached_run(config, params, jnp.full((batch, inputs), 5, jnp.int32), outputs)
        jax.block_until_ready(rest(first()))
        forget_peak()
        jax.block_until_ready(rest(first()))
        statistics = jax.devices()[0].memory_stats() or {}
        found.append(statistics.get("peak_bytes_in_use") or peak_memory())
    return found


def forget_peak() -> None:
    """Linux counts this process's peak again from here; elsewhere it stays that of all time."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    print(
        json.dumps(
            _peaks(ModelConfig.from_dict(request["config"]), request["settings"], request["dtype"])
        )
    )
