"""Text for people: aligned tables, sizes, and names out of files made safe to print."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ("B", "KiB", "MiB", "GiB")


def printable(text: str) -> str:
    """The text in one line, without characters that a terminal would obey."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "?" for char in text)


def size(count: int) -> str:
    """Bytes as people read them: `512 B`, `1.5 MiB`."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under a head. Never wraps or cuts, so that it can be searched and piped."""
    cells = [list(head), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Labels and values, the values aligned. Pairs without a value are left out."""
    shown = [(label, printable(value)) for label, value in pairs if value]
    width = max(len(label) for label, _ in shown)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in shown)
