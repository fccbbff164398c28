"""Measurements: each module is a command, python -m benchmarks.<name>."""

from collections.abc import Iterable


def positive(word: str) -> int:
    """Parse a whole number from 1 up, as an argparse type. ValueError for anything else."""
    if int(word) < 1:
        raise ValueError(word)
    return int(word)


def print_table(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]], width: int | None = None) -> None:
    """Print rows of cells under their headings."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)
