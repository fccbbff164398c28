"""Folders of the cache: where they are, who may use them, and when they go."""

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt.data import cache
from gpt.data.cache import JOURNAL, MARK, WRITTEN, cache_folder, publish, unfinished, writing
from gpt.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stopped_by(block, error: BaseException, journal: bool = False) -> list[str]:
    """What a block of the cache leaves behind that ends with an error."""

    def run() -> None:
        nonlocal folder
        with block as work:
            folder = work.parent
            (work / "content").touch()
            if journal:
                (work / JOURNAL).write_text("half")
            raise error

    folder = Path()
    with pytest.raises(type(error)):
        run()
    return names(folder)


def test_the_cache_folder_is_given_or_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(Path("~/kept")) == tmp_path / "home" / "kept"
    assert cache_folder(Path("kept")) == Path.cwd() / "kept"
    assert cache_folder(None) == tmp_path / "xdg" / "gpt-on-triton"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # ignored, as its specification asks
    assert cache_folder(None) == tmp_path / "home" / ".cache" / "gpt-on-triton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == tmp_path / "home" / ".cache" / "gpt-on-triton"


def test_without_a_home_a_cache_folder_is_required(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match=r"no home folder .*--cache-dir"):
        cache_folder(None)


def test_a_published_folder_is_whole_or_absent(tmp_path):
    assert stopped_by(publish(tmp_path / "made"), ZeroDivisionError()) == []
    with publish(tmp_path / "made") as work:
        (work / "whole").touch()
        (work / JOURNAL).touch()
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["whole"]
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o755  # for all users of a shared cache


def test_a_folder_that_another_process_published_first_stays(tmp_path):
    with publish(tmp_path / "made") as work:
        (work / "content").touch()
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "first").touch()
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["first"]


def test_a_file_with_the_folders_name_is_an_error_that_names_the_cache(tmp_path):
    with pytest.raises(UserError, match=f"cannot write to the cache folder {tmp_path} "), publish(tmp_path / "made"):
        (tmp_path / "made").touch()


def refused(cause: Exception) -> UserError:
    error = UserError("refused")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "journal", "name", "stays"),
    [
        (KeyboardInterrupt(), True, "corpus", True),
        (KeyboardInterrupt(), True, None, False),  # nothing would find it again
        (KeyboardInterrupt(), False, "corpus", False),  # nothing of it is finished
        (refused(OSError(28, "No space left on device")), True, "corpus", True),
        (refused(ValueError("bad text")), True, "corpus", False),
        (ZeroDivisionError(), True, "corpus", False),
    ],
    ids=["interrupted", "without-name", "without-journal", "full-disk", "bad-text", "fault"],
)
def test_resumable_work_is_kept(tmp_path, error, journal, name, stays):
    assert stopped_by(unfinished(tmp_path, name), error, journal) == ([".resume-corpus"] if stays else [])
    with unfinished(tmp_path, "corpus") as work:
        assert (work / JOURNAL).exists() == stays
    assert names(tmp_path) == []


def test_a_published_folder_resumes_only_if_asked_to(tmp_path):
    stopped_by(unfinished(tmp_path, "made"), KeyboardInterrupt(), True)
    with publish(tmp_path / "made") as work:
        assert not (work / JOURNAL).exists()
    shutil.rmtree(tmp_path / "made")
    with publish(tmp_path / "made", resume=True) as work:
        assert (work / JOURNAL).exists()


def test_two_processes_never_share_a_folder(tmp_path):
    with unfinished(tmp_path, "corpus") as first, unfinished(tmp_path, "corpus") as second:
        assert first.name == ".resume-corpus"
        assert second.name.startswith(".writing-")
    with unfinished(tmp_path, "corpus") as first:
        assert first.name == ".resume-corpus"


def test_a_folder_removed_meanwhile_is_not_resumed(tmp_path, monkeypatch):
    """The holder finishes between this process's open and its lock: the lock is then on a folder without a name."""
    real = cache.fcntl.flock

    def finished_by_then(lock, how):
        shutil.rmtree(tmp_path / ".resume-corpus")
        (tmp_path / ".resume-corpus").mkdir()  # a third process has begun
        real(lock, how)

    monkeypatch.setattr(cache.fcntl, "flock", finished_by_then)
    with unfinished(tmp_path, "corpus") as work:
        assert work.name.startswith(".writing-")


