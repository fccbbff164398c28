"""The tokenizer that a config asks for: from the corpus's characters, trained on its text, or one of tiktoken's."""

import difflib
from typing import Literal

from gpt.data.config import TokenizerConfig
from gpt.data.tokenizer_base import Texts
from gpt.data.tokenizers import KINDS, BPETokenizer, Tokenizer
from gpt.errors import UserError


def build_tokenizer(config: TokenizerConfig, texts: Texts, *, document_token: bool = True) -> Tokenizer:
    """The tokenizer that config asks for.

    texts: gives the text to learn from, anew at each call: all of it for char, the training part for bpe; the other
    kinds never call it. document_token: whether a character tokenizer gets one; every other kind has one anyway.
    Raises UserError for an unknown name, or an encoding that is not at hand and cannot be downloaded.
    """
    if config.tokenizer in KINDS:
        return KINDS[config.tokenizer].build(config, texts, document_token)
    return _named(config.tokenizer)


def learns_from(name: str) -> Literal["all", "train", None]:
    """The part of the corpus that the tokenizer of this name learns from; None if it needs no text."""
    return KINDS[name].learns_from if name in KINDS else None


def check_name(name: str) -> None:
    """UserError, with the known names, unless build_tokenizer knows this one. Downloads nothing."""
    if name in KINDS:
        return
    import tiktoken

    names = [*KINDS, *tiktoken.list_encoding_names()]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no tokenizer {name!r}: {hint}Known are {', '.join(names)}")


def _named(name: str) -> BPETokenizer:
    """One of tiktoken's own encodings, from TIKTOKEN_CACHE_DIR or the network."""
    check_name(name)
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: a download with a wrong hash
        raise UserError(
            f"the tokenizer {name} could not be downloaded ({type(error).__name__}): connect to the network, set "
            "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer char, byte or bpe"
        ) from error
    ranks = encoding._mergeable_ranks
    tokens: list[bytes | None] = [None] * (max(ranks.values()) + 1)
    for token, rank in ranks.items():
        tokens[rank] = token
    return BPETokenizer(name, encoding._pat_str, tokens, encoding._special_tokens)


def encoding_at_hand(name: str) -> BPETokenizer | None:
    """One of tiktoken's own encodings if its files are in tiktoken's cache; nothing is downloaded."""
    import tiktoken.load

    def refuse(address: str) -> bytes:
        raise OSError(f"{address} is not asked for")

    read_file, tiktoken.load.read_file = tiktoken.load.read_file, refuse
    try:
        return _named(name)
    except UserError:
        return None
    finally:
        tiktoken.load.read_file = read_file
