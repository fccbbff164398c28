"""A killed training loses nothing: ten kills here, any number with python -m tests.crash."""

import re
import subprocess
import sys
from pathlib import Path


def test_a_killed_training_resumes_and_equals_an_uninterrupted_one():
    command = [sys.executable, "-m", "tests.crash", "--kills", "10", "--seed", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "10 of 10 kills resumed" in done.stdout
    assert re.search(r"; [1-9]\d* runs? ended bit for bit", done.stdout)
