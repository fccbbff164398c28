"""UserError, exit statuses, and how commands end."""

import errno
import sys
from collections.abc import Callable

from gpt.streams import LostOutput, outlets

EXIT_DONE = 0
EXIT_FAULT = 1  # a bug (with a traceback), or a lost process
EXIT_USER = 2  # wrong input
EXIT_DIVERGED = 3  # training gave up: loss, gradient or weights were not finite
EXIT_STOPPED = 4  # stopped by a signal or a time limit, everything is saved

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The system refuses even to say whether a path exists.
NO_WAY = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


class UserError(ValueError):
    """The user's input is wrong. The message is one sentence: what is wrong, where, and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


class LostProcess(RuntimeError):
    """Another process of this job ended, and this one cannot continue without it."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main function and exit with its status.

    A UserError becomes one line on stderr and status 2; so do a full disk, a lack of memory, unwritable output and a
    path that the system refuses. A reader that closes the pipe, as in `sample.py ... | head`, is not an error. Without
    its output, a command that does not need it runs to its end, with status 2 instead of 0.
    """
    with outlets() as out:
        try:
            status = _status_of(main)
        except SystemExit as stop:  # after --help
            status = stop.code if isinstance(stop.code, int) else EXIT_DONE
        out.is_needed = False
        out.flush()
        if out.error is not None and out.error.errno != errno.EPIPE and not status:
            status = _refuse(f"cannot write the output: {out.error.strerror}")
        sys.stderr.flush()
    sys.exit(status or EXIT_DONE)


def _status_of(main: Callable[[], int | None]) -> int | None:
    """Return the exit status of main, also for what it raises."""
    try:
        return main()
    except UserError as error:
        return _refuse(" ".join(str(error).splitlines()))
    except LostOutput as error:
        return _refuse(f"cannot write the output: {error}")
    except LostProcess as error:
        _refuse(str(error))
        return EXIT_FAULT
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:
        return EXIT_DONE
    except OSError as error:
        if error.errno not in NO_ROOM and not (error.errno in NO_WAY and error.filename):
            raise
        verb = "write" if error.errno in NO_ROOM else "use"
        return _refuse(f"cannot {verb} {error.filename or 'the output'}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _refuse("out of memory: lower --batch-size, --seq-len or the model's size")


def _refuse(message: str) -> int:
    """Print an error for the user; return its exit status."""
    print(f"error: {message}\n", end="", file=sys.stderr)  # a single write, since ranks share the terminal
    return EXIT_USER


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of Python, numpy or torch means that memory ran out."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
