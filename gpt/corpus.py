"""Text sources to token files: found, hashed, split, tokenized once, and kept by content.

    corpus = prepare(config.data, config.tokenizer)
    tokens = read_tokens(corpus.train, corpus.tokenizer)

The cache key is a hash of the sources' bytes, the tokenizer's settings, the split and the format, so that nothing is
ever out of date. Text is never held whole: it passes through in chunks.

Documents: each file is one. The tokenizer's document token, where it has one, stands before each document; the
held-out tail of a document is no new one. A character tokenizer gets the token only for several documents, so that one
text gives exactly its characters.
Split: one document at its tail. Of several, a seeded hash of each one's bytes decides, so that a document keeps its
side when the corpus grows. Text is kept as it stands, blanks and line ends too; nothing but blanks is refused.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt.config import DataConfig, TokenizerConfig
from gpt.errors import UserError
from gpt.shards import ShardWriter, read_tokens
from gpt.sources import Progress, Source, find_sources, publish
from gpt.tokenizer import BPETokenizer, Tokenizer, UnknownCharacter, build_tokenizer, check_name, load_tokenizer

__all__ = ["Corpus", "Progress", "check_length", "prepare", "read_tokens"]

log = logging.getLogger(__name__)

FORMAT = 1  # of a cached corpus; part of its key
Side = Literal["train", "val"]


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


@dataclass(frozen=True)
class _Document:
    """A source, of which the first `cut` UTF-8 bytes of text are trained on: inf for all, 0 for none."""

    source: Source
    cut: float

    def parts(self, errors: str) -> Iterator[tuple[Side, str]]:
        """The text in chunks, each wholly on one side; the cut moves down to a character's start."""
        done = 0
        for text in self.source.chunks(errors):
            size = utf8_bytes(text)
            if done + size <= self.cut:
                yield "train", text
            elif done >= self.cut:
                yield "val", text
            else:
                raw = text.encode()
                at = int(self.cut) - done
                while raw[at] & 0xC0 == 0x80:
                    at -= 1
                head = len(raw[:at].decode())
                head = max(head, done == 0)  # up, where nothing would be left to train on
                yield "train", text[:head]
                yield "val", text[head:]
            done += size


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    fixed_tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenize data.corpus, or open what an earlier call made of the same text and settings.

    fixed_tokenizer: what a resumed or evaluated run brings; `tokenizer` is then not looked at. progress is called as
    progress(what, bytes done, bytes in all). Raises UserError for whatever is wrong with the text or the cache.
    """
    if fixed_tokenizer is None:
        check_name(tokenizer.tokenizer)
    cache = cache_folder(data.cache_dir)
    sources = [source.hashed() for source in find_sources(data, cache / "downloads", progress)]
    digest = _digest(sources, data, tokenizer, fixed_tokenizer)
    place = cache / "corpora" / digest[:32]
    if place.is_dir():
        try:
            saved = fixed_tokenizer or load_tokenizer(place / "tokenizer.json")
            return _open(place, sources, digest, saved, verify=True)
        except UserError as error:
            log.warning("%s: tokenizing again", error)
            shutil.rmtree(place, ignore_errors=True)
    with publish(place) as work:
        made = _write(work, sources, data, tokenizer, fixed_tokenizer, progress)
    return _open(place, sources, digest, made, verify=False)


def check_length(corpus: Corpus, seq_len: int) -> None:
    """UserError unless the training part fills one row of seq_len tokens and the validation part has a target."""
    for side, tokens, least in (("training", corpus.train_tokens, seq_len + 1), ("validation", corpus.val_tokens, 2)):
        if tokens < least:
            raise UserError(
                f"the corpus is too short: its {side} part has {tokens} tokens and seq_len {seq_len} needs {least}; "
                "give more text, a smaller --seq-len or another --val-fraction"
            )


def cache_folder(given: Path | None) -> Path:
    """Where corpora and downloads are kept: `given`, or a folder in $XDG_CACHE_HOME or ~/.cache."""
    if given is not None:
        return Path(given).expanduser().absolute()
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # the XDG specification: a relative path is ignored
        root = os.path.expanduser("~/.cache")
    if not os.path.isabs(root):
        raise UserError("this user has no home folder to keep tokenized text in: give a folder with --cache-dir")
    return Path(root, "gpt-on-triton")


def utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _digest(sources: list[Source], data: DataConfig, config: TokenizerConfig, fixed: Tokenizer | None) -> str:
    """The cache key: sha256 of all that decides the tokens."""
    if fixed is not None:
        tokenizer: list[Any] = ["fixed", fixed.fingerprint]
    else:
        tokenizer = [config.tokenizer, config.bpe_vocab_size if config.tokenizer == "bpe" else None]
    key = {
        "format": FORMAT,
        "sources": [[source.sha256, source.coding, source.limit] for source in sources],
        "tokenizer": tokenizer,
        "split": [data.val_fraction, data.split_seed if len(sources) > 1 else None],
        "encoding_errors": data.encoding_errors,
    }
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _open(place: Path, sources: list[Source], digest: str, tokenizer: Tokenizer, *, verify: bool) -> Corpus:
    """The corpus in a cache folder; UserError if anything in it is damaged."""
    try:
        counts = json.loads((place / "corpus.json").read_text())
        train_bytes, val_bytes = int(counts["train_bytes"]), int(counts["val_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"the tokenized corpus in {place} is damaged") from None
    train, val = (read_tokens(place / f"{side}.tokens", tokenizer, verify=verify) for side in ("train", "val"))
    return Corpus(
        directory=place,
        tokenizer=tokenizer,
        train=place / "train.tokens",
        val=place / "val.tokens",
        train_tokens=len(train),
        val_tokens=len(val),
        train_bytes=train_bytes,
        val_bytes=val_bytes,
        documents=len(sources),
        sources=tuple((source.name, source.size, source.sha256) for source in sources),
        digest=digest,
    )


def _write(
    folder: Path,
    sources: list[Source],
    data: DataConfig,
    config: TokenizerConfig,
    fixed: Tokenizer | None,
    progress: Progress | None,
) -> Tokenizer:
    """Make a corpus folder: tokenizer.json, train.tokens, val.tokens, corpus.json. Returns the tokenizer."""
    documents = _split(sources, data)
    tokenizer = fixed or _learn(documents, data, config, progress)
    tokenizer.save(folder / "tokenizer.json")
    counts = {"train_bytes": 0, "val_bytes": 0}
    total, blank = sum(source.size for source in sources), True
    with ShardWriter(folder / "train.tokens", tokenizer) as train, ShardWriter(folder / "val.tokens", tokenizer) as val:
        writers = {"train": train, "val": val}
        for piece, ids in _encoded(documents, tokenizer, data.encoding_errors):
            if piece.starts and tokenizer.document_token is not None:
                writers[piece.side].append(np.array([tokenizer.document_token]))
            writers[piece.side].append(ids)
            counts[f"{piece.side}_bytes"] += utf8_bytes(piece.text)
            blank = blank and piece.text.isspace()
            if progress is not None:
                progress("tokenizing", min(sum(counts.values()), total), total)
    if blank:
        raise UserError(f"the corpus {', '.join(data.corpus)} is empty: it holds nothing but blanks")
    if not (train.tokens and val.tokens):
        raise UserError(f"the corpus {', '.join(data.corpus)} is too short to be split: give more text")
    (folder / "corpus.json").write_text(json.dumps(counts, indent=0))
    return tokenizer


def _split(sources: list[Source], data: DataConfig) -> list[_Document]:
    """Which text is trained on. Both sides get some, if there is more than one character or document."""
    fraction = data.val_fraction
    if len(sources) == 1:
        total = sum(utf8_bytes(text) for text in sources[0].chunks(data.encoding_errors))
        return [_Document(sources[0], min(max(int(total * (1 - fraction)), 1), total - 1))]
    draws = [_draw(source, data.split_seed) for source in sources]
    held = [draw < fraction for draw in draws]
    if not any(held):
        held = [draw == min(draws) for draw in draws]
    if all(held):
        held = [draw != max(draws) for draw in draws]
    if not any(held):  # all are copies of one text
        held[-1] = True
    return [_Document(source, 0 if out else math.inf) for source, out in zip(sources, held)]


def _draw(source: Source, seed: int) -> float:
    """A number in [0, 1) that depends on the seed and the document's bytes alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{source.sha256}".encode()).digest()[:6]) / 2**48


