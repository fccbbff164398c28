"""Turns text sources into token files: finds, hashes, splits and tokenizes them once, and caches the result.

    corpus = prepare(config.data, config.tokenizer)
    tokens = read_tokens(corpus.train, corpus.tokenizer)

The cache key is a hash of the sources' bytes, the tokenizer's settings, the split and the format, so that no entry can
be out of date. Text passes through in chunks and is never in memory whole.

Documents: a text file is one; so is each line of JSON lines and each row of a Parquet file or dataset. The tokenizer's
document token, if it has one, comes before each document; the held-out tail of a document does not begin a new one. A
character tokenizer has the token only if there are several documents, so that a single text becomes exactly its
characters. Text is kept unchanged, including spaces and line ends; a corpus of nothing but white space is refused.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.data.build_tokenizer import build_tokenizer, check_name, learns_from
from gpt.data.cache import cache_folder, make_way, publish
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.downloads import OnProgress
from gpt.data.external_tokens import find_token_files, hashed, write_index
from gpt.data.readers import OnRead, Source
from gpt.data.sources import find_sources
from gpt.data.split import Side, Split, find_split, read_documents
from gpt.data.token_files import read_tokens
from gpt.data.tokenize_corpus import write_tokens
from gpt.data.tokenizers import Tokenizer, load_tokenizer
from gpt.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 2  # of a cached corpus; part of the cache key
BPE_BYTES = 200_000_000  # of text, at most, that a BPE learns from


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus in the cache. Bytes are UTF-8 bytes of text; tokens include document tokens."""

    directory: Path
    tokenizer: Tokenizer
    train: Path
    val: Path
    train_tokens: int
    val_tokens: int
    train_bytes: int
    val_bytes: int
    documents: int
    sources: tuple[tuple[str, int, str], ...]  # name, bytes of the file, sha256
    digest: str  # sha256 of everything that decides the tokens
    parts: tuple[str, ...] = ()  # the digest of each corpus, if this is the sum of several


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    fixed_tokenizer: Tokenizer | None = None,
    progress: OnProgress | None = None,
) -> Corpus:
    """Tokenize data.corpus, or open the result of an earlier call with the same text and settings.

    fixed_tokenizer: the tokenizer of a resumed or evaluated run, used instead of `tokenizer`. progress is called as
    progress(stage, bytes done, bytes in all). Raises UserError for any fault of the text or the cache.
    """
    if fixed_tokenizer is None:
        check_name(tokenizer.tokenizer)
    cache = cache_folder(data.cache_dir)
    if files := find_token_files(data):
        fixed_tokenizer = fixed_tokenizer or _maker(files, tokenizer)
        sources = hashed(files, cache, progress)
        key: dict[str, Any] = {
            "format": FORMAT,
            "token files": [[source.path.name, source.sha256] for source in sources],
            "tokenizer": fixed_tokenizer.fingerprint,
            "split": data.val_fraction,
        }
    else:
        sources = [source.hashed() for source in find_sources(data, cache / "downloads", progress)]
        key = _key(sources, data, tokenizer, fixed_tokenizer)
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    folder = cache / "corpora" / digest[:32]
    if folder.is_dir():
        try:
            saved = fixed_tokenizer or load_tokenizer(folder / "tokenizer.json")
            return _open(folder, sources, digest, saved, verify=True)
        except UserError as error:  # token files may have moved, or changed
            log.warning("%s: %s again", error, "checking" if files else "tokenizing")
            make_way(folder)
    with publish(folder, resume=not files) as work:
        if files:
            made = fixed_tokenizer
            made.save(work / "tokenizer.json")
            write_index(work, files, made, data.val_fraction, _meter("checking tokens", sources, progress))
        else:
            made = _write(work, sources, data, tokenizer, fixed_tokenizer, progress)
    return _open(folder, sources, digest, made, verify=False)


def _maker(files: list[Path], config: TokenizerConfig) -> Tokenizer:
    """Build the tokenizer that made token files, which the user must name."""
    if learns_from(config.tokenizer):
        table = " (meta.pkl beside it is not read: a pickle can run code)" * (files[0].parent / "meta.pkl").exists()
        raise UserError(
            f"{files[0]} holds tokens, not text that a tokenizer could learn from{table}: name the tokenizer that made "
            "them, such as --tokenizer gpt2, or train on the text itself"
        )
    return build_tokenizer(config, list)


def check_length(corpus: Corpus, seq_len: int) -> None:
    """Raise UserError unless training fills one row of seq_len tokens and validation has a target."""
    for side, tokens, least in (("training", corpus.train_tokens, seq_len + 1), ("validation", corpus.val_tokens, 2)):
        if tokens < least:
            raise UserError(
                f"the corpus is too short: its {side} part has {tokens} tokens and seq_len {seq_len} needs {least}; "
                "give more text, a smaller --seq-len or another --val-fraction"
            )


