"""Paths of any bytes, in any locale, in every option that takes one; links, dangling links, and folders in the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A space, a byte that is no UTF-8, a letter that is, a line end, what globs, URLs and formats read, and a dash.
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
    """And what was written in one locale is read in another."""
    place = os.fsencode(tmp_path) + b"/" + ODD
    found = outcomes(place, first)
    assert len(found) > 50
    for record in found + outcomes(place, second):
        assert record["status"] == record["expected"] and "Traceback" not in record["said"], record
        if record["expected"] == 2:
            *_, last = said = record["said"].splitlines()
            assert [line for line in said if line.startswith("error: ")] == [last], record
    assert os.listdir(os.fsencode(tmp_path)) == [ODD], "nothing goes to a path of another spelling"
