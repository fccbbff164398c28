"""Standard input, output and error that are closed, full, or a pipe without a reader: every command."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.errors import run_command
from gpt.streams import LostOutput, Outlet, do_without_output
from tests.descriptors import CASES, pairs

ROOT = Path(__file__).parents[1]
# Commands whose result is what they print.
PRINTING = {"train --dry-run", "train --help", "sample", "sample --jsonl", "evaluate", "inspect"}
FULL, CLOSED = (
    f"error: cannot write the output: {why}\n" for why in ("No space left on device", "standard output is closed")
)


@pytest.fixture(scope="module")
def outcomes(tiny_run, tmp_path_factory) -> dict[tuple[str, str], dict]:
    words = [tiny_run, tiny_run.parent / "text.txt", tmp_path_factory.mktemp("cases")]
    command = [sys.executable, "-m", "tests.descriptors", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = map(json.loads, done.stdout.splitlines())
    return {(outcome["command"], outcome["case"]): outcome for outcome in found}


def expected(command: str, case: str) -> tuple[int, str]:
    """Status, and the end of stderr where that can be read."""
    if command == "sample, refused":
        return 2, "error: temperature must be at least 0, not -1.0\n"
    if command == "sample --prompt -" and CASES[case][0] is None:
        return 2, "error: standard input is closed: no prompt can be read from it\n"
    prints = command in PRINTING or command == "sample --prompt -"
    if "stdout closed" in case or case in ("both closed", "all closed"):
        return (2, CLOSED) if prints else (0, "")
    if case.startswith(("stdout full", "both full")):
        return (0, "") if command == "sample --output" else (2, FULL)
    return 0, ""


@pytest.mark.parametrize(("command", "case"), pairs(), ids=lambda word: word.replace(" ", "-"))
def test_no_traceback_and_a_sensible_status(outcomes, command, case):
    outcome = outcomes[command, case]
    status, errors = expected(command, case)
    # Which of the two it says does not matter where both hold.
    if command == "sample --prompt -" and case == "all closed":
        errors = ""
    assert outcome["traceback"] == "" and "Traceback" not in outcome["err"]
    assert outcome["status"] == status
    if CASES[case][2] == "err":
        assert outcome["err"].endswith(errors)
        assert (outcome["err"].count("error: ") == 1) == bool(errors)
    if command == "train":
        run = {name for name in outcome["written"] if name.startswith("run/")}
        assert run == {name for name in outcomes[command, "all open"]["written"] if name.startswith("run/")}
        assert "run/checkpoints/step_00000001/manifest.json" in run
    if command == "export":
        assert "exported/model.safetensors" in outcome["written"]
    if command == "sample --output":
        assert "out.jsonl" in outcome["written"] and outcome["out"] == ""
    if CASES[case][1] == "out" and command in PRINTING:
        assert outcome["out"]


def test_a_process_without_any_descriptor(tiny_run, tmp_path):
    """As `sample.py RUN --output FILE <&- >&- 2>&-` begins it."""
    command = [sys.executable, "sample.py", str(tiny_run), "--output", str(tmp_path / "out"), "--max-new-tokens", "3"]
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert len(json.loads((tmp_path / "out").read_text())["tokens"]) == 3


def test_a_process_whose_output_is_full(tiny_run):
    command = [sys.executable, "-m", "gpt.corpus", "inspect", str(tiny_run)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, FULL)


def test_no_file_gets_the_number_of_a_closed_descriptor():
    script = "import os, sys; from gpt.streams import outlets\n"
    script += "with outlets():\n    sys.exit(0 if os.open(os.devnull, os.O_RDONLY) > 2 else 1)"
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", script], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_the_streams_are_restored(capsys):
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: print("x"))
    assert stop.value.code == 0 and (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "x\n"


def test_an_outlet_keeps_the_first_failure():
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    outlet = Outlet(stream, is_needed=False)
    assert outlet.write("a") == 1
    outlet.flush()
    assert isinstance(outlet.error, BrokenPipeError)
    assert outlet.write("abc") == 3
    stream.close()


def test_a_command_whose_result_is_in_files_goes_on_when_its_output_fails(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdout", Outlet(Full(), is_needed=True))
    do_without_output()
    print("a line")
    assert sys.stdout.error.errno == 28
    monkeypatch.setattr("sys.stdout", Outlet(Full(), is_needed=True))
    with pytest.raises(LostOutput, match="No space left on device"):
        print("a line")
