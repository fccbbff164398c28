"""Unpacks gzip, Zstandard, bzip2 and xz files, recognized by their first bytes, in bounded memory."""

import bz2
import importlib
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

from gpt.errors import UserError

log = logging.getLogger(__name__)

MAGIC = {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd", "bz2": b"BZh", "xz": b"\xfd7zXZ\0"}
_FED = 1 << 10  # bytes given to an unpacker at once, which bounds the memory for the result
_IGNORE_REST = ("gz", "bz2")  # like the programs gzip and bzip2, which warn

# pzstd's files begin with a skippable frame. Text may begin with "BZh", and token ids with the bytes of .gz.
_BEGINS = {packing: re.escape(magic) for packing, magic in MAGIC.items()}
_BEGINS["gz"] += rb"(?:\x08|\Z)"
_BEGINS["zst"] += rb"|[\x50-\x5f]\x2a\x4d\x18"
_BEGINS["bz2"] = rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90|.{0,5}\Z)"


def packing_of(head: bytes) -> str:
    """Recognize the compression of a file by its head: gz, zst, bz2 or xz; "" if it is not compressed."""
    return next((packing for packing, magic in _BEGINS.items() if re.match(magic, head, re.DOTALL)), "")


def need(module: str, what: str) -> ModuleType:
    """Import a module of an optional package. UserError says how to install it."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what} need the package {package}, which is not installed: pip install {package}") from None


def unpacker(packing: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """Return a function that makes the unpacker of one member, and the errors that it raises."""
    if packing == "zst":
        zstandard = need("zstandard", ".zst files")
        return (lambda: zstandard.ZstdDecompressor().decompressobj()), (zstandard.ZstdError,)
    if packing == "bz2":
        return bz2.BZ2Decompressor, (OSError,)
    if packing == "xz":
        return (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)), (lzma.LZMAError,)
    return (lambda: zlib.decompressobj(wbits=31)), (zlib.error,)  # 31: with gzip's header


def unpacked(blocks: Iterable[bytes], packing: str, name: str, chunk: int) -> Iterator[bytes]:
    """Unpack all members of a compressed file, about `chunk` bytes at a time.

    Raises UserError if the file is damaged or ends too early. Other data after the last member of a .gz or .bz2 file is
    ignored with a warning, but all blocks are read.
    """
    new, faults = unpacker(packing)
    member, begun, read = new(), False, 0
    parts: list[bytes] = []
    size = 0
    for block in blocks:
        read += len(block)
        while block and member is not None:
            if member.eof:
                block = block.lstrip(b"\0") if packing in ("gz", "xz") else block  # padding after a member
                if block:
                    member, begun = _next_member(block, packing, name, new), False
                continue
            begun, fed, block = True, block[:_FED], block[_FED:]
            try:
                for part in _parts(member, fed, chunk):
                    parts.append(part)
                    size += len(part)
                    if size >= chunk:
                        yield b"".join(parts)
                        parts, size = [], 0
            except faults as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{name} is not a .{packing} file, or is damaged before its byte {read}: {reason}"
                ) from None
            block = (member.unused_data if member.eof else b"") + block
    if begun and not member.eof:
        raise UserError(f"{name} is cut short: the file ends before its compressed text does")
    if size:
        yield b"".join(parts)


def _parts(member: Any, fed: bytes, most: int) -> Iterator[bytes]:
    """Unpack some bytes of a member; in parts for bzip2 and xz, whose result may be a million times as large."""
    if not hasattr(member, "needs_input"):
        yield member.decompress(fed)
        return
    yield member.decompress(fed, most)
    while not (member.eof or member.needs_input):
        yield member.decompress(b"", most)


def _next_member(rest: bytes, packing: str, name: str, new: Callable[[], Any]) -> Any:
    """Make the unpacker of the next member; None if the rest is not a member and is ignored."""
    magic = MAGIC[packing]
    if packing in _IGNORE_REST and rest[: len(magic)] != magic[: len(rest)]:
        _warn(name, packing)
        return None
    return new()


@cache
def _warn(name: str, packing: str) -> None:
    log.warning("%s: the data after its compressed text is not .%s and is ignored", name, packing)
