"""``encdec compile``: predicts the cost of a run on a TPU pod, on a machine without one."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console

from encdec.config_files import split_overrides
from encdec.errors import ConfigError
from encdec.fields import listed
from encdec.flags import Parser
from encdec.storage import local_path
from encdec.train.run_config import RunConfig, load_config, parse_config


def main(argv: list[str]) -> int:
    """Compiles a run for topologies and reports memory, time and cost; or ``table``.

    Raises:
        ConfigError: an unknown topology, a config that does not divide on one of them, a file
            that cannot be written (all before anything is compiled), or one that does not fit:
            then the message is the compiler's reason and the nearest setting that fits.
    """
    if argv and argv[0] == "table":
        from encdec.hardware.compile_table import main as table

        return table(argv[1:])
    overrides, rest = split_overrides(argv)
    options = _parser().parse_args(rest)
    run = parse_config(load_config(options.config, overrides))
    for flag in ("out", "hlo"):
        _check_writable(flag, getattr(options, flag))
    # Before jax starts: this machine's accelerators are not used.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from encdec.hardware import compile_report as report
    from encdec.hardware.compile import DoesNotFit
    from encdec.hardware.search import search
    from encdec.hardware.topology import find_topology
    from encdec.train.warm_start import with_source_model

    run = with_source_model(run)
    kind = _kinds(options)[options.what]
    topologies = [find_topology(name) for name in options.topology]
    plans = [_plan(run, topology, options, kind) for topology in topologies]
    console = Console(width=None if sys.stdout.isatty() else 150)
    found: list[Any] = []
    reports: list[dict[str, Any]] = []
    unfit: list[str] = []  # a topology that is too small does not prevent the others' reports
    for topology, (here, meshes) in zip(topologies, plans):
        attempt = functools.partial(kind.compile, topology=topology)
        try:
            if options.search:
                divides = functools.partial(_divides, kind, topology)
                searched = search(here, attempt, divides, options.search, meshes)
                report.compare(list(searched.steps), console)
                found.append(searched.steps[0])
                reports += report.searched_as_json(searched)
            else:
                found.append(_fit(here, attempt, kind.smaller))
                reports.append(kind.as_json(found[-1]))
            kind.show(found[-1], console)
            if options.hlo:
                pathlib.Path(options.hlo).write_text(report.text_of(found[-1]))
        except DoesNotFit as error:
            unfit.append(f"{topology.name}: {error}")
        if options.out:
            pathlib.Path(options.out).write_text(json.dumps(reports, indent=2) + "\n")
    if len(found) > 1:
        kind.compare(found, console)
    if unfit:
        raise DoesNotFit(" ".join(unfit))
    return 0


class _Kind(NamedTuple):
    """Functions behind a value of --what."""

    compile: Callable[..., Any]  # (run, topology)
    check: Callable[..., None]  # (run, topology) -> ConfigError if something does not divide
    smaller: Callable[[RunConfig], list[RunConfig]] | None  # to try if a run does not fit
    show: Callable[[Any, Console], None]
    compare: Callable[[list[Any], Console], None]
    as_json: Callable[[Any], dict[str, Any]]


def _kinds(options: argparse.Namespace) -> dict[str, _Kind]:
    from encdec.hardware import compile_report as report
    from encdec.hardware.compile import calibrate, check_step, compile_step, halved, smaller
    from encdec.hardware.decode import check_decoding, compile_decoding
    from encdec.hardware.layer import compile_layer

    chosen = dict(option.split("=", 1) for option in options.option)
    inputs, targets = options.inputs_length, options.targets_length
    lengths = {"inputs": inputs, "targets": targets, "compiler_options": chosen}
    on_one_chip = lambda run, topology: None  # nothing is split
    return {
        "train": _Kind(
            functools.partial(compile_step, **lengths),
            check_step,
            smaller,
            report.show,
            report.compare,
            report.as_json,
        ),
        "decode": _Kind(
            functools.partial(compile_decoding, **lengths),
            check_decoding,
            halved,
            report.show_decoding,
            report.compare_decoding,
            report.decoding_as_json,
        ),
        "layer": _Kind(
            lambda run, topology: compile_layer(run, topology, inputs, options.layers, chosen),
            on_one_chip,
            None,
            report.show_layer,
            report.compare_layers,
            report.layer_as_json,
        ),
        "calibrate": _Kind(
            lambda run, topology: calibrate(topology, chosen),
            on_one_chip,
            None,
            report.show_calibration,
            report.compare_calibrations,
            report.calibration_as_json,
        ),
    }


def _plan(
    run: RunConfig, topology: Any, options: argparse.Namespace, kind: _Kind
) -> tuple[RunConfig, list[Any]]:
    """The run with its rows on a topology, and the meshes to search there.

    Raises:
        ConfigError: the run does not divide, alone or with one of those meshes.
    """
    from encdec.hardware.search import search_meshes

    devices = len(topology.devices)
    if options.rows:
        pieces = 1 if options.what == "decode" else run.accumulation
        run = dataclasses.replace(run, batch_size=options.rows * devices * pieces)
    meshes = [run.mesh]
    if "mesh" in (options.search or ()):
        meshes = search_meshes(run.mesh, devices, topology.slices)
    for mesh in meshes:
        try:
            kind.check(dataclasses.replace(run, mesh=mesh), topology)
        except ConfigError as error:
            raise ConfigError(f"{topology.name}: {error}") from None
    return run, meshes


def _divides(kind: _Kind, topology: Any, run: RunConfig) -> bool:
    try:
        kind.check(run, topology)
    except ConfigError:
        return False
    return True


def _check_writable(flag: str, file: str | None) -> None:
    """Raises ConfigError if a file cannot be written; leaves no trace and changes none."""
    if not file:
        return
    path = pathlib.Path(file)
    there = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(
            f"--{flag}={file} cannot be written: {error.strerror}; give a file in "
            "an existing folder"
        ) from None
    if not there:
        path.unlink()


def _parser() -> Parser:
    parser = Parser(
        prog="encdec compile",
        description="Compiles the training step, or generation, for TPU topologies, on a machine "
        "without any, and predicts memory, time, MFU and chip-hours.",
        epilog="Any field of the config is set by --config.FIELD=VALUE, the mesh too: "
        "--config.mesh.fsdp=4. `encdec compile table REPORT.json ...` compares saved "
        "reports. docs/prediction.md explains the method and its limits.",
    )
    parser.add_argument("--config", type=local_path, required=True, metavar="FILE.py[:ARGUMENT]")
    parser.add(
        "--topology",
        "e.g. v5e:4x4, v5p:2x2x4, v5e:16x16*2 (two slices); several separated by commas give one "
        "table",
        lambda text: list(listed(text, "--topology")),
        required=True,
        metavar="NAME",
    )
    of_rows, of_targets = "--what=train|decode|layer", "--what=train|decode"
    source = "source tokens per row"
    parser.add("--inputs_length", source, int, 1024, least=1, needs=of_rows)
    target = "target tokens per row"
    parser.add("--targets_length", target, int, 256, least=1, needs=of_targets)
    parser.add(
        "--rows",
        "rows per device, instead of config.batch_size: for comparing topologies of different "
        "sizes",
        int,
        least=1,
        needs=of_rows,
    )
    parser.add(
        "--what",
        "the training step; prefill and decode step, with batch_size rows; layers alone, forward "
        "and backward on one chip, for quick experiments; or one large product and one large sum, "
        "which calibrate the estimates",
        default="train",
        choices=("train", "decode", "layer", "calibrate"),
    )
    parser.add("--layers", "number of layers", int, 1, least=1, needs="--what=layer")
    parser.add(
        "--search",
        "find the fastest variant that fits, over batch (the config's, doubled while it fits or "
        "halved until it does), remat and mesh (copies, and shards of the state); default: all "
        "three",
        _searched,
        needs="--what=train",
        nargs="?",
        const="batch,remat,mesh",
        metavar="OVER",
    )
    option = "compiler option for this compilation only"
    parser.add("--option", option, _option, default=[], metavar="NAME=VALUE")
    parser.add(
        "--out",
        "also write the figures here, after each topology; after a search, those of all variants "
        "that fit, the fastest first",
        local_path,
        metavar="FILE",
    )
    parser.add("--hlo", "write the last compiled program here", local_path, metavar="FILE")
    return parser


def _searched(text: str) -> tuple[str, ...]:
    over = tuple(text.split(","))
    wrong = [name for name in over if name not in ("batch", "remat", "mesh")]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of batch, remat, mesh")
    return over


def _option(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=VALUE")
    return text


def _fit(run: RunConfig, attempt, smaller: Callable[[RunConfig], list[RunConfig]] | None):
    """Compiles ``run``; if it does not fit, the error names the nearest variant that does."""
    from encdec.hardware.compile import DoesNotFit, nearest_fit

    try:
        return attempt(run)
    except DoesNotFit as error:
        if smaller is None:
            raise
        found = nearest_fit(smaller(run), attempt)
        if found is None:
            raise DoesNotFit(
                f"{error} Nothing smaller was found that fits; shard the parameters "
                "(--config.mesh.fsdp=-1 --config.mesh.data=1)"
            ) from None
        variant, compiled = found
        remat, changed = variant.model_config().execution.remat, ""
        if remat != run.model_config().execution.remat:
            changed = f" --config.model_overrides.remat={remat}"
        raise DoesNotFit(
            f"it does not fit: {error} The nearest settings that do: "
            f"--config.batch_size={variant.batch_size}{changed} (predicted "
            f"{compiled.tokens_per_second:,.0f} tokens/s)"
        ) from None
