"""gpt/interop/sample_texts.py: the texts on which two tokenizers are compared."""

import pytest

from gpt.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt.interop import sample_texts as module
from gpt.interop.sample_texts import sample_texts


@pytest.mark.parametrize("odd", [*module._SPACES, *module._ODD], ids=ascii)
def test_each_odd_piece_is_tried_at_every_edge(odd):
    """Between letters, twice, before and after a space, and before a digit: where patterns split text."""
    assert f"a{odd}b {odd}{odd}c{odd} {odd}1" in sample_texts(ByteTokenizer())


def test_odd_pieces_are_a_character_or_a_letter_with_a_mark():
    assert [piece for piece in module._ODD if len(piece) > 1] == ["e\u0301", "\u0308\u0323"]
    assert not [piece for piece in module._ODD if piece.isascii() and piece.isprintable()]
    assert not {piece for piece in module._SPACES if piece.strip()} - {"\u200b", "\u200d", "\ufeff"}


def test_a_character_tokenizer_sees_its_own_characters_only():
    texts = list(sample_texts(CharTokenizer("aé\n")))
    assert set("".join(texts)) == set("aé\n")
    assert texts == list(sample_texts(CharTokenizer("aé\n")))
    assert set(sample_texts(CharTokenizer(""))) == {""}
