"""The whole workflow on one small machine: data, two models at equal cost, a student, a report."""

from encdec.quickstart.quickstart_command import main

__all__ = ["main"]
