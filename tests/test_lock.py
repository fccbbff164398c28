"""One trainer per run directory."""

import os
import signal
import subprocess
import sys

import pytest

from gpt.errors import UserError
from gpt.lock import RunLock

HOLD = """
import sys
from pathlib import Path
from gpt.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_trainer_is_refused_until_the_first_ends_however_it_ends(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        with (
            RunLock(tmp_path) as lock,
            pytest.raises(UserError, match=rf"in use by another training, process {first.pid}:"),
        ):
            lock.take()
        first.send_signal(signal.SIGKILL)
    with RunLock(tmp_path) as lock:
        assert lock.take() is True
        assert lock.take() is False
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
        with RunLock(tmp_path) as other, pytest.raises(UserError, match=f"process {os.getpid()}"):
            other.take()
    with RunLock(tmp_path) as lock:
        assert lock.take() is True