def _learn(
    documents: list[_Document], data: DataConfig, config: TokenizerConfig, progress: Progress | None
) -> Tokenizer:
    """The tokenizer that config asks for, from the whole text for characters, from the training part for a BPE."""
    total = sum(document.source.size for document in documents)

    def texts() -> Iterator[str]:
        done = 0
        for document in documents:
            for side, text in document.parts(data.encoding_errors):
                done += utf8_bytes(text)
                if progress is not None:
                    progress("reading", min(done, total), total)
                if side == "train" or config.tokenizer == "char":
                    yield text

    return build_tokenizer(config, texts, document_token=len(documents) > 1)


@dataclass(frozen=True)
class _Piece:
    """Text to encode by itself."""

    side: Side
    text: str
    source: Source
    position: int  # of its first character in the document
    starts: bool  # the document begins here


def _pieces(documents: list[_Document], tokenizer: Tokenizer, errors: str) -> Iterator[_Piece]:
    for document in documents:
        position = 0
        for side, parts in groupby(document.parts(errors), key=lambda part: part[0]):
            for text in tokenizer.segments(text for _, text in parts):
                if text:
                    yield _Piece(side, text, document.source, position, position == 0)
                    position += len(text)


def _encoded(documents: list[_Document], tokenizer: Tokenizer, errors: str) -> Iterator[tuple[_Piece, np.ndarray]]:
    """Each piece with its ids, in order. tiktoken works outside the interpreter's lock: it gets a thread per core."""
    pieces = _pieces(documents, tokenizer, errors)
    threads = _cores() if isinstance(tokenizer, BPETokenizer) else 1
    waiting: deque[tuple[_Piece, Future[np.ndarray]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(tokenizer.encode_to_array, piece.text)))
            if len(waiting) > 2 * threads:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(piece: _Piece, future: "Future[np.ndarray]") -> tuple[_Piece, np.ndarray]:
    try:
        return piece, future.result()
    except UnknownCharacter as error:
        position = piece.position + error.position
        raise UnknownCharacter(error.character, position, piece.source.name) from None


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
