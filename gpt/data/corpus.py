"""Text sources to token files: found, hashed, split, tokenized once, and kept by content.

    corpus = prepare(config.data, config.tokenizer)
    tokens = read_tokens(corpus.train, corpus.tokenizer)

The cache key is a hash of the sources' bytes, the tokenizer's settings, the split and the format, so that nothing is
ever out of date. Text is never held whole: it passes through in chunks. `python -m gpt.corpus inspect PATH` says what
came of it.

Documents: each text file is one, and so is each line of JSON lines and each row of a Parquet file or dataset. The
tokenizer's document token, where it has one, comes before each document; the held-out tail of a document does not
begin a new one. A character tokenizer gets the token only for several documents, so that one text gives exactly its
characters. gpt/data/split.py says which are held out. Text is kept unchanged, spaces and line ends too; text of nothing
but white space is refused.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
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

__all__ = ["Corpus", "OnProgress", "cache_folder", "check_length", "prepare"]

log = logging.getLogger(__name__)

FORMAT = 2  # of a cached corpus; part of its key
BPE_BYTES = 200_000_000  # of text that a BPE learns from at most


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
    digest: str  # sha256 of all that decides the tokens
    parts: tuple[str, ...] = ()  # of several corpora as one: the digest of each


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    fixed_tokenizer: Tokenizer | None = None,
    progress: OnProgress | None = None,
) -> Corpus:
    """Tokenize data.corpus, or open what an earlier call made of the same text and settings.

    fixed_tokenizer: what a resumed or evaluated run brings; `tokenizer` is then not looked at. progress is called as
    progress(what, bytes done, bytes in all). Raises UserError for whatever is wrong with the text or the cache.
    """
    if fixed_tokenizer is None:
        check_name(tokenizer.tokenizer)
    cache = cache_folder(data.cache_dir)
    if files := find_token_files(data):
        return _prepare_tokens(files, data, fixed_tokenizer or _maker(files, tokenizer), cache, progress)
    sources = [source.hashed() for source in find_sources(data, cache / "downloads", progress)]
    digest = _digest(sources, data, tokenizer, fixed_tokenizer)
    folder = cache / "corpora" / digest[:32]
    if folder.is_dir():
        try:
            saved = fixed_tokenizer or load_tokenizer(folder / "tokenizer.json")
            return _open(folder, sources, digest, saved, verify=True)
        except UserError as error:
            log.warning("%s: tokenizing again", error)
            make_way(folder)
    with publish(folder, resume=True) as work:
        made = _write(work, sources, data, tokenizer, fixed_tokenizer, progress)
    return _open(folder, sources, digest, made, verify=False)


def _maker(files: list[Path], config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that made token files, which must be named."""
    if learns_from(config.tokenizer):
        table = " (meta.pkl beside it is not read: a pickle can run code)" * (files[0].parent / "meta.pkl").exists()
        raise UserError(
            f"{files[0]} holds tokens and no text to learn a tokenizer from{table}: name the one that made them, such "
            "as --tokenizer gpt2, or train on the text itself"
        )
    return build_tokenizer(config, list)


def _prepare_tokens(
    files: list[Path], data: DataConfig, tokenizer: Tokenizer, cache: Path, progress: OnProgress | None
) -> Corpus:
    """A corpus of other programs' token files, which stay where they are."""
    sources = hashed(files, cache, progress)
    key = {
        "format": FORMAT,
        "token files": [[source.path.name, source.sha256] for source in sources],
        "tokenizer": tokenizer.fingerprint,
        "split": data.val_fraction,
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    folder = cache / "corpora" / digest[:32]
    if folder.is_dir():
        try:
            return _open(folder, sources, digest, tokenizer, verify=True)
        except UserError as error:  # moved, or touched
            log.warning("%s: checking again", error)
            make_way(folder)
    with publish(folder) as work:
        tokenizer.save(work / "tokenizer.json")
        write_index(work, files, tokenizer, data.val_fraction, _meter("checking tokens", sources, progress))
    return _open(folder, sources, digest, tokenizer, verify=False)


def check_length(corpus: Corpus, seq_len: int) -> None:
    """UserError unless the training part fills one row of seq_len tokens and the validation part has a target."""
    for side, tokens, least in (("training", corpus.train_tokens, seq_len + 1), ("validation", corpus.val_tokens, 2)):
        if tokens < least:
            raise UserError(
                f"the corpus is too short: its {side} part has {tokens} tokens and seq_len {seq_len} needs {least}; "
                "give more text, a smaller --seq-len or another --val-fraction"
            )


def _digest(sources: list[Source], data: DataConfig, config: TokenizerConfig, fixed: Tokenizer | None) -> str:
    """The cache key: sha256 of all that decides the tokens."""
    if fixed is not None:
        tokenizer: list[Any] = ["fixed", fixed.fingerprint]
    else:
        tokenizer = [config.tokenizer, config.bpe_vocab_size if config.tokenizer == "bpe" else None]
    several = len(sources) > 1 or sources[0].kind != "text"
    key = {
        "format": FORMAT,
        "sources": [[source.sha256, *source.form] for source in sources],
        "tokenizer": tokenizer,
        "split": [data.val_fraction, data.split_seed if several else None],
        "encoding_errors": data.encoding_errors,
    }
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _open(folder: Path, sources: list[Source], digest: str, tokenizer: Tokenizer, *, verify: bool) -> Corpus:
    """The corpus in a cache folder; UserError if anything in it is damaged."""
    try:
        counts = json.loads((folder / "corpus.json").read_bytes())
        counts = {name: int(counts[name]) for name in ("train_bytes", "val_bytes", "documents")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"the tokenized corpus in {folder} is damaged") from None
    train, val = (read_tokens(folder / f"{side}.tokens", tokenizer, verify=verify) for side in ("train", "val"))
    return Corpus(
        directory=folder,
        tokenizer=tokenizer,
        train=folder / "train.tokens",
        val=folder / "val.tokens",
        train_tokens=len(train),
        val_tokens=len(val),
        **counts,
        sources=tuple((source.name, source.size, source.sha256) for source in sources),
        digest=digest,
    )


def _write(
    folder: Path,
    sources: list[Source],
    data: DataConfig,
    config: TokenizerConfig,
    fixed: Tokenizer | None,
    progress: OnProgress | None,
) -> Tokenizer:
    """Make a corpus folder: tokenizer.json, train.tokens, val.tokens, corpus.json. Returns the tokenizer.

    In a folder that an interrupted call left behind it uses the existing tokenizer and tokens.
    """
    split = find_split(sources, data)
    saved = folder / "tokenizer.json"
    tokenizer = fixed or _unfinished(saved)
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


def _unfinished(path: Path) -> Tokenizer | None:
    """The tokenizer that an interrupted call has learned."""
    try:
        return load_tokenizer(path) if path.exists() else None
    except UserError:
        return None


def _meter(what: str, sources: list[Source], progress: OnProgress | None) -> OnRead | None:
    """Tells progress how much of the sources' files has been read."""
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
    """The tokenizer that config asks for, from the whole text for characters, from the training part for a BPE.

    A BPE's trainer keeps every distinct word in memory: it learns from at most BPE_BYTES, spread evenly over the text.
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
            if taken >= BPE_BYTES:  # packed files hold more text than their size says
                return

    return build_tokenizer(config, texts, document_token=split.several)
