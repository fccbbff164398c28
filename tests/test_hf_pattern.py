"""Patterns that are taken split text in tiktoken as in the tokenizers library; the others are refused."""

import random

import pytest
import tiktoken
from tokenizers import Regex, pre_tokenizers

from gpt.interop.hf_pattern import GPT2_PATTERN, for_oniguruma, unlike
from tests.tokenizer_checks import CL100K, GPT2, O200K, PATTERN

REST = r"|[\s\S]"
ALPHABET = [*"asSßtbfﬀﬁﬆiTFIlLſkK\u212acǰ\u0301{}\\$^[]<>-&~|1²½Ⅷ_ \n\r\t\x0b\x85\u3000日ぁ한яé'.,", "\u200d", "\u180e"]
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TAKEN = [
    GPT2_PATTERN,
    PATTERN,
    O200K,
    LLAMA3,
    LLAMA3.replace("{1,3}", ""),  # Qwen2
    r" ?[^(\s|[.,!?…。，、।۔،])]+" + REST,  # BLOOM
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+" + REST,  # DeepSeek
    r"[一-龥぀-ゟ゠-ヿ]+" + REST,
    r"(?<=a)s|(?<!t)b|s(?=t)|i(?!l)|(?>a+)a|(s|t)f" + REST,
    r"a{2}|b{1,2}?|s{2,}|\p{Han}+|\P{L}+?t|\d{1,3}(?=(?:\d{3})*(?!\d))" + REST,
    r"[^a[bs]]|\$|\^|\[|\x41|\u0042|\.\~\-" + REST,
    r"(?i:[sf]s|i?l|t|k)b" + REST,
    r"a\z|\s+\z|.s" + REST,
]
REFUSED = {
    r"(?i:assb)": "aßb",
    r"(?i:afib)": "aﬁb",
    r"(?i:as|st)b": "ﬆb",
    r"(?i:\p{Lu})b": "sb",
    r"(?i:aß)b": "assb",
    r"(?i)assb": "aßb",
    r"a(?i)b|s": "S",
    r"((?i)a|s)b|l": "SB",
    r"ca{2}?b": "cb",
    r"ca{1,2}+b": "caaaab",
    r"\<a": "<a",
    r"\>b": "a>b",
    r"[a--b]+": "a-b",
    r"[a-z&&[^b]]+": "ab",
    r"[[:alpha:]]+": "ab",
    r"[^[:space:]]+": "a\x85b",
    r"\p{^L}+": "1_",
    r"\p{Graph}+": "👩\u200d👩",
    r"\pL+": "ab",
    r"\w+": "a\u200db",
    r"\bs": "a s",
    r"^a": "\na",
    r"\[^a": "[\na",
    r"a$": "a\n",
    r"\\$": "\\\n",
    r"\Aa": "a",
    r"\h+": "ab",
    r"\R": "\r\n",
    r"\Ga": "aa",
    r"(?m)a.": "a\n",
    r"(?s)a.": "a\n",
    r"(?x)a b": "ab",
    r"a{,2}b": "aab",
    r"(?<n>a)\k<n>": "aa",
    r"(a)\1": "aa",
    r"[]a]": "]a",
    r"(?~ab)": "ab",
    r"(?#a)b": "b",
}


def splits(pattern: str, text: str) -> tuple[list[int], list[int]]:
    """Where tiktoken and tokenizers end the pieces of a text, in bytes."""
    size, pieces = 0, pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
    theirs = [size := size + len(piece.encode()) for piece, _ in pieces]
    # Each piece that is a token is that token, so with all its substrings as tokens no piece comes apart.
    raw = text.encode()
    tokens = {bytes([i]): i for i in range(256)}
    for a in range(len(raw)):
        for b in range(a + 2, len(raw) + 1):
            tokens.setdefault(raw[a:b], len(tokens))
    encoding, size = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=tokens, special_tokens={}), 0
    return [size := size + len(encoding.decode_single_token_bytes(i)) for i in encoding.encode_ordinary(text)], theirs


@pytest.mark.parametrize("pattern", TAKEN)
def test_accepted_patterns_split_alike(pattern):
    assert unlike(pattern) is None
    draw = random.Random(0)
    texts = ["".join(draw.choices(ALPHABET, k=draw.randint(1, 25))) for _ in range(60)]
    for text in [*texts, "aßb", "aﬁb", "ca{2}b", "'S 'ſ 'LL", "1234567", "a  b \n\n c"]:
        ours, theirs = splits(pattern, text)
        assert ours == theirs, text


@pytest.mark.parametrize("pattern", REFUSED)
def test_ambiguous_patterns_are_refused(pattern):
    assert unlike(pattern + REST)
    assert unlike(f"(?:{pattern}){REST}")


@pytest.mark.parametrize("pattern", [r"(?i:assb)", r"(?i:afib)", r"(?i:\p{Lu})b", r"ca{2}?b", r"\>b", r"((?i)a|s)b|l"])
def test_the_two_libraries_differ_on_some_refused_patterns(pattern):
    ours, theirs = splits(pattern + REST, REFUSED[pattern])
    assert ours != theirs


@pytest.mark.parametrize("pattern", [GPT2, CL100K, O200K, PATTERN])
def test_tiktokens_patterns_are_rewritten(pattern):
    assert unlike(for_oniguruma(pattern)) is None
    draw = random.Random(0)
    for _ in range(60):
        text = "".join(draw.choices(ALPHABET, k=draw.randint(1, 25)))
        assert splits(pattern, text)[0] == splits(for_oniguruma(pattern), text)[1], text


def test_a_pattern_without_an_equivalent_is_refused():
    assert for_oniguruma(r"\p{N}{1,3}+x" + REST) is None
    assert for_oniguruma(r"\w+" + REST) is None


@pytest.mark.parametrize(
    "script", ["Han", "Hiragana", "Katakana", "Hangul", "Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Thai"]
)
def test_scripts_with_the_same_characters_in_both_libraries_are_accepted(script):
    assert unlike(rf"\p{{{script}}}+|[\P{{{script}}}]") is None
    assert unlike(rf"\p{{{script}X}}") is not None
