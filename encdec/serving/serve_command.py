"""``encdec serve``: a trained model over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import pathlib
import time

from encdec import shipped
from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.inference.generation_settings import add_draft_option
from encdec.logs import logger
from encdec.packages import install_hint
from encdec.storage import any_path

_LOG = logger(__name__)


def main(argv: list[str]) -> int:
    """``encdec serve --checkpoint=DIR``: runs until SIGTERM or Ctrl-C.

    Raises:
        ConfigError: flags out of range, an address in use, a draft model that cannot be used, or
            missing packages.
        CheckpointError: the directory holds no trained model.
        DataError: its vocabulary is missing or is another one.
    """
    options = _parser().parse_args(argv)
    _check(options)
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.inference.draft_model import check_draft_lengths, check_draft_model, load_draft
    from encdec.inference.exported import export_format
    from encdec.inference.generator import read_prompt_format
    from encdec.saved.saved_params import load_params_for_inference
    from encdec.serving.app import Service
    from encdec.serving.chat import find_template
    from encdec.serving.engine import Engine
    from encdec.serving.protocol import Limits
    from encdec.serving.server import bind, run
    from encdec.serving.slots import slot_bytes

    bound = bind(options.host, options.port)
    if exported := export_format(options.checkpoint):
        raise ConfigError(
            f"{options.checkpoint} is an export ({exported}), which cannot batch "
            "requests; serve the work directory that it was made from"
        )
    prompts, trained_for = read_prompt_format(
        options.checkpoint, max_input_tokens=options.max_input_tokens
    )
    prompts = dataclasses.replace(prompts, keep_unknown=options.keep_unknown)
    template = find_template(options.checkpoint, options.chat_template)
    max_tokens = options.max_tokens or trained_for
    check_draft_model(options.draft, prompts.vocabulary)
    check_draft_lengths(options.draft, prompts.max_input_tokens, max_tokens)
    config, params, step = load_params_for_inference(options.checkpoint, options.step)
    engine = Engine(
        config,
        params,
        prompts,
        max_tokens=max_tokens,
        slots=options.slots,
        max_queue=options.max_queue,
        draft=load_draft(options.draft, prompts.vocabulary),
    )
    begin = time.perf_counter()
    if options.warm_up:
        programs = engine.warm_up()
        _LOG.info(f"{programs} programs ready in {time.perf_counter() - begin:.1f} s")
    name = options.name or pathlib.Path(options.checkpoint).resolve().name
    service = Service(
        engine,
        name,
        Limits(max_tokens, min(trained_for, max_tokens), options.max_answers),
        options.timeout_seconds,
        options.max_body_bytes,
        template=template,
    )
    megabytes = (slot_bytes(engine.config, engine.plan) + engine.drafts.slot_bytes) / 1e6
    _LOG.info(
        f"{name}, step {step:,}: {options.slots} slots of {prompts.max_input_tokens:,} tokens in "
        f"and {max_tokens:,} out, {megabytes:,.1f} MB each"
    )
    run(service, bound, options.grace_seconds)
    _LOG.info("ended")
    return 0


def _check(options: argparse.Namespace) -> None:
    for name, least in (
        ("slots", 1),
        ("max_queue", 0),
        ("max_tokens", 1),
        ("max_input_tokens", 2),
        ("max_body_bytes", 1),
        ("max_answers", 1),
        ("port", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; expected {least} or more")
    if not options.timeout_seconds > 0:
        raise ConfigError(f"timeout_seconds is {options.timeout_seconds}; expected more than 0")
    if not options.grace_seconds >= 0:
        raise ConfigError(f"grace_seconds is {options.grace_seconds}; expected 0 or more")
    for package in ("jinja2", "starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"encdec serve needs {package}: {install_hint('serve')}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="encdec serve",
        description="Serves a trained model over HTTP, in OpenAI's protocols, with "
        "continuous batching.",
        epilog="Example: encdec serve --checkpoint=runs/mine --port=8000; curl "
        'http://127.0.0.1:8000/v1/completions -d \'{"prompt": "...", "temperature": 0}\'',
    )
    parser.add_argument(
        "--checkpoint",
        type=shipped.checkpoint,
        required=True,
        metavar="DIR",
        help="work directory of `encdec train` or `encdec import`",
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
    parser.add_argument("--name", help="the model's name (default: the directory's)")
    parser.add_argument(
        "--chat_template",
        type=any_path,
        metavar="FILE",
        help="Jinja template that turns a chat's messages into one text (default: the checkpoint's "
        "chat_template.jinja, which an import copies; without one, the input is a single message)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0: any free port (default %(default)s)"
    )
    _add_limit_flags(parser)
    return parser


def _add_limit_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slots",
        type=int,
        default=16,
        metavar="N",
        help="answers generated at once (default %(default)s)",
    )
    parser.add_argument(
        "--max_queue",
        type=int,
        default=256,
        metavar="N",
        help="answers that may wait for a slot; more get 429 (default %(default)s)",
    )
    parser.add_argument(
        "--max_input_tokens",
        type=int,
        metavar="N",
        help="longest input (default: the longest in training)",
    )
    parser.add_argument(
        "--max_tokens",
        type=int,
        metavar="N",
        help="most new tokens (default: the length of training targets)",
    )
    parser.add_argument(
        "--max_answers",
        type=int,
        default=64,
        metavar="N",
        help="most answers to one request: prompts times n (default %(default)s)",
    )
    parser.add_argument(
        "--max_body_bytes",
        type=int,
        default=1 << 20,
        metavar="N",
        help="longest request body (default %(default)s)",
    )
    parser.add_argument(
        "--timeout_seconds",
        type=float,
        default=120.0,
        metavar="X",
        help="time until a request is abandoned (default %(default)s)",
    )
    parser.add_argument(
        "--grace_seconds",
        type=float,
        default=30.0,
        metavar="X",
        help="time that running requests get at shutdown (default %(default)s)",
    )
    parser.add_argument(
        "--keep_unknown",
        action="store_true",
        help="read text outside the vocabulary as its unknown token instead of refusing it",
    )
    add_draft_option(parser)
    parser.add_argument(
        "--no_warm_up",
        dest="warm_up",
        action="store_false",
        help="do not compile at start-up, but when a program is first needed",
    )
