"""``encdec config``: a run's configuration as it is read, each field with meaning and default."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import textwrap
import tokenize
from typing import Any, Literal, get_args, get_origin

from encdec.config_files import add_config_flag, split_overrides
from encdec.fields import field_types
from encdec.flags import Parser
from encdec.model.execution import INFERENCE_FIELDS
from encdec.modules import add_module_flag, import_modules
from encdec.train.run_config import RunConfig, is_directory, load_config, parse_config, to_dict

WIDTH = 100  # of a line of the table
NAME_WIDTH = 28
VALUE_WIDTH = 16


def main(argv: list[str]) -> int:
    """``encdec config --config=FILE.py[:ARGUMENT] [--config.FIELD=VALUE ...]``.

    Raises:
        ConfigError: as ``encdec train`` of the same configuration.
    """
    overrides, rest = split_overrides(argv)
    options = _parser().parse_args(rest)
    import_modules(options.module)
    run = parse_config(load_config(options.config, overrides))
    if options.json:
        content = {"run": to_dict(run)}
        if not is_directory(run.model):
            content["model"] = run.model_config().to_dict()
        print(json.dumps(content, indent=2))
        return 0
    print(f"{options.config} as `encdec train` reads it; * differs from the default in brackets\n")
    for line in run_table(run):
        print(line)
    if is_directory(run.model):
        print(f"\nThe model is that of {run.model}, with config.model_overrides.")
        return 0
    print(f"\nThe model, config.model_overrides.FIELD: * differs from the preset {run.model}\n")
    for line in model_table(run):
        print(line)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="encdec config",
        description="Prints the configuration of a run, with every field's meaning and default.",
        epilog="Fields are set as in `encdec train`, by --config.FIELD=VALUE. Example: encdec "
        "config --config=configs/pretrain.py:330m --config.steps=2000",
    )
    add_config_flag(parser)
    parser.add("--json", "print JSON, for programs", default=False)
    add_module_flag(parser)
    return parser


def run_table(run: RunConfig) -> list[str]:
    """A line or more for every field of a run but those of the model."""
    return _group(run, RunConfig(), "", left_out=("model_overrides",))


def model_table(run: RunConfig) -> list[str]:
    """The same for the fields of the model and of its execution that a run chooses."""
    model, base = run.model_config(), run.base_model()
    left_out = ("execution", *INFERENCE_FIELDS)
    return _group(model, base, "", left_out) + _group(model.execution, base.execution, "", left_out)


def _group(group: Any, defaults: Any, prefix: str, left_out: tuple[str, ...]) -> list[str]:
    lines, about = [], meanings(type(group))  # type: ignore[arg-type]  # types are hashable
    for field in dataclasses.fields(group):
        value, default = getattr(group, field.name), getattr(defaults, field.name)
        name = prefix + field.name
        if field.name in left_out:
            continue
        if dataclasses.is_dataclass(value):
            lines += _group(value, default, f"{name}.", left_out)
        else:
            lines += _field(name, value, default, about[field.name])
    return lines


def _field(name: str, value: Any, default: Any, about: str) -> list[str]:
    # A part of the run was turned into steps, and would be of the default.
    is_part = isinstance(default, float) and 0 < default < 1 and isinstance(value, int)
    mark = "*" if value != default and not is_part else " "
    if is_part:
        about = f"{about} ({default!r} of the run)"
    elif mark == "*":
        about = f"{about} ({default!r})"
    head = f"{mark} {name:{NAME_WIDTH}} {value!r:{VALUE_WIDTH}} "
    if len(head) > NAME_WIDTH + VALUE_WIDTH + 4:
        return [head.rstrip(), *_wrapped(about, " " * (NAME_WIDTH + VALUE_WIDTH + 4))]
    return _wrapped(about, head)


def _wrapped(text: str, head: str) -> list[str]:
    indent = " " * (NAME_WIDTH + VALUE_WIDTH + 4)
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=indent) or [
        head.rstrip()
    ]


@functools.cache
def meanings(kind: type) -> dict[str, str]:
    """What the source of a dataclass says of each field: behind it, else in the lines above."""
    source = textwrap.dedent(inspect.getsource(kind))
    comments = {
        token.start[0]: (token.line.strip().startswith("#"), token.string.lstrip("# "))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    choices = {
        name: ", ".join(map(str, filter(None, get_args(hint))))
        for name, hint in field_types(kind).items()
        if get_origin(hint) is Literal
    }
    found = {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        name = node.target.id
        alone, behind = comments.get(node.end_lineno or 0, (True, ""))
        above: list[str] = []
        line = node.lineno - 1
        while line in comments and comments[line][0]:
            above.insert(0, comments[line][1])
            line -= 1
        parts = [" ".join(above) if alone else behind, choices.get(name, "")]
        found[name] = "; ".join(filter(None, parts))
    return found
