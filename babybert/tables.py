"""Tables of plain text for the results that commands print.

The output has no colours and no borders, and it is the same on a terminal, in a file and in a pipe.
"""

import io
import re
from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

NO_LIMIT = 10_000  # columns: wider than any table, so that rich neither wraps nor shortens a cell
NARROWEST_TEXT = 9  # columns of the terminal that a column of text keeps where the whole table is too wide
# Control characters, line separators and overrides of the writing direction: a terminal would obey them.
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def escape_control_characters(text: str) -> str:
    """Return one line of text for a terminal, in which each control character is an escape such as `\\x1b`."""
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def make_table(headers: Sequence[str], rows: Sequence[Sequence[str]], text_headers: Collection[str] = ()) -> Table:
    """A rich table of `rows`. The columns in `text_headers` are left-aligned, all others (numbers) right-aligned.

    Where the table does not fit, columns of text are folded; numbers never are.
    """
    table = Table(box=None, pad_edge=False)
    for column, header in enumerate(headers):
        longest = max((cell_len(escape_control_characters(row[column])) for row in rows), default=0)
        if header in text_headers:
            width = max(cell_len(header), min(longest, NARROWEST_TEXT))
            table.add_column(header, justify="left", overflow="fold", min_width=width)
        else:
            table.add_column(header, justify="right", no_wrap=True, min_width=longest)
    for row in rows:
        # Cells as Text: in a plain string rich would read "[MASK]" as markup.
        table.add_row(*(Text(escape_control_characters(cell)) for cell in row))
    return table


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], text_headers: Collection[str] = ()) -> str:
    """The table of `make_table` as text, as wide as its cells."""
    console, output = plain_console(NO_LIMIT)
    console.print(make_table(headers, rows, text_headers))
    return strip_lines(output.getvalue())


def plain_console(width: int) -> tuple[Console, io.StringIO]:
    """A console of `width` columns that prints plain text, and what it prints to."""
    output = io.StringIO()
    return Console(file=output, width=width, highlight=False, color_system=None), output


def strip_lines(text: str) -> str:
    """The text without the spaces that rich pads lines with, and without a last newline."""
    return "\n".join(line.rstrip() for line in text.splitlines())
