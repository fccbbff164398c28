"""corpus.json of a run: what it was trained on, and where the cache keeps those tokens."""

import json
from pathlib import Path

from gpt.config_file import config_from_toml
from gpt.data.cache import cache_folder
from gpt.data.corpus import Corpus
from gpt.files import write_whole


def write_provenance(corpus: Corpus, path: Path) -> None:
    """What the run was trained on: every source with its size and SHA-256, and how it was split."""
    sources = [{"name": name, "bytes": size, "sha256": sha256} for name, size, sha256 in corpus.sources]
    counts = ("digest", "documents", "train_tokens", "val_tokens", "train_bytes", "val_bytes")
    record = {key: getattr(corpus, key) for key in counts} | {"sources": sources}
    record |= {"tokenizer": corpus.tokenizer.fingerprint}
    record |= {"parts": corpus.parts} if corpus.parts else {}
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def tokenized_folders(run_dir: Path) -> list[Path]:
    """Where the cache had the tokens that a run was trained on: a folder, or one for each of its weighted corpora.

    Raises OSError, ValueError, KeyError or TypeError where its config.toml or corpus.json is missing or damaged.
    """
    record = json.loads((run_dir / "corpus.json").read_bytes())
    cache = cache_folder(config_from_toml(run_dir / "config.toml").data.cache_dir)
    return [
        cache / "corpora" / digest[:32] for digest in (record["parts"] if "parts" in record else [record["digest"]])
    ]
