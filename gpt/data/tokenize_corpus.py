"""Documents to token files: in groups that a thread per core encodes, and from where an interrupted call left off.

A group is some hundred kilobytes of text, so that a million short documents cost no more than one long one; only a few
groups are in memory at a time. Whenever another PART of text has been encoded, the token files are brought to the disk
and a journal beside them says how far they are good. A later call for the same text checks them, reads the text again
up to there without encoding it, and goes on; the files end up the same, byte for byte.
"""

import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.cache import JOURNAL
from gpt.data.readers import OnRead, Source
from gpt.data.split import Side, Split, read_documents, utf8_bytes
from gpt.data.token_files import ShardWriter
from gpt.data.tokenizers import Tokenizer, UnknownCharacter
from gpt.files import write_whole

GROUP = 400_000  # characters that are encoded at a time,
PIECES = 2000  # in at most so many pieces
PART = 100_000_000  # characters after which the journal is written
WORTH_KEEPING = 1_000_000  # characters that an interrupt writes it for

SIDES: tuple[Side, Side] = ("train", "val")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Text to encode by itself."""

    side: Side
    text: str
    document: str  # its name
    position: int  # of its first character in the document
    starts: bool  # the document begins here


@dataclass
class Counts:
    """What has been encoded. Bytes are UTF-8 bytes of text; shards: what each side's ShardWriter.state gave."""

    groups: int = 0
    characters: int = 0
    documents: int = 0
    train_bytes: int = 0
    val_bytes: int = 0
    white_space: bool = True  # whether all text so far is white space
    shards: dict[Side, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Encoded:
    """A group's ids and bytes on each side."""

    ids: dict[Side, np.ndarray]
    bytes: dict[Side, int]
    white_space: bool


def write_tokens(
    folder: Path,
    sources: list[Source],
    split: Split,
    tokenizer: Tokenizer,
    errors: str,
    on_read: OnRead | None = None,
) -> Counts:
    """Make train.tokens and val.tokens in a folder, or finish those of an earlier call.

    Raises UserError for what is not text.
    """
    paths = {side: folder / f"{side}.tokens" for side in SIDES}
    counts = _journal(folder / JOURNAL, tokenizer)
    writers = _resume(paths, tokenizer, counts)
    if writers is None:
        counts, writers = Counts(), {side: ShardWriter(path, tokenizer) for side, path in paths.items()}
    written, marked = counts.characters, None
    with writers["train"], writers["val"]:
        try:
            for group, encoded in _encoded(
                _groups(sources, split, tokenizer, errors, on_read), tokenizer, counts.groups
            ):
                _append(writers, counts, group, encoded)
                marked = replace(counts, shards={side: writer.mark() for side, writer in writers.items()})
                if counts.characters - written >= PART:
                    written = counts.characters
                    _keep(folder, tokenizer, marked, writers)
        except KeyboardInterrupt:
            if marked is not None and marked.characters - written >= WORTH_KEEPING:
                _keep(folder, tokenizer, marked, writers)
            raise
    return counts


def _append(writers: dict[Side, ShardWriter], counts: Counts, group: list[_Piece], encoded: _Encoded) -> None:
    """Write an encoded group and count it."""
    for side, ids in encoded.ids.items():
        writers[side].append(ids)
    counts.train_bytes += encoded.bytes["train"]
    counts.val_bytes += encoded.bytes["val"]
    counts.white_space = counts.white_space and encoded.white_space
    counts.groups += 1
    counts.characters += sum(len(piece.text) for piece in group)
    counts.documents += sum(piece.starts for piece in group)


def _keep(folder: Path, tokenizer: Tokenizer, marked: Counts, writers: dict[Side, ShardWriter]) -> None:
    """Bring the tokens to the disk, and then a journal that says how far they are good."""
    for writer in writers.values():
        writer.state()
    record = {"fingerprint": tokenizer.fingerprint, "group": GROUP, **asdict(marked)}
    write_whole(folder / JOURNAL, json.dumps(record).encode())


def _journal(path: Path, tokenizer: Tokenizer) -> Counts:
    """How far an earlier call came with this tokenizer."""
    try:
        record = json.loads(path.read_bytes())
        if (record.pop("fingerprint"), record.pop("group")) == (tokenizer.fingerprint, GROUP):
            return Counts(**record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return Counts()


def _resume(paths: dict[Side, Path], tokenizer: Tokenizer, counts: Counts) -> dict[Side, ShardWriter] | None:
    """Writers that continue the token files of an earlier call; None if these are missing or have changed."""
    writers: dict[Side, ShardWriter] = {}
    try:
        for side, path in paths.items():
            writers[side] = ShardWriter(path, tokenizer, counts.shards[side])
    except (OSError, ValueError, KeyError, TypeError):
        for writer in writers.values():
            writer.close()
        return None
    return writers


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


def _groups(*arguments: Any) -> Iterator[list[_Piece]]:
    """The pieces, as many together as make a GROUP."""
    group: list[_Piece] = []
    size = 0
    for piece in _pieces(*arguments):
        group.append(piece)
        size += len(piece.text)
        if size >= GROUP or len(group) == PIECES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encoded(
    groups: Iterator[list[_Piece]], tokenizer: Tokenizer, done: int
) -> Iterator[tuple[list[_Piece], _Encoded]]:
    """Each group but the first `done`, encoded, in order. tiktoken works outside the interpreter's lock: it gets a
    thread per core."""
    threads = cores() if tokenizer.parallel else 1
    waiting: deque[tuple[list[_Piece], Future[_Encoded]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for number, group in enumerate(groups):
            if number < done:
                continue
            waiting.append((group, pool.submit(_encode, group, tokenizer)))
            if len(waiting) > 2 * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
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
    joined = {side: np.concatenate(parts) for side, parts in ids.items() if parts}
    return _Encoded(joined, sizes, all(piece.text.isspace() for piece in group))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
