"""Reads documents from files of text, JSON, tables and Parquet, plain or compressed, in bounded memory.

Text is kept unchanged, including spaces and line ends; only a byte order mark at the start is left out. A text file is
one document; JSON, tables and Parquet hold one in each line, object or row, in a field of strings. Empty documents are
left out. gpt/data/formats.py recognizes what a file is.
"""

import codecs
import hashlib
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from gpt.data.json_documents import from_lines, from_values, instead, like_utf16
from gpt.data.tables import from_table
from gpt.data.unpack import need, unpacked
from gpt.errors import UserError

_CHUNK = 1 << 20  # bytes read at a time
_PACKED_CHUNK = 1 << 14  # of a compressed file, which bounds the unpacked size too
_LONGEST_LINE = 1 << 28  # bytes
_ROWS = 256  # of a Parquet file read at a time

OnRead = Callable[[int], None]  # gets the number of bytes just read from the file


class Document(NamedTuple):
    """One document. Its chunks can be read once, before the next document."""

    name: str
    sha256: str  # of the file if that is one document, else of the text
    chunks: Iterable[str]


@dataclass(frozen=True)
class Source:
    """A file of text.

    coding: "utf-8", or "python" for a source file that names its own encoding (PEP 263).
    kind, packing: what the file is, and how it is compressed. field: the field of an object or row that holds the text.
    limit: bytes of text to read at most: a text file is cut there, between characters; other files end with a whole
    document. sha256: of the bytes read, if known; a file that has changed is refused.
    """

    name: str
    path: Path
    size: int  # bytes to read from the file
    coding: str = "utf-8"
    limit: int | None = None
    sha256: str = ""
    kind: Literal["text", "jsonl", "json", "parquet", "csv"] = "text"
    packing: Literal["", "gz", "zst", "bz2", "xz"] = ""
    field: str = "text"

    @property
    def plain(self) -> bool:
        """Whether the file's bytes are the text's."""
        return self.kind == "text" and not self.packing

    @property
    def form(self) -> list[Any]:
        """Everything except the bytes that decides the text."""
        form = [self.coding, self.limit]
        return form if self.plain else [*form, self.kind, self.packing, None if self.kind == "text" else self.field]

    def hashed(self) -> "Source":
        """Return the source with its sha256 and exact size."""
        digest, size = hashlib.sha256(), 0
        for block in self._checked(None):
            digest.update(block)
            size += len(block)
        return replace(self, sha256=digest.hexdigest(), size=size)

    def documents(self, errors: str, on_read: OnRead | None = None) -> Iterator[Document]:
        """Yield the documents, in order. errors: "strict" or "replace", as in bytes.decode.

        Raises UserError, naming the file and the line or row, for anything that is not text, and at the end if the file
        has changed since it was hashed.
        """
        if self.kind == "text":
            yield Document(self.name, self.sha256, self.chunks(errors, on_read))
            return
        read = 0
        for name, text in self._rows(errors, on_read):
            try:
                raw = text.encode()
            except UnicodeEncodeError as error:
                if errors == "strict":
                    raise UserError(
                        f"{name}: the field {self.field!r} holds the lone surrogate U+{ord(text[error.start]):04X}, "
                        "which is not a character: correct it, or give --encoding-errors replace"
                    ) from None
                raw = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
                text = raw.decode()
            if self.limit is not None and read + len(raw) > self.limit:
                if read == 0:
                    text = raw[: self.limit].decode("utf-8", "ignore")
                    yield Document(name, hashlib.sha256(text.encode()).hexdigest(), (text,))
                return
            read += len(raw)
            if raw:
                yield Document(name, hashlib.sha256(raw).hexdigest(), (text,))

    def chunks(self, errors: str, on_read: OnRead | None = None) -> Iterator[str]:
        """Yield a text file's text, about a million characters at a time. UserError for two NUL bytes in a row."""
        position, last = 0, b""
        decoder = codecs.getincrementaldecoder(self._encoding(errors))(errors)
        for block in self._blocks(on_read):
            mark = len(codecs.BOM_UTF8) if position == 0 and block.startswith(codecs.BOM_UTF8) else 0
            text = self._decode(decoder, block[mark:], position + mark)
            if (at := (last + block).find(b"\0\0")) >= 0:
                raise UserError(f"{self.name} is not text: it holds NUL bytes from byte {position + at - len(last)} on")
            yield text
            position, last = position + len(block), block[-1:]
        if self.limit is None or self.kind != "text":  # a character cut by the limit is left out
            yield self._decode(decoder, b"", position, final=True)

    def text_bytes(self, most: int) -> int:
        """Count the UTF-8 bytes of the text. Stops counting above `most`."""
        total = 0
        for document in self.documents("replace"):
            for text in document.chunks:
                total += len(text.encode())
                if total > most:
                    return total
        return total

    def first_fits(self, most: int) -> bool:
        """Whether the first document has at most `most` UTF-8 bytes of text."""
        first = next(self.documents("replace"), None)
        return first is not None and sum(len(text.encode()) for text in first.chunks) <= most

    def _read(self) -> Iterator[bytes]:
        """Yield the bytes of the file, up to the limit of a plain text."""
        left, chunk = self.limit if self.plain else None, _PACKED_CHUNK if self.packing else _CHUNK
        try:
            with open(self.path, "rb", buffering=0) as file:
                while block := file.read(chunk if left is None else min(chunk, left)):
                    left = None if left is None else left - len(block)
                    yield block
        except OSError as error:
            raise UserError(f"cannot read {self.name}: {error.strerror or error}") from None

    def _blocks(self, on_read: OnRead | None = None) -> Iterator[bytes]:
        """Yield the unpacked content, up to a text's limit. Checks the bytes read against the sha256."""
        blocks = self._checked(on_read)
        if self.packing:
            blocks = unpacked(blocks, self.packing, self.name, _CHUNK)
        left = self.limit if self.kind == "text" else None
        for block in blocks:
            if left is not None:
                block = block[:left]
                left -= len(block)
            yield block
            if left == 0 and self.packing:
                return

    def _checked(self, on_read: OnRead | None) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for block in self._read():
            if self.sha256:
                digest.update(block)
            if on_read is not None:
                on_read(len(block))
            yield block
        if self.sha256 not in ("", digest.hexdigest()):
            raise UserError(
                f"{self.path} has changed (sha256 {digest.hexdigest()}, not {self.sha256}): start again, and delete "
                "the file first if it is a download"
            )

    def _encoding(self, errors: str) -> str:
        if self.coding != "python":
            return self.coding
        lines = iter(next(self._read(), b"").splitlines(keepends=True))
        try:
            encoding, _ = tokenize.detect_encoding(lambda: next(lines))
            return encoding.removesuffix("-sig")
        except SyntaxError as error:
            if errors == "replace":
                return "utf-8"
            raise UserError(f"{self.name}: {error.msg}; give --encoding-errors replace to read it as UTF-8") from None

    def _decode(self, decoder: codecs.IncrementalDecoder, block: bytes, position: int, final: bool = False) -> str:
        """Decode the block at byte `position` of the text."""
        pending = len(decoder.getstate()[0])
        try:
            return decoder.decode(block, final)
        except UnicodeDecodeError as error:
            offset = position - pending + error.start
            before = replace(self, kind="text", limit=offset, sha256="")
            line = 1 + sum(block.count(b"\n") for block in before._blocks()) if offset else 1
            start = next(replace(self, sha256="")._blocks(), b"")
            found = f"byte {offset} (0x{error.object[error.start]:02x}, in line {line}) begins no character"
            raise UserError(
                f"{self.name} is not valid {error.encoding.upper()}{like_utf16(start)}: {found}; "
                "convert the file, or give --encoding-errors replace"
            ) from None

    def _rows(self, errors: str, on_read: OnRead | None) -> Iterator[tuple[str, str]]:
        """Yield the name and text of each line, object or row."""
        if self.kind == "parquet":
            return self._parquet(errors, on_read)
        if self.kind == "csv":
            return from_table(self.chunks(errors, on_read), self.name, self.field)
        read = from_lines if self.kind == "jsonl" else from_values
        return read(self._blocks(on_read), self.name, self.field, errors, _LONGEST_LINE)

    def _parquet(self, errors: str, on_read: OnRead | None) -> Iterator[tuple[str, str]]:
        """Yield the name and text of each row. Reads a few rows at a time, from one row group after another."""
        pyarrow, parquet = need("pyarrow", "Parquet files"), need("pyarrow.parquet", "Parquet files")
        row, reported = 0, 0
        try:
            # Without these two options, a row group's whole column would be in memory.
            with parquet.ParquetFile(self.path, buffer_size=_CHUNK, pre_buffer=False) as file:
                self._check_column(file.schema_arrow, pyarrow.types)
                for batch in file.iter_batches(_ROWS, columns=[self.field], use_threads=False):
                    for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        row += 1
                        yield f"{self.name}, row {row}", self._row(raw, row, errors)
                    if on_read is not None:
                        read = self.size * row // file.metadata.num_rows
                        on_read(read - reported)
                        reported = read
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.name} is not a whole Parquet file (after row {row}: {reason})") from None
        if self.sha256:
            self.hashed()

    def _check_column(self, schema: Any, types: ModuleType) -> None:
        if self.field not in schema.names:
            raise UserError(f"{self.name} has no column {self.field!r}: {instead(schema.names)}")
        if (several := schema.names.count(self.field)) > 1:
            raise UserError(f"{self.name} has {several} columns {self.field!r}: keep one of them")
        kind = schema.field(self.field).type
        text = kind.value_type if types.is_dictionary(kind) else kind  # pandas writes categories
        if str(text) not in ("string", "large_string", "string_view"):
            raise UserError(f"{self.name}: the column {self.field!r} is not text but {kind}: {instead(schema.names)}")

    def _row(self, raw: bytes | None, row: int, errors: str) -> str:
        if raw is None:
            raise UserError(f"{self.name}, row {row}: the column {self.field!r} is not text but null")
        try:
            return raw.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            found = f"byte {error.start} of the text (0x{raw[error.start]:02x}) begins no character"
            raise UserError(
                f"{self.name}, row {row} is not valid UTF-8: {found}; correct it, or give --encoding-errors replace"
            ) from None
