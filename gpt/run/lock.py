"""Lock a run directory for one training process; the system releases the lock however the process ends."""

import errno
import logging
import os
from contextlib import suppress
from pathlib import Path

from gpt.errors import UserError
from gpt.run.layout import LOCK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)


class RunLock:
    """The lock file of a run directory, held by flock from take() to the end of the `with` block.

    The directory must exist; the file stays after the release and names the process that holds the lock. run_dir None:
    take() does nothing, as on ranks other than 0.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self.run_dir = run_dir
        self._fd: int | None = None

    def take(self) -> bool:
        """Take the lock. Returns False if this object already holds it or the file system has no locks.

        Raises UserError if another process holds it, or if the file cannot be written.
        """
        if self.run_dir is None or self._fd is not None or fcntl is None:
            return False
        path = self.run_dir / LOCK
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"cannot use the run directory {self.run_dir}: {path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(fd, 32).decode(errors="replace").strip()
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks
                log.warning(
                    "%s cannot be locked (%s): do not start a second training there", self.run_dir, error.strerror
                )
                return False
            raise UserError(
                f"{self.run_dir} is in use by another training, process {holder or 'unknown'}: "
                "wait for it, stop it, or give another --run-dir"
            ) from None
        self._fd = fd
        with suppress(OSError):  # on a full disk the lock holds without the process id
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return True

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
