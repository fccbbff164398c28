"""Token files: the header is checked before any token is read."""

from pathlib import Path

import numpy as np
import pytest

from gpt.data.token_files import HEADER_BYTES, TokenWriter, read_tokens
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt.errors import UserError


@pytest.fixture
def token_file(tmp_path) -> Path:
    with TokenWriter(tmp_path / "x.tokens", ByteTokenizer()) as writer:
        writer.append(np.arange(257))
        writer.append(np.array([7], np.int64))
    return tmp_path / "x.tokens"


def test_round_trip(token_file):
    tokens = read_tokens(token_file, ByteTokenizer(), verify=True)
    assert isinstance(tokens.base, np.memmap)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [*range(257), 7]
    assert token_file.stat().st_size == HEADER_BYTES + 2 * 258
    assert token_file.read_bytes()[:20] == b"GPTSHARD" + bytes([1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 0, 0])
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_a_large_vocabulary_takes_uint32(tmp_path):
    tokenizer = CharTokenizer("".join(map(chr, range(0xE000, 0xE000 + 70_000))))
    with TokenWriter(tmp_path / "x.tokens", tokenizer) as writer:
        writer.append(np.array([69_999, 0]))
    tokens = read_tokens(tmp_path / "x.tokens", tokenizer)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [69_999, 0]


def test_another_tokenizer_is_refused(token_file):
    with pytest.raises(UserError, match=r"x\.tokens was made by another tokenizer"):
        read_tokens(token_file, CharTokenizer("ab"))


def edited(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: b"", "not a token file"),
        (lambda c: c[:100], "not a token file"),
        (lambda c: edited(c, 0, b"NANOGPT!"), "not a token file"),
        (lambda c: edited(c, 8, b"\x02"), "version 2, 2 bytes per token: known is version 1, 2 or 4 bytes"),
        (lambda c: edited(c, 12, b"\x03"), "3 bytes per token"),
        (lambda c: c[:-1], "damaged"),
        (lambda c: c + b"\0\0", "damaged"),
        (lambda c: edited(c[:HEADER_BYTES], 16, bytes(8)), "damaged"),
        (lambda c: edited(c, 16, b"\xff" * 8), "damaged"),
        (lambda c: edited(c, 30, b"\x00\x01"), "another tokenizer"),
    ],
    ids=["empty", "short", "magic", "version", "width", "cut", "longer", "no-tokens", "count", "fingerprint"],
)
def test_a_damaged_header_or_size_is_refused(token_file, damage, message):
    token_file.write_bytes(damage(token_file.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        read_tokens(token_file, ByteTokenizer())
    assert str(token_file) in str(caught.value)


def test_a_changed_token_fails_the_checksum(token_file):
    token_file.write_bytes(edited(token_file.read_bytes(), HEADER_BYTES + 10, b"\xff"))
    with pytest.raises(UserError, match=r"x\.tokens is damaged: .* checksum"):
        read_tokens(token_file, ByteTokenizer(), verify=True)


def test_an_unfinished_file_is_refused(tmp_path):
    def fail(path):
        with TokenWriter(path, ByteTokenizer()) as writer:
            writer.append(np.arange(10))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fail(tmp_path / "x.tokens")
    with pytest.raises(UserError, match="never finished"):
        read_tokens(tmp_path / "x.tokens", ByteTokenizer())


def test_a_writer_continues_an_unfinished_file(tmp_path):
    """Tokens written after the state are cut off, even if no others follow."""
    path, tokenizer = tmp_path / "x.tokens", ByteTokenizer()
    writer = TokenWriter(path, tokenizer)
    writer.append(np.arange(100))
    state = writer.state()
    writer.append(np.arange(50))
    writer.close()
    for more in ([], [7]):
        with TokenWriter(path, tokenizer, state) as writer:
            assert writer.tokens == 100
            writer.append(np.array(more, np.uint16))
        assert read_tokens(path, tokenizer, verify=True).tolist() == [*range(100), *more]
    for wrong in ({"tokens": 102, "sha256": state["sha256"]}, {"tokens": 100, "sha256": "0"}):
        with pytest.raises(UserError, match=r"x\.tokens has changed"):
            TokenWriter(path, tokenizer, wrong)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read the token file"):
        read_tokens(tmp_path / "none.tokens", ByteTokenizer())
