"""The whole story on one small machine: data, two models at equal cost, a student, comparisons."""

from encdec.quickstart.quickstart_command import main

__all__ = ["main"]
