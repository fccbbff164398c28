"""Token files: what a header promises is checked before a token is read."""

from pathlib import Path

import numpy as np
import pytest

from gpt.data import token_files as shards
from gpt.data.token_files import HEADER_BYTES, ShardWriter, read_tokens
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt.errors import UserError

# --- token files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path) -> Path:
    with ShardWriter(tmp_path / "x.tokens", ByteTokenizer()) as writer:
        writer.append(np.arange(257))
        writer.append(np.array([7], np.int64))
    return tmp_path / "x.tokens"


def test_shard_round_trip(shard):
    tokens = read_tokens(shard, ByteTokenizer(), verify=True)
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [*range(257), 7]
    assert shard.stat().st_size == HEADER_BYTES + 2 * 258
    assert shard.read_bytes()[:20] == b"GPTSHARD" + bytes([1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 0, 0])
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_shard_of_a_large_vocabulary_is_uint32(tmp_path):
    tokenizer = CharTokenizer("".join(map(chr, range(0xE000, 0xE000 + 70_000))))
    with ShardWriter(tmp_path / "x.tokens", tokenizer) as writer:
        writer.append(np.array([69_999, 0]))
    tokens = read_tokens(tmp_path / "x.tokens", tokenizer)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [69_999, 0]


def test_shard_of_another_tokenizer_is_refused(shard):
    with pytest.raises(UserError, match=r"x\.tokens was made by another tokenizer"):
        read_tokens(shard, CharTokenizer("ab"))


def edited(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: b"", "not a token file"),
        (lambda c: c[:100], "not a token file"),
        (lambda c: edited(c, 0, b"NANOGPT!"), "not a token file"),
        (lambda c: edited(c, 8, b"\x02"), "version 2"),
        (lambda c: edited(c, 12, b"\x03"), "3 bytes per token"),
        (lambda c: c[:-1], "damaged"),
        (lambda c: c + b"\0\0", "damaged"),
        (lambda c: edited(c[:HEADER_BYTES], 16, bytes(8)), "damaged"),
        (lambda c: edited(c, 16, b"\xff" * 8), "damaged"),
        (lambda c: edited(c, 30, b"\x00\x01"), "another tokenizer"),
    ],
    ids=["empty", "short", "magic", "version", "width", "cut", "longer", "no-tokens", "count", "fingerprint"],
)
def test_bad_shard_is_refused(shard, damage, message):
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        read_tokens(shard, ByteTokenizer())
    assert str(shard) in str(caught.value)


def test_changed_token_is_found_by_the_checksum(shard):
    shard.write_bytes(edited(shard.read_bytes(), HEADER_BYTES + 10, b"\xff"))
    with pytest.raises(UserError, match=r"x\.tokens is damaged: .* checksum"):
        read_tokens(shard, ByteTokenizer(), verify=True)


def test_unfinished_shard_is_refused(tmp_path):
    def fail(path):
        with ShardWriter(path, ByteTokenizer()) as writer:
            writer.append(np.arange(10))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fail(tmp_path / "x.tokens")
    with pytest.raises(UserError, match="never finished"):
        read_tokens(tmp_path / "x.tokens", ByteTokenizer())


def test_an_unfinished_shard_is_gone_on_with(tmp_path):
    """What was written after the state is cut off, even if nothing follows it."""
    path, tokenizer = tmp_path / "x.tokens", ByteTokenizer()
    writer = ShardWriter(path, tokenizer)
    writer.append(np.arange(100))
    state = writer.state()
    writer.append(np.arange(50))
    writer.close()
    for more in ([], [7]):
        with ShardWriter(path, tokenizer, state) as writer:
            assert writer.tokens == 100
            writer.append(np.array(more, np.uint16))
        assert read_tokens(path, tokenizer, verify=True).tolist() == [*range(100), *more]
    for wrong in ({"tokens": 102, "sha256": state["sha256"]}, {"tokens": 100, "sha256": "0"}):
        with pytest.raises(UserError, match=r"x\.tokens is not as it was left"):
            ShardWriter(path, tokenizer, wrong)


def test_missing_shard(tmp_path):
    with pytest.raises(UserError, match="cannot read the token file"):
        read_tokens(tmp_path / "none.tokens", ByteTokenizer())
    assert shards.VERSION == 1
