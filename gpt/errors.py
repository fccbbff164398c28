"""The one exception for what the user can put right, and how the commands end on it."""

import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_FAULT = 1  # the program's own fault: a traceback
EXIT_USER = 2  # the user's input
EXIT_DIVERGED = 3  # training gave up: not finite
EXIT_STOPPED = 4  # stopped by a signal or a time limit, with everything saved


class UserError(ValueError):
    """Something the user gave is wrong. The message is one clear sentence: what is wrong, where, and what to do."""


class LostProcess(RuntimeError):
    """Another process of this job is gone, and this one cannot go on without it."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main and leave with its exit status; a UserError becomes one line on stderr and status 2."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_USER
    except LostProcess as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_FAULT
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = EXIT_STOPPED
    except BrokenPipeError:  # the reader of our output went away, as in `sample.py ... | head`
        sys.stderr.close()
        status = EXIT_DONE
    sys.exit(status or EXIT_DONE)
