"""What all commands have in common: how much they say, and how their flags are called."""

from __future__ import annotations

import ast
import logging
import os
import pathlib
import re
import subprocess
import sys

import pytest

from encdec import cli, logs
from encdec.data.prepare_command import ProgressLine
from encdec.distill.score_command import ScoringProgress
from encdec.errors import ConfigError
from encdec.inference import progress
from encdec.inference.progress import Progress
from encdec.train.metrics import Console
from tests.parsers import all_parsers

PACKAGE = pathlib.Path(cli.__file__).parent


@pytest.fixture(autouse=True)
def usual_level():
    with logs.restored():
        logs.set_level(logs.USUAL)
        yield


def test_the_parsers_are_those_of_all_commands():
    named = set()
    for path in PACKAGE.rglob("*.py"):
        named |= set(re.findall(r'Parser\(\s*prog="(encdec [\w ]+)"', path.read_text()))
    assert len(named) > 30
    reached = all_parsers()
    for program in named:
        assert any(words == program or words.startswith(f"{program} ") for words in reached)


@pytest.mark.parametrize("words", all_parsers())
def test_every_command_is_quiet_or_verbose_if_told(words, capsys):
    parser = all_parsers()[words]
    required = [action for action in parser._actions if action.required]
    for action in required:
        action.required = False
    for group in parser._mutually_exclusive_groups:
        group.required = False
    values = ["x"] * sum(action.nargs != "*" for action in required if not action.option_strings)
    if words == "encdec completion":
        values = ["bash"]
    try:
        for flag, level in (("--quiet", logs.QUIET), ("--verbose", logs.VERBOSE)):
            given = parser.parse_args([*values, flag])
            assert logging.getLogger("encdec").level == level
            assert os.environ[logs.VARIABLE] == logging.getLevelName(level)
            assert not {"quiet", "verbose"} & set(vars(given))
        with pytest.raises(SystemExit):
            parser.parse_args([*values, "--quiet", "--verbose"])
        assert "not allowed with" in capsys.readouterr().err
    finally:
        for action in required:
            action.required = True


def test_nothing_but_errors_is_printed_past_the_levels():
    """All else on standard error goes through ``encdec.logs``, which obeys the two flags."""
    allowed = {"cli.py", "logs.py", "train/train_command.py", "train/metrics.py"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                streams = [ast.unparse(k.value) for k in node.keywords if k.arg == "file"]
                if streams and streams != ["sys.stdout"]:
                    found.add(path.relative_to(PACKAGE).as_posix())
    assert found <= allowed, found - allowed


def _verify(capsys, records, *flags):
    assert cli.main(["data", "verify", str(records), *flags]) == 0
    return capsys.readouterr()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("said")
    (folder / "pairs.jsonl").write_text('{"source": "a", "target": "b"}\n' * 20)
    files = [f"--jsonl={folder / 'pairs.jsonl'}", f"--out={folder / 'records'}"]
    given = ["--inputs_length=16", "--targets_length=16", "--vocabulary=bytes", "--workers=1"]
    assert cli.main(["prepare", *files, *given, "--quiet"]) == 0
    return folder / "records"


def test_verify_says_less_and_more(records, capsys):
    capsys.readouterr()
    usual, quiet, verbose = (
        _verify(capsys, records, *flags) for flags in ((), ("--quiet",), ("--verbose",))
    )
    assert "verify: rows" in usual.err and usual.out
    assert quiet.err == "" and quiet.out == usual.out
    assert re.search(r"^\d\d:\d\d:\d\d INFO encdec\.\S+: verify: rows$", verbose.err, re.M)
    assert "DEBUG encdec.cli: done in" in verbose.err and verbose.out == usual.out
    # Each call ends with the level that it found.
    assert _verify(capsys, records).err == usual.err


def test_bars_and_lines_of_progress_are_left_out_and_warnings_are_not(records, capsys, monkeypatch):
    monkeypatch.setattr(progress, "REPORT_SECONDS", -1)
    monkeypatch.setattr("encdec.data.prepare_command.LOG_SECONDS", -1)
    monkeypatch.setattr("encdec.distill.score_command.REPORT_SECONDS", -1)

    class Counts:
        examples = rows = tokens = bytes = 7
        lost = None

    class Later(Counts):
        rows, tokens = 8, 9

    def everything():
        Progress("job", 10)(1, 5)
        ProgressLine()(Counts)
        scoring = ScoringProgress(str(records))
        scoring(Counts), scoring(Later)
        console = Console(10)
        console.say("a line")
        console.write_scalars(3, {"train/loss": 1.0})
        console.warn("warning: few rows")
        return capsys.readouterr().err

    shown = everything()
    for part in ("job: 1 of 10", "prepare: 7 examples", "8 of", "a line", "step 3/10", "few rows"):
        assert part in shown
    logs.set_level(logs.QUIET)
    assert everything() == "warning: few rows\n"


def test_verbose_shows_where_an_error_began(capsys):
    assert cli.main(["describe", "nothing", "--verbose"]) == ConfigError.exit_code
    err = capsys.readouterr().err
    assert "in find_model" in err and err.rstrip().splitlines()[-1].startswith("encdec: error: no")
    assert cli.main(["describe", "nothing", "--quiet"]) == ConfigError.exit_code
    assert re.fullmatch(r"encdec: error: .*\n", capsys.readouterr().err)


def test_processes_that_a_command_starts_have_its_level():
    program = "from encdec import logs; print(logs.shows_progress(), logs.shows_tracebacks())"
    for level, shown in ((logs.QUIET, "False False"), (logs.VERBOSE, "True True")):
        logs.set_level(level)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout.strip() == shown, done.stderr
    assert logs._level_named("nonsense") == logs.USUAL


def test_other_projects_are_heard_after_verbose_alone(capsys):
    other = logging.getLogger("jax.anything")
    logs.set_level(logs.VERBOSE)
    other.info("compiled")
    assert "INFO jax.anything: compiled" in capsys.readouterr().err
    logs.set_level(logs.USUAL)
    other.info("compiled")
    assert capsys.readouterr().err == ""
