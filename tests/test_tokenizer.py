"""Tokenizers: round trips, special tokens that stay text, streaming, BPE against its source."""

import itertools
import os
import socket

import numpy as np
import pytest
import regex
import requests
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.data import bpe
from gpt.data import tokenizers as module
from gpt.data.bpe import merge_order, train_bpe
from gpt.data.build_tokenizer import build_tokenizer, check_name
from gpt.data.config import TokenizerConfig
from gpt.data.tokenizers import DOCUMENT, BPETokenizer, CharTokenizer, StreamDecoder, UnknownCharacter
from gpt.errors import UserError
from tests.tokenizer_checks import (
    BPE,
    BYTE,
    CHAR,
    GPT2,
    KINDS,
    PATTERNS,
    TEXT,
    anything,
    calm,
    every_kind,
    make_bpe,
    make_named,
    nasty,
)

# --- round trips ------------------------------------------------------------------------------------------------------


@calm
@given(text=anything | nasty)
def test_byte_and_bpe_take_any_text(text):
    for tokenizer in (BYTE, BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()


@calm
@given(text=st.text(st.sampled_from(sorted(set(TEXT))), max_size=80))
def test_char_takes_any_text_of_its_characters(text):
    ids = CHAR.encode(text)
    assert len(ids) == len(text)
    assert CHAR.decode(ids) == text


@calm
@given(data=st.data())
def test_any_ids_decode_and_token_bytes_counts_them(data):
    for tokenizer in KINDS:
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
        text, raw = tokenizer.decode(ids), tokenizer.decode_bytes(ids)
        assert text == raw.decode("utf-8", "replace")
        assert len(raw) == tokenizer.token_bytes[ids].sum()


@every_kind
def test_array_and_list_agree(tokenizer):
    array = tokenizer.encode_to_array(TEXT)
    assert array.dtype == tokenizer.dtype == np.uint16
    assert array.tolist() == tokenizer.encode(TEXT)
    assert tokenizer.decode(array) == TEXT
    assert tokenizer.encode("") == []
    assert tokenizer.encode_to_array("").shape == (0,)


@every_kind
@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_outside_the_vocabulary_raise(tokenizer, wrong):
    with pytest.raises(ValueError, match=f"{wrong} is outside the vocabulary, 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([0, wrong])


@every_kind
def test_encode_refuses_arguments_of_another_type(tokenizer):
    with pytest.raises(TypeError, match="text must be text, not 5"):
        tokenizer.encode(5)
    with pytest.raises(TypeError, match="allow_special must be True or False, not 'all'"):
        tokenizer.encode("n", allow_special="all")


@every_kind
def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"U\+DC80 at position 2"):
        tokenizer.encode("na\udc80ve")


def test_dtype_grows_past_65536_ids():
    everything = "".join(chr(c) for c in range(0x11000) if not 0xD800 <= c < 0xE000)[: 1 << 16]
    assert CharTokenizer(everything).dtype == np.uint16
    larger = CharTokenizer(everything, document_token=True)
    assert larger.dtype == np.uint32
    assert larger.encode_to_array(everything).tolist() == list(range(1 << 16))


# --- character tokenizers ---------------------------------------------------------------------------------------------


def test_char_alphabet_is_the_sorted_characters_of_all_texts():
    tokenizer = build_tokenizer(TokenizerConfig("char"), lambda: ["hello\n", "wörld 🙂"], document_token=False)
    assert tokenizer.characters == "\n dehlorwö🙂"
    assert tokenizer.vocab_size == 11
    assert tokenizer.document_token is None
    assert tokenizer.encode("\n🙂") == [0, 10]
    assert tokenizer.token_bytes.tolist() == [1] * 9 + [2, 4]


def test_char_document_token_comes_last_and_only_if_asked_for():
    tokenizer = build_tokenizer(TokenizerConfig("char"), lambda: ["abc"], document_token=True)
    assert (tokenizer.document_token, tokenizer.vocab_size) == (3, 4)
    assert tokenizer.decode([0, 3, 1]) == "ab"


@pytest.mark.parametrize("character", ["é", "\x00", "\uffff", "🙂", "a"], ids=ascii)
def test_char_names_the_character_that_it_lacks(character):
    tokenizer = CharTokenizer("bdé" if character != "é" else "bd")
    with pytest.raises(UnknownCharacter) as caught:
        tokenizer.encode(f"bd{character}d")
    assert caught.value.position == 2
    for part in (f"U+{ord(character):04X}", repr(character), "position 2", "--tokenizer byte or bpe"):
        assert part in str(caught.value)


# --- special tokens ---------------------------------------------------------------------------------------------------


@every_kind
def test_spelling_of_a_special_token_stays_text(tokenizer):
    text = f"ab{DOCUMENT}ab"
    ids = tokenizer.encode(text)
    assert tokenizer.document_token not in ids
    assert tokenizer.document_token not in tokenizer.encode_to_array(text)
    assert tokenizer.decode(ids) == text


@every_kind
def test_special_token_if_asked_for(tokenizer):
    ids = tokenizer.encode(f"a{DOCUMENT}b{DOCUMENT}", allow_special=True)
    assert ids == [*tokenizer.encode("a"), tokenizer.document_token, *tokenizer.encode("b"), tokenizer.document_token]
    assert tokenizer.decode(ids) == "ab"


def test_without_a_document_token_its_spelling_is_text_even_if_asked_for():
    tokenizer = CharTokenizer("".join(sorted(set(DOCUMENT))))
    assert tokenizer.decode(tokenizer.encode(DOCUMENT, allow_special=True)) == DOCUMENT


def test_several_special_tokens_the_longest_spelling_wins(named):
    assert named.encode("<|end|>!<|end|>", allow_special=True) == [305, 300]
    assert named.decode(named.encode("<|end|>!")) == "<|end|>!"
    assert not {300, 301, 305} & set(named.encode(f"<|end|>!{DOCUMENT}"))


# --- streaming --------------------------------------------------------------------------------------------------------


@calm
@given(data=st.data())
def test_stream_joins_to_decode(data):
    for tokenizer in KINDS:
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
        stream = StreamDecoder(tokenizer)
        assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == tokenizer.decode(ids)


def test_stream_never_shows_half_a_character():
    stream = StreamDecoder(BYTE)
    shown = [stream.push(byte) for byte in "é🙂z".encode()]
    assert shown == ["", "é", "", "", "", "🙂", "z"]
    assert stream.flush() == ""


def test_stream_flush_ends_an_unfinished_character_and_starts_anew():
    stream = StreamDecoder(BYTE)
    assert [stream.push(byte) for byte in "🙂".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(ord("a")) == "a"


# --- BPE --------------------------------------------------------------------------------------------------------------


def test_bpe_has_exactly_the_size_asked_for():
    assert BPE.vocab_size == 600
    assert BPE.document_token == 599
    assert BPE.token_bytes[:256].tolist() == [1] * 256
    assert BPE.token_bytes[599] == 0
    assert len(BPE.encode(TEXT)) < len(TEXT) / 2


def test_bpe_of_a_small_text_is_smaller_and_says_so(caplog):
    tokenizer = build_tokenizer(TokenizerConfig("bpe", 5000), lambda: ["abab abab"])
    assert 257 < tokenizer.vocab_size < 270
    assert f"bpe_vocab_size 5000: the vocabulary has {tokenizer.vocab_size} tokens" in caplog.text
    caplog.clear()
    again = build_tokenizer(TokenizerConfig("bpe", tokenizer.vocab_size), lambda: ["abab abab"])
    assert again.vocab_size == tokenizer.vocab_size and not caplog.text


def test_bpe_of_the_smallest_size_is_bytes():
    assert make_bpe(257).encode("aé") == list("aé".encode())


def test_bpe_training_takes_long_words_in_pieces():
    """Its time grows with the square of a word's length, and a text may be one word."""
    tokens = merge_order(train_bpe(["a" * 5000], 300))
    assert max(map(len, tokens)) == 1000


def test_a_table_has_a_row_for_each_id_that_text_becomes():
    """And for the document token; other special tokens need none."""
    more = BPETokenizer("x", BPE.pattern, BPE.tokens, BPE.specials | {"<|other|>": BPE.vocab_size})
    for tokenizer, rows in ((BYTE, 257), (BPE, BPE.vocab_size), (more, BPE.vocab_size)):
        tokenizer.check_table(rows, "m")
        message = f"the tokenizer of m has the token {rows - 1}, but its embedding table has {rows - 1} rows: train it"
        with pytest.raises(UserError, match=message):
            tokenizer.check_table(rows - 1, "m")


@pytest.mark.parametrize("length", [0, 99_999, 100_000, 250_001])
def test_bpe_training_gets_long_texts_in_parts(length):
    text = ("0123456789" * (length // 10 + 1))[:length]
    parts = list(bpe._short([text, "ab"]))
    assert "".join(parts[:-1]) == text and parts[-1] == "ab"
    assert [len(part) for part in parts[:-1]] == [100_000] * (length // 100_000) + [length % 100_000] * (
        length % 100_000 > 0
    )


def test_bpe_training_repeats():
    assert make_bpe().fingerprint == BPE.fingerprint


def test_bpe_merges_as_its_trainer_does():
    """tiktoken with our ranks splits any text into the same tokens as the tokenizers library."""
    trained = train_bpe([TEXT], 599)
    vocab = trained.get_vocab()
    learned = [token for token in sorted(vocab, key=vocab.get) if len(token) > 1]
    strange = " the theth'LL don'T\t\n  \n12345 naïve日本語。🙂 {''}.,;: Ünseen"
    for text in (TEXT, strange, TEXT[::-1], "  " * 50 + "x"):
        theirs = trained.encode(text).tokens
        ours = BPE.encode(text)
        assert BPE.decode(ours) == text
        assert [i if i >= 256 else None for i in ours] == [
            256 + learned.index(token) if len(token) > 1 else None for token in theirs
        ]


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@settings(calm, max_examples=300)
@given(text=nasty)
def test_no_piece_crosses_a_cut(pattern, text):
    whole = regex.findall(pattern, text)
    for match in module.CUT.finditer(text):
        left, right = text[: match.start()], text[match.start() :]
        assert regex.findall(pattern, left) + regex.findall(pattern, right) == whole


@calm
@given(text=nasty, sizes=st.lists(st.integers(0, 9), max_size=20), longest=st.integers(1, 12))
def test_segments_depend_on_the_text_alone(text, sizes, longest):
    """However the text arrives in chunks, the segments are the same, bounded, and join to it."""
    ends = np.cumsum([0, *sizes, len(text)])
    chunks = [text[a:b] for a, b in itertools.pairwise(ends)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SEGMENT", longest)
        segments = list(BPE.segments(chunks))
        assert segments == list(BPE.segments([text]))
        assert "".join(segments) == text
        assert all(0 < len(segment) <= longest for segment in segments)
        assert BPE.decode(BPE.encode(text)) == text


def test_long_text_in_segments_has_the_ids_of_the_whole(monkeypatch):
    whole = BPE.encoding.encode_ordinary(TEXT)
    monkeypatch.setattr(module, "_SEGMENT", 50)
    assert len(list(BPE.segments([TEXT]))) > 50
    assert BPE.encode(TEXT) == whole


@pytest.mark.parametrize("unit", [" ", "\u3000", "a", "日", "\n"], ids=ascii)
def test_a_million_characters_without_a_cut(unit):
    """tiktoken alone overflows its regex stack on a run of a million spaces."""
    text = unit * 1_000_000 + "x"
    assert BPE.decode(BPE.encode_to_array(text)) == text


# --- named encodings --------------------------------------------------------------------------------------------------


def test_named_encoding_keeps_its_ids(named):
    assert named.vocab_size == 306
    assert named.document_token == 301
    assert named.encode(TEXT) == make_named().encode_ordinary(TEXT)
    assert named.decode([*named.encode("ab"), 302, 301, 305]) == "ab"  # 302 is unused
    assert named.token_bytes[300:].tolist() == [0] * 6


def test_gpt2_itself():
    try:
        if "TIKTOKEN_CACHE_DIR" not in os.environ:  # tiktoken itself would wait for a silent network for minutes
            socket.create_connection(("openaipublic.blob.core.windows.net", 443), timeout=5).close()
        tokenizer = build_tokenizer(TokenizerConfig("gpt2"), list)
    except (OSError, UserError) as error:
        pytest.skip(f"gpt2 cannot be had: {error}")
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.document_token) == (50257, 50256)
    assert tokenizer.pattern == GPT2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gtp2", "did you mean 'gpt2'"),
        ("cl100k", "did you mean 'cl100k_base'"),
        ("bp", "did you mean 'bpe'"),
        ("", "choose char, byte"),
    ],
)
def test_unknown_name_lists_the_known(name, hint):
    for call in (check_name, lambda name: build_tokenizer(TokenizerConfig(name), list)):
        with pytest.raises(UserError, match=hint) as caught:
            call(name)
        assert "char, byte, bpe" in str(caught.value)
        assert "o200k_base" in str(caught.value)


@pytest.mark.parametrize(
    "error", [requests.ConnectionError("no route"), requests.HTTPError("403"), ValueError("Hash mismatch")], ids=repr
)
def test_no_network_says_what_to_do(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match="cl100k_base could not be downloaded") as caught:
        build_tokenizer(TokenizerConfig("cl100k_base"), list)
    assert "TIKTOKEN_CACHE_DIR" in str(caught.value)


def test_a_pair_that_is_seen_once_is_not_merged():
    merged = lambda text: set(merge_order(train_bpe([text], 300))[256:])
    assert merged("ab cd") == set()
    assert merged("ab cd ab") == {b"ab"}
