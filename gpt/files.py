"""Files that are there whole or not at all."""

import os
from pathlib import Path

from gpt.errors import UserError


def flush(path: Path) -> None:
    """Bring a file's or a directory's content to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader, and whoever comes after a crash, sees the old content or the new one.

    Raises OSError; the old content then stands.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    flush(path.parent)


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 file, with or without a byte order mark. UserError, naming it as `what`, for any other."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} {path} is not UTF-8: {error.reason} at byte {error.start}") from error
