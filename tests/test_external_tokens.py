"""Other programs' token files: nanoGPT's and llm.c's, read as they are, and every one that is not whole."""

import gzip
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard

from gpt.data import external_tokens
from gpt.data.corpus import check_length
from gpt.data.external_tokens import TokenParts
from gpt.data.loader import target_bytes
from gpt.data.mixture import Mixture
from gpt.data.packing import make_loader, validation_batches
from gpt.data.token_files import read_tokens
from gpt.data.tokenizers import ByteTokenizer
from gpt.errors import UserError
from tests.corpus_checks import POEM, sides, write

IDS = np.concatenate([np.concatenate([[256], np.frombuffer(POEM.encode(), np.uint8)]) for _ in range(3)])


def nanogpt(path: Path, ids=IDS) -> Path:
    return write(path, np.asarray(ids, "<u2").tobytes())


def llm_c(path: Path, ids=IDS, magic=20240520, version=1, width=2, tokens=None) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if tokens is None else tokens
    return write(path, header.tobytes() + np.asarray(ids, f"<u{width}").tobytes())


def llama(path: Path, ids=IDS, **options) -> Path:
    return llm_c(path, ids, **{"magic": 20240801, "version": 7, "width": 4, **options})


KINDS = {"nanogpt": nanogpt, "llm.c": llm_c, "llm.c-uint32": llama}


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_mapped_in_place(tmp_path, make, kind):
    folder = tmp_path / "data"
    KINDS[kind](folder / "train.bin")
    KINDS[kind](folder / "val.bin", IDS[:500])
    write(folder / "meta.pkl", b"\x80\x04never read")
    write(folder / "input.txt", "not read either")
    corpus = make(folder, "byte")
    train, val = (read_tokens(path, corpus.tokenizer) for path in (corpus.train, corpus.val))
    assert isinstance(train.base, np.memmap)
    assert Path(train.base.filename) == folder / "train.bin"
    assert train.dtype == (np.uint32 if kind == "llm.c-uint32" else np.uint16)
    assert (train.tolist(), val.tolist()) == (IDS.tolist(), IDS[:500].tolist())
    assert (corpus.train_tokens, corpus.val_tokens, corpus.documents) == (len(IDS), 500, 4)
    assert (corpus.train_bytes, corpus.val_bytes) == (len(POEM.encode()) * 3, 499)
    assert [name for name, *_ in corpus.sources] == [str(folder / "train.bin"), str(folder / "val.bin")]
    assert sum(path.stat().st_size for path in corpus.directory.iterdir()) < 3000
    check_length(corpus, 100)


def test_files_of_a_glob_are_joined_in_order(tmp_path, make):
    for i, part in enumerate(np.array_split(IDS, 5)):
        llm_c(tmp_path / f"fineweb_train_{i:06}.bin", part)
    llm_c(tmp_path / "fineweb_val_000000.bin", IDS[:300])
    corpus = make(tmp_path / "*.bin", "byte")
    train = read_tokens(corpus.train, corpus.tokenizer)
    assert isinstance(train, TokenParts)
    assert np.asarray(train).tolist() == IDS.tolist()
    assert corpus.val_tokens == 300
    assert len(corpus.sources) == 6
    one = make((tmp_path / "fineweb_train_000003.bin", tmp_path / "fineweb_val_000000.bin"), "byte")
    assert read_tokens(one.train, one.tokenizer).tolist() == np.array_split(IDS, 5)[3].tolist()


@pytest.mark.parametrize("cuts", [1, 3])
def test_without_validation_files_the_tail_is_for_validation(tmp_path, make, cuts):
    for i, part in enumerate(np.array_split(IDS, cuts)):
        nanogpt(tmp_path / f"{i}.bin", part)
    corpus = make(tmp_path / "*.bin", "byte", val_fraction=0.5)
    train, val = (np.asarray(read_tokens(path, corpus.tokenizer)) for path in (corpus.train, corpus.val))
    assert [*train, *val] == IDS.tolist()
    assert len(train) == len(IDS) // 2


