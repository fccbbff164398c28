"""Rows of .csv and .tsv files are documents where their first line names the column."""

import csv
import gzip
import io

import pytest

from gpt.data import readers
from gpt.errors import UserError
from tests.corpus_checks import documents_of, write

TEXTS = ['He said "no", and\nleft\tit', "naïve, 日本語", " x "]


def table(texts=TEXTS, field="text", delimiter=",", **form) -> bytes:
    box = io.StringIO(newline="")
    rows = csv.writer(box, delimiter=delimiter, **form)
    rows.writerows([["id", field, "more, or less"], *([i, text, "z"] for i, text in enumerate(texts))])
    return box.getvalue().encode()


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "X.CSV", "x.csv.gz"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"], ids=repr)
@pytest.mark.parametrize("form", [{}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\n"}], ids=str)
def test_rows_are_documents(tmp_path, monkeypatch, name, delimiter, form):
    pack = gzip.compress if name.endswith("gz") else bytes
    for start, chunk in ((b"", 5), (b"\xef\xbb\xbf", 1 << 20)):
        monkeypatch.setattr(readers, "_CHUNK", chunk)
        path = write(tmp_path / "in" / name, pack(start + table(delimiter=delimiter, **form)))
        assert documents_of(path) == documents_of(path.parent) == TEXTS


def test_another_column_or_a_missing_one(tmp_path, caplog):
    path = write(tmp_path / "in/x.csv", table(field="body"))
    assert documents_of(path, text_field="body") == TEXTS
    assert documents_of(path.parent) == [table(field="body").decode()]
    assert caplog.text == ""
    assert documents_of(path) == [table(field="body").decode()]
    assert "its first line has no column 'text', so it is read as plain text" in caplog.text


def test_a_table_by_another_name_is_text(tmp_path):
    assert documents_of(write(tmp_path / "x.txt", table())) == [table().decode()]


def test_quoted_fields(tmp_path):
    long = "x" * 300_000
    assert documents_of(write(tmp_path / "x.csv", table([long, "", "a"]))) == [long, "a"]
    assert documents_of(write(tmp_path / "x.csv", "text\n\nplain words\n\n")) == ["plain words"]
    assert documents_of(write(tmp_path / "x.csv", table([]))) == []
    assert documents_of(write(tmp_path / "x.csv", '{"text": "a"}\n{"text": "b"}\n')) == ["a", "b"]
    assert documents_of(write(tmp_path / "x.csv", table(["a" * 9, "b"])), max_corpus_bytes=9) == ["a" * 9]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table() + b"7,b\n", "x.csv, row 4 has 2 fields, but the first line names 3"),
        (table() + b'7,"b', "x.csv, row 4 is damaged: unexpected end of data"),
        (table() + b'7,"b" c,d\n', "x.csv, row 4 is damaged: .* expected after"),
        (table(lineterminator="\r"), "x.csv, row 1 is damaged: new-line character"),
        (b"text,text\na,b\n", "x.csv has 2 columns 'text': keep one of them"),
        ("text,id\nñ,1\ncafé,2\n".encode("latin-1"), r"x.csv is not valid UTF-8: byte 8 \(0xf1, in line 2\)"),
        (b"text,id\n" + b"words,1\n" * 2000 + b"\0\0", "it holds NUL bytes from byte 16008 on"),
    ],
    ids=range(7),
)
def test_bad_tables_say_where(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        documents_of(write(tmp_path / "x.csv", content))
