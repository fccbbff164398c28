"""A run directory is locked for one training process."""

import errno
import logging
import os
import signal
import subprocess
import sys

import pytest

from gpt.errors import UserError
from gpt.run import lock as module
from gpt.run.lock import RunLock

HOLD = """
import sys
from pathlib import Path
from gpt.run.lock import RunLock
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


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("text", ["", "\xff\n"], ids=["unnamed", "garbage"])
def test_a_lock_without_a_process_id_is_respected(tmp_path, text):
    """On a full disk the file has no process id, but the lock holds."""
    with RunLock(tmp_path) as lock:
        lock.take()
        (tmp_path / ".lock").write_bytes(text.encode("latin-1"))
        before = open_files()
        with pytest.raises(UserError, match=f"process {'unknown' if not text else chr(0xFFFD)}: wait for it"):
            RunLock(tmp_path).take()
        assert open_files() == before


def test_the_lock_names_its_last_holder(tmp_path):
    (tmp_path / ".lock").write_text("a much longer name than a number\n")
    with RunLock(tmp_path) as lock:
        lock.take()
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    before = open_files()
    with caplog.at_level(logging.WARNING), RunLock(tmp_path) as lock:
        assert lock.take() is False
    expected = f"{tmp_path} cannot be locked (No locks available): do not start a second training there"
    assert [record.getMessage() for record in caplog.records] == [expected]
    assert open_files() == before


def test_a_directory_that_cannot_be_locked_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"cannot use the run directory {tmp_path}/x: {tmp_path}/x/.lock: No such"):
        RunLock(tmp_path / "x").take()


def test_no_lock_without_a_directory_or_fcntl(tmp_path, monkeypatch):
    with RunLock(None) as lock:
        assert lock.take() is False
    monkeypatch.setattr(module, "fcntl", None)
    with RunLock(tmp_path) as lock:
        assert lock.take() is False
    assert not (tmp_path / ".lock").exists()


def test_a_lock_can_be_taken_again_after_its_block(tmp_path):
    before = open_files()
    lock = RunLock(tmp_path)
    for _ in range(2):
        with lock:
            assert lock.take() is True
        assert open_files() == before


def test_others_may_read_the_lock_and_not_write_it(tmp_path):
    before = os.umask(0)
    try:
        with RunLock(tmp_path) as lock:
            lock.take()
    finally:
        os.umask(before)
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o644
