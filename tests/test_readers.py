"""Formats: what each file gives, in bounded memory, and the one sentence for every file that is not whole."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gpt.data import readers
from gpt.data.readers import Source
from gpt.data.sources import find_sources
from gpt.errors import UserError
from tests.corpus_checks import POEM, names, sides, write

TEXTS = ["one\n", "zwei — naïve", "日本語 🙂", 'four "quoted" \\ \t and \u2028 more', "five" * 50]
PACK = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard.compress}


def lines(texts=TEXTS, field="text") -> bytes:
    rows = [json.dumps({"id": i, field: text}, ensure_ascii=i % 2 > 0) for i, text in enumerate(texts)]
    return "".join(row + "\n" for row in rows).encode()


def parquet(path: Path, texts=TEXTS, field="text", kind=None, **options) -> Path:
    table = pa.table({"id": range(len(texts)), field: pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, **options)
    return path


def documents(path: Path, errors="strict", **options) -> list[str]:
    (source,) = find_sources(data_of(path, **options), path.parent / "downloads")
    return ["".join(document.chunks) for document in source.hashed().documents(errors)]


def data_of(path, **options):
    from gpt.data.config import DataConfig

    return DataConfig((str(path),), **options)


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("packing", PACK)
def test_json_lines_are_documents(tmp_path, monkeypatch, packing, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    monkeypatch.setattr(readers, "_PACKED_CHUNK", chunk)
    path = write(tmp_path / f"x.jsonl{packing}", PACK[packing](lines()))
    assert documents(path) == TEXTS


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("chunk", [3, 7, 1 << 20])  # a block never is shorter than a byte order mark
def test_packed_text_is_one_document_of_all_its_members(tmp_path, monkeypatch, packing, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    monkeypatch.setattr(readers, "_PACKED_CHUNK", chunk)
    pack = PACK[packing]
    path = write(tmp_path / f"x.txt{packing}", pack(b"\xef\xbb\xbfone ") + pack(b"") + pack("zwei é".encode()))
    assert documents(path) == ["one zwei é"]


def test_gzip_padding_is_ignored(tmp_path):
    assert documents(write(tmp_path / "x.txt.gz", gzip.compress(b"text") + bytes(600))) == ["text"]


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("options", [{}, {"row_group_size": 2}, {"compression": "zstd"}], ids=str)
def test_parquet_rows_are_documents(tmp_path, kind, options):
    assert documents(parquet(tmp_path / "x.parquet", kind=kind, **options)) == TEXTS


def test_the_text_may_have_another_field(tmp_path):
    assert documents(write(tmp_path / "x.jsonl", lines(field="content")), text_field="content") == TEXTS
    assert documents(parquet(tmp_path / "x.parquet", field="content"), text_field="content") == TEXTS


def test_empty_lines_line_ends_and_marks_are_not_documents(tmp_path):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": ""}\n{"text": "b", "text": "c"}'
    assert documents(write(tmp_path / "x.jsonl", content)) == ["a", "c"]
    assert documents(parquet(tmp_path / "x.parquet", ["", "a", ""])) == ["a"]


def test_a_folder_of_every_format(tmp_path, make):
    root = tmp_path / "texts"
    write(root / "a.txt", "text a")
    write(root / "b.jsonl.gz", gzip.compress(lines()))
    write(root / "c.txt.zst", zstandard.compress(b"text c"))
    write(root / "d.tar.gz", gzip.compress(b"no text that a folder is searched for"))
    parquet(root / "e.parquet")
    corpus = make(root, "byte")
    assert names(corpus, root) == ["a.txt", "b.jsonl.gz", "c.txt.zst", "e.parquet"]
    assert corpus.documents == 2 + 2 * len(TEXTS)
    assert sorted("".join(sides(corpus))) == sorted("text atext c" + "".join(TEXTS) * 2)


def test_every_format_gives_the_same_tokens(tmp_path, make):
    """The split goes by each document's bytes: whichever file a document comes in."""
    texts = [f"document number {i}, " * (i % 7 + 1) for i in range(60)]
    made = [make(write(tmp_path / f"x.jsonl{ending}", pack(lines(texts))), "byte") for ending, pack in PACK.items()]
    made.append(make(parquet(tmp_path / "x.parquet", texts), "byte"))
    made.append(make(folder_of_texts(tmp_path / "texts", texts), "byte"))
    assert len({corpus.directory for corpus in made}) == len(made)
    assert {corpus.train.read_bytes() for corpus in made} == {made[0].train.read_bytes()}
    assert {corpus.val.read_bytes() for corpus in made} == {made[0].val.read_bytes()}
    assert all(corpus.documents == 60 for corpus in made)
    grown = make(write(tmp_path / "more.jsonl", lines([*texts, *map(str, range(60))])), "byte")
    assert set(split_of(made[0])[1]) <= set(split_of(grown)[1])


