"""Trains a byte-level BPE with the tokenizers library, for tiktoken to encode with."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

# GPT-4's pattern (cl100k_base), written so that tiktoken and tokenizers read it alike.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

_SEGMENT = 100_000  # characters that the trainer gets at a time
_LONGEST = 1_000  # characters; the trainer's time grows with the square of a word's length


def train_bpe(texts: Iterable[str], vocab_size: int) -> "tokenizers.Tokenizer":
    """Train a byte-level BPE of at most vocab_size tokens, including the 256 bytes; merge pairs seen at least twice."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Split(Regex(rf"[\s\S]{{{_LONGEST}}}"), behavior="isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, cut, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(_short(texts), trainer)
    return model


def merge_order(model: "tokenizers.Tokenizer") -> list[bytes]:
    """Return a trained BPE's tokens in tiktoken's order: the 256 bytes, then the result of each merge."""
    vocab = model.get_vocab(with_added_tokens=False)
    to_byte = {character: byte for byte, character in enumerate(byte_characters())}
    learned = [bytes(map(to_byte.__getitem__, token)) for token in sorted(vocab, key=vocab.__getitem__)]
    return [bytes([i]) for i in range(256)] + [token for token in learned if len(token) > 1]


def _short(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into segments of bounded length."""
    for text in texts:
        for start in range(0, len(text), _SEGMENT):
            yield text[start : start + _SEGMENT]


def byte_characters() -> list[str]:
    """Return the printable character for each byte in a byte-level BPE's vocabulary (Radford et al. 2019)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
