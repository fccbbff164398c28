"""A fixed number of mutated inputs; as many as one likes by python -m tests.fuzz_inputs."""

import subprocess
import sys
from pathlib import Path


def test_mutated_inputs_end_in_a_sentence_or_are_harmless():
    command = [sys.executable, "-m", "tests.fuzz_inputs", "--cases", "40", "--seed", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 of 40 cases passed" in done.stdout