def folder_of_texts(root: Path, texts: list[str]) -> Path:
    for i, text in enumerate(texts):
        write(root / f"{i:03}.txt", text)
    return root


def split_of(corpus) -> list[list[str]]:
    return [side.split("document") for side in sides(corpus)]


def test_a_single_row_is_split_at_its_tail(tmp_path, make):
    for path in (write(tmp_path / "x.jsonl", lines([POEM])), parquet(tmp_path / "x.parquet", [POEM])):
        corpus = make(path)
        assert "".join(sides(corpus)) == POEM
        assert corpus.tokenizer.document_token is None
        assert 0 <= int(0.9 * len(POEM.encode())) - corpus.train_bytes < 4


def test_the_field_is_in_the_key(tmp_path, make):
    path = write(tmp_path / "x.jsonl", b"".join(b'{"text": "a%d", "other": "b%d"}\n' % (i, i) for i in range(50)))
    assert "b" not in "".join(sides(make(path)))
    assert "a" not in "".join(sides(make(path, text_field="other")))


def test_cap_counts_the_text_of_whole_documents(tmp_path, make):
    texts = ["a" * 10, "é" * 5, "c" * 10, "d"]
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(lines(texts)))
    other = write(tmp_path / "y.txt", "e" * 10)

    def kept(cap: int, corpus=(path, other)) -> str:
        return "".join(sorted(set("".join(sides(make(corpus, max_corpus_bytes=cap))))))

    assert kept(41) == "acdeé"
    assert kept(40) == "acdé"
    assert kept(30) == "acé"
    assert kept(29) == "aé"
    assert kept(25, (other, path)) == "ae"
    assert kept(15, (other, path)) == "e"
    assert kept(20, (other, path)) == "ae"
    assert kept(7) == "a"  # a first document alone is cut


def test_cap_cuts_a_packed_text(tmp_path, make):
    path = write(tmp_path / "x.txt.zst", zstandard.compress(("aé" * 50).encode()))
    assert "".join(sides(make(path, max_corpus_bytes=20))) == "aé" * 6 + "a"


@pytest.mark.parametrize("form", ["jsonl.gz", "parquet"])
def test_progress_counts_the_bytes_of_the_files(tmp_path, make, form):
    path, calls = tmp_path / f"x.{form}", []
    parquet(path) if form == "parquet" else write(path, gzip.compress(lines()))
    make(path, "byte", progress=lambda *call: calls.append(call))
    size = path.stat().st_size
    assert calls[-1] == ("tokenizing", size, size)


