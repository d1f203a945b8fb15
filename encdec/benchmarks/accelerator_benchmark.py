"""``encdec benchmark accelerator``: everything that only a GPU or TPU can show, in one command.

Attention kernels against plain XLA, step time and MFU, generation with transformers next to it,
and a profile of one step. Every part is written to ``accelerator.json`` when it is done, so that a
machine that is taken away costs one part; repeat the command to run the missing ones.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from encdec.benchmarks.device_rates import best_seconds, measure_rates
from encdec.benchmarks.inference_benchmark import OURS as GENERATED
from encdec.benchmarks.inference_benchmark import measure as measure_generation
from encdec.benchmarks.inference_benchmark import numbers
from encdec.benchmarks.train_benchmark import OURS, OurStep, StepSetting, measure
from encdec.benchmarks.transformers_runtime import missing
from encdec.cost.chips import peak_flops
from encdec.errors import ConfigError
from encdec.files import write_json
from encdec.flags import Parser
from encdec.logs import logger
from encdec.model import ModelConfig, preset
from encdec.model.attention import dot_product_attention, segment_mask
from encdec.model.kernels import cudnn_attention, resolve_kernel, splash_attention
from encdec.storage import local_path

_LOG = logger(__name__)

# T5-large's shape (arXiv 1910.10683, table 1) in our blocks, on top of 330m.
T5_LARGE = "t5-large"
_T5_LARGE = (
    ("encoder_layers", 24),
    ("decoder_layers", 24),
    ("num_heads", 16),
    ("num_kv_heads", 16),
)
MODELS = ("330m", "330m-tpu", "1b-tpu", T5_LARGE)
MFU_GOAL, SEQUENCES_GOAL = 0.45, 175  # on an H200; sequences per second of T5_LARGE at 512 + 114
RESULTS = "accelerator.json"
Part = Callable[[], Mapping[str, Any]]


def setting_of(options: argparse.Namespace, model: str, rows: int) -> StepSetting:
    """A training step in bfloat16 with AdamW."""
    name, overrides = ("330m", _T5_LARGE) if model == T5_LARGE else (model, ())
    return StepSetting(
        name, "bfloat16", "adamw", rows, options.inputs_length, options.targets_length, overrides
    )


def compare_attention(config: ModelConfig, rows: int, length: int, causal: bool) -> dict[str, Any]:
    """The kernel that ``attention_kernel="auto"`` takes here against plain XLA, on packed rows.

    Errors are the largest differences from plain XLA in float32 over the largest value there, of
    the kernel and of plain XLA in the config's own dtype: the second is what the dtype costs.
    """
    kernel = resolve_kernel(config, segments=True, dropout=False)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, n, config.head_dim) for n in (config.num_heads, config.num_kv_heads)]
    q, gradient = (jax.random.normal(key, shapes[0], jnp.float32) for key in keys[:2])
    k, v = (jax.random.normal(key, shapes[1], jnp.float32) for key in keys[2:])
    q = q * config.attention_logit_scale
    third = length // 3
    ids = np.repeat([1, 2, 0], [third, length - third - length // 8, length // 8])
    segments = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (rows, length))
    mask = segment_mask(segments, segments, causal=causal)
    real = (segments > 0)[..., None, None]  # of padding, kernels may return anything

    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if kernel == "splash":
            return splash_attention(config, q, k, v, (segments, segments), causal)
        if kernel == "cudnn":
            return cudnn_attention(config, q, k, v, mask)
        return dot_product_attention(config, q, k, v, mask)

    def with_gradients(function: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
        def both(q: Any, k: Any, v: Any, gradient: Any) -> tuple[jax.Array, ...]:
            out, pull = jax.vjp(lambda *x: jnp.where(real, function(*x), 0), q, k, v)
            return (out, *pull(gradient.astype(out.dtype)))

        return jax.jit(both)

    plain = with_gradients(lambda q, k, v: dot_product_attention(config, q, k, v, mask))
    exact = plain(q, k, v, gradient)
    small = [x.astype(config.dtype) for x in (q, k, v, gradient)]
    programs = {"kernel": with_gradients(fused), "plain": plain}
    found = {name: program(*small) for name, program in programs.items()}
    result: dict[str, Any] = {"implementation": kernel, "causal": causal, "length": length}
    for name, values in found.items():
        result[f"{name}_errors"] = {
            what: float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
            for what, a, b in zip(("value", "dq", "dk", "dv"), values, exact, strict=True)
        }
        result[f"{name}_seconds"] = best_seconds(functools.partial(programs[name], *small))
    # Twice what the dtype itself costs, or float32's own rounding.
    result["agrees"] = all(
        error <= max(2 * result["plain_errors"][what], 1e-5)
        for what, error in result["kernel_errors"].items()
    )
    return result


def train_part(options: argparse.Namespace, model: str, matmul_flops: float) -> dict[str, Any]:
    """Step time, MFU and sequences per second; halves the rows until they fit in memory."""
    rows = options.batch_size
    while True:
        try:
            one = measure(
                setting_of(options, model, rows),
                rounds=options.repeats,
                steps=5,
                torch=False,
                compiled=False,
                matmul_flops=matmul_flops,
            )
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or rows % 2:
                raise
            rows //= 2
    seconds = one.median(OURS)
    return {
        "rows": rows,
        "inputs": options.inputs_length,
        "targets": options.targets_length,
        "step_seconds": seconds,
        "sequences_per_second": rows / seconds,
        "mfu": one.mfu,
        "share_of_matmul_rate": one.share(OURS),
        "parts": one.parts,
        "data_seconds": one.data_seconds,
        "host_seconds": one.host_seconds,
    }


def generation_part(options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Greedy generation in bfloat16, ours and transformers' alternating; on a CPU, where reading
    bfloat16 one row at a time is not measured, in float32."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    precisions = {} if options.no_torch else {"transformers": dtype}
    _, found = measure_generation(
        {GENERATED: preset(options.generated)},
        (options.inputs_length,),
        (options.outputs,),
        (batch,),
        repeats=3,
        uncached_inputs=(),
        dtype=dtype,
        precisions=precisions,
        folder=pathlib.Path(options.out) / "exported",
    )
    return {"measured": [one.to_dict() for one in found]}


def profile_part(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """A trace of one step for TensorBoard or Perfetto."""
    step = OurStep(setting_of(options, model, options.batch_size))
    step()
    folder = pathlib.Path(options.out) / "profile"
    with jax.profiler.trace(str(folder)):
        step()
    return {"folder": str(folder), "files": len(list(folder.rglob("*.xplane.pb")))}


def parts_of(options: argparse.Namespace) -> dict[str, Part]:
    """The parts to run, the most valuable first."""
    rate = functools.cache(lambda: measure_rates("bfloat16").flops_per_second)
    parts: dict[str, Part] = {
        "device": lambda: {
            "kind": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "jax": jax.__version__,
            "peak_flops": peak_flops(jax.devices()),
            "matmul_flops_bfloat16": rate(),
        }
    }
    for model in options.models[:2]:
        for causal in (False, True):
            config = setting_of(options, model, 2).run().model_config()
            parts[f"attention {model} {'causal' if causal else 'full'}"] = functools.partial(
                compare_attention, config, 2, options.inputs_length, causal
            )
    for model in options.models:
        part = lambda name: train_part(options, name, rate())
        parts[f"train {model}"] = functools.partial(part, model)
    for batch in options.batches:
        parts[f"generation {batch}"] = functools.partial(generation_part, options, batch)
    parts["profile"] = functools.partial(profile_part, options, options.models[0])
    return parts


def run_parts(
    parts: Mapping[str, Part], path: pathlib.Path, settings: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Runs the parts missing from ``path``, writing it after each; returns all results.

    A part that fails is written with its error, and done again by the next call. No part begins
    after ``seconds``.

    Raises:
        ConfigError: the file is of other settings.
    """
    kept: dict[str, Any] = {"settings": settings, "parts": {}}
    if path.is_file():
        kept = json.loads(path.read_text())
    if kept["settings"] != settings:
        raise ConfigError(
            f"{path} was measured with {kept['settings']}, not with {settings}; give another --out"
        )
    begin, results = time.monotonic(), kept["parts"]
    for name, part in parts.items():
        if name in results and "error" not in results[name]:
            continue
        if time.monotonic() - begin > seconds:
            _LOG.warning(f"{name}: out of time; repeat the command to continue here")
            continue
        started = time.monotonic()
        try:
            results[name] = dict(part())
        except ConfigError:
            raise
        except Exception as error:  # whatever a new device does, the other parts are measured
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        results[name]["took_seconds"] = time.monotonic() - started
        write_json(path, kept)
        _LOG.info(f"{name}: {summary(results[name])}")
    return results


