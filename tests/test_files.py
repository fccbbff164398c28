"""Atomic writes, and paths of any bytes as text."""

import os
from pathlib import Path

import pytest

from gpt.files import decoded, path_from_text, path_to_text, utf8_path, write_whole

STRANGE = os.fsdecode(b"a\xff\xc3\xa9\x80z")  # bytes that are not UTF-8 around one that is


def test_a_path_of_any_bytes_survives_encoding_as_text():
    assert path_to_text("a/é 日") == "a/é 日" and path_from_text("a/é 日") == "a/é 日"
    assert path_to_text(STRANGE) == "a\0ffé\x0080z"
    assert path_from_text("a\0ffé\x0080z") == STRANGE
    assert path_from_text("\0fe") == os.fsdecode(b"\xfe")


@pytest.mark.parametrize("text", ["a\0", "a\0f", "a\x007f", "a\0xx", "a\0FF", "\0ff\0"])
def test_a_nul_that_encodes_no_byte_is_refused(text):
    with pytest.raises(ValueError, match="a path cannot hold a NUL"):
        path_from_text(text)


def test_a_library_gets_a_utf8_path(tmp_path):
    for name in ("plain", STRANGE):
        path = tmp_path / name
        path.write_text(name[0])
        with utf8_path(path) as readable:
            assert (readable == str(path)) == (name == "plain")
            assert Path(readable.encode().decode()).read_text() == name[0]
    assert not os.path.exists(readable)


def test_text_read_in_another_locale_is_decoded():
    taken = "é".encode().decode("ascii", "surrogateescape")
    assert decoded(taken + " a") == "é a"
    assert [decoded(text) for text in ("é", "\udcff", "\ud800")] == ["é", "\udcff", "\ud800"]


def test_write_whole_follows_links_and_leaves_no_temporary_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for content in (b"one", b"two"):
        write_whole(tmp_path / "link", content)
        assert (tmp_path / "file").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["file", "link"] and (tmp_path / "link").is_symlink()


def test_an_error_names_the_file_and_the_old_content_stays(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device", "elsewhere")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_whole(tmp_path / "file", b"new")
    assert caught.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
