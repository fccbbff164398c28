"""Tokenizers to try things on, and text that provokes them."""

import random

import pytest
import tiktoken
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from gpt.data.bpe import PATTERN, merge_order, train_bpe
from gpt.data.build_tokenizer import build_tokenizer
from gpt.data.config import TokenizerConfig
from gpt.data.tokenizers import DOCUMENT, BPETokenizer, ByteTokenizer, CharTokenizer

calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

LINES = (
    "First, the user's 3 files; then 12,345 more. Don't stop!\n\n"
    "def main():\n    return {'naïve': 'café', '日本': '日本語。'}  # 🙂 👩‍👩‍👧\r\n\tend\n"
)
# Random words, so that there is something to merge.
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "or", "un", "é")]
RANDOM = random.Random(0)
WORDS = "".join(
    "".join(RANDOM.choices(SYLLABLES, k=RANDOM.randint(1, 4))) + RANDOM.choice(" ,.\n") for _ in range(3000)
)
TEXT = LINES * 10 + WORDS

# Other people's pre-splitting patterns, as tiktoken has them.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
PATTERNS = {"ours": PATTERN, "gpt2": GPT2, "cl100k": CL100K, "o200k": O200K}

# Text that provokes pre-splitting: runs of spaces, marks, contractions, combining marks, other scripts.
nasty = st.lists(st.sampled_from([*"aBsé日二ß1²Ⅷ _'’.,;:!?。/-\n\r\t\u00a0\u3000\u0301🙂", "a's", "B'LL", "!\n", "  "]))
nasty = nasty.map("".join)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def make_bpe(size: int = 600) -> BPETokenizer:
    return build_tokenizer(TokenizerConfig("bpe", size), lambda: [TEXT])


def make_named() -> tiktoken.Encoding:
    """A small encoding as tiktoken's own are made: an id that no token has, several special tokens."""
    ranks = {token: i for i, token in enumerate(merge_order(train_bpe([TEXT], 300)))}
    specials = {DOCUMENT: 301, "<|end|>": 300, "<|end|>!": 305}
    return tiktoken.Encoding("small", pat_str=GPT2, mergeable_ranks=ranks, special_tokens=specials)


BPE = make_bpe()
BYTE = ByteTokenizer()
CHAR = CharTokenizer("".join(sorted(set(TEXT + DOCUMENT))), document_token=True)
KINDS = [CHAR, BYTE, BPE]
every_kind = pytest.mark.parametrize("tokenizer", KINDS, ids=["char", "byte", "bpe"])