def test_without_locks_nothing_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "fcntl", None)
    with unfinished(tmp_path, "corpus") as work:
        assert work.name.startswith(".writing-")
    assert names(tmp_path) == []


def test_locks_of_the_cache_are_freed(tmp_path):
    open_files = lambda: len(os.listdir("/proc/self/fd"))
    before = open_files()
    for _ in range(3):
        with unfinished(tmp_path, "corpus"), unfinished(tmp_path, "corpus"):
            pass
    assert open_files() == before


@pytest.mark.parametrize(("name", "days"), [(".writing-x", 1), (".resume-x", 30)])
def test_leftovers_are_deleted_after_a_day_or_a_month(tmp_path, monkeypatch, name, days):
    left = tmp_path / name
    left.mkdir()
    for file in WRITTEN:
        (left / file).touch()
    left_at = left.stat().st_mtime
    for age, stays in ((days * 86_400, True), (days * 86_400 + 1, False)):
        monkeypatch.setattr(time, "time", lambda age=age: left_at + age)
        with unfinished(tmp_path):
            assert left.exists() == stays


# What the cache did not write.


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: a file's bytes, None for a folder or a link that leads nowhere."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


@pytest.mark.parametrize("name", [".writing-notes", ".resume-corpus"])
@pytest.mark.parametrize(
    "files",
    [["notes.txt"], ["content"], [MARK, "content", "notes.txt"], [MARK, "train.tokens/1.txt"]],
    ids=["a-note", "no-mark", "a-note-beside-the-mark", "a-folder"],
)
def test_an_old_folder_with_a_user_file_stays(tmp_path, monkeypatch, name, files):
    """Whoever names a folder of theirs as the cache must not lose what has a leftover's name."""
    for file in files:
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_text("mine")
    before = contents(tmp_path)
    monkeypatch.setattr(time, "time", lambda: (tmp_path / name).stat().st_mtime + 1e9)
    with unfinished(tmp_path, "corpus") as work:
        (work / "content").write_text("the cache's")
        assert work != tmp_path / name
    assert contents(tmp_path) == before


def test_a_link_named_like_a_leftover_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    for file in WRITTEN:
        (tmp_path / "mine" / file).write_text("mine")
    (tmp_path / "cache").mkdir()
    for name in (".writing-x", ".resume-corpus"):
        (tmp_path / "cache" / name).symlink_to(tmp_path / "mine")
    before = contents(tmp_path)
    monkeypatch.setattr(time, "time", lambda: (tmp_path / "mine").stat().st_mtime + 1e9)
    with unfinished(tmp_path / "cache", "corpus"):
        pass
    assert contents(tmp_path) == before


def test_a_user_file_added_during_writing_stays(tmp_path):
    with unfinished(tmp_path, "corpus") as work:
        for name in (*WRITTEN, "notes.txt"):
            (work / name).write_text("some")
    assert contents(tmp_path) == {".resume-corpus": None, ".resume-corpus/notes.txt": b"some"}


def test_a_leftover_that_cannot_be_deleted_is_ignored(tmp_path, monkeypatch):
    (tmp_path / ".writing-x").mkdir()
    monkeypatch.setattr(time, "time", lambda: (tmp_path / ".writing-x").stat().st_mtime + 100_000)
    monkeypatch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with unfinished(tmp_path):
        pass


def test_a_failed_write_names_the_cache(tmp_path):
    (tmp_path / "file").touch()
    expected = rf"cannot write to the cache folder {tmp_path}/file \(File exists\): give another with --cache-dir"
    with pytest.raises(UserError, match=expected), writing(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match=r"\(no number\)"), writing(tmp_path / "a" / "b"):
        raise OSError("no number")
    with pytest.raises(BrokenPipeError), writing(tmp_path / "a" / "b"):
        raise BrokenPipeError  # of the terminal, not of the cache


def test_a_child_process_does_not_hold_the_lock(tmp_path):
    """The lock goes with the process that took it, whatever it started meanwhile."""
    with unfinished(tmp_path, "corpus"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        with unfinished(tmp_path, "corpus") as work:
            assert work.name == ".resume-corpus"
    finally:
        child.communicate()
