"""Corpora: how text is split and tokenized, the cache, and every bad input's sentence."""

import codecs
import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.data import corpus as corpus_module
from gpt.data import readers
from gpt.data import tokenizers as tokenizer_module
from gpt.data.config import DataConfig
from gpt.data.corpus import Corpus, check_length
from gpt.data.provenance import write_provenance
from gpt.data.readers import Source
from gpt.data.split import find_split, read_documents
from gpt.data.token_files import read_tokens
from gpt.data.tokenizers import DOCUMENT, CharTokenizer, UnknownCharacter
from gpt.errors import UserError
from tests.corpus_checks import POEM, calm, folder_of, sides, write

# --- one document -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_one_document_is_split_at_its_tail_without_loss(tmp_path, make, kind):
    corpus = make(write(tmp_path / "poem.txt", POEM), kind)
    train, val = sides(corpus)
    assert train + val == POEM
    assert (len(train.encode()), len(val.encode())) == (corpus.train_bytes, corpus.val_bytes)
    assert 0 <= int(0.9 * len(POEM.encode())) - corpus.train_bytes < 4
    assert corpus.documents == 1
    digest = hashlib.sha256(POEM.encode()).hexdigest()
    assert corpus.sources == ((str(tmp_path / "poem.txt"), len(POEM.encode()), digest),)


