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

from gpt import formats, readers
from gpt.config import DataConfig
from gpt.documents import read_documents
from gpt.errors import UserError
from gpt.files import read_lines
from gpt.json_documents import json_form
from gpt.sources import find_sources
from tests.corpus_checks import PACK, POEM, documents_of, names, sides, write

TEXTS = ["one\n", "zwei — naïve", "日本語 🙂", 'four "quoted" \\ \t', "five" * 50]
ROWS = [{"id": i, "text": text, "more": {"text": ["x"]}} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FORMS = {
    "lines": LINES,
    "lines with CRLF": LINES.replace("\n", "\r\n"),
    "lines with blanks": "\ufeff\n\n" + LINES.replace("\n", "\n\n"),
    "array": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS, indent=2),
    "array, a row in a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "pretty objects": "\n".join(json.dumps(row, indent=4, ensure_ascii=False) for row in ROWS),
    "pretty objects after each other": "".join(json.dumps(row, indent=4) for row in ROWS),
    "objects in one line": " ".join(map(json.dumps, ROWS)),
    "lines with CR": LINES.replace("\n", "\r"),
}


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.ndjson", "x.txt", "x"])
@pytest.mark.parametrize("form", FORMS)
def test_objects_are_documents_whatever_the_name(tmp_path, form, name, packing, caplog):
    path = write(tmp_path / (name + packing), PACK[packing](FORMS[form].encode()))
    assert documents_of(path) == TEXTS
    assert ("it is JSON, and the field 'text' of each object is a document" in caplog.text) == ("json" not in name)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("form", FORMS)
