"""Printing for people. Ids, keys and messages of any origin are text: no terminal or markup acts on them."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the entry point imports this module, and most processes print no table
    from rich.table import Table

_ACTING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories: control and format characters, halves of surrogates, ends of lines and paragraphs."""


def escaped(text: str, *, lines: bool = False) -> str:
    """`text` with every character that a terminal acts on as an escape; with `lines`, line ends and tabs stay."""
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        char.encode("unicode_escape").decode() if char not in kept and unicodedata.category(char) in _ACTING else char
        for char in text
    )


def say(text: str, *, error: bool = False) -> None:
    """Print lines on standard output, or on standard error."""
    print(escaped(text, lines=True), file=sys.stderr if error else sys.stdout)


def table_of(heads: Sequence[str], rows: Iterable[Sequence[str | None]], *, title: str | None = None) -> Table:
    """A table whose cells are shown as they are, each in one line of text; None is an empty cell."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, title=None if title is None else Text(escaped(title)))
    for row in rows:
        table.add_row(*(Text(escaped(cell or "")) for cell in row))
    return table


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str | None]], *, title: str | None = None) -> None:
    """Print `table_of` these on standard output."""
    from rich.console import Console

    Console().print(table_of(heads, rows, title=title))
