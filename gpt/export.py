"""The command `python -m gpt.export RUN DIR`: see gpt.interop.export."""

import sys

from gpt.command_line import parse_flags
from gpt.errors import run_command
from gpt.interop.export import Arguments, main

if __name__ == "__main__":
    run_command(lambda: main(parse_flags(Arguments, sys.argv[1:], prog="gpt.export")))
