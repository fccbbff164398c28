"""Folders of the cache: written under a temporary name, so that a reader sees the whole folder or none."""

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

JOURNAL = "progress.json"  # in an unfinished folder: how much of it is finished
MARK = ".made-by-gpt"  # in an unfinished folder: this program made it
# All files that this program writes in a folder of the cache. It never deletes any other file.
_CORPUS = ("tokenizer.json", "corpus.json", "train.tokens", "val.tokens")
WRITTEN = {MARK, JOURNAL, "content", "record.json", *_CORPUS, f".{JOURNAL}.tmp", ".tokenizer.json.tmp"}
_DAY = 86400


def cache_folder(given: Path | None) -> Path:
    """Return the folder for corpora and downloads: `given`, or one in $XDG_CACHE_HOME or ~/.cache."""
    if given is not None:
        return Path(given).expanduser().absolute()
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # the XDG specification ignores relative paths
        root = os.path.expanduser("~/.cache")
    if not os.path.isabs(root):
        raise UserError("this user has no home folder to keep tokenized text in: give a folder with --cache-dir")
    return Path(root, "gpt-on-triton")


@contextmanager
def publish(final: Path, *, resume: bool = False) -> Iterator[Path]:
    """Open a temporary folder for writing, which is renamed to `final` if the block succeeds and deleted if it fails.

    If another process publishes first, its folder stays. A failing write in the block is a UserError that names the
    cache folder.

    resume: start with what an earlier block for `final` left when it was killed, or interrupted with a JOURNAL in the
    folder; that is kept for a month. Two processes never share a folder.
    """
    with unfinished(final.parent, final.name if resume else None) as work:
        yield work
        try:
            (work / JOURNAL).unlink(missing_ok=True)
            for path in (*work.rglob("*"), work):  # before it gets the name that readers trust
                flush(path)
            os.rename(work, final)
            (final / MARK).unlink()
            flush(final.parent)
        except OSError:
            if not final.is_dir():
                raise


@contextmanager
def unfinished(folder: Path, resume: str | None = None) -> Iterator[Path]:
    """Open a temporary folder below `folder` for the block. resume: a name, so that a later block can continue it.

    Folders that killed processes left are deleted after a day, or after a month if they have such a name.
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
        # Keep work that was interrupted or found the disk full. Refused text will change, so its work is useless.
        keep = lock is not None and (isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, OSError))
        raise
    finally:
        if work is not None and not (keep and (work / JOURNAL).exists()):
            discard(work)
        if lock is not None:
            os.close(lock)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a folder of the cache. A failing write in the block is a UserError that names it."""
    try:
        make_folder(folder)
        yield
    except BrokenPipeError:  # the terminal's, not the cache's
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write to the cache folder {folder} ({reason}): give another with --cache-dir"
        ) from error


def _resumed(work: Path) -> tuple[Path | None, int | None]:
    """Return the folder, new or old, and its lock; None, None if another process or the user owns it."""
    if fcntl is None or (work.exists() and not is_own(work)):
        return None, None
    make_folder(work)
    lock = os.open(work, os.O_RDONLY | os.O_CLOEXEC)
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(work)):  # else another process has just finished it
            return work, lock
    os.close(lock)
    return None, None


def _sweep(folder: Path) -> None:
    """Delete the folders of killed processes: those older than a day, or a month if they can be resumed."""
    for pattern, age in ((".writing-*", _DAY), (".resume-*", 30 * _DAY)):
        for old in folder.glob(pattern):
            with suppress(FileNotFoundError):  # another process sweeps too
                if time.time() - old.stat().st_mtime > age and is_own(old):
                    discard(old)


def is_own(work: Path) -> bool:
    """Whether an unfinished folder and all its files are this program's."""
    if work.is_symlink() or not work.is_dir():
        return False
    names = os.listdir(work)
    return (not names or MARK in names) and strange_in(work) is None


def strange_in(folder: Path) -> Path | None:
    """Return a file in a folder of the cache that this program did not write, or None."""
    return next((path for path in folder.iterdir() if path.name not in WRITTEN or path.is_dir()), None)


def discard(folder: Path) -> None:
    """Delete this program's files in a folder of the cache, and the folder if it is then empty."""
    with suppress(OSError):  # a later sweep deletes it
        for name in (*sorted(WRITTEN - {MARK}), MARK):  # last, so that the folder stays known
            if not (folder / name).is_dir():
                (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def make_way(final: Path) -> None:
    """Delete a damaged folder of the cache. UserError if it holds a file that is not the cache's."""
    if strange := strange_in(final):
        raise UserError(
            f"{final} is damaged and holds {strange.name}, which the cache did not write: move that elsewhere"
        )
    discard(final)
