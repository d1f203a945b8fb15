"""What a command says on standard error: warnings, progress and, if asked for, its inner steps.

Results go to standard output by ``print``. All else goes through Python's logging, by loggers
below ``encdec``: ``--quiet`` leaves warnings and errors, ``--verbose`` adds what is logged as
debugging, by jax and orbax, too. A program that uses the library sets the level as of any other:
``logging.getLogger("encdec").setLevel("WARNING")``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from encdec.errors import EncdecError

VARIABLE = "ENCDEC_LOG_LEVEL"  # the level of a process that a command starts, or of any
Say = Callable[[str], None]  # takes a line of progress
QUIET, USUAL, VERBOSE = logging.WARNING, logging.INFO, logging.DEBUG
# Of other projects, which log what compiles and what is written.
_OTHERS = ("jax", "absl", "orbax", "etils")
_FORMATS = {VERBOSE: "%(asctime)s %(levelname)s %(name)s: %(message)s"}


class _StandardError(logging.Handler):
    """Lines on what ``sys.stderr`` is when they come, each written at once."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


_HANDLER = _StandardError()


def logger(name: str) -> logging.Logger:
    """The logger of a module, whose lines are on standard error."""
    root = logging.getLogger("encdec")
    if _HANDLER not in root.handlers:
        root.addHandler(_HANDLER)
        root.propagate = False
        _apply(_level_named(os.environ.get(VARIABLE, "")))
    return logging.getLogger(name)


def set_level(level: int) -> None:
    """Sets the log level, also for processes that this one starts."""
    logger("encdec")
    os.environ[VARIABLE] = logging.getLevelName(level)
    _apply(level)


def shows_progress() -> bool:
    """Whether progress is shown: not after ``--quiet``."""
    return logger("encdec").isEnabledFor(USUAL)


def show_error(error: EncdecError) -> int:
    """Prints an error that a user can fix, its traceback too after ``--verbose``; its exit code."""
    if logger("encdec").isEnabledFor(VERBOSE):
        traceback.print_exception(error)
    print(f"encdec: error: {error}", file=sys.stderr)
    return error.exit_code


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Undoes ``set_level`` at the end, for whoever calls a command inside a program."""
    level, variable = logger("encdec").level, os.environ.get(VARIABLE)
    try:
        yield
    finally:
        if variable is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = variable
        _apply(level)


def _level_named(name: str) -> int:
    level = logging.getLevelName(name.strip().upper() or "INFO")
    return level if isinstance(level, int) else USUAL


def _apply(level: int) -> None:
    logging.getLogger("encdec").setLevel(level)
    _HANDLER.setFormatter(logging.Formatter(_FORMATS.get(level), "%H:%M:%S"))
    if level == VERBOSE:
        for other in map(logging.getLogger, _OTHERS):
            other.addHandler(_HANDLER)
            other.setLevel(USUAL)
    else:
        for made in logging.Logger.manager.loggerDict.values():
            if isinstance(made, logging.Logger) and made.name in _OTHERS:
                made.removeHandler(_HANDLER)
                made.setLevel(logging.NOTSET)
