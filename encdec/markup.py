"""Tables as text, Markdown and HTML, and whole HTML pages that need no other file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of rows, columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """The lines of a Markdown table; all columns but the first ``left`` are right-aligned."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def html_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table of texts, escaped."""
    cells = lambda kind, row: "".join(f"<{kind}>{html.escape(str(x))}</{kind}>" for x in row)
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def html_page(title: str, style: str, parts: Iterable[str]) -> str:
    """A page with its title as heading and the parts, which are HTML, below it."""
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head><body><h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