def _key(sources: list[Source], data: DataConfig, config: TokenizerConfig, fixed: Tokenizer | None) -> dict[str, Any]:
    """Return everything that decides the tokens of a text."""
    tokenizer: list[Any] = [config.tokenizer, config.bpe_vocab_size if config.tokenizer == "bpe" else None]
    if fixed is not None:
        tokenizer = ["fixed", fixed.fingerprint]
    several = len(sources) > 1 or sources[0].kind != "text"
    return {
        "format": FORMAT,
        "sources": [[source.sha256, *source.form] for source in sources],
        "tokenizer": tokenizer,
        "split": [data.val_fraction, data.split_seed if several else None],
        "encoding_errors": data.encoding_errors,
    }


def _open(folder: Path, sources: list[Source], digest: str, tokenizer: Tokenizer, *, verify: bool) -> Corpus:
    """Open the corpus in a cache folder. UserError if any of it is damaged."""
    try:
        counts = json.loads((folder / "corpus.json").read_bytes())
        counts = {name: int(counts[name]) for name in ("train_bytes", "val_bytes", "documents")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"the tokenized corpus in {folder} is damaged") from None
    train, val = (read_tokens(folder / f"{side}.tokens", tokenizer, verify=verify) for side in ("train", "val"))
    sizes = {"train_tokens": len(train), "val_tokens": len(val), **counts}
    files = tuple((source.name, source.size, source.sha256) for source in sources)
    return Corpus(
        folder, tokenizer, folder / "train.tokens", folder / "val.tokens", **sizes, sources=files, digest=digest
    )


def _write(
    folder: Path,
    sources: list[Source],
    data: DataConfig,
    config: TokenizerConfig,
    fixed: Tokenizer | None,
    progress: OnProgress | None,
) -> Tokenizer:
    """Write a corpus folder: tokenizer.json, train.tokens, val.tokens, corpus.json. Returns the tokenizer.

    Uses the tokenizer and tokens that an interrupted call left in the folder.
    """
    split = find_split(sources, data)
    saved, tokenizer = folder / "tokenizer.json", fixed
    if tokenizer is None and saved.exists():
        with suppress(UserError):
            tokenizer = load_tokenizer(saved)
    if tokenizer is None:
        tokenizer = _learn(sources, split, data, config, _meter("reading", sources, progress))
    tokenizer.save(saved)
    counts = write_tokens(
        folder, sources, split, tokenizer, data.encoding_errors, _meter("tokenizing", sources, progress)
    )
    if counts.white_space:
        raise UserError(f"the corpus {', '.join(data.corpus)} is empty: it holds nothing but white space")
    if not (counts.train_bytes and counts.val_bytes):
        raise UserError(f"the corpus {', '.join(data.corpus)} is too short to be split: give more text")
    kept = {name: getattr(counts, name) for name in ("train_bytes", "val_bytes", "documents")}
    (folder / "corpus.json").write_text(json.dumps(kept, indent=0))
    return tokenizer


def _meter(what: str, sources: list[Source], progress: OnProgress | None) -> OnRead | None:
    """Return a function that reports to progress how much of the sources' files has been read."""
    if progress is None:
        return None
    total, done = sum(source.size for source in sources), 0

    def on_read(size: int) -> None:
        nonlocal done
        done += size
        progress(what, min(done, total), total)

    return on_read


def _learn(
    sources: list[Source], split: Split, data: DataConfig, config: TokenizerConfig, on_read: OnRead | None
) -> Tokenizer:
    """Build the tokenizer that config names, from the text that it learns from.

    A BPE's trainer keeps every distinct word in memory, so it gets at most BPE_BYTES, spread evenly over the text.
    """
    share = min(1.0, BPE_BYTES / max(1, sum(source.size for source in sources)))

    def every_text() -> Iterator[tuple[Side, str]]:
        for number, document in enumerate(read_documents(sources, data.encoding_errors, on_read)):
            yield from split.parts(number, document)

    def texts() -> Iterator[str]:
        if learns_from(config.tokenizer) == "all":
            yield from (text for _, text in every_text())
            return
        count = taken = 0
        for side, text in every_text():
            if side == "train":
                count += 1
                if int(count * share) > int((count - 1) * share):
                    taken += len(text)
                    yield text
            if taken >= BPE_BYTES:  # compressed files hold more text than their size says
                return

    return build_tokenizer(config, texts, document_token=split.several)
