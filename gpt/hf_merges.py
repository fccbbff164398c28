"""Whether a tokenizer.json encodes as tiktoken does: it lists its merges, tiktoken merges what makes a token.

tiktoken joins, again and again, the two neighbors whose bytes together have the lowest id. A list of merges in the
order of the ids that they make does the same unless it lacks a pair that comes up. The bytes of a token, wherever they
stand, are joined as they are alone, as long as nothing joins them to their neighbors. So the token appears in a text
only if its own bytes become it, and then of the same last pair; any other pair of it does not come up, listed or not.
"""

from typing import Any

from gpt.bpe import byte_characters
from gpt.tokenizer import MAX_VOCAB

UNUSED = "<unused {}>"  # a space keeps it apart from every byte-level token


def byte_tokens(vocab: dict[str, int], others: set[str]) -> list[bytes | None]:
    """The bytes of each id but the others'; ValueError where a token is not byte-level or two share an id."""
    to_byte = {character: byte for byte, character in enumerate(byte_characters())}
    found: dict[int, bytes] = {}
    for text, i in vocab.items():
        if type(i) is not int or not 0 <= i < MAX_VOCAB:
            raise ValueError(f"its token {text!r} has the id {i!r}, which is not between 0 and {MAX_VOCAB}")
        if text in others or text == UNUSED.format(i):
            continue
        if not all(character in to_byte for character in text):
            raise ValueError(f"its token {text!r} is not byte-level")
        if i in found:
            raise ValueError(f"its token {text!r} has the id {i}, which another token has too")
        found[i] = bytes(to_byte[character] for character in text)
    return [found.get(i) for i in range(max(found, default=-1) + 1)]


def unreached(model: dict[str, Any], others: set[str]) -> set[str]:
    """The tokens that text never becomes; others: the spellings of added tokens.

    Raises ValueError, naming the token, where tiktoken would not encode as the merges do.
    """
    import tokenizers

    vocab = model["vocab"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    _check_order(merges, vocab, others)
    bpe = tokenizers.models.BPE(vocab, merges)  # which takes no whole piece as a token
    parts = {t: bpe.tokenize(t) for t in vocab if len(t) > 1 and t not in others and " " not in t}
    apart = {text: found for text, found in parts.items() if len(found) > 1}
    if not model.get("ignore_merges"):
        return set(apart)
    # These come as whole pieces only; but two parts tiktoken would join wherever they stand.
    for text, found in apart.items():
        if len(found) == 2:
            left, right = (part.value for part in found)
            raise ValueError(f"it lacks the merge {left!r} {right!r}, which makes its token {text!r}")
    return set()


def _check_order(merges: list[tuple[str, ...]], vocab: dict[str, int], others: set[str]) -> None:
    """ValueError unless merges join tokens, make others, and come in the order of what they make."""
    before = -1
    for left, right in merges:
        text = left + right
        if not {left, right, text} <= vocab.keys():
            raise ValueError(f"its merge {left!r} {right!r} joins or makes a token that its vocabulary lacks")
        if vocab[text] < before:
            raise ValueError(f"its merges are not in the order of its ids: {left!r} {right!r} comes too late")
        if text in others:
            raise ValueError(f"its merge {left!r} {right!r} makes the added token {text!r}")
        before = vocab[text]
