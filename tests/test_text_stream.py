"""The text that may be shown while tokens are generated."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.inference.text_stream import TextStream


class Letters:
    """A tokenizer of single bytes for TextStream."""

    def decode_bytes(self, ids):
        return bytes(ids)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(0, 99))
def test_stop_strings_are_found_whatever_the_pieces(text, stops, seed):
    """Against a search of every prefix; text that is held back can begin a stop string."""
    end = next((n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)), None)
    expected = text
    if end is not None:
        expected = text[: end - max(len(stop) for stop in stops if text[:end].endswith(stop))]
    stream, shown, at, rng = TextStream(Letters(), stops), "", 0, random.Random(seed)
    stream._decoder.push = lambda part: part  # pieces of several characters, as BPE gives them
    while at < len(text) and not stream.ended:
        size = rng.randint(1, 3)
        shown += stream.push(text[at : at + size])
        at += size
        held = text[len(shown) : at]
        assert stream.ended or not held or any(stop.startswith(held) for stop in stops)
        assert expected.startswith(shown)
    assert shown + stream.flush() == expected
    assert stream.ended == (end is not None)
