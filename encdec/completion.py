"""``encdec completion SHELL``: a script that completes commands, flags and fields of runs."""

from __future__ import annotations

import contextlib
import io
import re

from encdec import cli
from encdec.config_files import field_names
from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.train.run_config import RunConfig, complete, to_dict

SCRIPTS = {
    "bash": """_encdec() {
    local IFS=$'\\n' word="${COMP_WORDS[COMP_CWORD]}"
    # The line is split again at spaces alone: bash also splits at = and :.
    local -a words; IFS=' ' read -r -a words <<< "${COMP_LINE:0:COMP_POINT}"
    [[ "${COMP_LINE:0:COMP_POINT}" == *' ' ]] && words+=('')
    COMPREPLY=($(encdec completion --words -- "${words[@]:1}" 2>/dev/null))
    [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
    return 0
}
complete -o default -o bashdefault -F _encdec encdec
""",
    "zsh": """#compdef encdec
_encdec() {
    local -a found
    found=("${(@f)$(encdec completion --words -- "${words[@]:1:$((CURRENT - 1))}" 2>/dev/null)}")
    [[ -n "$found" ]] && compadd -S '' -a found || _files
}
compdef _encdec encdec
""",
    "fish": """complete -c encdec -a '(encdec completion --words -- \
(commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
""",
}
FIELD = "--config."


def main(argv: list[str]) -> int:
    """Prints the script of a shell, or the possible continuations of ``--words -- WORD ...``."""
    if argv[:1] == ["--words"]:
        print("\n".join(candidates(argv[2:] if argv[1:2] == ["--"] else argv[1:])))
        return 0
    parser = Parser(
        prog="encdec completion",
        description="Prints a script that completes encdec's commands, flags and fields.",
        epilog='Example, for ~/.bashrc: eval "$(encdec completion bash)"',
    )
    parser.add_argument("shell", choices=SCRIPTS)
    print(SCRIPTS[parser.parse_args(argv).shell], end="")
    return 0


def candidates(words: list[str]) -> list[str]:
    """What the last of the words after ``encdec`` may become; none leaves it to file names."""
    *before, last = words or [""]
    if not before:
        return _matching(last, [*cli.COMMANDS, "--help", "--version"])
    command, table = before[0], cli.COMMANDS
    if command == "benchmark":
        if len(before) == 1:
            return _matching(last, [*cli.BENCHMARKS])
        command, table, before = before[1], cli.BENCHMARKS, before[1:]
    if command not in table:
        return []
    if last.startswith(FIELD):
        return _matching(last, [f"{FIELD}{name}=" for name in _fields()])
    usage = _help(table[command][0], before[1:2])
    if last.startswith("-"):
        return _matching(last, sorted(set(re.findall(r"--[\w-]+", usage))))
    return _matching(last, _actions(usage)) if len(before) == 1 else []


def _matching(start: str, words: list[str]) -> list[str]:
    return [word for word in words if word.startswith(start)]


def _fields() -> list[str]:
    import ml_collections

    config = complete(ml_collections.ConfigDict(to_dict(RunConfig())))
    names = field_names(config)
    return [name for name in names if not any(n.startswith(f"{name}.") for n in names)]


def _help(target: str, action: list[str]) -> str:
    """The help of a command, or of its action where the word after it is one."""
    command = cli.load(target)
    action = action if action and re.fullmatch(r"[a-z]+", action[0]) else []
    shown = io.StringIO()
    for words in ([*action, "--help"], ["--help"]):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
            with contextlib.suppress(SystemExit, ConfigError):
                command(words)
        if shown.getvalue():
            break
    return shown.getvalue()


def _actions(usage: str) -> list[str]:
    """Actions of a command, as its usage names them: ``list | show ...`` or ``{list,show} ...``."""
    first = " ".join(usage.partition("\n\n")[0].split())
    found = re.search(r"\b([a-z]+(?:(?: \| |,)[a-z]+)+)\}? \.\.\.", first)
    return re.split(r" \| |,", found[1]) if found else []
