"""Documents from JSON: objects in any form, the field that holds the text, and what is wrong with a file."""

import bz2
import gzip
import json

import pytest

from gpt.data import formats, json_documents, readers
from gpt.data.json_documents import json_form
from gpt.errors import UserError
from tests.corpus_checks import LINES, PACK, POEM, ROWS, TEXTS, documents_of, names, sides, write

FORMS = {
    "lines": LINES,
    "lines with CRLF": LINES.replace("\n", "\r\n"),
    "lines with empty lines": "\ufeff\n\n" + LINES.replace("\n", "\n\n"),
    "array": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS, indent=2),
    "array, a row in a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "pretty objects": "\n".join(json.dumps(row, indent=4, ensure_ascii=False) for row in ROWS),
    "pretty objects after each other": "".join(json.dumps(row, indent=4) for row in ROWS),
    "objects in one line": " ".join(map(json.dumps, ROWS)),
    "lines with CR": LINES.replace("\n", "\r"),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.ndjson", "x.txt", "x"])
@pytest.mark.parametrize("form", FORMS)
def test_objects_are_documents_whatever_the_name(tmp_path, form, name, packing, caplog):
    path = write(tmp_path / (name + packing), PACK[packing](FORMS[form].encode()))
    assert documents_of(path) == TEXTS
    assert ("it is JSON, so the field 'text' of each object is a document" in caplog.text) == ("json" not in name)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("form", FORMS)
def test_objects_in_any_blocks(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    assert documents_of(write(tmp_path / "x.json", FORMS[form])) == TEXTS


@pytest.mark.parametrize("form", FORMS)
def test_objects_longer_than_the_head(tmp_path, form):
    """Where the first object does not end in the head, what the head holds still is an object."""
    long = "é" * formats._LONG_HEAD
    text = FORMS[form].replace("one\\n", long, 1)
    for name in ("x.json", "x.txt"):
        assert documents_of(write(tmp_path / name, text)) == [long, *TEXTS[1:]]


@pytest.mark.parametrize("name", ["x.json", "x.txt", "x.json.gz"])
def test_a_field_far_after_others_is_found(tmp_path, name, monkeypatch):
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
    "strings": ('["a", "b"]', "x.json, object 1 is not a JSON object but a string: each one needs a field 'text'"),
    "field": ('[{"text": "a"}, {"body": "b"}]', "x.json, object 2 has no field 'text': it has body; .*--text-field"),
    "number": ('[{"text": 3}]', "x.json, object 1: the field 'text' is not text but a number"),
    "cut": ('[{"text": "a"}, {"text": "b"}', "x.json is not whole JSON .after object 2: its array does not end"),
    "cut within": ('[{"text": "a"}, {"text": "b', "x.json is not whole JSON .after object 1: Unterminated string"),
    "comma": ('[{"text": "a"} {"text": "b"}]', "after object 1: a comma is missing"),
    "last comma": ('[{"text": "a"},]', "after object 1: Expecting value"),
    "after": ('[{"text": "a"}] more', "after object 1: text follows its array"),
    "after nothing": ("[] more", "text follows its array"),
    "words": ("no JSON at all", "x.json is not whole JSON .after object 0: Expecting value"),
    "deep": ('[{"text": ' + "[" * 100_000, "x.json is not whole JSON|nested too deeply"),
    "digits": ('[{"text": ' + "9" * 9999 + "}]", "x.json is not whole JSON .after object 0: Exceeds the limit"),
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
    longest = []
    parse = json_documents._Values._value
    monkeypatch.setattr(json_documents._Values, "_value", lambda self: longest.append(len(self._text)) or parse(self))
    monkeypatch.setattr(readers, "_CHUNK", 1000)
    texts = [f"document {i} " * 10 for i in range(2000)]
    assert documents_of(write(tmp_path / "x.json", json.dumps([{"text": text} for text in texts], indent=1))) == texts
    assert max(longest) < 2000


# --- without the field ------------------------------------------------------------------------------------------------

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
    assert "it is JSON without the field 'text', so it is read as plain text" in caplog.text


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
    assert "it is JSON without the field 'text', so it is read as plain text" in caplog.text


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
def test_json_form_of_a_head(head, whole, form):
    assert json_form(head, whole) == form
