"""What measures: each module is a command, python -m benchmarks.<name>."""


def positive(word: str) -> int:
    """A whole number from 1 up, as an argparse type. ValueError for anything else."""
    if int(word) < 1:
        raise ValueError(word)
    return int(word)
