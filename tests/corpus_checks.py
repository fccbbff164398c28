"""What the tests of sources, corpora and token files share."""

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

from gpt.corpus import Corpus
from gpt.shards import read_tokens

calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

POEM = "The quick brown fox — naïve, 日本語 — jumps over\nthe lazy dog 🙂.\n" * 40


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
