"""``encdec evaluate compare``: differences of two models' scores, with intervals and p-values."""

from __future__ import annotations

from encdec.errors import ConfigError
from encdec.files import write_json, write_text
from encdec.flags import Parser
from encdec.modules import add_module_flag, import_modules
from encdec.storage import any_path, as_path, make_directory, user_place


def main(argv: list[str]) -> int:
    """``encdec evaluate compare --first='NAME=DIR,DIR' --second='NAME=DIR,DIR'``.

    Raises:
        ConfigError: a model without a name or directory.
        DataError: a directory without a finished evaluation, or evaluations of other examples.
    """
    options = _parser().parse_args(argv)
    sides = {}
    for flag in ("first", "second"):
        name, _, folders = getattr(options, flag).partition("=")
        if not name or not folders:
            raise ConfigError(f"--{flag}={getattr(options, flag)}; expected NAME=DIR,DIR")
        sides[flag] = name, [user_place(f"--{flag}", folder) for folder in folders.split(",")]
    import_modules(options.module)
    from encdec.evaluation.compare import compare_evaluations, compare_markdown

    (first, firsts), (second, seconds) = sides.values()
    content = compare_evaluations(firsts, seconds, resamples=options.resamples)
    text = compare_markdown(content, (first, second))
    if options.out:
        out = as_path(options.out)
        make_directory(out)
        write_json(out / "comparison.json", content)
        write_text(out / "comparison.md", text)
    print(text)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="encdec evaluate compare",
        description="Compares two models' finished evaluations of the same examples: paired "
        "bootstrap intervals, and a randomization test.",
        epilog="Example: encdec evaluate compare --first='DEC=runs/dec/evaluation' "
        "--second='ED=runs/ed/evaluation'",
    )
    for flag in ("first", "second"):
        parser.add(
            f"--{flag}",
            "a name and the --out directories of its evaluations; seeds are averaged per example",
            required=True,
            metavar="NAME=DIR,DIR",
        )
    parser.add("--resamples", "number of bootstrap samples", int, 1000, least=1)
    add_module_flag(parser)
    parser.add("--out", "receives comparison.md and .json", any_path)
    return parser
