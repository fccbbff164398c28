"""The command `python -m gpt.evaluate RUN ...`: see gpt.evaluation.command."""

import sys

from gpt.command_line import parse_flags
from gpt.errors import run_command
from gpt.evaluation.command import Arguments, main

if __name__ == "__main__":
    run_command(lambda: main(parse_flags(Arguments, sys.argv[1:], prog="gpt.evaluate")))
