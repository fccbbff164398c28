"""Forty mutated inputs; any number with python -m tests.fuzz_inputs."""

import subprocess
import sys
from pathlib import Path


def test_mutated_inputs_are_refused_in_one_sentence_or_harmless():
    command = [sys.executable, "-m", "tests.fuzz_inputs", "--cases", "40", "--seed", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 of 40 cases passed" in done.stdout
