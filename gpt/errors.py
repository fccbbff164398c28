"""The one exception for what the user can put right, and how the commands end on it."""

import errno
import sys
from collections.abc import Callable

from gpt.streams import LostOutput, outlets

EXIT_DONE = 0
EXIT_FAULT = 1  # the program's own fault: a traceback
EXIT_USER = 2  # the user's input
EXIT_DIVERGED = 3  # training gave up: not finite
EXIT_STOPPED = 4  # stopped by a signal or a time limit, with everything saved


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A path that the user gave leads nowhere, and even asking whether it exists is refused.
NO_WAY = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


class UserError(ValueError):
    """Something the user gave is wrong. The message is one clear sentence: what is wrong, where, and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


class LostProcess(RuntimeError):
    """Another process of this job is gone, and this one cannot go on without it."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main and leave with its exit status.

    A UserError becomes one line on stderr and status 2, and so does a disk or a memory that is full, an output that
    cannot be written, or a path that the system refuses. A reader that goes away, as in `sample.py ... | head`, is not
    an error. A command that can do without its output ends as it would, with status 2 in the place of 0.
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
    """The exit status of a main, which what it raises decides."""
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
    """Say what the user can put right; the status for it."""
    print(f"error: {message}\n", end="", file=sys.stderr)  # one write: ranks share the terminal
    return EXIT_USER


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is the refusal of memory, by Python, by numpy, or by torch on a CPU or a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
