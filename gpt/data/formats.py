"""Recognizes a file's format by its content, and by its name only if the content cannot tell."""

import codecs
import io
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from gpt.data.json_documents import json_form, like_utf16
from gpt.data.tables import columns
from gpt.data.unpack import MAGIC, packing_of, unpacked, unpacker
from gpt.errors import UserError

log = logging.getLogger(__name__)

_HEAD = 8192  # bytes that distinguish text from binary
_LONG_HEAD = 1 << 16  # bytes that distinguish JSON from text
_LONGEST_HEAD = 1 << 26  # bytes, for a longer first object
_BLOCK = 1 << 14
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # bytes that occur in no common text encoding
_NAMES = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "parquet": "parquet", "csv": "csv", "tsv": "csv"}
_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz|zip|7z|rar)$")
_UNPACK = "unpack it, and name the folder"
_KINDS = (  # a pattern for the start of a file that is not text, its description, what to do
    (rb"PK\x03\x04", "a ZIP archive (or a .docx, .xlsx, .epub, .npz or .pt file, which are such)", _UNPACK),
    (rb"PK\x05\x06", "an empty ZIP archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (rb"\{\\rtf1", "an RTF file", "save it as plain text first"),
    (rb"!<arch>\n", "an ar archive", _UNPACK),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file", "save it as plain text first"),
    (rb"\x93NUMPY", "a NumPy array", "give text, or token files (.bin)"),
    (rb"SQLite format 3\0", "an SQLite database", "write its text to JSON lines first"),
    (rb"ARROW1\0\0", "an Arrow file", "write it as Parquet first"),
    (rb"Obj\x01", "an Avro file", "write it as Parquet first"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", "write its text to JSON lines first"),
    (rb"\x04\x22\x4d\x18", "an lz4 file", "unpack it first"),
    (rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff", "an image", "give text"),
    (rb"\x7fELF", "a program", "give text"),
    (rb"%PDF-\d", "a PDF file", "take its text out first"),
    (rb"07070[127][0-7A-Fa-f]{70}", "a cpio archive", _UNPACK),
    (rb"\([ld]p[01]\n", "a pickle, which can run any code when it is read", "write JSON lines instead"),
    (rb"(?s:.{257})ustar", "a tar archive", _UNPACK),
)
_LIKE_TEXT = (  # plain text may begin like these too
    (rb"ORC", "an ORC file", "write it as Parquet first"),
    (rb"GIF8", "an image", "give text"),
    (rb"GGUF", "a model in GGUF", "give text"),
)
_PARQUET = b"PAR1"
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x00-\x1f}\]\x80-\x95KXcq(]")


class Form(NamedTuple):
    """kind: text, jsonl, json, parquet or csv. packing: gz, zst, bz2 or xz; "" if it is not compressed."""

    kind: str
    packing: str


def form_by_name(name: str) -> Form:
    """Return the form that a file's name suggests: text by default."""
    parts = name.lower().split(".")
    packing = parts.pop() if parts[1:] and parts[-1] in MAGIC else ""
    return Form(_NAMES.get(parts[-1], "text"), packing)


def not_text(head: bytes) -> tuple[str, str] | None:
    """Describe a file with this head, and what to do, if it is certainly not text; None if it may be text."""
    for pattern, what, todo in _KINDS if is_plain(head) else _KINDS + _LIKE_TEXT:
        if re.match(pattern, head):
            return what, todo
    if _PICKLE.match(head):
        return "a pickle, which can run any code when it is read", "write its text to JSON lines first"
    if b"\0\0" in head or 10 * head.count(b"\0") >= len(head) > 0:
        return "binary (it holds NUL bytes)", "give text, in UTF-8"
    # Backspaces do not count: old manuals are full of them.
    controls = len(_CONTROL.findall(head.replace(b"\b", b"")))
    if controls * (5 if _utf8(head) else 50) >= len(head) >= (64 if _utf8(head) else 1):
        return "binary (it holds control characters)", "give text, in UTF-8"
    return None


def is_plain(head: bytes) -> bool:
    """Whether a head is UTF-8 without control characters."""
    return _utf8(head) and not _CONTROL.search(head)


def _utf8(head: bytes) -> bool:
    """Whether the start of a file is UTF-8; a character may be cut at its end."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def is_binary(head: bytes) -> bool:
    """Whether a search for text skips a file with this head: for a NUL, or control characters that are not UTF-8."""
    if not_text(head):
        return True
    return b"\0" in head if _utf8(head) else _CONTROL.search(head) is not None


def _head(path: Path, packing: str, name: str, size: int) -> bytes:
    """Read the first `size` bytes of a file's unpacked content, or some more."""
    with open(path, "rb") as file:
        if not packing:
            return file.read(size)
        blocks = iter(lambda: file.read(_BLOCK), b"")
        head = b""
        for block in unpacked(blocks, packing, name, 1):
            head += block
            if len(head) >= size:
                break
        return head


def form_of(path: Path, called: str, field: str, errors: str, *, shown: str, searched: bool = False) -> Form | None:
    """Recognize a file's kind and compression. called: its name, which `path` may lack; shown: its name in messages.

    searched: the file was found in a folder, and is skipped if binary: the result is None. errors: as in bytes.decode.
    Raises UserError for a file that holds no text.
    """
    named = form_by_name(called)
    if searched and _ARCHIVE.search(called.lower()):
        return None
    start = _head(path, "", shown, 512)
    packing = packing_of(start)
    if not start:
        return named
    if named.packing and not packing:
        unpacker(named.packing)  # raises if its package is not installed
        if is_binary(_head(path, "", shown, _HEAD)):
            raise UserError(f"{shown} is not a .{named.packing} file, or is damaged before its byte {len(start)}")
        log.warning("%s is not compressed: it is read without unpacking", shown)
    try:
        head = _head(path, packing, shown, _HEAD)
    except UserError:
        if searched and not named.packing:
            return None
        raise
    parquet = head.startswith(_PARQUET) and not is_plain(head)
    if packing and (packing_of(head) or parquet):
        what = "compressed twice" if packing_of(head) else "a compressed Parquet file"
        raise UserError(f"{shown} is {what}: unpack it first")
    if parquet or (named.kind == "parquet" and not packing):
        return Form("parquet", "")
    if searched and is_binary(head) and not (packing and named.kind != "text"):
        return None
    return Form(_kind_of_text(path, shown, field, head, Form(named.kind, packing), errors, searched), packing)


def _kind_of_text(path: Path, name: str, field: str, head: bytes, form: Form, errors: str, searched: bool) -> str:
    """Return text, jsonl, json or csv. form: the kind that the name suggests, and the packing."""
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if errors != "strict":
            raise UserError(f"{name} is UTF-16, not UTF-8: convert the file (iconv -f UTF-16 -t UTF-8)")
        return form.kind  # the reader reports the first invalid byte
    if found := not_text(head):
        raise UserError(f"{name} is {found[0]}, not text: {found[1]}")
    named = form.kind
    if head.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1] not in (b"{", b"["):
        if named == "csv" and field not in columns(head.decode("utf-8", "replace")):
            if not searched:
                log.warning("%s: its first line has no column %r, so it is read as plain text", name, field)
            return "text"
        return "text" if named == "json" and searched else named
    named = "text" if named == "csv" else named
    found, content = _json(path, form.packing, name, head)
    if found is None:
        return "text" if named == "json" and searched else named
    kind, first, several = found
    if named == "jsonl":
        return kind
    key = rf'"{re.escape(field)}"\s*:\s*"'
    has = isinstance(first.get(field), str) if first is not None else re.search(key, content)
    if named == "json" and (has or not searched):
        return kind
    if not has and kind == "jsonl" and several:  # the reader lists the fields that the rows have
        return kind
    if not has and (searched or not several):
        if several or not searched:
            log.warning("%s: it is JSON without the field %r, so it is read as plain text", name, field)
        return "text"
    log.warning("%s: it is JSON, so the field %r of each object is a document", name, field)
    return kind


def _json(
    path: Path, packing: str, name: str, head: bytes
) -> tuple[tuple[str, dict[str, Any] | None, bool] | None, str]:
    """Return json_form of a file, including its first object unless that is too long, and the text examined."""
    size = _LONG_HEAD
    while True:
        if len(head) >= _HEAD:
            head = _head(path, packing, name, size)
        content, whole = head.decode("utf-8", "replace"), len(head) < size
        found = json_form(content, whole)
        if found is None or found[1] is not None or whole or size >= _LONGEST_HEAD:
            return found, content
        size *= 8


def read_lines(path: Path, what: str) -> list[str]:
    """Read the lines of a UTF-8 file, with or without a byte order mark. UserError for any other, naming it `what`."""
    try:
        raw = path.read_bytes()
        if packing := packing_of(raw):
            raise UserError(f"the {what} {path} is compressed (.{packing}): unpack it first")
        if not like_utf16(raw) and (found := not_text(raw[:8192])):
            raise UserError(f"the {what} {path} is {found[0]}, not text: {found[1]}")
        return io.TextIOWrapper(io.BytesIO(raw), "utf-8-sig").read().split("\n")
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        hint = like_utf16(raw)
        raise UserError(f"the {what} {path} is not UTF-8{hint}: {error.reason} at byte {error.start}") from error