def summary(result: Mapping[str, Any]) -> str:
    """A part's result in one line."""
    if "error" in result:
        return result["error"]
    if "step_seconds" in result:
        mfu = f", MFU {result['mfu']:.0%}" if result["mfu"] else ""
        return (
            f"{1e3 * result['step_seconds']:,.1f} ms per step of {result['rows']} rows, "
            f"{result['sequences_per_second']:,.1f} sequences/s{mfu}"
        )
    if "agrees" in result:
        faster = result["plain_seconds"] / result["kernel_seconds"]
        word = "agrees" if result["agrees"] else "DISAGREES"
        return f"{result['implementation']} {word} with plain XLA, {faster:.2f}x as fast"
    if "measured" in result:
        return "; ".join(
            f"{one['model']} {one['tokens_per_second']['median']:,.1f} tokens/s"
            for one in result["measured"]
        )
    return ", ".join(f"{name} {value}" for name, value in result.items())


def _parser() -> Parser:
    parser = Parser(
        prog="encdec benchmark accelerator",
        description="On a GPU or TPU, in about ten minutes: attention kernels against plain "
        f"XLA, training steps with MFU (goal on an H200: {MFU_GOAL:.0%}, and {SEQUENCES_GOAL} "
        f"sequences/s of {T5_LARGE}), generation with transformers next to it, a profile. "
        "Results are written as they come; repeat the command to continue.",
    )
    names = lambda text: tuple(text.split(","))
    parser.add("--out", "results", local_path, required=True)
    parser.add("--models", "presets", names, MODELS, metavar="A,B")
    parser.add("--generated", "model", default="330m", metavar="PRESET")
    parser.add("--batches", "batch sizes of generation", numbers, (1, 8, 64), metavar="N,N")
    for name, default, least, text in (
        ("batch_size", 32, 1, "rows of a training step; halved where memory is too small"),
        ("inputs_length", 512, 1, "source tokens"),
        ("targets_length", 114, 1, "target tokens"),
        ("outputs", 64, 2, "generated tokens"),
        ("repeats", 3, 1, "rounds of five timed steps"),
        ("minutes", 10, 0, "after which no part begins"),
    ):
        parser.add(f"--{name}", text, int, default, least)
    parser.add("--no_torch", "without transformers", default=False)
    return parser


def _refuse_cpu(models: list[str]) -> None:
    if jax.default_backend() == "cpu":
        raise ConfigError(
            f"JAX finds no GPU or TPU here, and on a CPU {', '.join(models)} would take hours; to "
            "try the command, give small models: --models=micro-1m --generated=micro-1m"
        )


def main(argv: list[str]) -> int:
    """``encdec benchmark accelerator --out=DIR``; 1 if a part failed or is missing."""
    options = _parser().parse_args(argv)
    if not options.no_torch and (why := missing("float32")):
        _LOG.warning(f"{why}; only encdec is measured")
        options.no_torch = True
    if not options.no_torch:  # torch finds its memory taken otherwise
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    preset(options.generated)
    if large := {*options.models, options.generated} & {*MODELS}:
        _refuse_cpu(sorted(large))
    parts = parts_of(options)
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "minutes")}
    settings["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    path = pathlib.Path(options.out) / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    results = run_parts(parts, path, settings, 60 * options.minutes)
    print(f"all results: {path}")
    return int(any("error" in results.get(name, {"error": ""}) for name in parts))
