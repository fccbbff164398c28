"""Full disks, read-only directories, and damaged or missing files."""

import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpt.errors import UserError, run_command
from gpt.run.checkpoint import list_checkpoints, verify
from gpt.run.lock import RunLock
from gpt.run.metrics import read_metrics
from gpt.training import saver as saver_module
from gpt.training.command import load_config
from gpt.training.monitor import Monitor
from tests.run_checks import FLAGS, NEWEST, OLDER, status_of
from train import main


def sentence(capsys) -> str:
    """Return the only line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@contextlib.contextmanager
def largest_file(size: int):
    """Limit all files to size bytes, like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def mounted(place: Path, options: str):
    """Mount a small tmpfs at place; skip the test if mounting is not permitted."""
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


# A full disk.


@pytest.mark.parametrize(
    ("size", "message"),
    [(1000, r"cannot write run/config\.toml: File too large"), (8_000, r"checkpoints/step_00000006: .*File too large")],
    ids=["at-the-config", "at-the-weights"],
)
def test_a_full_disk_ends_the_run_and_keeps_the_older_checkpoints(run, capsys, size, message):
    with largest_file(size):
        status = status_of("--resume", "--max-steps", "8")
    assert status == 2
    assert re.search(message, sentence(capsys))
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [NEWEST, OLDER]
    assert verify(run / "checkpoints" / NEWEST) is None
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    assert status_of("--resume", "--max-steps", "8") == 0
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "train_loss" in r] == [2, 4, 8]


def test_metrics_that_cannot_be_written_are_named(run, capsys):
    monitor = Monitor(load_config(FLAGS), start_step=4)
    with largest_file((run / "metrics.jsonl").stat().st_size + 5):
        for _ in range(2):  # a line that is cut short, and one that is not written at all
            with pytest.raises(UserError, match=r"cannot write run/metrics\.jsonl: (No space left|File too large)"):
                monitor.log({"step": 5})
    monitor.close()
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == [2, 2, 4, 4]


def test_a_small_disk_fills_up(run, capsys):
    """The checkpoints of steps 2 and 4 fit on the disk, that of step 6 does not."""
    held = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    (run.parent / "disk").mkdir()
    with mounted(run.parent / "disk", f"size={held + 60_000}"):
        shutil.copytree(run, "disk/run")
        assert status_of("--resume", "--max-steps", "30", "--run-dir", "disk/run") == 2
        assert "No space left on device" in sentence(capsys)
        checkpoints = list_checkpoints(Path("disk/run/checkpoints"))
        assert checkpoints and all(verify(path) is None for path in checkpoints)


def test_output_that_cannot_be_written_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: print("step 1"))
    assert stop.value.code == 2
    assert sentence(capsys) == "error: cannot write the output: No space left on device"


# Directories and files.


def test_a_directory_that_cannot_be_written(run, capsys):
    if os.geteuid():
        run.chmod(0o555)
        assert status_of("--resume", "--max-steps", "8") == 2
        run.chmod(0o755)
    else:  # root writes everywhere but on a disk that is mounted so
        shutil.move(run, "aside")
        run.mkdir()
        with mounted(run, "size=1m"):
            shutil.copytree("aside", run, dirs_exist_ok=True)
            subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
            assert status_of("--resume", "--max-steps", "8") == 2
    assert re.search(r"cannot use the run directory run: run/\.lock: (Read-only|Permission denied)", sentence(capsys))


def test_a_run_directory_below_a_file(run, capsys):
    assert status_of("--run-dir", "text.txt/run", "--max-steps", "1") == 2
    assert "cannot use the run directory text.txt/run: Not a directory" in sentence(capsys)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


DAMAGES = {"truncated": lambda p: os.truncate(p, p.stat().st_size // 2), "flipped": flip, "deleted": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.toml", "tokenizer.json"])
def test_a_damaged_file_of_the_run_is_named(run, capsys, name, damage):
    DAMAGES[damage](run / name)
    assert status_of("--resume", "--max-steps", "8") == 2
    assert f"run/{name}" in sentence(capsys)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [NEWEST, OLDER]


def test_a_manifest_without_its_files_is_skipped(run, capsys):
    for path in (run / "checkpoints" / NEWEST).glob("*[rs].safetensors"):
        path.unlink()
    assert status_of("--resume", "--max-steps", "2") == 0
    said = capsys.readouterr().out
    assert re.search(rf"passing over {NEWEST}: \S+\.safetensors cannot be read \(No such file", said)


def test_damaged_metrics_do_not_stop_a_resume(run, capsys):
    (run / "metrics.jsonl").write_bytes(b'{"step": 1, "train_loss": 3.5}\n\xff\xfe{"step": 2}\n[1]\n')
    assert status_of("--resume", "--max-steps", "6") == 0
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == [1, 6, 6]


def test_a_deleted_token_file_is_rebuilt(run, caplog):
    shards = list(Path("cache").rglob("train.tokens"))
    for shard in shards:
        shard.unlink()
    assert status_of("--resume", "--max-steps", "5") == 0
    assert "train.tokens" in caplog.text and any(shard.is_file() for shard in shards)


def test_a_deleted_corpus_is_named(run, capsys):
    Path("text.txt").unlink()
    assert status_of("--resume", "--max-steps", "5") == 2
    assert "the corpus text.txt does not exist" in sentence(capsys)


# Two at once, and interrupts.


def test_a_second_training_in_the_same_directory_is_refused(run, capsys):
    metrics = (run / "metrics.jsonl").read_bytes()
    with RunLock(run) as lock:
        lock.take()
        for words in (["--resume"], ["--overwrite"], []):
            assert status_of(*words) == 2
            assert f"run is in use by another training, process {os.getpid()}" in sentence(capsys)
        assert status_of("--eval-only") == 0  # reading is free
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_concurrently_started_training_is_not_overwritten(run, capsys, monkeypatch):
    """Both found the directory free; the other run finished before this one writes."""
    shutil.move(run, "aside")
    take = RunLock.take

    def later(lock):
        shutil.copytree("aside", run, dirs_exist_ok=True)
        return take(lock)

    monkeypatch.setattr(RunLock, "take", later)
    assert status_of("--max-steps", "1") == 2
    assert "another training has started in run" in sentence(capsys)
    assert verify(run / "checkpoints" / NEWEST) is None


def test_ctrl_c_during_a_save_does_not_break_it(run, capsys, monkeypatch):
    """The interrupt comes while the thread writes step 6; main waits for it."""
    begun, store = threading.Event(), saver_module.store

    def slow(*arguments, **options):
        begun.set()
        assert interrupted.wait(60)
        store(*arguments, **options)

    def interrupt(device, seed, steps, rank):
        if steps == 6:
            assert begun.wait(60)
            interrupted.set()
            raise KeyboardInterrupt

    interrupted = threading.Event()
    monkeypatch.setattr(saver_module, "store", slow)
    with monkeypatch.context() as patch:
        patch.setattr("gpt.training.step.seed_generators", interrupt)  # at the beginning of each step
        with pytest.raises(KeyboardInterrupt):
            main(load_config([*FLAGS, "--resume", "--max-steps", "9"]))
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_00000006", NEWEST]
    assert verify(run / "checkpoints/step_00000006") is None