def test_parts_support_what_loaders_need(tmp_path):
    whole = np.arange(1000, dtype=np.uint16) % 250
    parts = TokenParts([whole[:1], whole[1:400], whole[400:410], whole[410:].astype(np.uint32)])
    assert (len(parts), parts.shape, parts.dtype) == (1000, (1000,), np.uint32)
    assert (parts[-1], parts[0], parts[409]) == (whole[-1], 0, whole[409])
    for start, stop in [(0, 1000), (0, 1), (399, 411), (5, 5), (1000, 2000), (-3, None), (0, 400), (10, 5)]:
        assert parts[start:stop].tolist() == whole[start:stop].tolist()
    assert (parts == 7).tolist() == (whole == 7).tolist()
    with pytest.raises(IndexError):
        parts[1000]
    with pytest.raises(IndexError, match="steps of 1"):
        parts[::2]
    assert target_bytes(parts, ByteTokenizer()) == 999


@pytest.mark.parametrize("packing", ["stream", "documents", "best_fit"])
def test_the_loader_reads_several_files_in_place(packing, monkeypatch):
    """They may be far larger than memory: never are all of them read at once."""
    whole = np.arange(1000, dtype=np.uint16) % 250
    parts = TokenParts([whole[:1], whole[1:400], whole[400:410], whole[410:]])
    monkeypatch.setattr(TokenParts, "__array__", lambda *args, **options: pytest.fail("all tokens were read"))
    options = {"batch_size": 7, "seq_len": 16}
    loaders = [make_loader(tokens, packing, 249, seed=3, **options) for tokens in (whole, parts)]
    for _ in range(20):
        ours, theirs = (loader.next_batch() for loader in loaders)
        assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))
    batches = [list(validation_batches(tokens, packing, 249, **options)) for tokens in (whole, parts)]
    assert all(a.equal(b) for ours, theirs in zip(*batches, strict=True) for a, b in zip(ours, theirs, strict=True))


def test_a_file_is_hashed_once(tmp_path, make, monkeypatch):
    path = nanogpt(tmp_path / "x.bin")
    first = make(path, "byte")
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    (record,) = (tmp_path / "cache/hashes").iterdir()  # where an earlier version has left it too
    status = path.stat()
    state = [status.st_size, status.st_mtime_ns, status.st_ino]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (record.name, json.loads(record.read_bytes())) == (f"{name}.json", {"state": state, "sha256": digest})
    with monkeypatch.context() as patch:
        patch.setattr(external_tokens.Source, "hashed", None)
        patch.setattr(external_tokens, "count_ids", None)
        assert make(path, "byte").directory == first.directory
    nanogpt(path, IDS[::-1])
    again = make(path, "byte")
    assert again.directory != first.directory
    assert read_tokens(again.train, again.tokenizer)[0] == IDS[-1]


@pytest.mark.parametrize("change", ["touched", "moved"])
def test_files_that_were_touched_or_moved_are_checked_again(tmp_path, make, change, caplog):
    path = nanogpt(tmp_path / "a" / "x.bin")
    first = make(path, "byte")
    if change == "touched":
        os.utime(path, (0, 0))
    else:
        path = shutil.move(path.parent, tmp_path / "b") / "x.bin"
    again = make(path, "byte")
    assert again.directory == first.directory
    assert "checking again" in caplog.text
    assert sides(again) == sides(first)


def test_a_run_on_token_files(tmp_path, make, named):
    """A named tokenizer's ids, beyond a byte."""
    ids = np.asarray(named.encode(POEM))
    assert ids.max() > 256
    llm_c(tmp_path / "train.bin", ids)
    llm_c(tmp_path / "val.bin", ids[:100])
    corpus = make(tmp_path, "gpt2")
    assert corpus.tokenizer.fingerprint == named.fingerprint
    assert sides(corpus)[0] == POEM


# --- what is refused --------------------------------------------------------------------------------------------------

