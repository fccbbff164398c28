"""Files that are written whole or not at all, and what bytes that are not the locale's mean."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gpt.arguments import shown
from gpt.errors import UserError


def flush(path: Path) -> None:
    """Bring a file's or a directory's content to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush_names(folder: Path) -> None:
    """Bring a directory's names to the disk, if it may be read: to write in it that is not needed."""
    with contextlib.suppress(PermissionError):
        flush(folder)


def make_folder(path: Path) -> None:
    """Make a directory, and those above it that do not exist, and bring their names to the disk."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(made):
        flush_names(folder.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader, and whoever comes after a crash, sees the old content or the new one.

    A symbolic link is followed. Raises OSError; the old content then stays.
    """
    real = Path(os.path.realpath(path))
    temporary = real.with_name(f".{real.name}.tmp")
    try:
        temporary.write_bytes(data)
        flush(temporary)
        os.replace(temporary, real)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    flush(real.parent)


def decoded(text: str) -> str:
    """Text that the locale took for bytes, decoded as UTF-8; unchanged where it is not UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        return text


def path_to_text(path: str | Path) -> str:
    """A path as text that any UTF-8 file can hold, whatever the locale.

    A byte that is not UTF-8 becomes a NUL, which no path has, and its two hexadecimal digits.
    """
    text = os.fsencode(path).decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda found: f"\0{ord(found[0]) & 0xFF:02x}", text)


def path_from_text(text: str) -> str:
    """The path that path_to_text was given. ValueError for a NUL that it did not write."""
    pieces = text.split("\0")
    escaped = [bytes([byte]) + rest.encode() for byte, rest in map(_unescaped, pieces[1:])]
    return os.fsdecode(b"".join([pieces[0].encode(), *escaped]))


def _unescaped(piece: str) -> tuple[int, str]:
    """The byte that the first two digits stand for, and the text after them."""
    if not re.match("[89a-f][0-9a-f]", piece):
        raise ValueError("a path cannot hold a NUL")
    return int(piece[:2], 16), piece[2:]


def is_folder(path: Path) -> bool:
    """Whether a path leads to a directory. UserError where the system refuses to say."""
    try:
        return path.is_dir()
    except OSError as error:
        raise UserError(f"cannot use {shown(path)}: {error.strerror}") from None


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """A path to a file for libraries that take only UTF-8: its own, or one of an open descriptor."""
    if path_to_text(path) == str(path):
        yield str(path)
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        yield f"/dev/fd/{fd}"
    finally:
        os.close(fd)
