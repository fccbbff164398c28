"""Files are read by their content, whatever their name; what is not text is refused, or left out of a folder."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt.data import readers
from gpt.data.config import DataConfig
from gpt.data.formats import read_lines
from gpt.data.sources import find_sources
from gpt.data.split import read_documents
from gpt.errors import UserError
from tests.corpus_checks import LINES, PACK, POEM, ROWS, TEXTS, documents_of, names, write

# --- text that begins as another form does ----------------------------------------------------------------------------

CODE = {
    "latex": "{\\bf Theorem} {x} is {y}.\n" * 20,
    "c": '{ "a", "b" },\n{ "c", "d" },\n' * 20,
    "python": '{"a": 1, "b": None}\n' * 20,
    "javascript": '{"text": value, other}\nfunction f() {}\n' * 20,
    "one line, then prose": '{"text": "a"}\nis how a document looks.\n' * 20,
    "object, then prose": '{\n "text": "a"\n} is how a document looks.\n' * 20,
    "lyrics": "[Verse 1]\nSo it goes\n" * 20,
    "list": '["a", "b"]\n' * 20,
    "citation": "[1] {x}\n" * 20,
    "brace": "{",
    "bracket": "[ {",
    "template": "{{ title }}\n" * 20,
    "cut": '{"text": "a',
    "GIF": "GIF89a is what such files begin with.\n" * 20,
    "ORC": "ORCs are creatures of myth.\n" * 20,
    "GGUF": "GGUF is a format.\n" * 20,
    "PAR1": "PAR1 begins a Parquet file.\n" * 20,
    "BZh": "BZh9 is how bzip2 begins.\n" * 20,
    "PDF": "%PDF- is how they begin.\n" * 20,
    "RTF": "{\\rtfm is not a command of TeX}\n" * 20,
    "digits": "070701 is a number.\n" * 20,
    "manual": "N\bNA\bAM\bME\bE\n" * 20,
    "colors": "\x1b[31mred\x1b[0m\n" * 20,
}


@pytest.mark.parametrize("case", CODE)
def test_text_that_only_starts_like_json_is_text(tmp_path, case, caplog):
    assert documents_of(write(tmp_path / "x.txt", CODE[case])) == [CODE[case]]
    assert documents_of(write(tmp_path / "folder/x.txt", CODE[case]).parent) == [CODE[case]]
    assert caplog.text == ""


# --- what is not text -------------------------------------------------------------------------------------------------


def tar_of(packing: str = "") -> bytes:
    box = io.BytesIO()
    with tarfile.open(fileobj=box, mode=f"w:{packing}") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(POEM.encode())
        archive.addfile(info, io.BytesIO(POEM.encode()))
    return box.getvalue()


def zip_of() -> bytes:
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as archive:
        archive.writestr("a.txt", POEM)
    return box.getvalue()


def npy_of() -> bytes:
    box = io.BytesIO()
    np.save(box, np.arange(1000))
    return box.getvalue()


def parquet_of() -> bytes:
    box = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), box)
    return box.getvalue()


BINARY = {
    "tar": (tar_of(), "a tar archive, not text: unpack it, and name the folder"),
    "tar.gz": (tar_of("gz"), "a tar archive"),
    "tar.bz2": (tar_of("bz2"), "a tar archive"),
    "tar.xz": (tar_of("xz"), "a tar archive"),
    "zip": (zip_of(), "a ZIP archive"),
    "npy": (npy_of(), "a NumPy array"),
    "pickle": (pickle.dumps([POEM]), "a pickle"),
    "pickle-2": (pickle.dumps({"text": POEM}, 2), "a pickle"),
    "pdf": (b"%PDF-1.7\n1 0 obj\n", "a PDF file"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "an image"),
    "jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "an image"),
    "sqlite": (b"SQLite format 3\0" + bytes(80), "an SQLite database"),
    "uint16": (np.arange(40, 400, dtype="<u2").tobytes(), "binary .it holds NUL bytes."),
    "utf16 without a mark": ("plain words".encode("utf-16-le"), "binary .it holds NUL bytes."),
    "random": (np.random.default_rng(0).bytes(9000), "binary|not valid UTF-8"),
    "ar": (b"!<arch>\nfoo.o/          0           0   ", "an ar archive"),
    "cpio": (b"070701" + b"0" * 104 + b"a.txt\0" + POEM.encode(), "a cpio archive"),
    "pickle-0": (pickle.dumps({"text": "plain"}, 0), "a pickle"),
    "gif": (b"GIF89a\x10\0\x10\0\xf0\x01\0", "an image"),
    "gguf": (b"GGUF\x03\0\0\0\x10", "a model in GGUF"),
    "orc": (b"ORC\n\x0b\n\x03\0\0\0\x12\x04\b\x02P\0" * 9, "an ORC file"),
    "uint8": (bytes([1 + i * 7 % 60 for i in range(900)]), "binary .it holds control characters."),
    "twice": (gzip.compress(bz2.compress(POEM.encode())), "is compressed twice: unpack it first"),
    "parquet.gz": (gzip.compress(parquet_of()), "is a compressed Parquet file: unpack it first"),
}


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("name", ["x.txt", "x", "x.json"])
@pytest.mark.parametrize("kind", BINARY)
def test_binary_files_are_refused(tmp_path, make, kind, name, errors):
    content, message = BINARY[kind]
    with pytest.raises(UserError, match=message) as caught:
        make(write(tmp_path / name, content), "byte", encoding_errors=errors)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in BINARY if kind not in ("twice", "parquet.gz")])
def test_binary_files_in_a_folder_are_left_out(tmp_path, make, kind, caplog):
    write(tmp_path / "texts/a.txt", POEM)
    write(tmp_path / "texts/b", BINARY[kind][0])
    assert names(make(tmp_path / "texts"), tmp_path / "texts") == ["a.txt"]
    assert "left out 0 hidden and 1 binary files" in caplog.text


def test_parquet_is_recognized_by_its_content(tmp_path):
    assert documents_of(write(tmp_path / "x.txt", parquet_of())) == TEXTS
    assert documents_of(write(tmp_path / "folder/x", parquet_of()).parent) == TEXTS


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_late_nuls_are_refused(tmp_path, monkeypatch, errors, packing, chunk):
    """As in a file that was not written to its end."""
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    text = "plain words\n" * 1000
    where = "" if packing else "from byte 12000 on"
    path = write(tmp_path / f"x.txt{packing}", PACK[packing](text.encode() + bytes(5000)))
    with pytest.raises(UserError, match=f"holds NUL bytes.*{where}"):
        documents_of(path, errors)
    if not packing:
        assert documents_of(path, errors, max_corpus_bytes=12001) == [text + "\0"]


def test_a_single_nul_is_text(tmp_path):
    text = "words and\0 more words\n" * 50
    assert documents_of(write(tmp_path / "x.txt", text)) == [text]


def test_utf16_is_refused_even_with_replacement(tmp_path):
    path = write(tmp_path / "x.txt", POEM.encode("utf-16"))
    with pytest.raises(UserError, match="looks like UTF-16"):
        documents_of(path)
    with pytest.raises(UserError, match=r"x.txt is UTF-16, not UTF-8: convert the file .iconv"):
        documents_of(path, "replace")


def test_latin1_is_refused_or_replaced(tmp_path):
    path = write(tmp_path / "x.txt", "café noir\n".encode("latin-1") * 20)
    with pytest.raises(UserError, match=r"x.txt is not valid UTF-8: byte 3 \(0xe9"):
        documents_of(path)
    assert documents_of(path, "replace") == ["caf\ufffd noir\n" * 20]


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [LINES.encode(), gzip.compress(json.dumps(ROWS).encode())], ids=["lines", "gz"])
def test_stdin_is_recognized_by_its_content(tmp_path, monkeypatch, content):
    class Stdin:
        buffer = io.BytesIO(content)

        def isatty(self):
            return False

    monkeypatch.setattr("sys.stdin", Stdin())
    sources = find_sources(DataConfig(("-",)), tmp_path / "downloads")
    assert ["".join(document.chunks) for document in read_documents(sources, "strict")] == TEXTS


def test_stdin_that_is_not_text_is_refused(tmp_path, monkeypatch):
    class Stdin:
        buffer = io.BytesIO(tar_of("gz"))

        def isatty(self):
            return False

    monkeypatch.setattr("sys.stdin", Stdin())
    with pytest.raises(UserError, match="stdin is a tar archive"):
        find_sources(DataConfig(("-",)), tmp_path / "downloads")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"a\nb\n"), r"the prompt file .*x.txt is compressed \(.gz\): unpack it first"),
        (lzma.compress(b"a\nb\n"), r"is compressed \(.xz\)"),
        (zip_of(), "is a ZIP archive .*, not text"),
        ("words".encode("utf-16"), r"is not UTF-8 \(it looks like UTF-16\)"),
        ("words".encode("utf-16-le"), "is binary .it holds NUL bytes., not text"),
        ("caf\xe9".encode("latin-1"), "is not UTF-8: unexpected end of data at byte 3"),
    ],
    ids=range(6),
)
def test_a_file_of_prompts_or_questions_is_text(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_lines(write(tmp_path / "x.txt", content), "prompt file")
    assert read_lines(write(tmp_path / "y.txt", b"\xef\xbb\xbfa\r\nb\rc"), "prompt file") == ["a", "b", "c"]


def test_an_array_of_objects_without_the_field_is_refused_under_any_name(tmp_path, make):
    """One object alone may be a text that happens to be JSON; several are rows, and their reader lists their fields."""
    for name in ("x.txt", "x.json", "x"):
        with pytest.raises(UserError, match="body"):
            make(write(tmp_path / name, b'[{"body": "a"}, {"body": "b"}]'), "byte")


def test_a_table_that_begins_like_json_and_is_none_is_text(tmp_path):
    (source,) = find_sources(DataConfig((str(write(tmp_path / "x.csv", "{notes} of a day\n")),)), tmp_path)
    assert source.kind == "text"
