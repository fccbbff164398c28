"""Folders of the cache: written beside their final, and there whole or not at all."""

import os
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
MARK = ".made-by-gpt"  # in an unfinished folder: this program made it
# Every file that this program writes in a folder of the cache. Nothing else in one is ever deleted.
_CORPUS = ("tokenizer.json", "corpus.json", "train.tokens", "val.tokens")
WRITTEN = {MARK, JOURNAL, "content", "record.json", *_CORPUS, f".{JOURNAL}.tmp", ".tokenizer.json.tmp"}
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
def publish(final: Path, *, resume: bool = False) -> Iterator[Path]:
    """A new folder to write in, which becomes `final` when the block ends well and goes away when it does not.

    A reader never sees half of it. Where another process was first, its folder stays. A write that fails in the block
    is a UserError that names the cache folder.

    resume: the folder may be what an earlier block for this final left behind when it was killed, or interrupted with
    a JOURNAL in it; it waits a month for that. Two processes never share one.
    """
    with unfinished(final.parent, final.name if resume else None) as work:
        yield work
        try:
            (work / JOURNAL).unlink(missing_ok=True)
            for path in (*work.rglob("*"), work):  # before it has a name that readers trust
                flush(path)
            os.rename(work, final)
            (final / MARK).unlink()
            flush(final.parent)
        except OSError:
            if not final.is_dir():
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
            (work / MARK).touch()
            work.chmod(0o755)
            yield work
    except (KeyboardInterrupt, UserError) as error:
        # What was interrupted, or found the disk full, may go on; text that was refused will be another.
        keep = lock is not None and (isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, OSError))
        raise
    finally:
        if work is not None and not (keep and (work / JOURNAL).exists()):
            discard(work)
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
    """The folder, new or old, and the lock on it; None, None where another process or the user has it."""
    if fcntl is None or (work.exists() and not is_own(work)):
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
    """Remove what killed processes left: folders of a day ago, or of a month ago if they can be resumed."""
    for pattern, age in ((".writing-*", _DAY), (".resume-*", 30 * _DAY)):
        for old in folder.glob(pattern):
            with suppress(FileNotFoundError):  # another process sweeps too
                if time.time() - old.stat().st_mtime > age and is_own(old):
                    discard(old)


def is_own(work: Path) -> bool:
    """Whether this program made an unfinished folder, which then holds its mark, and all that is in it."""
    if work.is_symlink() or not work.is_dir():
        return False
    names = os.listdir(work)
    return (not names or MARK in names) and strange_in(work) is None


def strange_in(folder: Path) -> Path | None:
    """Something in a folder of the cache that this program did not write; None if all is its own."""
    others = (path for path in folder.iterdir() if path.name not in WRITTEN or path.is_dir())
    return next(others, None)


def discard(folder: Path) -> None:
    """Delete what this program wrote in a folder of the cache, and the folder unless it holds something else."""
    with suppress(OSError):  # it goes the next time
        for name in (*sorted(WRITTEN - {MARK}), MARK):  # which is the last to go
            if not (folder / name).is_dir():
                (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def make_way(final: Path) -> None:
    """Delete a damaged folder of the cache, to make it anew. UserError where it holds what is not the cache's."""
    if strange := strange_in(final):
        raise UserError(
            f"{final} is damaged and holds {strange.name}, which the cache did not write: move that elsewhere"
        )
    discard(final)
