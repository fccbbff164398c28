"""Compressed files: known by content, all their members, what follows them, in bounded memory."""

import json
import re

import pytest

from gpt.data import readers
from gpt.data.unpack import need, unpacked
from gpt.errors import UserError
from tests.corpus_checks import PACK, POEM, documents_of, write

TEXTS = ["one\n", "zwei — naïve"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


@pytest.mark.parametrize("packing", [p for p in PACK if p])
@pytest.mark.parametrize("name", ["x", "x.txt", "x.txt.gz", "x.bz2"])
def test_compression_is_recognized_by_content(tmp_path, packing, name):
    assert documents_of(write(tmp_path / name, PACK[packing](POEM.encode()))) == [POEM]
    assert documents_of(write(tmp_path / "folder" / name, PACK[packing](POEM.encode())).parent) == [POEM]


def test_zstandard_with_a_skippable_first_frame(tmp_path):
    """As pzstd writes it."""
    frame = b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + PACK[".zst"](POEM.encode())
    for name in ("x", "x.txt.zst", "folder/x"):
        path = write(tmp_path / name, frame + frame)
        assert documents_of(path if name != "folder/x" else path.parent) == [POEM * 2]


def test_a_name_of_compression_on_plain_text(tmp_path, caplog):
    assert documents_of(write(tmp_path / "x.txt.gz", POEM)) == [POEM]
    assert documents_of(write(tmp_path / "x.jsonl.xz", LINES)) == TEXTS
    assert caplog.text.count("is not compressed: it is read without unpacking") == 2


@pytest.mark.parametrize("packing", [p for p in PACK if p])
@pytest.mark.parametrize("chunk", [3, 7, 1 << 14])
def test_all_members_are_read(tmp_path, monkeypatch, packing, chunk):
    monkeypatch.setattr(readers, "_PACKED_CHUNK", chunk)
    pack = PACK[packing]
    assert documents_of(write(tmp_path / f"x{packing}", pack(b"one ") + pack(b"") + pack(b"two"))) == ["one two"]


@pytest.mark.parametrize("packing", [p for p in PACK if p])
@pytest.mark.parametrize("chunk", [1, 5, 1 << 14])
@pytest.mark.parametrize("rest", [b"garbage", b"\n", b"BZ", b"\0" * 3 + b"x"], ids=repr)
def test_data_after_the_last_member_is_ignored_or_refused(tmp_path, monkeypatch, caplog, packing, chunk, rest):
    """gzip and bzip2 leave it out with a warning, the others refuse it."""
    monkeypatch.setattr(readers, "_PACKED_CHUNK", chunk)
    path = write(tmp_path / f"x.txt{packing}", PACK[packing](POEM.encode()) + rest)
    if packing in (".gz", ".bz2") and (packing, rest) != (".bz2", b"BZ"):
        assert documents_of(path) == [POEM]
        assert caplog.text.count(f"the data after its compressed text is not {packing} and is ignored") == 1
    else:
        with pytest.raises(UserError, match=r"x\.txt\.\w+ (is not a \.|is cut short)"):
            documents_of(path)


@pytest.mark.parametrize("packing", [p for p in PACK if p])
def test_parts_are_joined_into_chunks(packing):
    pack, kind = PACK[packing], packing[1:]
    packed = lambda *texts: list(unpacked([b"".join(map(pack, texts))], kind, "x", 5))
    assert packed(b"") == []
    assert packed(b"abcd", b"e", b"fgh", b"ij", b"k") == [b"abcde", b"fghij", b"k"]


@pytest.mark.parametrize("packing", [".gz", ".xz"])
def test_padding_after_a_member_is_ignored(tmp_path, packing, caplog):
    pack = PACK[packing]
    path = write(tmp_path / f"x.txt{packing}", pack(b"one ") + bytes(8) + pack(b"two") + bytes(600))
    assert documents_of(path) == ["one two"] and caplog.text == ""


@pytest.mark.parametrize("packing", [p for p in PACK if p])
def test_a_truncated_file_is_refused(tmp_path, packing):
    data = PACK[packing](POEM.encode())
    for cut in (data[:-1], data[: len(data) // 2], data + data[:-1], data[:7]):
        with pytest.raises(UserError, match=r"is cut short|is damaged"):
            documents_of(write(tmp_path / f"x.txt{packing}", cut))


@pytest.mark.parametrize("packing", [p for p in PACK if p])
def test_a_small_file_that_unpacks_to_a_large_text_is_read_in_parts(packing):
    """A file of 64 MiB of spaces: no part that comes out of a kilobyte of it is larger than what is asked for."""
    data = PACK[packing](b" " * (64 << 20))
    sizes = [len(part) for part in unpacked([data], packing.removeprefix("."), "x", 1 << 20)]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= {".bz2": 2 << 20, ".xz": 2 << 20}.get(packing, 40 << 20)


def test_a_package_that_is_missing_is_named():
    assert need("json.decoder", "x").JSONDecoder
    with pytest.raises(UserError, match=r"^Such files need the package no_such, which is not .*: pip install no_such$"):
        need("no_such.part", "Such files")


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_damage_is_said_to_be_before_the_byte_that_was_read(packing):
    whole = bytearray(PACK["." + packing](bytes(range(256)) * 40))
    at = len(whole) // 2
    whole[at : at + 20] = b"\xff" * 20
    blocks = [bytes(whole[i : i + 16]) for i in range(0, len(whole), 16)]
    with pytest.raises(UserError, match=r"before its byte \d+: ") as caught:
        list(unpacked(blocks, packing, "x", 1 << 20))
    place = int(re.search(r"byte (\d+)", str(caught.value))[1])
    assert at < place <= len(whole) and (place % 16 == 0 or place == len(whole))
