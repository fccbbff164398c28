"""Whether a tokenizer.json encodes as tiktoken does: it lists its merges, tiktoken merges what makes a token.

tiktoken joins, again and again, the two neighbors whose bytes together have the lowest id. A list of merges in the
order of the ids that they make does the same unless it lacks a pair that comes up. The bytes of a token, wherever they
are, are joined as they would be alone, as long as nothing joins them to their neighbors. So the token appears in a text
only if its own bytes become it, and then of the same last pair; any other pair of it does not come up, listed or not.
"""

from typing import Any

from gpt.data.bpe import byte_characters
from gpt.data.tokenizers import MAX_VOCAB

UNUSED = "<unused {}>"  # a space keeps it apart from every byte-level token


def byte_tokens(vocab: dict[str, int], others: set[str]) -> list[bytes | None]:
    """The bytes of each id but the others'; ValueError where a token is not byte-level or two share an id."""
    # A character that is not the sign of a byte must not be taken for one: only some of the 256 signs are below 256.
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
    """The tokens that text never becomes. others: the spellings of added tokens; bpe: the tokenizers library's model.

    Raises ValueError, naming the token, where tiktoken would not encode as the merges do.
    """
    whole, apart = bpe.ignore_merges, {}
    bpe.ignore_merges = False
    for text in model["vocab"]:
        if len(text) > 1 and text not in others and " " not in text and len(parts := bpe.tokenize(text)) > 1:
            apart[text] = parts
    bpe.ignore_merges = whole
    if not whole:
        return set(apart)
    # These come as whole pieces only; but tiktoken would join two parts wherever they are.
    for text, found in apart.items():
        if len(found) == 2:
            left, right = (part.value for part in found)
            raise ValueError(f"it lacks the merge {left!r} {right!r}, which makes its token {text!r}")
    return set()


def check_order(merges: list[Any], vocab: dict[str, int], others: set[str]) -> None:
    """ValueError unless merges join tokens, make others, and come in the order of what they make."""
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
