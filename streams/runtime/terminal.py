"""Printing for people. Ids, keys and messages of any origin are text: no terminal or markup acts on them."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the entry point imports this module, and most processes print no table
    from rich.console import Console
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


def print_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str | None]],
    *,
    title: str | None = None,
    console: Console | None = None,
) -> None:
    """Print cells as they are, each one text, on `console` (default: standard output); None is an empty cell.

    No word is cut. On a terminal prose wraps between words, and where the words do not fit side by side each row is a
    block of lines. Where the output is no terminal, each row is one line, as long as it needs to be.
    """
    from rich.console import Console

    console = console or Console()
    shown_heads = [escaped(head) for head in heads]
    cells = [[escaped(cell or "") for cell in row] for row in rows]
    widths = _widths_within(console.width, shown_heads, cells) if console.is_terminal else None
    if widths is not None:
        console.print(_table(shown_heads, cells, widths, title))
        return
    lines = _blocks(shown_heads, cells, console.width) if console.is_terminal else _lines(shown_heads, cells)
    console.out("\n".join([escaped(title), *lines] if title is not None else lines), highlight=False)


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]], widths: Sequence[int], title: str | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(escaped(title)))
    for head, width in zip(heads, widths, strict=True):
        table.add_column(Text(head), width=width, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _widths_within(room: int, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int] | None:
    """Widths of columns, none below its longest word; None if there is no room for that."""
    columns = list(zip(heads, *cells, strict=True))
    least = [max(_width(word) for cell in column for word in [*cell.split(), ""]) for column in columns]
    widths = [max(map(_width, column)) for column in columns]
    room -= 3 * len(columns) + 1  # lines and padding
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max(range(len(widths)), key=lambda number: (widths[number] > least[number], widths[number]))
        widths[widest] -= 1
    return widths


def _lines(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(_width, column)) for column in zip(heads, *cells, strict=True)]
    return [
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *cells)
    ]


def _blocks(heads: Sequence[str], cells: Sequence[Sequence[str]], room: int) -> list[str]:
    lines: list[str] = []
    for row in cells:
        texts = [f"{head}: {cell}" if head else cell for head, cell in zip(heads, row, strict=True) if cell]
        for text in texts:
            lines += wrap(text, room, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        lines.append("")
    return lines[:-1]


def _width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    from rich.cells import cell_len

    return cell_len(text)
