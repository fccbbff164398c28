"""Tokenizes documents into token files: on every core, and resuming after an interruption.

Text is encoded in groups of some hundred kilobytes, so that a million short documents cost no more than one long one.
Only a few groups are in memory at a time. After each PART of text, the token files are flushed to disk and a journal
beside them records how much of them is valid. A later call for the same text checks them, reads the text again up to
there without encoding it, and continues; the files end up the same, byte for byte.
"""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.cache import JOURNAL
from gpt.data.readers import OnRead, Source
from gpt.data.split import Side, Split, read_documents, utf8_bytes
from gpt.data.token_files import TokenWriter
from gpt.data.tokenizers import Tokenizer, UnknownCharacter
from gpt.files import write_whole

GROUP = 400_000  # characters that are encoded at a time,
PIECES = 2000  # in at most this many pieces
PART = 100_000_000  # characters between two journals
WORTH_KEEPING = 1_000_000  # characters for which an interruption writes a journal

SIDES: tuple[Side, Side] = ("train", "val")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Text that is encoded by itself."""

    side: Side
    text: str
    document: str  # its name
    position: int  # of its first character in the document
    starts: bool  # whether the document begins here


@dataclass
class Counts:
    """What has been encoded so far; the journal's content. Bytes are UTF-8 bytes of text."""

    groups: int = 0
    characters: int = 0
    documents: int = 0
    train_bytes: int = 0
    val_bytes: int = 0
    white_space: bool = True  # whether all text so far is white space
    shards: dict[Side, Any] = field(default_factory=dict)  # the state of each side's TokenWriter


@dataclass(frozen=True)
class _Encoded:
    """A group's ids, and its counts. It holds none of the group's text."""

    ids: dict[Side, np.ndarray]
    bytes: dict[Side, int]
    characters: int
    documents: int
    white_space: bool


def write_tokens(
    folder: Path, sources: list[Source], split: Split, tokenizer: Tokenizer, errors: str, on_read: OnRead | None = None
) -> Counts:
    """Write train.tokens and val.tokens in a folder, or finish those of an earlier call.

    Raises UserError for a source that is not text.
    """
    counts, writers = _resume(folder, tokenizer)
    groups = islice(_groups(_pieces(sources, split, tokenizer, errors, on_read)), counts.groups, None)
    written, marked = counts.characters, None
    with writers["train"], writers["val"]:
        try:
            for encoded in _encoded(groups, tokenizer):
                _append(writers, counts, encoded)
                marked = replace(counts, shards={side: writer.state() for side, writer in writers.items()})
                if counts.characters - written >= PART:
                    written = counts.characters
                    _write_journal(folder, tokenizer, marked, writers)
        except KeyboardInterrupt:
            if marked is not None and marked.characters - written >= WORTH_KEEPING:
                _write_journal(folder, tokenizer, marked, writers)
            raise
    return counts


def _append(writers: dict[Side, TokenWriter], counts: Counts, encoded: _Encoded) -> None:
    """Write an encoded group and count it."""
    for side, ids in encoded.ids.items():
        writers[side].append(ids)
    counts.train_bytes += encoded.bytes["train"]
    counts.val_bytes += encoded.bytes["val"]
    counts.white_space = counts.white_space and encoded.white_space
    counts.groups += 1
    counts.characters += encoded.characters
    counts.documents += encoded.documents


def _write_journal(folder: Path, tokenizer: Tokenizer, counts: Counts, writers: dict[Side, TokenWriter]) -> None:
    """Flush the tokens to disk, then write the journal that counts them."""
    for writer in writers.values():
        writer.sync()
    record = {"fingerprint": tokenizer.fingerprint, "group": GROUP, **asdict(counts)}
    write_whole(folder / JOURNAL, json.dumps(record).encode())


def _resume(folder: Path, tokenizer: Tokenizer) -> tuple[Counts, dict[Side, TokenWriter]]:
    """Open the token files at the position that the journal records, or at the start without a valid journal."""
    paths = {side: folder / f"{side}.tokens" for side in SIDES}
    writers: dict[Side, TokenWriter] = {}
    try:
        record = json.loads((folder / JOURNAL).read_bytes())
        if (record.pop("fingerprint"), record.pop("group")) == (tokenizer.fingerprint, GROUP):
            counts = Counts(**record)
            for side, path in paths.items():
                writers[side] = TokenWriter(path, tokenizer, counts.shards[side])
            return counts, writers
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        for writer in writers.values():
            writer.close()
    return Counts(), {side: TokenWriter(path, tokenizer) for side, path in paths.items()}


def _pieces(
    sources: list[Source], split: Split, tokenizer: Tokenizer, errors: str, on_read: OnRead | None
) -> Iterator[_Piece]:
    for number, document in enumerate(read_documents(sources, errors, on_read)):
        position = 0
        for side, parts in groupby(split.parts(number, document), key=lambda part: part[0]):
            for text in tokenizer.segments(text for _, text in parts):
                if text:
                    yield _Piece(side, text, document.name, position, position == 0)
                    position += len(text)


def _groups(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Collect pieces into groups of about GROUP characters."""
    group: list[_Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= GROUP or len(group) == PIECES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encoded(groups: Iterator[list[_Piece]], tokenizer: Tokenizer) -> Iterator[_Encoded]:
    """Encode groups, in order; with a thread per core if that is faster with this tokenizer.

    Memory is bounded however the threads are scheduled: only the pool refers to a group, and drops its text once it is
    encoded.
    """
    threads = cores() if tokenizer.parallel else 1
    waiting: deque[Future[_Encoded]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for future in map(pool.submit, repeat(_encode), groups, repeat(tokenizer)):
            waiting.append(future)
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(group: list[_Piece], tokenizer: Tokenizer) -> _Encoded:
    mark = np.array([] if tokenizer.document_token is None else [tokenizer.document_token], tokenizer.dtype)
    ids: dict[Side, list[np.ndarray]] = {side: [] for side in SIDES}
    sizes: dict[Side, int] = dict.fromkeys(SIDES, 0)
    for piece in group:
        if piece.starts:
            ids[piece.side].append(mark)
        try:
            ids[piece.side].append(tokenizer.encode_to_array(piece.text))
        except UnknownCharacter as error:
            raise UnknownCharacter(error.character, piece.position + error.position, piece.document) from None
        sizes[piece.side] += utf8_bytes(piece.text)
    return _Encoded(
        ids={side: parts[0] if len(parts) == 1 else np.concatenate(parts) for side, parts in ids.items() if parts},
        bytes=sizes,
        characters=sum(len(piece.text) for piece in group),
        documents=sum(piece.starts for piece in group),
        white_space=all(piece.text.isspace() for piece in group),
    )


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
