"""A table in the terminal, in the widest layout that fits."""

from collections.abc import Container, Iterable

from rich import box
from rich.table import Table

from nin.runs.console import Console

_GAP = 2  # characters between columns; the edges have one each
_MIN_TEXT_WIDTH = 24  # characters of a column of text


def fit_table(layouts: Iterable[tuple[list[list[str]], Container[int]]], console: Console) -> Table:
    """The first of ``layouts`` for which the terminal is wide enough, otherwise the last one.

    Where not even that fits, words are broken, but not into columns of a few characters: lines are longer than the
    terminal instead.

    Args:
        layouts: each the table as text, header first, and the numbers of its columns of text. These may be wrapped
            between words, the others not.
    """
    for (header, *lines), texts in layouts:
        columns = list(zip(header, *lines, strict=True))
        widths = [
            max((len(part) for cell in column for part in (cell.split() if i in texts else [cell])), default=0)
            for i, column in enumerate(columns)
        ]
        room = console.width - sum(widths) - _GAP * len(widths)
        if room >= 0:
            break
    if room < 0:
        cut = [min(width, _MIN_TEXT_WIDTH) if i in texts else width for i, width in enumerate(widths)]
        room, widths = room + sum(widths) - sum(cut), cut
        console.width, room = max(console.width, console.width - room), max(room, 0)
    # Rows that take several lines each are separated by an empty one.
    wraps = sum(max(map(len, column)) + _GAP for column in columns) > console.width
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, _GAP - 1, 0, 0), leading=int(wraps))
    for i, (name, least, column) in enumerate(zip(header, widths, columns, strict=True)):
        more = min(room, max(map(len, column)) - least)
        # With a width: rich would take the missing characters from all columns that wrap, and break words.
        table.add_column(name, overflow="fold", no_wrap=i not in texts, width=least + more)
        room -= more
    for line in lines:
        table.add_row(*line)
    return table
