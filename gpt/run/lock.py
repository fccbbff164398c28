"""One trainer per run directory: a lock that the system takes back when its process ends, however it ends."""

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
    """RUN/.lock, held by flock from take() to the end of the `with` block; it names the process that holds it.

    The directory must exist; the file stays when the lock goes. run_dir None: nothing is locked,
    as on the ranks that write nothing.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self.run_dir = run_dir
        self._fd: int | None = None

    def take(self) -> bool:
        """Lock; whether it was free to be taken, and not this object's already.

        UserError where another process holds it, or nothing can be written.
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
                log.warning("%s cannot be locked (%s): start no second training there", self.run_dir, error.strerror)
                return False
            raise UserError(
                f"{self.run_dir} is in use by another training, process {holder or 'unknown'}: "
                "wait for it, stop it, or give another --run-dir"
            ) from None
        self._fd = fd
        with suppress(OSError):  # a full disk: the lock holds without its name
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return True

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
