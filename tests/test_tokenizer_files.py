"""Tokenizers on disk: saved and loaded, and files that are refused."""

import errno
import hashlib
import json
import subprocess
import sys

import pytest
import tiktoken

from gpt import files
from gpt.errors import UserError
from gpt.tokenizer import (
    DOCUMENT,
    CharTokenizer,
    load_tokenizer,
)
from tests.tokenizer_checks import BPE, BYTE, CHAR, TEXT, make_bpe


@pytest.mark.parametrize("kind", ["char", "char+document", "byte", "bpe", "named"])
def test_save_and_load(tmp_path, kind, named, monkeypatch):
    kinds = {"char": CharTokenizer("\n aé🙂"), "char+document": CHAR, "byte": BYTE, "bpe": BPE, "named": named}
    tokenizer, path = kinds[kind], tmp_path / "tokenizer.json"
    tokenizer.save(path)
    monkeypatch.setattr(tiktoken, "get_encoding", None)  # the file is enough
    loaded = load_tokenizer(path)
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.document_token) == (tokenizer.vocab_size, tokenizer.document_token)
    assert (loaded.token_bytes == tokenizer.token_bytes).all()
    text = "a\n a" if kind == "char" else TEXT
    assert loaded.encode(text) == tokenizer.encode(text)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_fingerprint_is_of_the_saved_bytes_and_tells_tokenizers_apart(tmp_path):
    path = tmp_path / "tokenizer.json"
    BPE.save(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == BPE.fingerprint
    others = [CHAR, BYTE, BPE, make_bpe(599), CharTokenizer("ab"), CharTokenizer("ab", document_token=True)]
    assert len({tokenizer.fingerprint for tokenizer in others}) == len(others)


def damaged(tokenizer, **changes) -> bytes:
    form = json.loads(tokenizer._serialized)
    return json.dumps(form | changes).encode()


TOKENS = json.loads(BPE._serialized)["tokens"]
BAD_FILES = {
    "empty": b"",
    "truncated": BPE._serialized[:5000],
    "not-json": b"\x80\x04\x95pickle",
    "nested": b"[" * 100_000,
    "a-list": b"[]",
    "foreign": b'{"version": "1.0", "model": {"type": "BPE"}}',
    "newer": damaged(BPE, version=2),
    "other-kind": damaged(BPE, kind="sentencepiece"),
    "kind-is-a-list": damaged(BPE, kind=["bpe"]),
    "no-tokens": damaged(BPE, tokens=None),
    "tokens-are-numbers": damaged(BPE, tokens=[1, 2]),
    "token-twice": damaged(BPE, tokens=[*TOKENS, TOKENS[300]], special_tokens={}),
    "token-empty": damaged(BPE, tokens=[*TOKENS, ""], special_tokens={}),
    "byte-missing": damaged(BPE, tokens=TOKENS[1:]),
    "bad-base64": damaged(BPE, tokens=[*TOKENS[:-1], "*"]),
    "bad-pattern": damaged(BPE, pattern="(unclosed"),
    "empty-pattern": damaged(BPE, pattern=""),
    "pattern-of-nothing": damaged(BPE, pattern="x*"),
    "pattern-of-some": damaged(BPE, pattern=r"\w+"),
    "no-pattern": damaged(BPE, pattern=7),
    "special-taken": damaged(BPE, special_tokens={DOCUMENT: 5}),
    "special-negative": damaged(BPE, special_tokens={DOCUMENT: -1}),
    "special-huge": damaged(BPE, special_tokens={DOCUMENT: 10**12}),
    "special-true": damaged(BPE, special_tokens={DOCUMENT: True}),
    "special-twice": damaged(BPE, special_tokens={DOCUMENT: 599, "<|b|>": 599}),
    "special-empty": damaged(BPE, special_tokens={"": 599}),
    "special-list": damaged(BPE, special_tokens=[DOCUMENT]),
    "chars-missing": damaged(CHAR, characters=None),
    "chars-unsorted": damaged(CHAR, characters="ba"),
    "chars-double": damaged(CHAR, characters="aab"),
    "chars-surrogate": damaged(CHAR, characters="a\ud800"),
    "chars-document": damaged(CHAR, document_token=1),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("place", ["missing.json", "."])
def test_file_that_cannot_be_read(tmp_path, place):
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path / place)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    BYTE.save(path)
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        BPE.save(path)
    assert load_tokenizer(path).fingerprint == BYTE.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_character_run_loads_no_tokenizer_library():
    code = "import sys, gpt.corpus; print(sorted({'tiktoken', 'tokenizers', 'requests', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
