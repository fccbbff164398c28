"""The cache of tokenized corpora: when it is used, made again, cleared away, or refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt.data import corpus as corpus_module
from gpt.data import readers, tokenize_corpus
from gpt.data import tokenizers as tokenizer_module
from gpt.data.cache import MARK, cache_folder
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.corpus import prepare
from gpt.data.token_files import TokenWriter
from gpt.data.tokenizers import ByteTokenizer
from gpt.errors import UserError
from tests.corpus_checks import POEM, folder_of, sides, write
from tests.test_external_tokens import llm_c


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_second_run_opens_what_the_first_made(tmp_path, make, kind, monkeypatch):
    path = write(tmp_path / "poem.txt", POEM)
    first = make(path, kind)
    monkeypatch.setattr(corpus_module, "_write", None)
    second = make(path, kind)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    same = ("directory", "train_tokens", "val_tokens", "train_bytes", "val_bytes", "documents", "sources", "digest")
    assert [getattr(second, name) for name in same] == [getattr(first, name) for name in same]
    moved = write(tmp_path / "elsewhere" / "copy.txt", POEM)  # by content, not by name
    assert make(moved, kind).directory == first.directory
    assert make(moved, kind).sources[0][0] == str(moved)


def test_the_cache_key_depends_on_everything_that_decides_the_tokens(tmp_path, make):
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
        patch.setattr(tokenize_corpus, "GROUP", 100)
        patch.setattr(readers, "_CHUNK", 100)
        calls = iter(range(1000))
        append = TokenWriter.append

        def stop(self, ids):
            append(self, ids)
            if next(calls) == 5:
                raise KeyboardInterrupt

        patch.setattr(TokenWriter, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            make(path, "byte")
    assert list(cache.iterdir()) == []
    assert "".join(sides(make(path, "byte"))) == POEM


KILLED = """
import os, sys
from pathlib import Path
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.corpus import prepare
stop = lambda what, done, total: os._exit(9) if what == "tokenizing" else None
prepare(DataConfig((sys.argv[1],), Path(sys.argv[2])), TokenizerConfig("char"), progress=stop)
"""


def test_a_killed_process_leaves_no_partial_cache(tmp_path, make):
    path, cache = write(tmp_path / "poem.txt", POEM), tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", KILLED, path, cache])
    assert done.returncode == 9
    (left,) = (cache / "corpora").iterdir()
    assert left.name.startswith(".resume-")
    assert "".join(sides(make(path))) == POEM
    assert not left.exists()  # what was unfinished there is what is finished now


@pytest.mark.parametrize(("name", "days"), [(".writing-x", 1), (".resume-x", 30)])
def test_leftovers_of_killed_processes_are_deleted(tmp_path, make, name, days):
    left = tmp_path / "cache" / "corpora" / name
    for file in (MARK, "train.tokens"):
        write(left / file, "half of it")
    path = write(tmp_path / "poem.txt", POEM)
    make(path)
    assert left.exists()  # another process might be writing it, or a later call resume it
    os.utime(left, (time.time() - 86_400 * days - 10,) * 2)
    make(path, "byte")
    assert not left.exists()


# --- going on where a killed process was ------------------------------------------------------------------------------

GO_ON = """
import os, signal, sys
from pathlib import Path
from gpt.data import readers, tokenize_corpus, tokenizers
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.corpus import prepare
tokenizers._SEGMENT = 300
tokenize_corpus.GROUP, tokenize_corpus.PART, readers._CHUNK = 500, 2000, 400
written = tokenize_corpus.write_whole
def stop(path, data):
    written(path, data)
    journals.append(path)
    if len(journals) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
