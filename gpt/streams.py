"""Handle standard output and error that are closed, full, or a pipe without a reader."""

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import IO, Any


class LostOutput(Exception):
    """A command's result cannot be written. The message says why."""


class Outlet:
    """A wrapper of a text stream, or of a closed one (None), that keeps the first write failure in `error`.

    After a failure it discards all output. is_needed: it also raises the failure, as BrokenPipeError if the reader
    closed the pipe, else as LostOutput.
    """

    def __init__(self, stream: IO[str] | None, *, is_needed: bool) -> None:
        self.is_closed, self.is_needed = stream is None, is_needed
        self.error: OSError | None = None
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        if hasattr(self._stream, "reconfigure"):
            # The C locale means ASCII, but the text is UTF-8. A path may contain bytes that are not text.
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
        """Raise LostOutput if the stream is closed and needed."""
        if self.is_closed and self.is_needed:
            raise LostOutput("standard output is closed")

    def _fail(self, error: OSError) -> None:
        self.error = error
        with contextlib.suppress(OSError, ValueError):  # Python flushes the buffer at exit
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
    """Wrap stdout, which is needed, and stderr, which is not, in Outlets; yields that of stdout.

    Opens closed descriptors to the null device, so that no file of the program gets their numbers.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number
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
    """Continue when stdout fails, because the command's result is in files."""
    if isinstance(sys.stdout, Outlet):
        sys.stdout.is_needed = False


def check_output() -> None:
    """Raise LostOutput if stdout is closed, before the command does any work."""
    if isinstance(sys.stdout, Outlet):
        sys.stdout.check()
