"""Reads documents from JSON lines, from an array of objects or from consecutive objects, in bounded memory."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from gpt.errors import UserError

_OBJECT = re.compile(r'\s*\{\s*("|\})')
_ARRAY = re.compile(r'\s*\[\s*(\{\s*("|\}))')
_BETWEEN = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_TAIL = 12  # characters: a parse error this close to the end of the text may come from its being incomplete


def json_form(head: str, whole: bool) -> tuple[str, dict[str, Any] | None, bool] | None:
    """Recognize JSON by its head: "jsonl" (lines) or "json"; None if it is not JSON.

    Also returns the first object, if it ends within the head, and whether others follow. whole: the head is the text.
    """
    head = head.removeprefix("\ufeff").lstrip()
    if match := _ARRAY.match(head):
        found, end = _first(head, match.start(1), whole)
        more = head[end:].lstrip().startswith(",")
        return ("json", found, more) if end else None
    if not _OBJECT.match(head):
        return None
    found, end = _first(head, 0, whole)
    if not end:
        return None
    after = head[end:].lstrip()
    if after and not (after[0] == "{" and _first(after, 0, whole)[1]):
        return None
    in_lines = "\n" not in head[:end] and (not after or "\n" in head[end : -len(after)])
    return ("jsonl" if in_lines else "json"), found, bool(after)


def _first(text: str, start: int, whole: bool) -> tuple[dict[str, Any] | None, int]:
    """Return the object at `start` and its end: None and the text's end if it is cut, None and 0 if it is not JSON."""
    try:
        found, end = _DECODER.raw_decode(text, start)
        return (found, end) if isinstance(found, dict) else (None, 0)
    except json.JSONDecodeError as error:
        return None, len(text) if not whole and _goes_on(error, len(text)) else 0
    except (RecursionError, ValueError):
        return None, 0


def _goes_on(error: json.JSONDecodeError, size: int) -> bool:
    return error.pos >= size - _TAIL or error.msg.startswith("Unterminated string")


def lines(blocks: Iterable[bytes], name: str, longest: int) -> Iterator[bytes]:
    """Split blocks into lines, at line feeds only."""
    parts: list[bytes] = []
    size = number = 0
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for line in whole:
            number += 1
            yield b"".join([*parts, line])
            parts, size = [], 0
        parts.append(rest)
        size += len(rest)
        if size > longest:
            raise UserError(f"{name}, line {number + 1} has more than {longest} bytes: is it JSON lines?")
    if size:
        yield b"".join(parts)


def from_lines(blocks: Iterable[bytes], name: str, field: str, errors: str, longest: int) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each line that is not empty."""
    for number, line in enumerate(lines(blocks, name, longest), 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            where = f"{name}, line {number}"
            yield where, field_of(_parsed(line, where, number, errors), field, where, "each line")


def _parsed(line: bytes, where: str, number: int, errors: str) -> Any:
    try:
        return json.loads(line.decode("utf-8", errors))
    except UnicodeDecodeError as error:
        found = f"byte {error.start} of the line (0x{line[error.start]:02x}) begins no character"
        hint = like_utf16(line) if number == 1 else ""
        raise UserError(
            f"{where} is not valid UTF-8{hint}: {found}; convert the file, or give --encoding-errors replace"
        ) from None
    except ValueError as error:
        found = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where} is not a whole JSON object ({found})") from None
    except RecursionError:
        raise UserError(f"{where} is not a JSON object that can be read: it is nested too deeply") from None


def field_of(row: Any, field: str, where: str, each: str) -> str:
    """Return the text of a row. UserError if it has none."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object but {kind_of(row)}: {each} needs a field {field!r}")
    if field not in row:
        raise UserError(f"{where} has no field {field!r}: {instead(row)}")
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} is not text but {kind_of(text)}")
    return text


def from_values(blocks: Iterable[bytes], name: str, field: str, errors: str, longest: int) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each object of a JSON array or of consecutive objects."""
    for number, value in enumerate(_Values(_decoded(blocks, name, errors), name, longest).all(), 1):
        where = f"{name}, object {number}"
        yield where, field_of(value, field, where, "each one")


def _decoded(blocks: Iterable[bytes], name: str, errors: str) -> Iterator[str]:
    decoder, read = codecs.getincrementaldecoder("utf-8")(errors), 0
    for block in chain(blocks, [b""]):
        start = read - len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            found = f"byte {start + error.start} (0x{error.object[error.start]:02x}) begins no character"
            raise UserError(
                f"{name} is not valid UTF-8: {found}; convert the file, or give --encoding-errors replace"
            ) from None
        yield text if read else text.removeprefix("\ufeff")
        read += len(block)


class _Values:
    """Parses the JSON values of a text in chunks. Keeps only the text that is not parsed yet."""

    def __init__(self, chunks: Iterator[str], name: str, longest: int) -> None:
        self._chunks, self._name, self._longest = chunks, name, longest
        self._text, self._at, self._count = "", 0, 0

    def all(self) -> Iterator[Any]:
        """Yield the elements of the array that the text consists of, else its consecutive values."""
        array = self._skip() == "["
        self._at += array
        while character := self._skip():
            if array and character == "]":
                self._at += 1
                if self._skip():
                    raise self._fault("text follows its array")
                return
            if array and self._count:
                if character != ",":
                    raise self._fault("a comma is missing")
                self._at += 1
                self._skip()
            value = self._value()
            self._count += 1
            yield value
        if array:
            raise self._fault("its array does not end")

    def _value(self) -> Any:
        while True:
            try:
                value, self._at = _DECODER.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                left = len(self._text) - self._at
                if left > self._longest:
                    raise UserError(
                        f"{self._name}, object {self._count + 1} has more than {self._longest} characters"
                    ) from None
                if not (_goes_on(error, len(self._text)) and self._read(max(1, left))):
                    raise self._fault(error.msg) from None
            except ValueError as error:  # a number of too many digits
                raise self._fault(error) from None
            except RecursionError:
                raise self._fault("it is nested too deeply") from None

    def _skip(self) -> str:
        """Skip white space. Returns the next character, or "" at the end."""
        while True:
            self._at = _BETWEEN.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(1):
                return ""

    def _read(self, size: int) -> bool:
        """Read at least `size` more characters, if there are so many. Returns whether it read any."""
        parts, got = [self._text[self._at :]], 0
        while got < size and (chunk := next(self._chunks, None)) is not None:
            parts.append(chunk)
            got += len(chunk)
        self._text, self._at = "".join(parts), 0
        return got > 0

    def _fault(self, what: object) -> UserError:
        return UserError(f"{self._name} is not whole JSON (after object {self._count}: {what})")


def kind_of(value: Any) -> str:
    """Name the type of a value of JSON, or of a dataset, whose rows hold values of other types too."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    kinds |= {int: "a number", float: "a number"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def instead(names: Iterable[str]) -> str:
    names = list(map(str, names))
    listed = ", ".join(names[:10]) + ", ..." * (len(names) > 10) if names else "nothing"
    return f"it has {listed}; name what holds the text with --text-field"


def like_utf16(start: bytes) -> str:
    return " (it looks like UTF-16)" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