MEMORY = """
import sys
from pathlib import Path
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.corpus import prepare
def peak():  # of this process: getrusage would tell its parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
prepare(DataConfig((sys.argv[1],), Path(sys.argv[2])), TokenizerConfig("byte"))
before = peak()
corpus = prepare(DataConfig((sys.argv[3],), Path(sys.argv[2])), TokenizerConfig("byte"))
print(corpus.documents, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's memory so")
@pytest.mark.parametrize("form", ["jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_documents(tmp_path, form):
    """200,000 short documents take less than 20 MB more than 2,000: a list of their digests alone would be 25."""
    paths = []
    for count in (2000, 200_000):
        texts = [f"document {i}" for i in range(count)]
        path = tmp_path / f"{count}.{form}"
        paths.append(parquet(path, texts) if form == "parquet" else write(path, gzip.compress(lines(texts), 1)))
    words = [sys.executable, "-c", MEMORY, paths[0], tmp_path / "cache", paths[1]]
    count, grown = map(int, subprocess.run(words, capture_output=True, check=True).stdout.split())
    assert count == 200_000
    assert grown < 20_000  # KiB


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    draw = random.Random(0)
    path = parquet(tmp_path / "x.parquet", [draw.randbytes(1000).hex() for _ in range(10_000)], use_dictionary=False)
    held = [pa.total_allocated_bytes() for _ in Source("x", path, 0, kind="parquet").documents("strict")]
    assert path.stat().st_size > 10e6
    assert max(held) - held[-1] < 4e6


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_LINES = {
    "no-json": (b'{"text": "a"}\nplain words\n', r"x\.jsonl, line 2 is not a whole JSON object"),
    "cut": (b'{"text": "a"}\n{"text": "b', r"x\.jsonl, line 2 is not a whole JSON object"),
    "list": (b'\n["text"]\n', r"line 2 is not a JSON object but a list"),
    "field": (b'{"body": "a", "id": 3}\n', r"line 1 has no field 'text': it has body, id; .*--text-field"),
    "nothing": (b"{}\n", r"line 1 has no field 'text': it has nothing"),
    "number": (b'{"text": "a"}\n{"text": 3}\n', r"line 2: the field 'text' is not text but a number"),
    "null": (b'{"text": null}\n', r"line 1: the field 'text' is not text but null"),
    "latin1": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"line 2 is not valid UTF-8: byte 13 of the line \(0xe9\)"),
    "utf16": ('{"text": "a"}\n'.encode("utf-16"), r"line 1 is not valid UTF-8 \(it looks like UTF-16\)"),
    "surrogate": (b'{"text": "a\\ud800"}\n', r"line 1: the field 'text' holds the lone surrogate U\+D800"),
    "deep": (b'{"text": ' + b"[" * 100_000, r"line 1 is not a JSON object that can be read|line 1 is not a whole"),
    "blank": (b"\n\n", r"is empty: it holds no document"),
    "empty-texts": (b'{"text": ""}\n', r"is empty: it holds no document"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_json_lines_say_where(tmp_path, make, case):
    content, message = BAD_LINES[case]
    with pytest.raises(UserError, match=message) as caught:
        make(write(tmp_path / "x.jsonl", content))
    assert "x.jsonl" in str(caught.value)
    assert list((tmp_path / "cache").glob("corpora/*")) == []


def test_replaced_bytes_of_json_lines(tmp_path):
    path = write(tmp_path / "x.jsonl", b'{"text": "caf\xe9"}\n{"text": "a\\ud800b"}\n')
    assert documents(path, "replace") == ["caf\ufffd", "a\ufffdb"]


def test_a_line_without_end_is_refused(tmp_path, make, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_LINE", 1000)
    monkeypatch.setattr(readers, "_CHUNK", 100)
    with pytest.raises(UserError, match=r"x\.jsonl, line 2 has more than 1000 bytes"):
        make(write(tmp_path / "x.jsonl", b'{"text": "a"}\n' + b"x" * 2000))


@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("damage", ["cut", "header", "middle", "trailing"])
def test_damaged_packed_file(tmp_path, make, packing, kind, damage):
    if (packing, damage) == ("gz", "trailing"):
        damage = "cut"  # what follows is left out: tests/test_formats.py
    content = lines([POEM] * 3) if kind == "jsonl" else POEM.encode() * 3
    data = PACK[f".{packing}"](content)
    middle = len(data) // 2
    data = {
        "cut": data[:-3],
        "header": b"no archive" + data,
        "middle": data[:middle] + bytes(b ^ 0x5A for b in data[middle : middle + 20]) + data[middle + 20 :],
        "trailing": data + b"garbage",
    }[damage]
    if (packing, damage) == ("zst", "middle"):  # zstandard writes no checksum unless asked
        data = zstandard.ZstdCompressor(write_checksum=True).compress(content)
        data = data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
    path = write(tmp_path / f"x.{kind}.{packing}", data)
    with pytest.raises(UserError, match=r"is cut short|is damaged|not (a )?whole JSON|not valid UTF-8") as caught:
        make(path, "byte")
    assert str(path) in str(caught.value)
    assert list((tmp_path / "cache").glob("corpora/*")) == []


def test_packed_text_that_is_not_utf8_says_where(tmp_path, make):
    for ending in (".gz", ".zst"):
        path = write(tmp_path / f"x.txt{ending}", PACK[ending](b"ab\ncd\xff"))
        with pytest.raises(UserError, match=r"not valid UTF-8: byte 5 \(0xff, in line 2\)"):
            make(path)


def test_bad_parquet(tmp_path, make):
    good = parquet(tmp_path / "good.parquet", TEXTS * 100, row_group_size=50).read_bytes()
    hole = good[:100] + bytes(300) + good[400:]
    for damaged in (good[:-20], b"PAR1" + good[300:], b"PAR1", b"text, no Parquet", hole):
        with pytest.raises(UserError, match=r"bad\.parquet is not a whole Parquet file") as caught:
            make(write(tmp_path / "bad.parquet", damaged))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"has no column 'body': it has id, text; .*--text-field"):
        make(tmp_path / "good.parquet", text_field="body")
    with pytest.raises(UserError, match=r"column 'id' is not text but int64"):
        make(tmp_path / "good.parquet", text_field="id")
    with pytest.raises(UserError, match=r"null\.parquet, row 2: the column 'text' is not text but null"):
        make(parquet(tmp_path / "null.parquet", ["a", None]))
    with pytest.raises(UserError, match="is empty"):
        make(parquet(tmp_path / "none.parquet", []))
    twice = pa.Table.from_arrays([pa.array(TEXTS), pa.array(TEXTS)], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet has 2 columns 'text': keep one of them"):
        make(tmp_path / "twice.parquet")


def test_parquet_with_strings_that_are_not_utf8(tmp_path, make):
    raw = pa.array([b"ok", b"caf\xe9"], pa.binary())
    text = pa.StringArray.from_buffers(2, *raw.buffers()[1:])
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet, row 2 is not valid UTF-8: byte 3 of the text \(0xe9\)"):
        make(tmp_path / "x.parquet")
    assert documents(tmp_path / "x.parquet", "replace") == ["ok", "caf\ufffd"]


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("x.parquet", "pyarrow", "pyarrow"),
        ("x.jsonl.zst", "zstandard", "zstandard"),
        ("hf:owner/name", "datasets", "datasets"),
    ],
)
def test_a_missing_package_is_named(tmp_path, make, monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.{module}", None)
    with pytest.raises(UserError, match=rf"need the package {package}, .*: pip install {package}$"):
        make(name if name.startswith("hf:") else write(tmp_path / name, b"x"))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_file_that_changes_while_it_is_read(tmp_path, make, form):
    path = tmp_path / f"x.{form}"

    def fill(texts):
        return parquet(path, texts) if form == "parquet" else write(path, lines(texts))

    fill(TEXTS)
    with pytest.raises(UserError, match=r"has changed \(sha256"):
        make(path, "bpe", progress=lambda *_: fill([*TEXTS, "more"]))


def test_a_source_says_what_decides_its_text():
    plain = Source("x", Path("x"), 1)
    assert plain.form == ["utf-8", None]


@pytest.mark.parametrize("limit", [1, 9, 10, 11, 19, 20, 21, 30])
def test_a_limit_anywhere_in_packed_blocks(tmp_path, monkeypatch, limit):
    blocks = [b"0123456789", b"abcdefghij", b"klmno"]
    asked = []
    monkeypatch.setattr(readers, "unpacked", lambda *_: (asked.append(block) or block for block in blocks))
    source = Source("x", write(tmp_path / "x", b"packed"), 6, packing="gz", limit=limit)
    assert "".join(source.chunks("strict")) == b"".join(blocks)[:limit].decode()
    assert len(asked) == min(3, -(-limit // 10))  # no more than is needed is unpacked


def test_text_of_bytes_that_are_not_utf_8_counts_as_what_replaces_them(tmp_path):
    (source,) = find_sources(data_of(write(tmp_path / "x.jsonl", b'{"text": "a\xff"}\n')), tmp_path / "downloads")
    assert source.text_bytes(100) == len("a\ufffd".encode())