journals = []
tokenize_corpus.write_whole = stop
prepare(DataConfig((sys.argv[1],), Path(sys.argv[2])), TokenizerConfig(sys.argv[3], 300))
"""


@pytest.fixture
def small(monkeypatch):
    """Groups and parts of so few characters that a poem has many."""
    monkeypatch.setattr(tokenize_corpus, "GROUP", 500)
    monkeypatch.setattr(tokenize_corpus, "PART", 2000)
    monkeypatch.setattr(readers, "_CHUNK", 400)
    monkeypatch.setattr(tokenizer_module, "_SEGMENT", 300)


@pytest.mark.parametrize("text", ["words\n" * 400 + " " * 1200, " " * 1200 + "words\n" * 400], ids=["last", "first"])
def test_a_group_of_white_space_does_not_make_a_text_empty(tmp_path, make, small, text):
    assert "".join(sides(make(write(tmp_path / "text.txt", text), "byte"))) == text


@pytest.fixture
def killed(tmp_path, make, monkeypatch, small):
    """killed(text, tokenizer) leaves what a kill amid the fourth part does; the folder, and what it had finished."""

    def killed(path: Path, kind: str) -> tuple[Path, dict]:
        journals, appended, names = [], [], []
        written, append = tokenize_corpus.write_whole, TokenWriter.append

        def stop(self, ids):
            append(self, ids)
            if len(journals) == 3:
                appended.append(self)
                self._file.flush()
            if len(appended) == 3:
                (work,) = (tmp_path / "cache" / "corpora").iterdir()
                names.append(work)
                shutil.copytree(work, tmp_path / "copy")
                raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(tokenize_corpus, "write_whole", lambda *words: journals.append(written(*words)))
            patch.setattr(TokenWriter, "append", stop)
            with pytest.raises(MemoryError):
                make(path, kind)
        left = shutil.move(tmp_path / "copy", names[-1])
        return left, json.loads((left / "progress.json").read_text())

    return killed


def encoded_by(make, monkeypatch, *arguments, **options):
    """A corpus, and how many characters were encoded to make it."""
    characters, encode = [], tokenize_corpus._encode
    with monkeypatch.context() as patch:
        counted = lambda group, tokenizer: characters.extend(len(p.text) for p in group) or encode(group, tokenizer)
        patch.setattr(tokenize_corpus, "_encode", counted)
        return make(*arguments, **options), sum(characters)


def files_of(corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.directory.iterdir()}


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("form", ["text", "folder", "jsonl"])
def test_the_next_call_continues_a_killed_process(tmp_path, make, monkeypatch, killed, kind, form):
    text = POEM * 8
    if form == "text":
        path = write(tmp_path / "poem.txt", text)
    elif form == "folder":
        path = folder_of(tmp_path / "texts", 200)
    else:
        rows = [{"text": text[i : i + 90]} for i in range(0, len(text), 90)]
        path = write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    left, journal = killed(path, kind)
    assert journal["characters"] >= 3 * 2000
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_learn", None)  # nor is the tokenizer learned again
        corpus, characters = encoded_by(make, monkeypatch, path, kind)
    shutil.rmtree(corpus.directory)
    fresh, all_characters = encoded_by(make, monkeypatch, path, kind)
    assert characters == all_characters - journal["characters"] > 0
    files = files_of(fresh)
    assert not left.exists()
    assert set(files) == {"tokenizer.json", "train.tokens", "val.tokens", "corpus.json"}
    shutil.rmtree(fresh.directory)
    killed(path, kind)
    assert files_of(make(path, kind)) == files


def test_the_next_call_continues_after_a_real_kill(tmp_path, make, monkeypatch, small):
    rows = "".join(json.dumps({"text": f"{i} {POEM[i : i + 90]}"}) + "\n" for i in range(200))
    path = write(tmp_path / "x.jsonl", rows)
    fresh, all_characters = encoded_by(make, monkeypatch, path, "bpe")
    files = files_of(fresh)
    shutil.rmtree(fresh.directory)
    done = subprocess.run([sys.executable, "-c", GO_ON, path, tmp_path / "cache", "bpe"])
    assert done.returncode == -9
    corpus, characters = encoded_by(make, monkeypatch, path, "bpe")
    assert 0 < characters <= all_characters - 6000
    assert files_of(corpus) == files


@pytest.mark.parametrize("damage", ["journal", "tokens", "short", "missing", "group"])
def test_a_damaged_unfinished_folder_starts_over(tmp_path, make, monkeypatch, killed, damage):
    path = write(tmp_path / "poem.txt", POEM * 8)
    left, journal = killed(path, "byte")
    tokens = left / "train.tokens"
    if damage == "journal":
        write(left / "progress.json", b'{"groups": 3')
    elif damage == "group":
        write(left / "progress.json", json.dumps(journal | {"group": 501}))
    elif damage == "missing":
        tokens.unlink()
    elif damage == "short":
        write(tokens, tokens.read_bytes()[:500])
    else:
        write(tokens, tokens.read_bytes()[:1000] + b"?" + tokens.read_bytes()[1001:])
    corpus, characters = encoded_by(make, monkeypatch, path, "byte")
    assert characters == len(POEM) * 8
    assert "".join(sides(corpus)) == POEM * 8


def test_an_interrupt_after_a_part_keeps_it(tmp_path, make, monkeypatch, small):
    path = write(tmp_path / "poem.txt", POEM * 8)
    append, calls = TokenWriter.append, []

    def stop(self, ids):
        append(self, ids)
        calls.append(ids)
        if len(calls) == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            make(path, "byte")
    corpus, characters = encoded_by(make, monkeypatch, path, "byte")
    assert 0 < characters < len(POEM) * 8 - 4000
    assert "".join(sides(corpus)) == POEM * 8


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path, make):
    """Another process finishes the same corpus while this one is writing: its folder stays, this one's goes."""
    path, inner, at_work = write(tmp_path / "poem.txt", POEM), [], []

    def look(what, done, total):
        at_work.append(sorted(path.name.split("-")[0] for path in (tmp_path / "cache" / "corpora").iterdir()))

    def race(what, done, total):
        if what == "tokenizing" and not inner:
            inner.append(None)
            inner[0] = make(path, progress=look)
            (inner[0].directory / "mark").touch()

    outer = make(path, progress=race)
    assert at_work[-1] == [".resume", ".writing"]  # never the same folder
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
def test_a_damaged_cache_is_rebuilt(tmp_path, make, caplog, name, damage):
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


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_a_damaged_folder_with_a_user_file_is_refused(tmp_path, make, kind):
    path = write(tmp_path / "poem.txt", POEM) if kind == "text" else llm_c(tmp_path / "train.bin")
    folder = make(path, "byte").directory
    write(folder / "notes.txt", "mine")
    write(folder / "corpus.json", "damaged")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match=r"is damaged and holds notes.txt, which the cache did not write: move"):
        make(path, "byte")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (folder / "notes.txt").unlink()
    make(path, "byte")
    assert json.loads((folder / "corpus.json").read_text())


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_unwritable_cache_is_refused(tmp_path, place):
    """A file is where the folder should be, which stops root too."""
    write(tmp_path / "file", "in the way")
    text = write(tmp_path / "poem.txt", POEM)
    with pytest.raises(UserError, match=r"cannot write to the cache folder .*file.*--cache-dir"):
        prepare(DataConfig((str(text),), tmp_path / place), TokenizerConfig("char"))


