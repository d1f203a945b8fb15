"""``encdec benchmark loop``: what the training loop costs in addition to its step.

The real loop trains on records; after each of its windows of steps, the same jitted step runs
equally often in a bare hot loop, on a batch that is on the devices already. The two take turns
in one process, so that a machine's changing load affects both equally.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from encdec.data.records import (
    DatasetCard,
    content_fingerprint,
    encode_row,
    open_records,
    token_dtype,
    write_shard,
)
from encdec.data.vocabulary import ByteVocabulary
from encdec.flags import Parser
from encdec.model import preset_names
from encdec.train.feed import on_devices, open_batches
from encdec.train.loop import train
from encdec.train.program import build_program
from encdec.train.run_config import parse_config
from encdec.train.sharding import make_mesh

OVERHEAD_GOAL = 0.03


def write_random_records(
    directory: pathlib.Path, rows: int, inputs_length: int, targets_length: int, seed: int = 0
) -> pathlib.Path:
    """Records of random bytes for a benchmark, two segments per row and no padding."""
    random, vocabulary = np.random.default_rng(seed), ByteVocabulary()
    spec = vocabulary.save(directory)
    dtype = token_dtype(spec.size, inputs_length, targets_length)

    def halves(length: int) -> list[np.ndarray]:
        ids = random.integers(vocabulary.offset, spec.size, length)
        return [ids[: length // 2], ids[length // 2 :]]

    shard = write_shard(
        directory / "rows-00000-of-00001.arrayrecord",
        (encode_row(halves(inputs_length), halves(targets_length), dtype) for _ in range(rows)),
    )
    DatasetCard(
        task="random bytes",
        split="train",
        origin={},
        vocabulary=spec,
        inputs_length=inputs_length,
        targets_length=targets_length,
        packing="best_fit",
        inputs_eos=False,
        objective={},
        seed=seed,
        decoder_start_id=0,
        token_dtype=dtype,
        rows=rows,
        examples=2 * rows,
        documents=2 * rows,
        source_tokens=rows * inputs_length,
        target_tokens=rows * targets_length,
        target_bytes=rows * targets_length,
        non_padding_share=1.0,
        truncated={},
        dropped={},
        shards=(shard,),
        fingerprint=content_fingerprint([shard], spec, inputs_length, targets_length, 0),
    ).write(directory)
    return directory


def measure_loop(
    *,
    model: str,
    batch_size: int,
    inputs_length: int = 128,
    targets_length: int = 64,
    window: int = 20,
    rounds: int = 5,
) -> dict[str, Any]:
    """Seconds per step, in the loop and bare, medians over ``rounds`` windows; and their ratio.

    The loop reads, shuffles and moves batches, fetches and checks every step's metrics, and
    writes a report a window; checkpoints and evaluation, which no step needs, are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        records = write_random_records(
            root / "records", max(1024, 4 * batch_size), inputs_length, targets_length
        )
        run = parse_config(
            {
                "model": model,
                "batch_size": batch_size,
                "steps": window * (rounds + 1),
                "log_every": window,
                "data": {"records": str(records)},
                "checkpoint": {"every": 0},
                "loss": {"z_loss": 0.0},
            }
        )
        bare = _BareLoop(run)
        in_loop, hot = [], []
        resumed: np.ndarray | None = None

        def turn(step: int, numbers: Mapping[str, float]) -> None:
            nonlocal resumed
            arrived = _clocks()
            # The loop has the next step in flight already; it ends outside both measurements.
            jax.block_until_ready(jax.live_arrays())
            seconds = bare.seconds_per_step(window)
            if resumed is not None:
                in_loop.append((arrived - resumed) / (window - 1))
                hot.append(seconds)
            resumed = _clocks()

        train(run, root / "work", on_report=turn)
    loop, alone = np.array(in_loop), np.array(hot)
    wall, processor = (loop / alone).T
    return {
        "model": model,
        "batch_size": batch_size,
        "inputs_length": inputs_length,
        "targets_length": targets_length,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "steps": window * rounds,
        "loop_step_seconds": float(np.median(loop[:, 0])),
        "bare_step_seconds": float(np.median(alone[:, 0])),
        "ratio": float(np.median(wall)),
        "ratios": wall.round(4).tolist(),
        # Of all threads: where the device is the processor itself, on a machine that others use,
        # this is the steadier measure. On an accelerator it says nothing about the step.
        "processor_ratio": float(np.median(processor)),
    }


def _clocks() -> np.ndarray:
    """Wall time and this process's processor time, seconds."""
    return np.array([time.perf_counter(), time.process_time()])


class _BareLoop:
    """The run's own jitted step, on one batch, with nothing around it."""

    def __init__(self, run: Any):
        records, model = open_records(run.data.records), run.model_config()
        self._program = build_program(run, model, make_mesh(run.mesh), records.card.targets_length)
        batches = open_batches(records, model, self._program.batch_sharding, run.batch_size)
        self._batch = next(on_devices(batches, self._program.batch_sharding, 0, 1))
        self._state = self._program.init()
        self.seconds_per_step(1)

    def seconds_per_step(self, steps: int) -> np.ndarray:
        """Wall and processor time of a step in a hot loop, after two that are not timed."""
        for _ in range(2):
            self._step()
        jax.block_until_ready(self._state)
        started = _clocks()
        for _ in range(steps):
            self._step()
        jax.block_until_ready(self._state)
        return (_clocks() - started) / steps

    def _step(self) -> None:
        self._state, _ = self._program.train_step(self._state, self._batch)


def loop_main(argv: list[str]) -> int:
    """``encdec benchmark loop``: step time in the loop against the bare jitted step."""
    flags = Parser(prog="encdec benchmark loop", description=loop_main.__doc__)
    flags.add(
        "--model", "model to train", default="quickstart", choices=preset_names(), metavar="PRESET"
    )
    flags.add("--batch_size", "rows of a batch (default: 8 per device)", int, 0, least=1)
    flags.add("--inputs_length", "source tokens per row", int, 256, least=1)
    flags.add("--targets_length", "target tokens per row", int, 64, least=1)
    flags.add("--window", "steps between turns", int, 10, least=2)
    flags.add("--repeats", "turns", int, 7, least=1)
    flags.add("--json", "print JSON alone", default=False)
    given = flags.parse_args(argv)
    result = measure_loop(
        model=given.model,
        batch_size=given.batch_size or 8 * jax.device_count(),
        inputs_length=given.inputs_length,
        targets_length=given.targets_length,
        window=given.window,
        rounds=given.repeats,
    )
    if given.json:
        print(json.dumps(result))
        return 0
    print(
        f"{result['model']}, {result['batch_size']} rows of {result['inputs_length']} + "
        f"{result['targets_length']} tokens, {result['devices']} x {result['device']}, "
        f"{result['steps']} steps each"
    )
    print(f"in the loop: {1e3 * result['loop_step_seconds']:.2f} ms per step")
    print(f"bare step:   {1e3 * result['bare_step_seconds']:.2f} ms per step")
    print(
        f"ratio:       {result['ratio']:.3f} (goal {1 + OVERHEAD_GOAL:.2f} or less; "
        f"single turns {', '.join(f'{ratio:.3f}' for ratio in result['ratios'])})"
    )
    if jax.default_backend() == "cpu":
        print(f"processor time, all threads: ratio {result['processor_ratio']:.3f}")
    return 0
