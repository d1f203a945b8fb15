"""``encdec compile``: what a run would cost on a TPU pod, from a machine without one."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from typing import Any

from etils import epath
from rich.console import Console

from encdec.errors import ConfigError
from encdec.train.command import load_config, split_overrides
from encdec.train.config import MeshConfig, RunConfig, parse_config


def main(argv: list[str]) -> int:
    """Compiles a run for topologies and reports memory, time and cost; or ``table``.

    Raises:
        ConfigError: an unknown topology, a config that does not divide, or one that does not
            fit: then the message is the compiler's reason and the nearest setting that fits.
    """
    if argv and argv[0] == "table":
        from encdec.hardware.table import main as table

        return table(argv[1:])
    overrides, rest = split_overrides(argv)
    options = _parser().parse_args(rest)
    run = parse_config(load_config(options.config, overrides))
    # Before jax starts: no accelerator of this machine is wanted.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from encdec.hardware import report
    from encdec.hardware.compile import DoesNotFit
    from encdec.hardware.topology import find_topology, parse_name

    for name in options.topology:
        parse_name(name)
    chosen = dict(option.split("=", 1) for option in options.option)
    console = Console(width=None if sys.stdout.isatty() else 150)
    show, compare, as_json, compile_it = {
        "train": (report.show, report.compare, report.as_json, _compile),
        "decode": (report.show_decoding, report.compare_decoding, report.decoding_as_json,
                   _compile_decoding),
        "layer": (report.show_layer, report.compare_layers, report.layer_as_json, _compile_layer),
        "product": (report.show_product, report.compare_products, report.product_as_json,
                    _compile_product),
    }[options.what]
    if options.search and options.what != "train":
        raise ConfigError(f"--search looks for training settings; --what is {options.what!r}")
    found: list[Any] = []
    unfit: list[str] = []  # one of several topologies that is too small hides none of the others
    for name in options.topology:
        topology = find_topology(name)
        devices = len(topology.devices)
        attempt = lambda r, t=topology: compile_it(r, t, options, chosen)
        here = run if not options.rows else dataclasses.replace(
            run, batch_size=options.rows * devices * run.accumulation)
        try:
            if options.search:
                found.append(_search(here, attempt, options.search, devices, console))
            else:
                found.append(_fit(here, attempt) if options.what == "train" else attempt(here))
        except DoesNotFit as error:
            unfit.append(f"{name}: {error}")
            continue
        show(found[-1], console)
    if len(found) > 1:
        compare(found, console)
    if options.json:
        epath.Path(options.json).write_text(
            json.dumps([as_json(one) for one in found], indent=2) + "\n")
    if options.hlo and found:
        epath.Path(options.hlo).write_text(report.text_of(found[-1]))
    if unfit:
        raise DoesNotFit(" ".join(unfit))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="encdec compile", allow_abbrev=False,
        description="Compiles the training step, or generation, for TPU topologies, on a machine "
        "without any, and predicts memory, time, MFU and chip-hours.",
        epilog="Any field of the config is set by --config.FIELD=VALUE, the mesh too: "
        "--config.mesh.fsdp=4. `encdec compile table REPORT.json ...` lays saved reports side by "
        "side. docs/pod.md explains the method and its limits.")
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]")
    parser.add_argument("--topology", required=True, metavar="NAME", type=lambda x: x.split(","),
                        help="e.g. v5e:4x4, v5p:2x2x4, v5e:16x16*2 (two slices); several "
                        "separated by commas give one table")
    parser.add_argument("--inputs", type=int, default=1024, metavar="N",
                        help="source tokens a row (%(default)s)")
    parser.add_argument("--targets", type=int, default=256, metavar="N",
                        help="target tokens a row (%(default)s)")
    parser.add_argument("--rows", type=int, default=0, metavar="N",
                        help="rows on each device, in place of config.batch_size: the fair way to "
                        "compare topologies of different sizes")
    parser.add_argument("--what", choices=("train", "decode", "layer", "product"),
                        default="train", help="the training step; prefill and decode step, with "
                        "batch_size rows; layers alone, forward and backward on one chip, to try "
                        "things quickly; or one 8192 x 8192 x 8192 product, which calibrates the "
                        "clock")
    parser.add_argument("--layers", type=int, default=1, metavar="N",
                        help="with --what=layer: how many (%(default)s)")
    parser.add_argument("--search", nargs="?", const="batch,remat,mesh", metavar="OVER",
                        type=_searched,
                        help="find the fastest that fits, over batch (doubled from the config's), "
                        "remat and mesh (copies, and shards of the state); all three by default")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        type=_option, help="compiler option for this compilation only")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    parser.add_argument("--hlo", metavar="FILE", help="write the last compiled program here")
    return parser


def _searched(text: str) -> tuple[str, ...]:
    over = tuple(text.split(","))
    wrong = [name for name in over if name not in ("batch", "remat", "mesh")]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of batch, remat, mesh")
    return over


def _option(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    return text


def _compile(run: RunConfig, topology, options: argparse.Namespace, chosen: dict[str, str]):
    from encdec.hardware.compile import compile_step

    return compile_step(run, topology, options.inputs, options.targets, chosen)


def _compile_decoding(run: RunConfig, topology, options: argparse.Namespace, chosen):
    from encdec.hardware.decode import compile_decoding

    return compile_decoding(run, topology, options.inputs, options.targets, chosen)


def _compile_layer(run: RunConfig, topology, options: argparse.Namespace, chosen):
    from encdec.hardware.layer import compile_layer

    return compile_layer(run, topology, options.inputs, options.layers, chosen)


def _compile_product(run: RunConfig, topology, options: argparse.Namespace, chosen):
    from encdec.hardware.compile import compile_product

    return compile_product(topology, chosen)


def _fit(run: RunConfig, attempt):
    """Compiles ``run``; if it does not fit, says what does."""
    from encdec.hardware.compile import DoesNotFit, nearest_fit

    try:
        return attempt(run)
    except DoesNotFit as error:
        found = nearest_fit(run, attempt)
        if found is None:
            raise DoesNotFit(f"{error} Nothing smaller was found that fits; shard the parameters "
                             "(--config.mesh.fsdp=-1 --config.mesh.data=1)") from None
        variant, step = found
        raise DoesNotFit(
            f"the step does not fit: {error} The nearest that does: "
            f"--config.batch_size={variant.batch_size} --config.model_overrides.remat="
            f"{variant.model_config().remat} (predicted MFU {100 * step.mfu:.1f} %)") from None


def _search(run: RunConfig, attempt, over: tuple[str, ...], devices: int, console: Console):
    """Tries every mesh and remat policy, doubling the batch while it fits; the best MFU wins.

    Raises:
        ConfigError: nothing fits.
    """
    from encdec.hardware.compile import DoesNotFit, with_remat
    from encdec.hardware.report import compare
    from encdec.model.stacks import REMAT_POLICIES

    remats = ("none", *REMAT_POLICIES) if "remat" in over else (run.model_config().remat,)
    meshes = search_meshes(run.mesh, devices) if "mesh" in over else [run.mesh]
    steps, reasons = [], []
    for mesh, remat in itertools.product(meshes, remats):
        for doubling in itertools.count():
            variant = dataclasses.replace(
                with_remat(run, remat), mesh=mesh, batch_size=run.batch_size * 2**doubling)
            try:
                steps.append(attempt(variant))
            except DoesNotFit as error:
                reasons.append(str(error))
                break
            console.print(f"data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, remat "
                          f"{remat}, {variant.batch_size} rows: {100 * steps[-1].mfu:.1f} % MFU")
            if "batch" not in over:
                break
    if not steps:
        raise ConfigError(f"nothing fits, from {run.batch_size} rows up: {reasons[0]}; wanted a "
                          "smaller --config.batch_size or more --config.mesh.fsdp")
    compare(steps, console)
    return max(steps, key=_mfu)


def search_meshes(mesh: MeshConfig, devices: int) -> list[MeshConfig]:
    """Copies of the model, shards of its state over all devices, and shards over 16 of them.

    What ``mesh`` says of the tensor axis stays: at these sizes it never pays.
    """
    rest = devices // mesh.tensor if mesh.tensor > 0 else devices
    shards = sorted({1, rest} | ({16} if rest % 16 == 0 else set()))
    return [dataclasses.replace(mesh, data=rest // n, fsdp=n) for n in shards]


def _mfu(step) -> float:
    return step.mfu
