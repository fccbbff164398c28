"""Folders of the cache: written beside their place, and there whole or not at all."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpt.errors import UserError
from gpt.files import flush, make_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

JOURNAL = "progress.json"  # in an unfinished folder: what of it is finished
_DAY = 86400


def cache_folder(given: Path | None) -> Path:
    """Where corpora and downloads are kept: `given`, or a folder in $XDG_CACHE_HOME or ~/.cache."""
    if given is not None:
        return Path(given).expanduser().absolute()
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # the XDG specification: a relative path is ignored
        root = os.path.expanduser("~/.cache")
    if not os.path.isabs(root):
        raise UserError("this user has no home folder to keep tokenized text in: give a folder with --cache-dir")
    return Path(root, "gpt-on-triton")


@contextmanager
def publish(place: Path, *, resume: bool = False) -> Iterator[Path]:
    """A new folder to write in, which becomes `place` when the block ends well and goes away when it does not.

    A reader never sees half of it. Where another process was first, its folder stays. A write that fails in the block
    is a UserError that names the cache folder.

    resume: the folder may be what an earlier block for this place left behind when it was killed, or interrupted with
    a JOURNAL in it; it waits a month for that. Two processes never share one.
    """
    with unfinished(place.parent, place.name if resume else None) as work:
        yield work
        try:
            (work / JOURNAL).unlink(missing_ok=True)
            for path in (*work.rglob("*"), work):  # before it has a name that readers trust
                flush(path)
            os.rename(work, place)
            flush(place.parent)
        except OSError:
            if not place.is_dir():
                raise


@contextmanager
def unfinished(folder: Path, resume: str | None = None) -> Iterator[Path]:
    """A folder below `folder` to write in for as long as the block lasts; resume: a name to find it by the next time.

    What killed processes left behind goes after a day, or a month if it has such a name.
    """
    work, lock, keep = None, None, False
    try:
        with writing(folder):
            _sweep(folder)
            work, lock = _resumed(folder / f".resume-{resume}") if resume else (None, None)
            work = work or Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
            work.chmod(0o755)
            yield work
    except (KeyboardInterrupt, UserError) as error:
        # What was interrupted, or found the disk full, may go on; text that was refused will be another.
        keep = lock is not None and (isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, OSError))
        raise
    finally:
        if work is not None and not (keep and (work / JOURNAL).exists()):
            shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes a folder of the cache; a write that fails in the block is a UserError that names it."""
    try:
        make_folder(folder)
        yield
    except BrokenPipeError:  # of the terminal, not of the cache
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write to the cache folder {folder} ({reason}): give another with --cache-dir"
        ) from error


def _resumed(work: Path) -> tuple[Path | None, int | None]:
    """The folder, new or old, and the lock on it; None, None where another process has it."""
    if fcntl is None:
        return None, None
    make_folder(work)
    lock = os.open(work, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(work)):  # else its holder has just finished
            return work, lock
    except OSError:
        pass
    os.close(lock)
    return None, None


def _sweep(folder: Path) -> None:
    """Remove what killed processes left: folders of a day ago, or of a month ago if they can be gone on with."""
    for pattern, age in ((".writing-*", _DAY), (".resume-*", 30 * _DAY)):
        for old in folder.glob(pattern):
            with suppress(FileNotFoundError):  # another process sweeps too
                if time.time() - old.stat().st_mtime > age:
                    shutil.rmtree(old, ignore_errors=True)
