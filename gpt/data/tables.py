"""Reads a document from each row of a table in text: comma-separated (.csv) or tab-separated (.tsv) values."""

import csv
import re
from collections.abc import Iterable, Iterator

from gpt.errors import UserError

_LONGEST = 1 << 28  # characters of a field


def columns(head: str) -> list[str]:
    """Read the column names in a table's first line. The separator is the mark that occurs most often."""
    line = re.split(r"[\r\n]", head.removeprefix("\ufeff"), maxsplit=1)[0]
    return next(csv.reader([line], delimiter=_separator(line)), [])


def _separator(line: str) -> str:
    return max(",\t;|", key=line.count)


def from_table(chunks: Iterable[str], name: str, field: str) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each row below the column names. Raises UserError for a row of another length."""
    csv.field_size_limit(_LONGEST)
    lines = _lines(chunks)
    first = next(lines, "")
    names, number = columns(first), 0
    if names.count(field) != 1:
        raise UserError(f"{name} has {names.count(field)} columns {field!r}: keep one of them")
    at = names.index(field)
    try:
        for row in csv.reader(lines, delimiter=_separator(first), strict=True):
            number += 1
            if not row:
                continue
            if len(row) != len(names):
                raise UserError(f"{name}, row {number} has {len(row)} fields, but the first line names {len(names)}")
            yield f"{name}, row {number}", row[at]
    except csv.Error as error:
        raise UserError(f"{name}, row {number + 1} is damaged: {error}") from None


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """Split chunks into lines with their ends, at line feeds only."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from (line + "\n" for line in whole)
    if rest:
        yield rest
