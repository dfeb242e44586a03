"""Tables cut no identifier, on no terminal and in no pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from streams.runtime.terminal import print_table

ID = "mim.items/3/102921-with-a-long-identifier"
LONG = "MIM_TRAINER__RELEASE_EVERY_EVENT_SECONDS_AND_MORE_OF_IT_THAN_FITS_SIDE_BY_SIDE_ANYWHERE"
PROSE = "what was found, in a sentence of words that goes on for longer than a narrow terminal is wide"


def printed(
    heads: list[str], rows: list[list[str | None]], *, width: int, terminal: bool, title: str | None = None
) -> str:
    out = io.StringIO()
    print_table(
        heads, rows, title=title, console=Console(file=out, width=width, force_terminal=terminal, color_system=None)
    )
    return out.getvalue()


@pytest.mark.parametrize("width", [32, 48, 80, 81, 120, 400])
@pytest.mark.parametrize("identifier", [ID, LONG])
def test_no_identifier_is_cut_or_folded_whatever_the_width(width: int, identifier: str) -> None:
    text = printed(
        ["id", "reason", "found"], [[identifier, "bad_json", PROSE], ["x", None, ""]], width=width, terminal=True
    )
    assert identifier in text and "bad_json" in text
    for word in PROSE.split():
        assert word in text
    room = max(width, len(identifier) + 4)
    assert max(map(len, text.splitlines())) <= room


def test_a_table_that_fits_is_a_table_and_wraps_prose_alone() -> None:
    text = printed(["id", "found"], [[ID, PROSE]], width=80, terminal=True)
    assert "┃" in text and max(map(len, text.splitlines())) <= 80
    assert "┃" not in printed(["id", "found"], [[LONG, PROSE]], width=80, terminal=True)


def test_piped_output_is_one_whole_line_per_row_without_frames() -> None:
    text = printed(
        ["id", "reason", "found"], [[LONG, "a", PROSE], [ID, None, "b"]], width=80, terminal=False, title="of x"
    )
    title, heads, first, second = text.splitlines()
    assert title == "of x" and heads.split() == ["id", "reason", "found"]
    assert first == f"{LONG}  a       {PROSE}"
    assert second.split() == [ID, "b"] and second.index("b", len(ID)) == first.index(PROSE)
    assert text.isascii()


def test_columns_stand_under_each_other_for_wide_characters_too() -> None:
    first, second = printed(["a", "b"], [["日本", "x"], ["ab", "y"]], width=80, terminal=False).splitlines()[1:]
    assert first == "日本  x" and second == "ab    y"


def test_an_empty_table_has_its_heads() -> None:
    assert printed(["id", "found"], [], width=80, terminal=False) == "id  found\n"
    assert "id" in printed(["id", "found"], [], width=80, terminal=True)


@pytest.mark.parametrize("width", range(40, 160))
def test_no_line_is_longer_than_the_terminal_and_no_word_is_cut(width: int) -> None:
    text = printed(
        ["id", "reason", "found"], [[ID[:30], "bad_json", PROSE], ["x", None, "y"]], width=width, terminal=True
    )
    assert max(map(len, text.splitlines())) <= width
    assert ID[:30] in text and "bad_json" in text and all(word in text for word in PROSE.split())


def test_blocks_of_lines_have_one_empty_line_between_them_and_none_at_the_end() -> None:
    text = printed(["id", ""], [[LONG, "b"], ["c", None]], width=40, terminal=True)
    assert text == f"id:\n  {LONG}\nb\n\nid: c\n"