BAD = {
    "empty": (lambda p: write(p, b""), "is not a token file: its 0 bytes"),
    "odd": (lambda p: write(p, b"abc"), "is not a token file: its 3 bytes"),
    "version": (lambda p: llm_c(p, version=2), "llm.c token file of version 2: magic 20240520 needs version 1"),
    "cut": (lambda p: write(p, llm_c(p).read_bytes()[:-2]), "is damaged: .* bytes cannot hold"),
    "count": (lambda p: llm_c(p, tokens=7), "is damaged: .* its 7 tokens of 2 bytes"),
    "negative": (lambda p: llm_c(p, tokens=-7), "is damaged: .* its -7 tokens"),
    "wide": (lambda p: llama(p, width=2), "is damaged: .* tokens of 4 bytes"),
    "id": (
        lambda p: nanogpt(p, [1, 2, 257, 3]),
        "holds the id 257 at byte 4, but the tokenizer has 257 tokens: .*--tokenizer",
    ),
    "tail": (lambda p: nanogpt(p, [1, 2, 257]), "holds the id 257 at byte 4, but the tokenizer has 257"),
    "large": (lambda p: llama(p, [1, 2**32 - 1, 5]), "holds the id 4294967295 at byte 1028"),
    "pickle": (lambda p: write(p, b"\x80\x04\x95\x10\x00\x00"), "holds the id 1152 at byte 0"),
    "short": (lambda p: nanogpt(p, [1]), "too short to be split"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_the_reason(tmp_path, make, case):
    spoil, message = BAD[case]
    spoil(tmp_path / "x.bin")
    with pytest.raises(UserError, match=message) as caught:
        make(tmp_path / "x.bin", "byte")
    assert str(tmp_path / "x.bin") in str(caught.value)
    assert list((tmp_path / "cache").glob("corpora/*")) == []


def npy_of(ids) -> bytes:
    box = io.BytesIO()
    np.save(box, np.asarray(ids, "<u2"))
    return box.getvalue()


MANY = np.random.default_rng(0).integers(0, 50257, 600)
OTHERS = {
    "text": (POEM.encode(), "text: give it another name, such as .txt"),
    "odd text": (b"plain words\n" * 20 + b"x", "text: give it another name"),
    "gzip": (gzip.compress(POEM.encode()), r"compressed data \(.gz\): unpack it first"),
    "zstd": (zstandard.compress(POEM.encode()), r"compressed data \(.zst\)"),
    "npy": (npy_of(MANY), "a NumPy array"),
    "zip": (b"PK\x03\x04" + bytes(400), "a ZIP archive"),
    "uint32": (MANY.astype("<u4").tobytes(), "ids of 4 bytes, it seems: write them as uint16"),
    "uint32 of a large vocabulary": ((MANY * 3).astype("<u4").tobytes(), "ids of 4 bytes"),
    "int64": (MANY.astype("<i8").tobytes(), "ids of 8 bytes"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_content_named_bin_is_refused(tmp_path, kind):
    """Two letters are an id of gpt2's, and so are the halves of a wider id."""
    content, message = OTHERS[kind]
    with pytest.raises(UserError, match=rf"x.bin is not a token file of uint16 ids: it holds {message}"):
        external_tokens.look_at(write(tmp_path / "x.bin", content))


@pytest.mark.parametrize("ids", [MANY, MANY % 65, MANY % 300, MANY % 7, [640, *MANY], [0x8B1F, *MANY]], ids=range(6))
def test_ids_of_any_vocabulary_are_accepted(tmp_path, ids):
    assert external_tokens.look_at(nanogpt(tmp_path / "x.bin", ids)).tokens == len(ids)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_tokenizer_must_be_named(tmp_path, make, kind):
    nanogpt(tmp_path / "train.bin")
    nanogpt(tmp_path / "val.bin")
    with pytest.raises(UserError, match=r"train\.bin holds tokens, not text .*: name the tokenizer .*--tokenizer gpt2"):
        make(tmp_path, kind)
    write(tmp_path / "meta.pkl", b"")
    for corpus in (tmp_path, tmp_path / "train.bin"):
        with pytest.raises(UserError, match=r"train\.bin holds .* from \(meta\.pkl beside it is not read"):
            make(corpus, kind)


def test_options_and_sources_that_exclude_token_files_are_refused(tmp_path, make):
    path, text = nanogpt(tmp_path / "data_train.bin"), write(tmp_path / "x.txt", POEM)
    with pytest.raises(UserError, match=r"x\.txt is text, and others are token files"):
        make((path, text), "byte")
    with pytest.raises(UserError, match="max_corpus_bytes counts bytes of text"):
        make(path, "byte", max_corpus_bytes=10)
    with pytest.raises(UserError, match=r"v_val\.bin is for validation, by its name"):
        make(nanogpt(tmp_path / "v_val.bin"), "byte")


def test_token_files_cannot_be_scored(tmp_path):
    from gpt.evaluation.command import Arguments, main

    with pytest.raises(UserError, match="cannot be scored"):
        main(Arguments("a run", (str(nanogpt(tmp_path / "val.bin")),)))


def test_other_folders_are_text(tmp_path, make, caplog):
    nanogpt(tmp_path / "texts" / "train.bin")
    write(tmp_path / "texts" / "a.txt", POEM)
    assert "".join(sides(make(tmp_path / "texts"))) == POEM
    assert "1 binary files" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("files"),
        lambda index: index["files"].clear(),
        lambda index: index["files"][0].update(width="2"),
        lambda index: index["files"][0].update(tokens=10**9),
        lambda index: index["files"][0].update(offset=-2),
        lambda index: index["files"][0].update(tokens=0),
        lambda index: index["files"][0].update(path=3),
        lambda index: index["files"][0].update(other=3),
        lambda index: index.update(files="abc"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, make, change):
    corpus = make((nanogpt(tmp_path / "x.bin"), nanogpt(tmp_path / "y.bin")), "byte")
    index = json.loads(corpus.train.read_bytes())
    change(index)
    corpus.train.write_bytes(json.dumps(index).encode())
    with pytest.raises(UserError, match=r"train\.tokens is damaged"):
        read_tokens(corpus.train, corpus.tokenizer)


def test_an_index_of_another_tokenizer_is_refused(tmp_path, make, named):
    corpus = make(nanogpt(tmp_path / "x.bin"), "byte")
    with pytest.raises(UserError, match="made by another tokenizer"):
        read_tokens(corpus.train, named)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_ids_are_counted_in_parts(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(external_tokens, "_CHUNK", chunk)
    read, ids = [], [0, 0, 256, 3, 3, 3, 300]
    file = external_tokens.look_at(llama(tmp_path / "x.bin", ids[:6]))
    uses = external_tokens.count_ids(file, ByteTokenizer(), read.append)
    assert {i: n for i, n in enumerate(uses.tolist()) if n} == {0: 2, 256: 1, 3: 3} and len(uses) == 257
    assert sum(read) == 24 and max(read) == 4 * min(chunk, 6)
    with pytest.raises(UserError, match="the id 300 at byte 1048"):
        external_tokens.count_ids(external_tokens.look_at(llama(tmp_path / "x.bin", ids)), ByteTokenizer())


@pytest.mark.parametrize("packing", ["stream", "documents", "best_fit"])
def test_a_mixture_reads_several_files(packing):
    whole = np.arange(1000, dtype=np.uint16) % 250
    parts = TokenParts([whole[:1], whole[1:400], whole[400:]])
    options = {"batch_size": 7, "seq_len": 16, "seed": 3}
    mixed = (Mixture([make_loader(t, packing, 249, **options)] * 2, (1, 2), **options) for t in (whole, parts))
    ours, theirs = (loader.next_batch() for loader in mixed)
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def test_a_missing_token_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the token file .*gone.bin: No such file"):
        external_tokens.look_at(tmp_path / "gone.bin")


def test_a_glob_searches_folders(tmp_path, make):
    nanogpt(tmp_path / "texts/a/deep/train.bin")
    nanogpt(tmp_path / "texts/val.bin")
    assert make(tmp_path / "texts/**/*.bin", "byte").train_tokens == len(IDS)
