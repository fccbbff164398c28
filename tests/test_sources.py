"""Where text comes from: folders, globs, the cap, the interpreter's own library."""

import codecs
import hashlib
import os
import sysconfig
from pathlib import Path

import pytest

from gpt.data import sources
from gpt.data.config import DataConfig
from gpt.data.sources import STDLIB, find_sources
from gpt.data.tokenizers import ByteTokenizer
from gpt.errors import UserError
from tests.corpus_checks import names, sides, write

# --- folders, globs, lists --------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path) -> Path:
    root = tmp_path / "mixed"
    write(root / "b.txt", "text b")
    write(root / "a.md", "text a")
    write(root / "sub" / "deep" / "c.py", "text c")
    write(root / "empty.txt", "")
    write(root / ".hidden.txt", "hidden")
    write(root / ".git" / "config", "hidden")
    write(root / "cat.png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    write(root / "short.bin", b"\x1f\x8b\x08\xff\xfe\x05")
    (root / "broken").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe")
    return root


def test_folder_is_read_in_order_without_hidden_and_binary_files(mixed, make, caplog):
    corpus = make(mixed)
    assert names(corpus, mixed) == ["a.md", "b.txt", "sub/deep/c.py"]
    assert "left out 2 hidden and 4 binary files" in caplog.text


def test_glob(mixed, make, tmp_path):
    assert names(make(mixed / "*.[tm]*"), mixed) == ["a.md", "b.txt"]
    assert names(make(mixed / "**" / "*.py", fixed=ByteTokenizer()), mixed) == ["sub/deep/c.py"]
    assert names(make(mixed / "s*"), mixed) == ["sub/deep/c.py"]
    literal = write(tmp_path / "odd[1]*.txt", "a file whose name has a glob's marks")
    assert names(make(literal), tmp_path) == ["odd[1]*.txt"]


def test_a_file_named_explicitly_is_read_if_it_is_text(mixed, make):
    assert "".join(sides(make(mixed / ".hidden.txt"))) == "hidden"
    for errors in ("strict", "replace"):
        with pytest.raises(UserError, match=r"cat\.png is an image, not text"):
            make(mixed / "cat.png", encoding_errors=errors)


def test_several_entries_keep_their_order_and_each_file_counts_once(mixed, make):
    corpus = make((mixed / "b.txt", mixed, mixed / "sub" / ".." / "a.md"))
    assert names(corpus, mixed) == ["b.txt", "a.md", "sub/deep/c.py"]


def test_home_is_expanded(tmp_path, make, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "text.txt", "hello world")
    assert make("~/text.txt").train_bytes == 9


# --- the cap ----------------------------------------------------------------------------------------------------------


def test_cap_keeps_whole_documents_in_order(tmp_path, make):
    root = tmp_path / "texts"
    for name, size in {"a": 10, "b": 10, "c": 10, "d": 10, "e": 1}.items():
        write(root / name, name * size)

    def kept(corpus: object, cap: int) -> str:
        return "".join(name[-1] for name, _, _ in make(corpus, max_corpus_bytes=cap).sources)

    assert kept(root, 41) == "abcde"
    assert kept(root, 35) == "abc"  # not e, though it would fit
    assert kept(root, 30) == "abc"
    assert kept((root / "a", root / "a", root), 20) == "ab"  # a file named twice counts once


def test_cap_cuts_a_single_large_document_between_characters(tmp_path, make):
    path = write(tmp_path / "text", "aé" * 50)
    for errors in ("strict", "replace"):
        corpus = make(path, max_corpus_bytes=20, encoding_errors=errors)
        assert "".join(sides(corpus)) == "aé" * 6 + "a"
    start = path.read_bytes()[:20]
    assert corpus.sources[0][1:] == (20, hashlib.sha256(start).hexdigest())
    # A file that ends there ends in half a character, which is another text.
    other = make(write(tmp_path / "start", start), encoding_errors="replace")
    assert "".join(sides(other)) == "aé" * 6 + "a\ufffd"


# --- the interpreter's own library ------------------------------------------------------------------------------------


def test_stdlib_is_the_interpreters_own_sources_in_a_fixed_order(make, tmp_path):
    data = DataConfig((STDLIB,), max_corpus_bytes=6_000_000)
    found = find_sources(data, tmp_path)
    paths = [source.path.relative_to(sysconfig.get_path("stdlib")) for source in found]
    assert paths == sorted(paths, key=lambda path: (len(path.parts), path))
    assert {"abc.py", "typing.py", "argparse.py"} <= {str(path) for path in paths}
    assert all(path.suffix == ".py" for path in paths)
    assert not {"site-packages", "test", "tests", "idle_test"} & {part for path in paths for part in path.parts}
    assert 3_000_000 < sum(source.size for source in found) <= 6_000_000


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A standard library of the test's own."""
    root = tmp_path / "lib"
    write(root / "zlast.py", "z = 1\n")
    write(root / "abc.py", "# -*- coding: latin-1 -*-\nname = 'caf\xe9'\n".encode("latin-1"))
    write(root / "mark.py", codecs.BOM_UTF8 + "x = 'é'\n".encode())
    write(root / "json" / "decoder.py", "y = 2\n")
    for left_out in ("site-packages/a.py", "test/b.py", "json/tests/c.py", "idlelib/idle_test/d.py", "notes.txt"):
        write(root / left_out, "left out")
    write(root / "__pycache__" / "abc.cpython-311.pyc", b"\0")
    write(root / "_sysconfigdata__linux_.py", "build_time_vars = {}\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(root))
    return root


def test_stdlib_decodes_each_file_as_its_coding_line_says(library, make):
    corpus = make(STDLIB)
    assert [name for name, _, _ in corpus.sources] == [
        f"{STDLIB}/{name}" for name in ("abc.py", "mark.py", "zlast.py", "json/decoder.py")
    ]
    text = "".join(sides(corpus))
    assert "name = 'café'" in text
    assert "x = 'é'" in text
    assert "\ufeff" not in text


def test_stdlib_with_an_unknown_coding_line(library, make):
    write(library / "odd.py", "# coding: no-such-codec\n")
    with pytest.raises(UserError, match=r"odd\.py: .*no-such-codec.*--encoding-errors replace"):
        make(STDLIB)
    assert "no-such-codec" in "".join(sides(make(STDLIB, encoding_errors="replace")))


def test_stdlib_that_is_not_in_files(monkeypatch, tmp_path, make):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(UserError, match="keeps its library elsewhere"):
        make(STDLIB)
