"""Errors that a user can fix, each kind with its own exit code.

The command line prints the message alone, without a traceback, and exits with ``exit_code``,
so that a launcher can tell a wrong config from a preemption without reading logs.
"""


class EncdecError(Exception):
    """Base of all errors that name what was seen, what is expected and how to fix it."""

    exit_code = 1


class ConfigError(EncdecError):
    """A setting, flag or combination of settings that cannot work."""

    exit_code = 2


class DataError(EncdecError):
    """Text, records or a vocabulary that is missing, broken or does not fit."""

    exit_code = 3


class CheckpointError(EncdecError):
    """A work directory or checkpoint that is missing, partial or belongs to another run."""

    exit_code = 4


class NonFiniteError(EncdecError):
    """Training met a NaN or an infinity at ``step``."""

    exit_code = 5

    def __init__(self, message: str, step: int = 0):
        super().__init__(message)
        self.step = step


class StorageError(EncdecError):
    """The operating system refused to read or write: disk full, quota, permission, read-only."""

    exit_code = 7  # 6 is a ladder with failed runs, see launch/slurm.py


class InUseError(EncdecError):
    """Another process writes the same directory or file; it can be repeated when that has ended."""

    exit_code = 8


class Preempted(EncdecError):
    """The run was preempted; its state is saved and the run can be resumed."""

    exit_code = 75
