"""--help of every command wraps paragraphs at the terminal's width only."""

import functools
import io
import itertools
import re

import pytest

from gpt.command_line import parse_flags
from gpt.training.command import load_config
from tests.test_options_commands import PROGRAMS

COMMANDS = {"train": load_config} | {
    name: functools.partial(parse_flags, kinds[0], prog=name) for name, (_, _, kinds) in PROGRAMS.items()
}


def shown(command: str, width: int, monkeypatch) -> list[str]:
    """Return the lines after the usage."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout", out)
    with pytest.raises(SystemExit) as stop:
        COMMANDS[command](["--help"])
    out.flush()
    text = re.sub("\x1b\\[[0-9;]*m", "", out.buffer.getvalue().decode())
    assert stop.value.code == 0
    return text.splitlines()[1:]


def boxes(lines: list[str]) -> list[list[str]]:
    """Return the text in the boxes, column by column; an empty line for each edge."""
    top = next(line for line in lines if line.startswith("╭"))
    spans = [found.span() for found in re.finditer("╭.*?╮", top)]
    return [[line[start + 2 : end - 2] * line[start:].startswith("│") for line in lines] for start, end in spans]


def broken(lines: list[str]) -> list[str]:
    """List lines that have room for the first word of the next line of the same paragraph."""
    found = []
    for line, after in itertools.pairwise(lines):
        text = after.strip()
        indent = len(after) - len(after.lstrip())
        is_paragraph = indent > 0 or not (text.startswith(("-", "─")) or "  " in text)  # else an option or a rule
        begins = line[:indent].strip() == "" or line[:indent].endswith("  ")
        if text and is_paragraph and begins and line[indent : indent + 1].strip("─ "):
            word = text.split()[0]
            if len(line.rstrip()) + 1 + len(word) <= len(line):
                found.append(f"{line.strip()} | {word}")
    return found


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_wrapped_at_the_terminals_width_only(command, width, monkeypatch):
    about, *lines = [line for line in shown(command, width, monkeypatch) if line]
    assert lines[0].startswith("╭"), "the description is one line, which the terminal wraps"
    assert about[0].isupper() and about.endswith(".") and max(map(len, lines)) <= width
    columns = boxes(lines)
    assert sum(line.startswith("-") for column in columns for line in column) > 2
    assert not [line for column in columns for line in broken(column)]


def test_a_line_break_of_the_source_is_found():
    assert broken(["-x  one two   ", "    three     "]) == []
    assert broken(["-x  one       ", "    two three "]) == ["-x  one | two"]
    assert broken(["    one       ", "    two three "]) == ["one | two"]
    assert broken(["--long-flag X ", "    one two   "]) == []