def test_ascii_text_is_split_at_nine_tenths(tmp_path, make):
    """Tiny Shakespeare's split: text[:int(0.9 * n)] and the rest; exactly its characters, no document token."""
    for n in (10, 11, 1115, 1_115_394 // 40):
        text = ("First Citizen:\nBefore we proceed any further, hear me speak.\n" * n)[:n]
        corpus = make(write(tmp_path / f"{n}.txt", text))
        assert sides(corpus) == (text[: int(0.9 * n)], text[int(0.9 * n) :])
        assert (corpus.train_tokens, corpus.val_tokens) == (int(0.9 * n), n - int(0.9 * n))
        assert corpus.tokenizer.characters == "".join(sorted(set(text)))
        assert corpus.tokenizer.document_token is None


@given(text=st.text(st.sampled_from("ab\né日🙂"), min_size=2, max_size=40), fraction=st.floats(0.01, 0.99))
@settings(calm, max_examples=60)
def test_a_split_falls_between_characters_and_leaves_both_sides_some(tmp_path_factory, text, fraction):
    if not text.strip():
        text = "x" + text
    path = write(tmp_path_factory.mktemp("split") / "text", text)
    for chunk in (1, 5, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readers, "_CHUNK", chunk)
            source = Source("text", path, 0).hashed()
            (document,) = source.documents("strict")
            parts = list(find_split([source], DataConfig(val_fraction=fraction)).parts(0, document))
        train = "".join(text for side, text in parts if side == "train")
        val = "".join(text for side, text in parts if side == "val")
        assert train
        assert val
        assert train + val == text
        assert [side for side, _ in parts] == sorted(side for side, _ in parts)
        at, cut = len(train.encode()), int(len(text.encode()) * (1 - fraction))
        assert cut - 4 < at <= max(cut, len(text[0].encode()))


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_document_token_precedes_the_text_but_not_its_tail(tmp_path, make, kind):
    corpus = make(write(tmp_path / "poem.txt", POEM), kind)
    document = corpus.tokenizer.document_token
    train, val = read_tokens(corpus.train, corpus.tokenizer), read_tokens(corpus.val, corpus.tokenizer)
    assert np.flatnonzero(train == document).tolist() == [0]
    assert document not in val


def test_bpe_learns_from_the_training_part_alone(tmp_path, make):
    text = "abcdefgh " * 900 + "zyxwvuts " * 100
    corpus = make(write(tmp_path / "text", text), "bpe")
    tokens = [bytes(corpus.tokenizer.decode_bytes([i])) for i in range(corpus.tokenizer.vocab_size)]
    assert b" abcdefgh" in tokens
    assert not any(b"zy" in token for token in tokens)


@pytest.mark.parametrize("packed", [False, True])
def test_bpe_learns_from_a_limited_sample_spread_over_the_text(tmp_path, make, monkeypatch, packed):
    seen, build = [], corpus_module.build_tokenizer

    def noted(config, texts, **options):
        seen.extend(texts())
        return build(config, lambda: seen, **options)

    monkeypatch.setattr(corpus_module, "build_tokenizer", noted)
    rows = "".join(f'{{"text": "document {i:04}"}}\n' for i in range(1000)).encode()
    path = write(tmp_path / ("x.jsonl.gz" if packed else "x.jsonl"), gzip.compress(rows) if packed else rows)
    monkeypatch.setattr(corpus_module, "BPE_BYTES", path.stat().st_size // 10)
    make(path, "bpe")
    numbers = [int(text.split()[1]) for text in seen]
    if packed:  # a tenth of the file's size in bytes of text
        assert sum(map(len, seen)) - 13 < path.stat().st_size // 10 <= sum(map(len, seen))
    else:
        assert 80 <= len(seen) <= 100
        assert numbers[0] < 20 and numbers[-1] > 980


def test_char_alphabet_comes_from_the_whole_text(tmp_path, make):
    corpus = make(write(tmp_path / "text", "a" * 95 + "bcdef"))
    assert corpus.tokenizer.characters == "abcdef"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_reading_in_small_chunks_gives_the_same_tokens(tmp_path, make, kind, monkeypatch):
    path = write(tmp_path / "poem.txt", POEM)
    monkeypatch.setattr(tokenizer_module, "_SEGMENT", 200)
    whole = make(path, kind)
    tokens = [read_tokens(side, whole.tokenizer).copy() for side in (whole.train, whole.val)]
    monkeypatch.setattr(readers, "_CHUNK", 7)
    chunked = make(path, kind, fixed=whole.tokenizer)
    assert chunked.directory != whole.directory
    for side, ids in zip((chunked.train, chunked.val), tokens):
        assert (read_tokens(side, whole.tokenizer) == ids).all()
    # and they are what the tokenizer gives for the whole part at once
    monkeypatch.undo()
    train, _ = sides(whole)
    assert whole.tokenizer.encode(train) == [i for i in tokens[0] if i != whole.tokenizer.document_token]


def test_whitespace_line_ends_and_controls_are_kept(tmp_path, make):
    text = "  a\r\n\tb \n\n\x0c\r c\u2028d\x00 " * 20
    assert "".join(sides(make(write(tmp_path / "text", text)))) == text


@pytest.mark.parametrize("chunk", [3, 9, 1 << 20])  # a block begins at the second mark, or at neither
def test_byte_order_mark_is_left_out_at_the_start_only(tmp_path, make, monkeypatch, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    corpus = make(write(tmp_path / "text", codecs.BOM_UTF8 + "hello \ufeff world\n".encode()))
    assert "".join(sides(corpus)) == "hello \ufeff world\n"


def test_special_token_in_the_text_stays_text(tmp_path, make):
    for kind in ("byte", "bpe"):
        corpus = make(write(tmp_path / "text", f"a {DOCUMENT} b\n" * 50), kind)
        train = read_tokens(corpus.train, corpus.tokenizer)
        assert (train == corpus.tokenizer.document_token).sum() == 1


# --- several documents ------------------------------------------------------------------------------------------------


def documents_of(path: Path, corpus: Corpus) -> list[str]:
    ids = read_tokens(path, corpus.tokenizer)
    assert ids[0] == corpus.tokenizer.document_token
    starts = np.flatnonzero(ids == corpus.tokenizer.document_token)
    return [corpus.tokenizer.decode(part) for part in np.split(ids, starts[1:])]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_several_documents_are_separated_and_split_whole(tmp_path, make, kind):
    folder = folder_of(tmp_path / "texts")
    corpus = make(folder, kind)
    train, val = documents_of(corpus.train, corpus), documents_of(corpus.val, corpus)
    texts = [path.read_text() for path in sorted(folder.iterdir())]
    assert corpus.documents == 40
    assert train == [text for text in texts if text not in val]
    assert val == [text for text in texts if text not in train]
    assert 1 <= len(val) <= 12
    assert sum(len(text) for text in train) == corpus.train_bytes


def held_out(sources_: list[Source], **data) -> set[str]:
    split = find_split(sources_, DataConfig(**data))
    documents = enumerate(read_documents(sources_, "strict"))
    return {document.name for number, document in documents if split.side(number, document) == "val"}


def fakes(*names: object) -> list[Source]:
    return [Source(str(name), Path("x"), 1, sha256=hashlib.sha256(str(name).encode()).hexdigest()) for name in names]


def test_split_is_seeded_and_stable_when_the_corpus_grows():
    few, many = held_out(fakes(*range(500))), held_out(fakes(*range(2000)))
    assert few == many & {str(i) for i in range(500)}
    assert 150 < len(many) < 250
    assert 900 < len(held_out(fakes(*range(2000)), val_fraction=0.5)) < 1100
    assert held_out(fakes(*range(500)), split_seed=1) != few
    assert held_out(fakes(*reversed(range(500)))) == few


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("names", [(0, 1), (0, 1, 2), (0, 0), (0, 0, 0), (0, 0, 1)], ids=str)
def test_both_sides_get_a_document(names, fraction):
    documents = fakes(*names)
    split = find_split(documents, DataConfig(val_fraction=fraction))
    assert {split.side(*each) for each in enumerate(read_documents(documents, "strict"))} == {"train", "val"}


def test_a_char_run_on_other_text_needs_no_document_token(tmp_path, make):
    """An evaluated run brings its tokenizer: without a document token, documents follow each other."""
    fixed = CharTokenizer("".join(sorted(set("document number 0123456789, "))))
    corpus = make(folder_of(tmp_path / "texts"), "bpe", fixed=fixed)
    assert corpus.tokenizer is fixed
    assert corpus.train_tokens == corpus.train_bytes


# --- bytes that are not UTF-8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [3, 4, 5, 1 << 20])  # a block never is shorter than a byte order mark
@pytest.mark.parametrize(
    ("content", "offset", "line"),
    [
        (b"ab\ncd\xff", 5, 2),
        (b"\x80", 0, 1),
        ("é\n日\n".encode() + b"\xe9t\xe9", 7, 3),
        ("🙂".encode()[:3] + b"x", 0, 1),
        (b"cut short " + "🙂".encode()[:3], 10, 1),
        (codecs.BOM_UTF8 + b"abcd\n\xfe", 8, 2),
    ],
    ids=ascii,
)
def test_invalid_utf8_says_where(tmp_path, make, monkeypatch, content, offset, line, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    path = write(tmp_path / "bad.txt", content)
    with pytest.raises(UserError) as caught:
        make(path)
    found = content[offset]
    assert str(path) in str(caught.value)
    assert f"byte {offset} (0x{found:02x}, in line {line})" in str(caught.value)
    assert "--encoding-errors replace" in str(caught.value)


def test_replaced_bytes_become_the_replacement_character(tmp_path, make):
    corpus = make(write(tmp_path / "text", b"caf\xe9 and more\xff\xff text"), encoding_errors="replace")
    assert "".join(sides(corpus)) == "caf\ufffd and more\ufffd\ufffd text"


def test_utf16_is_recognised(tmp_path, make):
    with pytest.raises(UserError, match="looks like UTF-16"):
        make(write(tmp_path / "text", "hello".encode("utf-16")))


def test_latin1_in_a_folder_is_refused_and_not_left_out(tmp_path, make):
    write(tmp_path / "texts" / "a.txt", "plain")
    write(tmp_path / "texts" / "b.txt", "caf\xe9 noir".encode("latin-1"))
    with pytest.raises(UserError, match=r"b\.txt is not valid UTF-8: byte 3"):
        make(tmp_path / "texts")


# --- other bad input --------------------------------------------------------------------------------------------------


def test_a_missing_corpus_option_is_refused(make):
    with pytest.raises(UserError, match=r"no corpus is given.*--corpus"):
        make(())


@pytest.mark.parametrize("entry", ["", " "], ids=repr)
def test_an_empty_entry_is_refused(make, entry):
    with pytest.raises(UserError, match="has an empty entry"):
        make(entry)


@pytest.mark.parametrize("entry", ["missing.txt", "no/such/folder", "no*match", "ftp://host/file", "\0", "x" * 5000])
def test_a_missing_path_is_refused(make, entry):
    with pytest.raises(UserError, match=r"does not exist|leads to no text file|cannot read"):
        make(entry)


@pytest.mark.parametrize("content", [b"", codecs.BOM_UTF8], ids=repr)
def test_empty_file_names_it(tmp_path, make, content):
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        make(write(tmp_path / "empty.txt", content))


@pytest.mark.parametrize("content", [b" \n\t\r\n ", codecs.BOM_UTF8 + b" ", "\u3000\u2028".encode()], ids=repr)
def test_white_space_alone_is_refused(tmp_path, make, content):
    with pytest.raises(UserError, match="is empty: it holds nothing but white space"):
        make(write(tmp_path / "blank.txt", content))
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_one_character_cannot_be_split(tmp_path, make, kind):
    with pytest.raises(UserError, match="too short to be split"):
        make(write(tmp_path / "text", "日"), kind)


def test_a_folder_without_text_is_refused(tmp_path, make):
    (tmp_path / "texts").mkdir()
    with pytest.raises(UserError, match="leads to no text file"):
        make(tmp_path / "texts")
    write(tmp_path / "texts" / "a.png", b"\0")
    with pytest.raises(UserError, match="leads to no text file"):
        make(tmp_path / "texts")
    write(tmp_path / "texts" / "a.txt", b"")
    with pytest.raises(UserError, match="is empty"):
        make(tmp_path / "texts")


def test_pipe_is_refused(tmp_path, make):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        make(tmp_path / "pipe")


@pytest.mark.parametrize("entry", ["file", "folder"])
def test_an_unreadable_path_is_refused(tmp_path, make, monkeypatch, entry):
    """Tests may run as root, whom no mode stops: the refusal is put in by hand."""
    path = write(tmp_path / "texts" / "secret.txt", "text")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(readers, "open", refuse, raising=False)
    with pytest.raises(UserError, match=r"cannot read .*texts.*Permission denied"):
        make(path if entry == "file" else path.parent)


def test_an_unreadable_subfolder_is_refused(tmp_path, make, monkeypatch):
    write(tmp_path / "texts" / "a.txt", "text")
    write(tmp_path / "texts" / "sub" / "b.txt", "text")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        make(tmp_path / "texts")


def test_unknown_tokenizer_is_refused_before_any_work(make):
    with pytest.raises(UserError, match="did you mean 'gpt2'"):
        make("missing.txt", "gpt-2")


def test_unknown_character_names_file_and_position(tmp_path, make, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 10)
    write(tmp_path / "texts" / "a.txt", "plain words")
    path = write(tmp_path / "texts" / "b.txt", "plain words, and é")
    fixed = CharTokenizer("".join(sorted(set("plain words, and"))))
    with pytest.raises(UnknownCharacter, match=rf"'é' \(U\+00E9, .*\) at position 17 of {path}"):
        make(tmp_path / "texts", fixed=fixed)


def test_a_file_that_changes_while_being_read_is_refused(tmp_path, make):
    path = write(tmp_path / "text", POEM)

    def change(what, done, total):
        write(path, POEM.replace("quick", "quirk"))

    with pytest.raises(UserError, match=r"has changed \(sha256"):
        make(path, progress=change)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_check_length(tmp_path, make):
    corpus = make(write(tmp_path / "text", "0123456789" * 10))
    check_length(corpus, 89)
    with pytest.raises(UserError, match=r"training part has 90 tokens and seq_len 90 needs 91.*--seq-len"):
        check_length(corpus, 90)
    short = make(write(tmp_path / "short", "0123456789"))
    with pytest.raises(UserError, match="validation part has 1 tokens"):
        check_length(short, 4)


def test_the_record_names_digest_counts_sources_and_tokenizer(tmp_path, make):
    corpus = make(write(tmp_path / "poem.txt", POEM))
    write_provenance(corpus, tmp_path / "corpus.json")
    record = json.loads((tmp_path / "corpus.json").read_text())
    (source,) = record.pop("sources")
    assert source == {"name": corpus.sources[0][0], "bytes": len(POEM.encode()), "sha256": corpus.sources[0][2]}
    assert record.pop("tokenizer") == corpus.tokenizer.fingerprint
    assert {key: getattr(corpus, key) for key in record} == record
    assert record.keys() == {"digest", "documents", "train_tokens", "val_tokens", "train_bytes", "val_bytes"}


def test_one_document_beside_a_file_without_text_is_split_at_its_tail(tmp_path, make):
    write(tmp_path / "a.txt", "\ufeff")  # a byte order mark alone
    write(tmp_path / "b.txt", POEM)
    corpus = make(tmp_path)
    _, val = sides(corpus)
    assert corpus.documents == 1 and len(val.encode()) == pytest.approx(0.1 * len(POEM.encode()), abs=4)
