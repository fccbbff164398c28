"""Tokenizers on disk: saved and loaded, and files that are refused."""

import errno
import hashlib
import json
import subprocess
import sys

import pytest
import tiktoken

from gpt import files
from gpt.data.tokenizers import DOCUMENT, CharTokenizer, load_tokenizer
from gpt.errors import UserError
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
    "empty": (b"", "Expecting value"),
    "truncated": (BPE._serialized[:5000], "Unterminated string"),
    "not-json": (b"\x80\x04\x95pickle", "'utf-8' codec can't decode"),
    "nested": (b"[" * 100_000, "recursion depth"),
    "a-list": (b"[]", '"format" is not "gpt-tokenizer"'),
    "foreign": (b'{"version": "1.0", "model": {"type": "BPE"}}', '"format" is not "gpt-tokenizer"'),
    "newer": (damaged(BPE, version=2), '"version" is 2, known is 1'),
    "other-kind": (damaged(BPE, kind="sentencepiece"), "\"kind\" is 'sentencepiece', known are char, byte and bpe"),
    "kind-is-a-list": (damaged(BPE, kind=["bpe"]), "\"kind\" is ['bpe'], known are"),
    "no-tokens": (damaged(BPE, tokens=None), '"tokens" is not a list of strings'),
    "tokens-are-numbers": (damaged(BPE, tokens=[1, 2]), '"tokens" is not a list of strings'),
    "token-twice": (damaged(BPE, tokens=[*TOKENS, TOKENS[300]], special_tokens={}), '"tokens" holds one twice'),
    "token-empty": (damaged(BPE, tokens=[*TOKENS, ""], special_tokens={}), '"tokens" lacks single bytes'),
    "byte-missing": (damaged(BPE, tokens=TOKENS[1:]), '"tokens" lacks single bytes'),
    "bad-base64": (damaged(BPE, tokens=[*TOKENS[:-1], "*"]), '"tokens" holds bad base64 ('),
    "bad-pattern": (damaged(BPE, pattern="(unclosed"), "Opening parenthesis without closing"),
    "empty-pattern": (damaged(BPE, pattern=""), "pattern '' cannot split text"),
    "pattern-of-nothing": (damaged(BPE, pattern="x*"), "pattern 'x*' cannot split text"),
    "pattern-of-some": (damaged(BPE, pattern=r"\w+"), "leaves out a part of"),
    "no-pattern": (damaged(BPE, pattern=7), '"name" or "pattern" is not a string'),
    "special-taken": (damaged(BPE, special_tokens={DOCUMENT: 5}), '"special_tokens" holds an id that is taken'),
    "special-negative": (damaged(BPE, special_tokens={DOCUMENT: -1}), "holds an impossible id"),
    "special-huge": (damaged(BPE, special_tokens={DOCUMENT: 10**12}), "holds an impossible id"),
    "special-true": (damaged(BPE, special_tokens={DOCUMENT: True}), "holds an impossible id"),
    "special-twice": (damaged(BPE, special_tokens={DOCUMENT: 599, "<|b|>": 599}), "holds an id that is taken"),
    "special-empty": (damaged(BPE, special_tokens={"": 599}), '"special_tokens" is not a table'),
    "special-list": (damaged(BPE, special_tokens=[DOCUMENT]), '"special_tokens" is not a table'),
    "chars-missing": (damaged(CHAR, characters=None), '"characters" or "document_token" is wrong'),
    "chars-unsorted": (damaged(CHAR, characters="ba"), '"characters" are not sorted and distinct'),
    "chars-double": (damaged(CHAR, characters="aab"), '"characters" are not sorted and distinct'),
    "chars-surrogate": (damaged(CHAR, characters="a\ud800"), "surrogates not allowed"),
    "chars-document": (damaged(CHAR, document_token=1), '"characters" or "document_token" is wrong'),
    "other-format": (damaged(BYTE, format="other"), '"format" is not "gpt-tokenizer"'),
    "no-version": (damaged(BYTE, version=None), '"version" is None, known is 1'),
    "normalization": (damaged(BPE, normalization="NFKC"), '"normalization" or "document" is wrong'),
    "document": (damaged(BPE, document=3), '"normalization" or "document" is wrong'),
    "specials-missing": (damaged(BPE, special_tokens=None), '"special_tokens" is not a table'),
    "first-missing": (damaged(CHAR, first="?"), '"first" is not one of "characters"'),
    "first-number": (damaged(CHAR, first=1), '"first" is not one of "characters"'),
    "name-number": (damaged(BPE, name=1), '"name" or "pattern" is not a string'),
}


@pytest.mark.parametrize(("content", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused_by_name_and_reason(tmp_path, content, reason):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path} is not a tokenizer of this program, or is damaged: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("place", ["missing.json", "."])
def test_an_unreadable_file_is_refused(tmp_path, place):
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