def test_objects_in_any_blocks(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    assert documents_of(write(tmp_path / "x.json", FORMS[form])) == TEXTS


@pytest.mark.parametrize("form", FORMS)
def test_objects_longer_than_what_is_looked_at(tmp_path, form):
    """Where the first object does not end in the head, what the head holds still is an object."""
    long = "é" * formats._LONG_HEAD
    text = FORMS[form].replace("one\\n", long, 1)
    for name in ("x.json", "x.txt"):
        assert documents_of(write(tmp_path / name, text)) == [long, *TEXTS[1:]]


@pytest.mark.parametrize("name", ["x.json", "x.txt", "x.json.gz"])
def test_a_field_far_behind_others(tmp_path, name, monkeypatch):
    """The first object is read to its end, however long it is: in a folder too, where the field decides."""
    rows = [{"meta": "m" * 3 * formats._LONG_HEAD, "text": "one"}, {"text": "two"}]
    pack = gzip.compress if name.endswith("gz") else bytes
    for form in ("\n".join(map(json.dumps, rows)), json.dumps(rows), json.dumps(rows[0], indent=1)):
        path = write(tmp_path / "in" / name, pack(form.encode()))
        expected = ["one", "two"] if "two" in form else ["one"]
        assert documents_of(path) == documents_of(path.parent) == expected
    monkeypatch.setattr(formats, "_LONGEST_HEAD", 1 << 17)  # where it is given up
    path = write(tmp_path / "in" / name, pack("\n".join(map(json.dumps, rows)).encode()))
    assert documents_of(path) == (["one", "two"] if "json" in name else documents_of(path.parent))


def test_one_object_and_none(tmp_path, make):
    for form in (json.dumps({"text": POEM}), json.dumps({"text": POEM}, indent=1), json.dumps([{"text": POEM}])):
        assert "".join(sides(make(write(tmp_path / "x.json", form)))) == POEM
    for nothing in ("[]", " [ ] ", "{}[]"[2:]):
        with pytest.raises(UserError, match="is empty: it holds no document"):
            make(write(tmp_path / "x.json", nothing))


def test_every_form_gives_the_same_tokens(tmp_path, make):
    rows = [{"text": f"document number {i}, " * (i % 7 + 1)} for i in range(60)]
    forms = [json.dumps(rows), json.dumps(rows, indent=2), "\n".join(map(json.dumps, rows))]
    made = [make(write(tmp_path / f"{i}.json", form), "byte") for i, form in enumerate(forms)]
    assert len({corpus.directory for corpus in made}) == len(made)
    assert {corpus.train.read_bytes() for corpus in made} == {made[0].train.read_bytes()}
    assert {corpus.documents for corpus in made} == {60}


BAD = {
    "strings": ('["a", "b"]', "x.json, object 1 is no JSON object but a string: each one needs a field 'text'"),
    "field": ('[{"text": "a"}, {"body": "b"}]', "x.json, object 2 has no field 'text': it has body; .*--text-field"),
    "number": ('[{"text": 3}]', "x.json, object 1: the field 'text' is not text but a number"),
    "cut": ('[{"text": "a"}, {"text": "b"}', "x.json is no whole JSON .after object 2: its array does not end"),
    "cut within": ('[{"text": "a"}, {"text": "b', "x.json is no whole JSON .after object 1: Unterminated string"),
    "comma": ('[{"text": "a"} {"text": "b"}]', "after object 1: a comma is missing"),
    "last comma": ('[{"text": "a"},]', "after object 1: Expecting value"),
    "after": ('[{"text": "a"}] more', "after object 1: text follows its array"),
    "after nothing": ("[] more", "text follows its array"),
    "words": ("no JSON at all", "x.json is no whole JSON .after object 0: Expecting value"),
    "deep": ('[{"text": ' + "[" * 100_000, "x.json is no whole JSON|nested too deeply"),
    "digits": ('[{"text": ' + "9" * 9999 + "}]", "x.json is no whole JSON .after object 0: Exceeds the limit"),
    "latin1": (b'[{"text": "a"},\n{"text": "caf\xe9"}]', r"x.json is not valid UTF-8: byte 29 \(0xe9\)"),
    "cut character": (b'[{"text": "a"}, {"text": "\xc3', r"x.json is not valid UTF-8: byte 26 \(0xc3\)"),
    "surrogate": ('[{"text": "\\ud800"}]', r"object 1: the field 'text' holds the lone surrogate U\+D800"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_json_says_where(tmp_path, make, case):
    content, message = BAD[case]
    with pytest.raises(UserError, match=message):
        make(write(tmp_path / "x.json", content))
    assert list((tmp_path / "cache").glob("corpora/*")) == []


def test_an_object_without_end_is_refused(tmp_path, make, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_LINE", 1000)
    monkeypatch.setattr(readers, "_CHUNK", 100)
    with pytest.raises(UserError, match=r"x.json, object 2 has more than 1000 characters"):
        make(write(tmp_path / "x.json", '[{"text": "a"}, {"text": "' + "x" * 5000))


def test_replaced_bytes_of_json(tmp_path):
    assert documents_of(write(tmp_path / "x.json", b'[{"text": "caf\xe9"}]'), "replace") == ["caf\ufffd"]


def test_only_the_unparsed_part_is_kept(tmp_path, monkeypatch):
    """Of an array of many objects no more than a block and an object is in memory."""
    from gpt import json_documents

    longest = []
    parse = json_documents._Values._value
    monkeypatch.setattr(json_documents._Values, "_value", lambda self: longest.append(len(self._text)) or parse(self))
    monkeypatch.setattr(readers, "_CHUNK", 1000)
    texts = [f"document {i} " * 10 for i in range(2000)]
    assert documents_of(write(tmp_path / "x.json", json.dumps([{"text": text} for text in texts], indent=1))) == texts
    assert max(longest) < 2000


# --- text that begins as JSON does ------------------------------------------------------------------------------------

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
    "RTF": "{\\rtfm is no command of TeX}\n" * 20,
    "digits": "070701 is a number.\n" * 20,
    "manual": "N\bNA\bAM\bME\bE\n" * 20,
    "colors": "\x1b[31mred\x1b[0m\n" * 20,
}


@pytest.mark.parametrize("case", CODE)
def test_text_that_only_begins_as_json_does_is_text(tmp_path, case, caplog):
    assert documents_of(write(tmp_path / "x.txt", CODE[case])) == [CODE[case]]
    assert documents_of(write(tmp_path / "folder/x.txt", CODE[case]).parent) == [CODE[case]]
    assert caplog.text == ""


OBJECT = json.dumps({"name": "a package", "version": 3}, indent=2)


def test_json_without_the_field(tmp_path, make, caplog):
    """Named as JSON, or in lines, it is refused; a single object elsewhere is text, and a line says so."""
    plain = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    for name, content in (("x.json", OBJECT), ("x.json", plain), ("x.txt", plain), ("x.jsonl", OBJECT)):
        with pytest.raises(UserError, match=r"has no field 'text': it has .*--text-field"):
            make(write(tmp_path / name, content))
    assert documents_of(write(tmp_path / "x.txt", plain), text_field="body") == TEXTS
    caplog.clear()
    assert documents_of(write(tmp_path / "x.txt", OBJECT)) == [OBJECT]
    assert "it is JSON without the field 'text', and is read as plain text" in caplog.text


@pytest.mark.parametrize("name", ["rows.json", "rows.txt", "rows"])
def test_lines_of_json_without_the_field_are_refused_in_a_folder_too(tmp_path, make, name, caplog):
    for lines in (
        LINES.replace('"text": "', '"body": "'),
        '{"text": null}\n' + LINES,
        '{"text": {"en": "x"}}\n' + LINES,
    ):
        path = write(tmp_path / "in" / name, lines)
        with pytest.raises(UserError, match=rf"{name}, line 1.*'text'"):
            make(path.parent, "byte")
    write(path, json.dumps([{"body": "a"}, {"body": "b"}]))
    caplog.clear()
    assert make(path.parent, "byte").documents == 1
    assert "it is JSON without the field 'text', and is read as plain text" in caplog.text


def test_a_folder_of_source_code_keeps_its_json(tmp_path, make):
    root = tmp_path / "code"
    write(root / "package.json", OBJECT)
    write(root / "tsconfig.json", "// with comments\n" + OBJECT)
    write(root / "list.json", '["a", "b"]')
    write(root / "main.py", "x = 1\n")
    write(root / "rows.json", LINES)
    write(root / "rows.json.bz2", bz2.compress(LINES.encode()))
    corpus = make(root, "byte")
    assert names(corpus, root) == [
        "list.json",
        "main.py",
        "package.json",
        "rows.json",
        "rows.json.bz2",
        "tsconfig.json",
    ]
    assert corpus.documents == 4 + 2 * len(TEXTS)


@pytest.mark.parametrize(
    ("head", "whole", "form"),
    [
        ('{"a": 1}', True, ("jsonl", {"a": 1}, False)),
        ('{"a": 1}\n{"b": 2}', True, ("jsonl", {"a": 1}, True)),
        ('{"a": 1}\n{"b": 2', True, None),
        ('{"a": 1}\n{"b": 2', False, ("jsonl", {"a": 1}, True)),
        ('{"a": 1}\n\n[2]\n', True, None),
        ('{"a": "1', False, ("jsonl", None, False)),
        ('{"a": 1,\n "b', False, ("json", None, False)),
        ('{"a": 1,\n "b": 2} {"a": 1}', True, ("json", {"a": 1, "b": 2}, True)),
        ('{"a": 1,\n "b": 2} more', True, None),
        ('[{"a": 1}', False, ("json", {"a": 1}, False)),
        ('[{"a": 1},', False, ("json", {"a": 1}, True)),
        ("{}", True, ("jsonl", {}, False)),
        ("[1, 2]", True, None),
        ("[]", True, None),
        ("", True, None),
        ('{"a" 1, "b": 2, "c": 3}', False, None),
        ('{"a": 1} {"b": 2}', True, ("json", {"a": 1}, True)),
        ('{"a": 1}\r{"b": 2}', True, ("json", {"a": 1}, True)),
        ('{"a": 1}, {"b": 2}', True, None),
        ('{"a": 1} {"b" 2}', True, None),
        ('{"a": 1}\n', True, ("jsonl", {"a": 1}, False)),
    ],
    ids=str,
)
def test_what_a_head_says(head, whole, form):
    assert json_form(head, whole) == form


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
def test_binary_is_never_text(tmp_path, make, kind, name, errors):
    content, message = BINARY[kind]
    with pytest.raises(UserError, match=message) as caught:
        make(write(tmp_path / name, content), "byte", encoding_errors=errors)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in BINARY if kind not in ("twice", "parquet.gz")])
def test_binary_is_left_out_of_a_folder(tmp_path, make, kind, caplog):
    write(tmp_path / "texts/a.txt", POEM)
    write(tmp_path / "texts/b", BINARY[kind][0])
    assert names(make(tmp_path / "texts"), tmp_path / "texts") == ["a.txt"]
    assert "left out 0 hidden and 1 binary files" in caplog.text


def test_parquet_by_its_content(tmp_path):
    assert documents_of(write(tmp_path / "x.txt", parquet_of())) == TEXTS
    assert documents_of(write(tmp_path / "folder/x", parquet_of()).parent) == TEXTS


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_nuls_that_come_late_are_not_text(tmp_path, monkeypatch, errors, packing, chunk):
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


def test_utf16_is_refused_even_where_bytes_are_replaced(tmp_path):
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
def test_stdin_is_read_by_its_content(tmp_path, monkeypatch, content):
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
