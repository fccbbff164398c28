"""Checks that the merges of a tokenizer.json encode as tiktoken does, which has no list of merges.

tiktoken repeatedly joins the two neighbours whose bytes together are the token with the lowest id. A list of merges in
the order of the ids that they make does the same, unless it lacks a pair that occurs. The bytes of a token are joined
in a text as they are alone, until something joins them to their neighbours. So a token occurs in a text only if its
bytes alone become it, and then by the same last pair. No other pair of its parts occurs, listed or not.
"""

from typing import Any

from gpt.data.bpe import byte_characters
from gpt.data.tokenizers import MAX_VOCAB

UNUSED = "<unused {}>"  # the space distinguishes it from every byte-level token


def byte_tokens(vocab: dict[str, int], others: set[str]) -> list[bytes | None]:
    """Return the bytes of each id except the others'. ValueError if a token is not byte-level, or two share an id."""
    # Only some of the 256 characters for bytes are below 256: the others below 256 must not pass for bytes.
    to_byte = dict.fromkeys(range(256), "\uffff")
    to_byte |= {ord(character): chr(byte) for byte, character in enumerate(byte_characters())}
    found: dict[int, bytes] = {}
    for text, i in vocab.items():
        if type(i) is not int or not 0 <= i < MAX_VOCAB:
            raise ValueError(f"its token {text!r} has the id {i!r}, which is not between 0 and {MAX_VOCAB}")
        if text in others or text == UNUSED.format(i):
            continue
        try:
            token = text.translate(to_byte).encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(f"its token {text!r} is not byte-level") from None
        if i in found:
            raise ValueError(f"its token {text!r} has the id {i}, which another token has too")
        found[i] = token
    return [found.get(i) for i in range(max(found, default=-1) + 1)]


def unreached(model: dict[str, Any], others: set[str], bpe: Any) -> set[str]:
    """Return the tokens that no text becomes. others: spellings of added tokens; bpe: the tokenizers library's model.

    Raises ValueError, naming the token, if tiktoken would encode otherwise than the merges.
    """
    whole, apart = bpe.ignore_merges, {}
    bpe.ignore_merges = False
    for text in model["vocab"]:
        if len(text) > 1 and text not in others and " " not in text and len(parts := bpe.tokenize(text)) > 1:
            apart[text] = parts
    bpe.ignore_merges = whole
    if not whole:
        return set(apart)
    # These tokens occur only as whole pieces, but tiktoken would join their two parts anywhere.
    for text, found in apart.items():
        if len(found) == 2:
            left, right = (part.value for part in found)
            raise ValueError(f"it lacks the merge {left!r} {right!r}, which makes its token {text!r}")
    return set()


def check_order(merges: list[Any], vocab: dict[str, int], others: set[str]) -> None:
    """Raise ValueError unless merges join tokens into tokens, in the order of the ids that they make."""
    before = -1
    for pair in merges:
        if isinstance(pair, str) and pair.startswith("#version"):
            continue
        parts = pair.split(" ") if isinstance(pair, str) else pair
        if len(parts) != 2:
            raise ValueError(f"its merge {pair!r} is not two tokens")
        left, right = parts
        text = left + right
        if not {left, right, text} <= vocab.keys():
            raise ValueError(f"its merge {left!r} {right!r} joins or makes a token that its vocabulary lacks")
        if vocab[text] < before:
            raise ValueError(f"its merges are not in the order of its ids: {left!r} {right!r} comes too late")
        if text in others:
            raise ValueError(f"its merge {left!r} {right!r} makes the added token {text!r}")
        before = vocab[text]
