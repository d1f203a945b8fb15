"""The command line: its table, its errors, its exit codes, its speed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

import encdec
from encdec import cli
from encdec.errors import CheckpointError, ConfigError, EncdecError

TARGETS = {
    **{f"encdec {name}": target for name, (target, _) in cli.COMMANDS.items()},
    **{f"encdec benchmark {name}": target for name, (target, _) in cli.BENCHMARKS.items()},
}


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "encdec", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("command", TARGETS)
def test_every_command_imports_and_is_callable(command):
    assert callable(cli.load(TARGETS[command]))


def test_help_lists_every_command_and_succeeds(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, (_, text) in cli.COMMANDS.items():
        assert name in printed and text in printed
    assert cli.main(["benchmark", "--help"]) == 0
    printed = capsys.readouterr().out
    for name, (_, text) in cli.BENCHMARKS.items():
        assert name in printed and text in printed


def test_no_command_prints_the_help_and_fails(capsys):
    assert cli.main([]) == ConfigError.exit_code
    assert "usage: encdec" in capsys.readouterr().out


def test_help_takes_under_a_second_of_processor_time():
    """Processor time of the fastest of three, so that a busy machine does not fail it."""
    seconds = []
    for _ in range(3):
        before = os.times()
        assert run("--help").returncode == 0
        after = os.times()
        seconds.append(
            after.children_user
            - before.children_user
            + after.children_system
            - before.children_system
        )
    assert min(seconds) < 1.0, seconds


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from encdec import cli; cli.main(['--help']); "
        "print(sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0
    for package in ("jax", "jaxlib", "flax", "tensorflow", "seqio", "numpy", "rich"):
        assert f"'{package}'" not in result.stderr, package


def test_version():
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"encdec {encdec.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [(["trian"], "`encdec train`"), (["benchmark", "lop"], "`encdec benchmark loop`")],
)
def test_unknown_command_names_the_nearest(arguments, suggestion, capsys):
    assert cli.main(arguments) == ConfigError.exit_code
    message = capsys.readouterr().err
    assert repr(arguments[-1]) in message and suggestion in message


@pytest.mark.parametrize("former", cli.FORMER, ids=" ".join)
def test_a_former_name_says_what_the_command_is_called_now(former, capsys):
    today = cli.FORMER[former]
    shown = []
    for words in (former, today):
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out != ""
    said = f"encdec {' '.join(former)} is now called encdec {' '.join(today)}\n"
    assert (shown[0].err, shown[1].err) == (said, "")
    for words in (["--help"], [*former[:-1], "--help"]):
        with contextlib.suppress(SystemExit):
            cli.main(words)
        assert f" {former[-1]} " not in capsys.readouterr().out


def test_unlike_anything_lists_the_commands(capsys):
    assert cli.main(["xyzzy"]) == ConfigError.exit_code
    message = capsys.readouterr().err
    assert "did you mean" not in message
    assert all(name in message for name in cli.COMMANDS)


def replace_describe(monkeypatch, function):
    monkeypatch.setattr(cli, "load", lambda target: function)


def test_arguments_after_the_command_are_passed_on_and_its_code_returned(monkeypatch):
    seen = []
    replace_describe(monkeypatch, lambda argv: seen.append(argv) or 7)
    assert cli.main(["describe", "330m", "--help"]) == 7
    assert seen == [["330m", "--help"]]


def test_none_means_success(monkeypatch):
    replace_describe(monkeypatch, lambda argv: None)
    assert cli.main(["describe"]) == 0


@pytest.mark.parametrize("kind", [EncdecError, ConfigError, CheckpointError])
def test_our_errors_give_their_message_and_exit_code_alone(kind, monkeypatch, capsys):
    def fail(argv):
        raise kind("rows is 3; expected 4")

    replace_describe(monkeypatch, fail)
    assert cli.main(["describe"]) == kind.exit_code
    assert capsys.readouterr().err == "encdec: error: rows is 3; expected 4\n"


def test_an_interrupt_gives_130(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    replace_describe(monkeypatch, interrupt)
    assert cli.main(["describe"]) == 130
    assert "Traceback" not in capsys.readouterr().err


COMPILING = """
import _thread, signal, sys, threading
import jax
import jax.numpy as jnp
from encdec import cli

def compile_for_seconds(argv):
    def many_products(x):
        for _ in range(300):
            x = jnp.sin(x @ x.T) @ x + jnp.cumsum(x, 0)
        return x

    lowered = jax.jit(many_products).lower(jnp.ones((8, 8)))
    threading.Timer(0.3, _thread.interrupt_main).start()
    lowered.compile()

# Ignored by what a shell runs in the background, as perhaps these tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.load = lambda target: compile_for_seconds
cli.use_compilation_cache = lambda: None
sys.argv = ["encdec", "describe"]
sys.exit(cli.main())
"""


def test_an_interrupted_compilation_neither_crashes_nor_is_waited_for():
    # Not read from the tests' cache, which takes no time to interrupt.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILING], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (130, "encdec: interrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(argv):
        raise ZeroDivisionError

    replace_describe(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["describe"])


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m encdec data list"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -n 1"], capture_output=True, text=True
    )
    assert done.returncode in (0, 141), done.stderr  # 0: all was written before head closed
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    # The pipe is closed before anything is written.
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True
    )
    assert done.returncode == 141 and done.stderr == ""
