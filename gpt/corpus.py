"""The command `python -m gpt.corpus inspect PATH`: see gpt.data.inspect."""

import sys

from gpt.data.inspect import main
from gpt.errors import run_command

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
