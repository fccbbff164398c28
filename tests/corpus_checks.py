"""What the tests of sources, corpora and token files share."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import zstandard
from hypothesis import HealthCheck, settings

from gpt.data.config import DataConfig
from gpt.data.corpus import Corpus
from gpt.data.sources import find_sources
from gpt.data.split import read_documents
from gpt.data.token_files import read_tokens

calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}

POEM = "The quick brown fox — naïve, 日本語 — jumps over\nthe lazy dog 🙂.\n" * 40

# Documents; as objects; as lines of JSON.
TEXTS = ["one\n", "zwei — naïve", "日本語 🙂", 'four "quoted" \\ \t', "five" * 50]
ROWS = [{"id": i, "text": text, "more": {"text": ["x"]}} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def sides(corpus: Corpus) -> tuple[str, str]:
    """The text of both parts, read back."""
    return tuple(corpus.tokenizer.decode(read_tokens(path, corpus.tokenizer)) for path in (corpus.train, corpus.val))


def folder_of(root: Path, count: int = 40) -> Path:
    for i in range(count):
        write(root / f"{i:02}.txt", f"document number {i}, " * (i % 5 + 1))
    return root


def names(corpus: Corpus, root: Path) -> list[str]:
    return [os.path.relpath(name, root) for name, _, _ in corpus.sources]


def documents_of(path: Path, errors: str = "strict", **options) -> list[str]:
    """The text of each document that a path leads to."""
    data = DataConfig((str(path),), encoding_errors=errors, **options)
    sources = [source.hashed() for source in find_sources(data, path.parent / "downloads")]
    return ["".join(document.chunks) for document in read_documents(sources, errors)]
