"""Generate text from a trained run: python sample.py RUN [--prompt TEXT] [--name value ...]"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from gpt.command_line import parse_flags
from gpt.errors import EXIT_DONE, EXIT_STOPPED, run_command
from gpt.generate import SamplingConfig, generate
from gpt.run import load


@dataclass(frozen=True)
class Arguments:
    """Continue a prompt with a trained run, streaming to the terminal as tokens come."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    prompt: str = ""
    """Text to continue. Empty: start as a document does."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def main(arguments: Arguments) -> int:
    """Print the prompt and its continuation. Returns the exit status."""
    model, tokenizer = load(arguments.run, arguments.device)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    pieces = generate(model, tokenizer, [arguments.prompt], arguments.sampling)
    try:
        sys.stdout.write(arguments.prompt)
        for piece in pieces:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print()
        return EXIT_STOPPED
    print()
    return EXIT_DONE


if __name__ == "__main__":
    run_command(lambda: main(parse_flags(Arguments, sys.argv[1:], prog="sample.py")))
