"""Options of the text and the tokenizer."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt.arguments import check_fields
from gpt.errors import require
from gpt.option import option


@dataclass(frozen=True)
class DataConfig:
    """The text, and how it is split and packed."""

    corpus: tuple[str, ...] = option((), is_path=True, per_rank=True)
    """What to train on: files (text, JSON, CSV, Parquet; .gz, .zst, .bz2, .xz), directories, globs, http(s) URLs,
    hf:NAME for a Hugging Face dataset, - for stdin, python:stdlib (Python's library), or .bin files of token ids."""
    cache_dir: Path | None = option(None, per_rank=True)
    """Folder for tokenized corpora and downloads; by default one in the user's cache folder."""
    val_fraction: float = option(0.1, above=0, below=1)
    """Share of the text held out for validation: the tail of a single document, or the documents that a hash picks."""
    split_seed: int = option(0, is_wide=True)
    """Seed of the hash that picks the validation documents."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8: refuse the text, or replace them with U+FFFD."""
    text_field: str = "text"
    """The field of JSON, or the column of CSV, Parquet and datasets, that holds the text."""
    max_corpus_bytes: int | None = option(None, above=0, is_wide=True)
    """Read about this many bytes of text at most: whole documents, in the corpus's order."""
    max_download_bytes: int = option(16 << 30, above=0, is_wide=True)
    """Refuse to download a file larger than this."""
    corpus_weights: tuple[float, ...] = option((), in_recipe=True)
    """The share of the training rows that each entry of corpus provides, in order. Each entry then has its own epochs
    and its own split. Without weights, the entries form one text."""
    packing: Literal["stream", "documents", "best_fit"] = option("stream", in_recipe=True)
    """How documents fill training rows: as one stream of tokens; as that stream, but no token attends to another
    document; or with documents apart and as few of them cut as possible (best-fit packing)."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(all(entry.strip() for entry in self.corpus), "corpus has an empty entry: give a path or a name")
        weights = self.corpus_weights
        require(all(0 < w < math.inf for w in weights), f"corpus_weights must be positive and finite, not {weights}")
        require(
            len(weights) in (0, len(self.corpus)) or not self.corpus,
            f"corpus_weights has {len(weights)} numbers for {len(self.corpus)} entries of corpus: give one for each",
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    tokenizer: str = "char"
    """char (the corpus's own characters), byte, bpe (trained on the corpus), or a tiktoken encoding such as gpt2."""
    bpe_vocab_size: int = option(4096, at_least=257, acts_with=("tokenizer", ("bpe",)))
    """Size of the trained BPE vocabulary, including the 256 bytes and the document token."""

    def __post_init__(self) -> None:
        check_fields(self)
