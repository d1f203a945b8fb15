"""``encdec serve``: a trained model over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import time

from encdec import shipped
from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.inference.generation_settings import MOST_TOKENS, add_draft_option
from encdec.logs import logger
from encdec.packages import install_hint
from encdec.storage import any_path, directory_name

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
    _check_packages()
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.inference.cache_memory import check_slots
    from encdec.inference.draft_model import (
        check_draft_lengths,
        check_draft_model,
        draft_configs,
        load_draft,
    )
    from encdec.inference.exported import export_format
    from encdec.inference.generator import read_prompt_format
    from encdec.model import parameter_count
    from encdec.saved.saved_config import model_config_of, origin, read_config
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
    content = read_config(options.checkpoint)
    models = [model_config_of(content), *draft_configs(options.draft)]
    check_slots(models, options.slots, prompts.max_input_tokens, max_tokens)
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
    name = options.name or directory_name(options.checkpoint)
    service = Service(
        engine,
        name,
        Limits(max_tokens, min(trained_for, max_tokens), _most_answers(options)),
        options.timeout_seconds,
        options.max_body_bytes,
        template=template,
    )
    megabytes = (slot_bytes(engine.config, engine.plan) + engine.drafts.slot_bytes) / 1e6
    what = "; ".join(filter(None, (f"{parameter_count(params):,} parameters", origin(content))))
    _LOG.info(
        f"{name} ({what}), step {step:,}: {options.slots} slots of "
        f"{prompts.max_input_tokens:,} tokens in and {max_tokens:,} out, {megabytes:,.1f} MB each"
    )
    run(service, bound, options.grace_seconds)
    _LOG.info("ended")
    return 0


def _most_answers(options: argparse.Namespace) -> int:
    """Of one request; more would be told to try again, always to no effect."""
    return min(options.max_answers, options.slots + options.max_queue)


def _check_packages() -> None:
    for package in ("jinja2", "starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"encdec serve needs {package}: {install_hint('serve')}")


def _parser() -> Parser:
    parser = Parser(
        prog="encdec serve",
        description="Serves a trained model over HTTP, in OpenAI's protocols, with "
        "continuous batching.",
        epilog="Example: encdec serve --checkpoint=runs/mine --port=8000; curl "
        'http://127.0.0.1:8000/v1/completions -d \'{"prompt": "...", "temperature": 0}\'',
    )
    shipped.add_checkpoint_flag(parser)
    parser.add("--step", "checkpoint (default: the last)", int, least=0)
    parser.add("--name", "the model's name (default: the directory's)")
    parser.add(
        "--chat_template",
        "Jinja template that turns a chat's messages into one text (default: the checkpoint's "
        "chat_template.jinja, which an import copies; without one, the input is a single message)",
        any_path,
        metavar="FILE",
    )
    parser.add("--host", "address", default="127.0.0.1")
    parser.add("--port", "0: any free port", int, 8000, least=0, most=65535)
    parser.add("--slots", "answers generated at once", int, 16, least=1)
    parser.add("--max_queue", "answers that may wait for a slot; more get 429", int, 256, least=0)
    longest = "longest input (default: the longest in training)"
    parser.add("--max_input_tokens", longest, int, least=2)  # a token and EOS
    longest = "most new tokens (default: the length of training targets)"
    parser.add("--max_tokens", longest, int, least=1, most=MOST_TOKENS)
    parser.add("--max_answers", "most answers to one request: prompts times n", int, 64, least=1)
    parser.add("--max_body_bytes", "longest request body", int, 1 << 20, least=1)
    abandoned = "time until a request is abandoned"
    parser.add("--timeout_seconds", abandoned, float, 120.0, above=0)
    shutdown = "time that running requests get at shutdown"
    parser.add("--grace_seconds", shutdown, float, 30.0, least=0)
    unknown = "read text outside the vocabulary as its unknown token instead of refusing it"
    parser.add("--keep_unknown", unknown, default=False)
    add_draft_option(parser)
    parser.add_argument(
        "--no_warm_up",
        dest="warm_up",
        action="store_false",
        help="do not compile at start-up, but when a program is first needed",
    )
    return parser
