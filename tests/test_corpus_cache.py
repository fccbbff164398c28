"""The cache of tokenized corpora: when it is used, made again, cleared away, or refused."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt import corpus as module
from gpt import sources
from gpt.config import DataConfig, TokenizerConfig
from gpt.corpus import cache_folder, prepare
from gpt.errors import UserError
from gpt.shards import ShardWriter
from gpt.tokenizer import ByteTokenizer
from tests.corpus_checks import POEM, folder_of, sides, write


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_second_run_opens_what_the_first_made(tmp_path, make, kind, monkeypatch):
    path = write(tmp_path / "poem.txt", POEM)
    first = make(path, kind)
    monkeypatch.setattr(module, "_write", None)
    second = make(path, kind)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    same = ("directory", "train_tokens", "val_tokens", "train_bytes", "val_bytes", "documents", "sources", "digest")
    assert [getattr(second, name) for name in same] == [getattr(first, name) for name in same]
    moved = write(tmp_path / "elsewhere" / "copy.txt", POEM)  # by content, not by name
    assert make(moved, kind).directory == first.directory
    assert make(moved, kind).sources[0][0] == str(moved)


def test_whatever_decides_the_tokens_is_in_the_key(tmp_path, make):
    path = write(tmp_path / "poem.txt", POEM)
    folder = folder_of(tmp_path / "texts", 5)
    several = (folder, path)
    corpora = [
        make(path),
        make(path, "byte"),
        make(path, "bpe"),
        make(path, "bpe", size=301),
        make(path, val_fraction=0.2),
        make(path, encoding_errors="replace"),
        make(path, max_corpus_bytes=100),
        make(path, "bpe", fixed=ByteTokenizer()),
        make(several),
        make(several, split_seed=1),
        make(write(tmp_path / "other.txt", POEM + "!")),
    ]
    assert len({corpus.directory for corpus in corpora}) == len(corpora)
    assert make(path, size=301).directory == corpora[0].directory  # no matter to a character tokenizer
    assert make(path, split_seed=1).directory == corpora[0].directory  # nor to a single document


def test_interrupted_write_leaves_nothing(tmp_path, make, monkeypatch):
    path, cache = write(tmp_path / "poem.txt", POEM), tmp_path / "cache" / "corpora"
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_CHUNK", 100)
        calls = iter(range(1000))
        append = ShardWriter.append

        def stop(self, ids):
            append(self, ids)
            if next(calls) == 5:
                raise KeyboardInterrupt

        patch.setattr(ShardWriter, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            make(path, "byte")
    assert list(cache.iterdir()) == []
    assert "".join(sides(make(path, "byte"))) == POEM


KILLED = """
import os, sys
from pathlib import Path
from gpt.config import DataConfig, TokenizerConfig
from gpt.corpus import prepare
stop = lambda what, done, total: os._exit(9) if what == "tokenizing" else None
prepare(DataConfig((sys.argv[1],), Path(sys.argv[2])), TokenizerConfig("char"), progress=stop)
"""


def test_killed_process_leaves_no_half_cache_and_is_cleared_away(tmp_path, make):
    path, cache = write(tmp_path / "poem.txt", POEM), tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", KILLED, path, cache])
    assert done.returncode == 9
    (left,) = (cache / "corpora").iterdir()
    assert left.name.startswith(".writing-")
    assert "".join(sides(make(path))) == POEM
    assert left.exists()  # it might be another process at work
    os.utime(left, (time.time() - 90_000,) * 2)
    make(path, "byte")
    assert not left.exists()


def test_two_runs_at_once(tmp_path, make):
    """Another process finishes the same corpus while this one is writing: its folder stays, this one's goes."""
    path, inner = write(tmp_path / "poem.txt", POEM), []

    def race(what, done, total):
        if what == "tokenizing" and not inner:
            inner.append(None)
            inner[0] = make(path)
            (inner[0].directory / "mark").touch()

    outer = make(path, progress=race)
    assert outer.directory == inner[0].directory
    assert (outer.directory / "mark").exists()
    assert "".join(sides(outer)) == POEM
    assert len(list((tmp_path / "cache" / "corpora").iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("train.tokens", "val.tokens", "tokenizer.json", "corpus.json")
        for damage in ("truncated", "flipped", "missing")
        if (name, damage) != ("corpus.json", "flipped")  # a changed count is a count
    ],
)
def test_damaged_cache_is_made_again(tmp_path, make, caplog, name, damage):
    path = write(tmp_path / "poem.txt", POEM)
    file = make(path, "byte").directory / name
    content = file.read_bytes()
    changed = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
    file.unlink()
    if damage != "missing":
        write(file, content[:-2] if damage == "truncated" else changed)
    again = make(path, "byte")
    assert "tokenizing again" in caplog.text
    assert "".join(sides(again)) == POEM
    assert file.read_bytes() == content


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_cache_that_cannot_be_written(tmp_path, place):
    """A file stands where the folder should be, which stops root too."""
    write(tmp_path / "file", "in the way")
    text = write(tmp_path / "poem.txt", POEM)
    with pytest.raises(UserError, match=r"cannot write to the cache folder .*file.*--cache-dir"):
        prepare(DataConfig((str(text),), tmp_path / place), TokenizerConfig("char"))


def test_full_disk(tmp_path, make, monkeypatch):
    def full(self, ids):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "append", full)
    with pytest.raises(UserError, match=r"cannot write to the cache folder .*No space left.*--cache-dir"):
        make(write(tmp_path / "poem.txt", POEM))
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_default_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(None) == Path("/somewhere/gpt-on-triton")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder(None) == tmp_path / ".cache" / "gpt-on-triton"
    assert cache_folder(Path("~/x")) == tmp_path / "x"
    assert cache_folder(Path("here")) == Path.cwd() / "here"


def test_progress_counts_to_the_end(tmp_path, make):
    calls = []
    make(write(tmp_path / "text", "abc " * 100), "bpe", progress=lambda *call: calls.append(call))
    assert {what for what, _, _ in calls} == {"reading", "tokenizing"}
    assert all(0 < done <= total == 400 for _, done, total in calls)
    assert calls[-1] == ("tokenizing", 400, 400)
