"""Compressed files: gzip, Zstandard, bzip2 and xz, known by how they begin, unpacked in bounded memory."""

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
_FED = 1 << 10  # bytes given to an unpacker at a time: what they unpack to is in memory
_IGNORES_WHAT_FOLLOWS = ("gz", "bz2")  # so do gzip and bzip2, with a warning


# A .zst file may begin with a frame to be skipped, as pzstd's do; text may begin with "BZh", token ids as .gz does.
_BEGINS = {packing: re.escape(magic) for packing, magic in MAGIC.items()}
_BEGINS["gz"] += rb"(?:\x08|\Z)"
_BEGINS["zst"] += rb"|[\x50-\x5f]\x2a\x4d\x18"
_BEGINS["bz2"] = rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90|.{0,5}\Z)"


def packing_of(head: bytes) -> str:
    """How a file that begins so is compressed: gz, zst, bz2, xz; "" if it is not."""
    return next((packing for packing, magic in _BEGINS.items() if re.match(magic, head, re.DOTALL)), "")


def need(module: str, what: str) -> ModuleType:
    """An optional package's module; UserError that says how to get it."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what} need the package {package}, which is not installed: pip install {package}") from None


def unpacker(packing: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """What makes the unpacker of one member, and what it raises for damage."""
    if packing == "zst":
        zstandard = need("zstandard", ".zst files")
        return (lambda: zstandard.ZstdDecompressor().decompressobj()), (zstandard.ZstdError,)
    if packing == "bz2":
        return bz2.BZ2Decompressor, (OSError,)
    if packing == "xz":
        return (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)), (lzma.LZMAError,)
    return (lambda: zlib.decompressobj(wbits=31)), (zlib.error,)  # 31: with gzip's header


def unpacked(blocks: Iterable[bytes], packing: str, name: str, chunk: int) -> Iterator[bytes]:
    """What a compressed file holds, all its members, about `chunk` bytes at a time.

    Raises UserError where it is damaged or ends too early. What follows the last member of a .gz or .bz2 file and is
    not one is left out, and a warning says so; all blocks are read in any case.
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
        raise UserError(f"{name} is cut short: its compressed text does not end with the file")
    if size:
        yield b"".join(parts)


def _parts(member: Any, fed: bytes, most: int) -> Iterator[bytes]:
    """What some bytes of a member unpack to; of bzip2 and xz, which may be a million times as much, in parts."""
    if not hasattr(member, "needs_input"):
        yield member.decompress(fed)
        return
    yield member.decompress(fed, most)
    while not (member.eof or member.needs_input):
        yield member.decompress(b"", most)


def _next_member(rest: bytes, packing: str, name: str, new: Callable[[], Any]) -> Any:
    """The unpacker for what follows a member; None where that is not a member and is left out."""
    magic = MAGIC[packing]
    if packing in _IGNORES_WHAT_FOLLOWS and rest[: len(magic)] != magic[: len(rest)]:
        _warn(name, packing)
        return None
    return new()


@cache
def _warn(name: str, packing: str) -> None:
    log.warning("%s: what follows its compressed text is not .%s and is left out", name, packing)
