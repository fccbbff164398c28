"""Write files atomically, flush them to the disk, and handle paths and text in any locale."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gpt.arguments import shown
from gpt.errors import UserError


def flush(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush_names(folder: Path) -> None:
    """Flush the names in a directory to the disk, if it is readable: writing in it needs no read permission."""
    with contextlib.suppress(PermissionError):
        flush(folder)


def make_folder(path: Path) -> None:
    """Create a directory and its missing parents, and flush their names to the disk."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(made):
        flush_names(folder.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: readers, also after a crash, see the old content or the new one.

    Follows a symbolic link. If it raises OSError, the old content stays.
    """
    real = Path(os.path.realpath(path))
    temporary = real.with_name(f".{real.name}.tmp")
    try:
        temporary.write_bytes(data)
        flush(temporary)
        os.replace(temporary, real)
    except OSError as error:
        with contextlib.suppress(OSError):  # report the first error
            temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    flush(real.parent)


def decoded(text: str) -> str:
    """Decode text as UTF-8 that another locale read as bytes; unchanged if it is not UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        return text


def path_to_text(path: str | Path) -> str:
    """Encode a path as text for a UTF-8 file, in any locale.

    A byte that is not UTF-8 becomes NUL, which no path contains, and two hexadecimal digits.
    """
    text = os.fsencode(path).decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda found: f"\0{ord(found[0]) & 0xFF:02x}", text)


def path_from_text(text: str) -> str:
    """Decode the text of path_to_text. Raises ValueError for a NUL that path_to_text did not write."""
    text = re.sub("\0([89a-f][0-9a-f])", lambda found: chr(0xDC00 | int(found[1], 16)), text)
    if "\0" in text:
        raise ValueError("a path cannot hold a NUL")
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def is_folder(path: Path) -> bool:
    """Tell whether a path is a directory. Raises UserError if the system refuses to say."""
    try:
        return path.is_dir()
    except OSError as error:
        raise UserError(f"cannot use {shown(path)}: {error.strerror}") from None


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """Yield a path for libraries that take only UTF-8: the file's own, or that of an open descriptor."""
    if path_to_text(path) == str(path):
        yield str(path)
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        yield f"/dev/fd/{fd}"
    finally:
        os.close(fd)
