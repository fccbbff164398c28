"""Files that are there whole or not at all."""

import os
from pathlib import Path


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
