"""Reads and writes token files: a header of 128 bytes, then little-endian ids, which are memory-mapped.

magic "GPTSHARD" | version u32 | bytes per token u32 (2 or 4) | tokens u64 | tokenizer's fingerprint, 32 bytes |
sha256 of the ids, 32 bytes | zeros.
"""

import hashlib
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gpt.data.external_tokens import INDEX, TokenParts, read_index
from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError

MAGIC = b"GPTSHARD"
VERSION = 1
HEADER_BYTES = 128
_FIELDS = struct.Struct("<8sIIQ32s32s")


class TokenWriter:
    """Writes one token file. The file gets its header, and becomes valid, when a `with` block ends without an error.

    state: the state of an unfinished file. The writer continues after those tokens and cuts off any others. Raises
    UserError if the file does not begin with them.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, state: dict[str, Any] | None = None) -> None:
        self.tokens = 0
        self._dtype = tokenizer.dtype.newbyteorder("<")
        self._fingerprint = bytes.fromhex(tokenizer.fingerprint)
        self._digest = hashlib.sha256()
        self._file = open(path, "wb" if state is None else "r+b")  # noqa: SIM115
        if state is None:
            self._file.write(bytes(HEADER_BYTES))
        else:
            self._continue(state)

    def append(self, ids: np.ndarray) -> None:
        """Append ids (n,)."""
        data = np.ascontiguousarray(ids, self._dtype).data
        self._digest.update(data)
        self._file.write(data)
        self.tokens += len(ids)

    def sync(self) -> None:
        """Flush the tokens so far to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def state(self) -> dict[str, Any]:
        """Return what another writer needs to continue after these tokens, once sync has flushed them."""
        return {"tokens": self.tokens, "sha256": self._digest.hexdigest()}

    def _continue(self, state: dict[str, Any]) -> None:
        try:
            self._file.seek(HEADER_BYTES)
            left = state["tokens"] * self._dtype.itemsize
            while left and (block := self._file.read(min(left, 1 << 20))):
                self._digest.update(block)
                left -= len(block)
            if left or self._digest.hexdigest() != state["sha256"]:
                raise UserError(f"the unfinished token file {self._file.name} has changed")
            self._file.truncate()
            self.tokens = state["tokens"]
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file unfinished."""
        self._file.close()

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                width, digest = self._dtype.itemsize, self._digest.digest()
                self._file.seek(0)
                self._file.write(_FIELDS.pack(MAGIC, VERSION, width, self.tokens, self._fingerprint, digest))


def read_tokens(path: Path, tokenizer: Tokenizer, *, verify: bool = False) -> np.ndarray | TokenParts:
    """Map the ids of a token file or index, (tokens,) uint16 or uint32, read-only.

    verify: compare the ids with their checksum, about a second per GB. Raises UserError for a file of another kind, one
    that is truncated or damaged, and one with another tokenizer's ids.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read the token file {path}: {error.strerror or error}") from None
    if header.startswith(INDEX):
        return read_index(path, tokenizer)
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        raise UserError(f"{path} is not a token file of this program, or was never finished")
    _, version, width, tokens, fingerprint, digest = _FIELDS.unpack_from(header)
    if version != VERSION or width not in (2, 4):
        raise UserError(
            f"{path} is a token file of version {version}, {width} bytes per token: known is version {VERSION}, "
            "2 or 4 bytes"
        )
    if tokens == 0 or size != HEADER_BYTES + tokens * width:
        raise UserError(
            f"the token file {path} is damaged: {size} bytes cannot hold its {tokens} tokens of {width} bytes"
        )
    if fingerprint.hex() != tokenizer.fingerprint:
        raise UserError(f"the token file {path} was made by another tokenizer: prepare the text again with this one")
    if verify:
        with open(path, "rb") as file:
            file.seek(HEADER_BYTES)
            if hashlib.file_digest(file, "sha256").digest() != digest:
                raise UserError(f"the token file {path} is damaged: its tokens do not match their checksum")
    return np.memmap(path, f"<u{width}", "r", HEADER_BYTES, (tokens,)).view(np.ndarray)  # whose slices are faster
