"""When a command should end before its work is done: on a signal, or at its time limit."""

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
    """Wall seconds since this process began; where the system does not tell, since this module was imported."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, AttributeError, IndexError):
        return time.monotonic() - _IMPORTED


class Stopped(KeyboardInterrupt):
    """A stop was asked for while there was nothing to save. The message is what asked for it."""


class StopRequest:
    """Why a command should end: a SIGINT or SIGTERM, or a time limit. A SIGINT after that ends the process.

    A SIGTERM after that does not: where a whole job is told to end, torchrun tells each process again.

    max_minutes: since the process began; 0 sets no limit. A stop is noted, for `reason` to tell, and within at_once()
    raised. close(), or the end of a `with` block, gives the signals back to who had them before.
    """

    def __init__(self, max_minutes: float = 0.0) -> None:
        self.signal: int | None = None
        self.max_minutes = max_minutes
        self._raises = False
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    @property
    def reason(self) -> str | None:
        """What stops this process; None while nothing does."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if 0 < self.max_minutes <= process_seconds() / 60:
            return f"its limit of {self.max_minutes:g} minutes"
        return None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block a stop is raised as Stopped, wherever the main thread is.

        A time limit is if it ends within the block. One that is over already leaves a quick start its first step.
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
        """Wakes the main thread when the time limit is reached."""
        left = 60 * self.max_minutes - process_seconds()
        if left <= 0:  # also where no limit is set
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
        if self.reason is None:  # else the alarm, or torchrun's second SIGTERM
            self.signal = number
        if self._raises:
            self._raises = False  # once: what cleans up is left alone
            raise Stopped(self.reason)

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def aside(work: Callable[[], T]) -> T:
    """What work() returns or raises, done in another thread, so that signals are heard in a long call into a library.

    If one raises in this thread, the other is left alone; it does not hold up the end of the process.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="aside").start()
    return future.result()
