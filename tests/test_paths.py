"""Paths of any bytes in every option that takes a path, in any locale; links, obstructing folders, empty values."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.config import Config
from gpt.config_file import TABLES
from gpt.errors import UserError
from gpt.option import options_of
from gpt.training.command import Arguments, load_config
from tests.commands import MAINS
from tests.test_options_commands import PROGRAMS, argv_of

ROOT = Path(__file__).parents[1]
# A space, a byte that is not UTF-8, a letter that is, a line end, what globs, URLs and formats read, and a dash.
ODD = b" a\xff\xc3\xa4\n[b]*?%20{c}'\"$-"
UTF8, ASCII = {"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def outcomes(place: bytes, environment: dict[str, str]) -> list[dict]:
    command = [sys.executable, "-m", "tests.odd_paths", place]
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    settings = plain | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, capture_output=True, cwd=os.path.dirname(place), env=settings, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return list(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize(("first", "second"), [(UTF8, ASCII), (ASCII, {"LC_ALL": "C"})], ids=["utf8", "ascii"])
def test_a_path_is_used_or_refused_in_one_sentence(tmp_path, first, second):
    """Files written in one locale are read in another."""
    place = os.fsencode(tmp_path) + b"/" + ODD
    found = outcomes(place, first)
    assert len(found) > 50
    for record in found + outcomes(place, second):
        assert record["status"] == record["expected"] and "Traceback" not in record["said"], record
        if record["expected"] == 2:
            *_, last = said = record["said"].splitlines()
            assert [line for line in said if line.startswith("error: ")] == [last], record
    assert os.listdir(os.fsencode(tmp_path)) == [ODD], "nothing goes to a path of another spelling"


# Empty values: pathlib takes "" for the working directory.

TRAIN = options_of(Arguments)
# Of each program: its options that take a value, the words before one, and what reads the words.
READERS = {"train": (TRAIN, ["--corpus", "text.txt"], (), load_config)}
READERS |= {
    name: (options_of(kinds[0]), argv_of(name, {}), positional, MAINS[name])
    for name, (positional, _, kinds) in PROGRAMS.items()
}


def taking_values(options: dict, positional: tuple) -> list[str]:
    skipped = {*positional, "config_file"}
    return [n for n, o in options.items() if o.kind is not bool and not o.rules.may_be_empty and n not in skipped]


@pytest.mark.parametrize("program", READERS)
def test_an_empty_value_is_refused_for_every_option_that_takes_one(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, words, positional, main = READERS[program]
    names = taking_values(options, positional)
    assert len(names) > (40 if program == "train" else 0)
    for name in names:
        flag = "--" + name.replace("_", "-")
        for given in ([flag, ""], [flag, " \t\n"], [f"{flag}="], [f"{flag}= "], [f"--{name}="]):
            with pytest.raises(UserError, match=f"{given[0].rstrip('= ')} is empty: give it a value, or leave it out"):
                main([*words, *given])
    for place in range(max(1, len(positional))):
        for empty in ("", " "):
            with pytest.raises(UserError, match="an argument is empty: give it a value, or leave it out"):
                main([*words[:place], empty, *words[place + 1 :]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name, option in options_of(Config).items() if option.is_path])
@pytest.mark.parametrize("empty", ["", " ", "\t"], ids=repr)
def test_an_empty_path_in_a_file_is_refused(name, empty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = next(table for table, kind in TABLES.items() if name in kind.__dataclass_fields__)
    Path("recipe.toml").write_text(f"[{table}]\n{name} = {json.dumps(empty)}\n")
    with pytest.raises(UserError, match=f"recipe.toml: {name} is empty: give a path, or leave it out"):
        load_config(["recipe.toml"])
