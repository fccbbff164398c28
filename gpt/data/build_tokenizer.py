"""Builds the tokenizer that a config names: learned from the corpus, or one of tiktoken's encodings."""

from typing import Literal

from gpt.command_line import did_you_mean
from gpt.data.config import TokenizerConfig
from gpt.data.tokenizer_base import Texts
from gpt.data.tokenizers import KINDS, BPETokenizer, Tokenizer
from gpt.errors import UserError


def build_tokenizer(config: TokenizerConfig, texts: Texts, *, document_token: bool = True) -> Tokenizer:
    """Build the tokenizer that config names.

    texts: returns the text to learn from, from its start: the part that learns_from names. document_token: whether a
    character tokenizer has one; every other kind has one anyway.
    Raises UserError for an unknown name, or an encoding that is not cached and cannot be downloaded.
    """
    if config.tokenizer in KINDS:
        return KINDS[config.tokenizer].build(config, texts, document_token)
    return _named(config.tokenizer)


def learns_from(name: str) -> Literal["all", "train", None]:
    """Return the part of the corpus that the tokenizer of this name learns from; None if it needs no text."""
    return KINDS[name].learns_from if name in KINDS else None


def check_name(name: str) -> None:
    """Raise UserError, listing the known names, for a name that build_tokenizer does not know. Downloads nothing."""
    if name in KINDS:
        return
    import tiktoken

    names = [*KINDS, *tiktoken.list_encoding_names()]
    if name not in names:
        known = f"choose {', '.join(names[:-1])} or {names[-1]}"
        raise UserError(f"unknown tokenizer {name!r}: {known}{did_you_mean(name, names)}")


def _named(name: str) -> BPETokenizer:
    """Load one of tiktoken's encodings, from TIKTOKEN_CACHE_DIR or the network."""
    check_name(name)
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests raises OSErrors; a download with a wrong hash raises ValueError
        raise UserError(
            f"the tokenizer {name} could not be downloaded ({type(error).__name__}): connect to the network, set "
            "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer char, byte or bpe"
        ) from error
    by_rank = {rank: token for token, rank in encoding._mergeable_ranks.items()}
    tokens = [by_rank.get(rank) for rank in range(max(by_rank) + 1)]
    return BPETokenizer(name, encoding._pat_str, tokens, encoding._special_tokens)


def encoding_at_hand(name: str) -> BPETokenizer | None:
    """Load one of tiktoken's encodings without downloading anything; None if tiktoken has not cached it."""
    import tiktoken.load

    def refuse(address: str) -> bytes:
        raise OSError(f"{address} may not be downloaded")

    read_file, tiktoken.load.read_file = tiktoken.load.read_file, refuse
    try:
        return _named(name)
    except UserError:
        return None
    finally:
        tiktoken.load.read_file = read_file
