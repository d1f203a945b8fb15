"""``encdec evaluate table``: evaluations of many models in the form of the paper's table."""

from __future__ import annotations

from typing import Any

from encdec.errors import ConfigError
from encdec.files import write_json, write_text
from encdec.flags import Parser
from encdec.storage import any_path, as_path, make_directory, user_place


def main(argv: list[str]) -> int:
    """``encdec evaluate table --model='NAME=DIR,DIR' ... --out=DIR``.

    Raises:
        ConfigError: a --model without a name or directory.
        DataError: a directory without a finished evaluation, or one that counts twice.
    """
    options = _parser().parse_args(argv)
    from encdec.evaluation.evaluation_report import check_distinct, read_report
    from encdec.evaluation.results_table import PAPER, table, table_markdown

    models: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for given in options.model:
        name, _, folders = given.partition("=")
        if not name or not folders:
            raise ConfigError(
                f"--model={given}; expected NAME=DIR,DIR with a model name of the paper "
                f"({', '.join(PAPER)}) or any other"
            )
        models.setdefault(name, []).extend(
            (folder, read_report(user_place("--model", folder))) for folder in folders.split(",")
        )
    for evaluations in models.values():
        check_distinct(evaluations)
    content = table(
        {name: [report for _, report in evaluations] for name, evaluations in models.items()}
    )
    text = table_markdown(content)
    out = as_path(options.out)
    make_directory(out)
    write_json(out / "table.json", content)
    write_text(out / "table.md", text)
    print(text)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="encdec evaluate table",
        description="Shows evaluations in the form of the paper's Table 1, its figures separately.",
        epilog="Example: encdec evaluate table --model='DEC=runs/dec/squad,runs/dec/xsum' "
        "--model='ED 2/3-1/3=runs/ed/squad,runs/ed/xsum' --out=runs/table",
    )
    parser.add(
        "--model",
        "a row and the --out directories of its evaluations: one per "
        "task and seed, or with several tasks in one",
        action="append",
        required=True,
        metavar="NAME=DIR,DIR",
    )
    parser.add("--out", "receives table.md and .json", any_path, required=True)
    return parser
