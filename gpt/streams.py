"""Standard output and error that may be closed, full, or a pipe without a reader."""

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import IO, Any


class LostOutput(Exception):
    """A command's result has nowhere to go. The message says why."""


class Outlet:
    """A text stream in front of another, or of none, whose first failure is kept in `error` and the last one there is.

    From then on it writes to nowhere. is_needed: a failure is also raised, as BrokenPipeError where the reader went
    away and as LostOutput otherwise.
    """

    def __init__(self, stream: IO[str] | None, *, is_needed: bool) -> None:
        self.is_closed, self.is_needed = stream is None, is_needed
        self.error: OSError | None = None
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        if hasattr(self._stream, "reconfigure"):
            # The C locale says ASCII where it knows nothing else. A path may hold bytes that are not text.
            is_ascii = codecs.lookup(self._stream.encoding).name == "ascii"
            encoding = "utf-8" if is_ascii and "PYTHONIOENCODING" not in os.environ else None
            self._stream.reconfigure(encoding=encoding or self._stream.encoding, errors="backslashreplace")

    def write(self, text: str) -> int:
        if self.error is None:
            self.check()
            try:
                return self._stream.write(text)
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def check(self) -> None:
        """Raise LostOutput where nothing that is written can be seen."""
        if self.is_closed and self.is_needed:
            raise LostOutput("standard output is closed")

    def _fail(self, error: OSError) -> None:
        self.error = error
        with contextlib.suppress(OSError, ValueError):  # what its buffer holds must go somewhere when Python ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self.is_needed and error.errno == errno.EPIPE:
            raise error
        if self.is_needed:
            raise LostOutput(error.strerror or str(error))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outlets() -> Iterator[Outlet]:
    """Put Outlets in the place of stdout, which is needed, and stderr, which is not; yields that of stdout.

    Closed descriptors are opened to nowhere, so that no file of the program's gets their numbers.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    before = sys.stdout, sys.stderr
    out, err = Outlet(sys.stdout, is_needed=True), Outlet(sys.stderr, is_needed=False)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        if out.error is None and not out.is_closed:
            sys.stdout = before[0]
        if err.error is None and not err.is_closed:
            sys.stderr = before[1]


def do_without_output() -> None:
    """Go on when stdout fails: the command's result is in files."""
    if isinstance(sys.stdout, Outlet):
        sys.stdout.is_needed = False


def check_output() -> None:
    """Raise LostOutput where stdout is closed, before any work is done for it."""
    if isinstance(sys.stdout, Outlet):
        sys.stdout.check()
