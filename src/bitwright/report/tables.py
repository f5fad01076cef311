"""Tables for a terminal, and sizes and times in words."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

KIB = 1024.0


def size(nbytes: float) -> str:
    """A number of bytes as people write it, in binary units: ``3.2 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < KIB:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= KIB
    return f"{nbytes:.1f} TiB"


def duration(seconds: float) -> str:
    """A number of seconds as people write it: ``1 h 05 min``, ``3 min 20 s``, ``12.3 s``."""
    if seconds >= 3600:
        return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"
    if seconds >= 60:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{seconds:.1f} s"


def pairs(console: Console, title: str, rows: Iterable[tuple[str, object]]) -> None:
    """Print a table of names and values; a value of None is left out."""
    console.print(Text(title, style="table.title"))  # a table's own title would be wrapped at the table's width
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            table.add_row(name, Text(str(value)))  # Text, because brackets in a path are no markup
    console.print(table)


def grid(console: Console, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table with a header; the first column is text, the others are numbers."""
    table = Table(title=Text(title, style="table.title"), title_justify="left", pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
