"""How benchmarks show their numbers: tables of text, wide enough where the width is unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from rich.console import Console
from rich.table import Table

Row = TypeVar("Row")


def wide_console(width: int = 180) -> Console:
    """The terminal, or, in a pipe, ``width`` characters: better a wide table than a wrapped one."""
    return Console(width=None if Console().is_terminal else width)


def shown_mib(size: int | None) -> str:
    """Bytes in MiB; nothing where they were not measured."""
    return f"{size / 2**20:,.0f} MiB" if size else ""


def text_table(
    title: str, rows: Iterable[Row], columns: Mapping[str, Callable[[Row], str]], left: int = 1
) -> Table:
    """A table of one line per row.

    Args:
        title: above it.
        rows: what is shown.
        columns: how each column shows a row, by the column's name.
        left: columns that are left-aligned and not wrapped, the others being numbers.
    """
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(columns):
        text = place < left
        table.add_column(name, justify="left" if text else "right", no_wrap=text)
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    return table