def test_full_disk(tmp_path, make, monkeypatch):
    def full(self, ids):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TokenWriter, "append", full)
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


@pytest.mark.parametrize("most", [1_000, 2_500, 6_000, 10_000, 20_000])
def test_a_bpe_learns_from_parts_spread_evenly_over_the_text(tmp_path, monkeypatch, most):
    """From at most so many bytes, up to one document: of 100 documents of 100 characters every n-th."""
    texts = [f"{i:03} " + "word " * 19 + "\n" for i in range(100)]
    path = write(tmp_path / "x.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    size, seen = path.stat().st_size, []
    monkeypatch.setattr(corpus_module, "BPE_BYTES", most)
    monkeypatch.setattr(
        corpus_module, "build_tokenizer", lambda config, texts, **_: seen.extend(texts()) or ByteTokenizer()
    )
    prepare(DataConfig((str(path),), tmp_path / "cache", val_fraction=0.01), TokenizerConfig("bpe"))
    numbers = [int(text[:3]) for text in seen]
    share = min(1.0, most / size)
    assert abs(len(numbers) - 99 * share) <= 2
    gaps = np.diff(numbers)
    assert gaps.min() >= int(1 / share) and gaps.max() <= int(1 / share) + 2


def test_a_journal_without_one_of_its_files_starts_anew_and_leaves_no_file_open(tmp_path, make, monkeypatch, killed):
    path, closed, close = write(tmp_path / "poem.txt", POEM * 8), [], TokenWriter.close
    left, _ = killed(path, "byte")
    (left / "val.tokens").unlink()
    (left / "val.tokens").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "close", lambda self: closed.append(self) or close(self))
        with pytest.raises(IsADirectoryError):
            tokenize_corpus._resume(left, ByteTokenizer())
    assert len(closed) == 1
