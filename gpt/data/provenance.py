"""A run's corpus.json: what the run was trained on, and where its tokens are in the cache."""

import json
from pathlib import Path

from gpt.config_file import config_from_toml
from gpt.data.cache import cache_folder
from gpt.data.corpus import Corpus
from gpt.files import write_whole


def write_provenance(corpus: Corpus, path: Path) -> None:
    """Record every source of a corpus with its size and SHA-256, and how the text was split."""
    sources = [{"name": name, "bytes": size, "sha256": sha256} for name, size, sha256 in corpus.sources]
    counts = ("digest", "documents", "train_tokens", "val_tokens", "train_bytes", "val_bytes")
    record = {key: getattr(corpus, key) for key in counts}
    record |= {"sources": sources, "tokenizer": corpus.tokenizer.fingerprint}
    record |= {"parts": corpus.parts} if corpus.parts else {}
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def tokenized_folders(run_dir: Path) -> list[Path]:
    """Return the cache's folder of the tokens that a run was trained on, or one for each of its weighted corpora.

    Raises OSError, ValueError, KeyError or TypeError if config.toml or corpus.json is missing or damaged.
    """
    record = json.loads((run_dir / "corpus.json").read_bytes())
    cache = cache_folder(config_from_toml(run_dir / "config.toml").data.cache_dir)
    digests = record["parts"] if "parts" in record else [record["digest"]]
    return [cache / "corpora" / digest[:32] for digest in digests]
