"""Tables of plain text: alignment, markup and folding."""

import pytest

from babybert.tables import escape_control_characters, format_table, make_table, plain_console, strip_lines


def test_text_is_left_aligned_and_numbers_right() -> None:
    text = format_table(("name", "loss"), [("a", "1.5"), ("bigram", "12.25")], text_headers=("name",))
    assert text.splitlines() == ["name     loss", "a         1.5", "bigram  12.25"]


def test_brackets_are_not_markup_and_wide_tables_are_not_cut() -> None:
    text = format_table(("token", "row"), [("[MASK]", "x" * 300)], text_headers=("token", "row"))
    assert f"[MASK]  {'x' * 300}" in text


def test_control_characters_are_escaped() -> None:
    assert escape_control_characters("a\x1b[31m\x00\n\u2028\u202eb é") == r"a\x1b[31m\x00\n\u2028\u202eb é"
    text = format_table(("token", "loss"), [("a\x1cb\x1b[2J", "1.5")], text_headers=("token",))
    assert text.split("\n") == ["token          loss", r"a\x1cb\x1b[2J   1.5"]


def test_the_output_is_the_same_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("a" * 90, "1")]
    expected = format_table(("name", "loss"), rows, text_headers=("name",))
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "20", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    assert format_table(("name", "loss"), rows, text_headers=("name",)) == expected


def test_only_text_is_folded_where_a_table_is_too_wide() -> None:
    console, output = plain_console(20)
    console.print(make_table(("name", "number"), [("word" * 10, "123456789")], text_headers=("name",)))
    lines = strip_lines(output.getvalue()).splitlines()
    assert all(len(line) <= 20 for line in lines)
    assert "123456789" in lines[1]
