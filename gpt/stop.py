"""Stop a command early: on a signal, or at its time limit."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

_IMPORTED = time.monotonic()


def process_seconds() -> float:
    """Return the seconds since this process started, or since this module was imported if the system does not say."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, AttributeError, IndexError):
        return time.monotonic() - _IMPORTED


class Stopped(KeyboardInterrupt):
    """The command was stopped while it had nothing to save. The message names the cause."""


class StopRequest:
    """Notes a SIGINT, a SIGTERM or a time limit, so that a command can stop in order. A second SIGINT ends the process.

    A second SIGTERM does not: torchrun sends it again to each process of a job that was told to stop.

    max_minutes: since the process started; 0 sets no limit. `reason` tells why to stop; within at_once() a stop is
    raised. The end of a `with` block restores the earlier signal handlers.
    """

    def __init__(self, max_minutes: float = 0.0) -> None:
        self.signal: int | None = None
        self.max_minutes = max_minutes
        self._raises = False
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    @property
    def reason(self) -> str | None:
        """Why this process should stop; None while it should not."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if 0 < self.max_minutes <= process_seconds() / 60:
            return f"its limit of {self.max_minutes:g} minutes"
        return None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Stopped in the main thread, wherever it is, if a stop comes within the block.

        A time limit already exceeded before the block is not raised: a started run takes at least one step.
        """
        if self.signal is not None:
            raise Stopped(self.reason)
        self._raises = True
        alarm = self._alarm()
        try:
            yield
        finally:
            self._raises = False
            if alarm is not None:
                alarm.cancel()

    def _alarm(self) -> threading.Timer | None:
        """Start a timer that signals the main thread at the time limit."""
        left = 60 * self.max_minutes - process_seconds()
        if left <= 0:  # also without a limit
            return None

        def wake() -> None:
            if self.reason is not None:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

        alarm = threading.Timer(left + 0.01, wake)
        alarm.daemon = True
        alarm.start()
        return alarm

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.reason is None:  # otherwise it is the alarm, or torchrun's second SIGTERM
            self.signal = number
        if self._raises:
            self._raises = False  # only once, so that cleanup is not interrupted
            raise Stopped(self.reason)

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def aside(work: Callable[[], T]) -> T:
    """Run work() in another thread, so that signals are handled during a long library call; return or raise its result.

    If a signal raises in this thread, the other continues but does not delay the end of the process.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="aside").start()
    return future.result()
