"""Training rows in which documents are kept apart.

Every token of a row sees the tokens of its own document alone (`segment_ids`), and positions count from 0 where a
document, or the part of it that the row has, begins. The targets are those of the plain stream: what a document's last
token predicts is the document token that follows it, by which the model learns where a text ends. That token is always
the same one, so that nothing of the next document is predicted.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.data.loader import Loader, TrainLoader, order_keys, permuted, plain, targets_in, validation_batches
from gpt.errors import UserError
from gpt.model.config import IGNORE_INDEX

Row = list[tuple[int, int]]  # pieces: where each begins among the tokens, and its length

POOL = 4096  # pieces that are packed together
_BLOCK = 1 << 24  # tokens searched at a time


def document_inputs(x: Tensor, document_token: int) -> tuple[Tensor, Tensor]:
    """positions (int64) and segment_ids (int32) of rows x (B, T) in which the document token begins a document."""
    begins = x == document_token
    begins[:, 0] = True
    index = torch.arange(x.shape[1]).expand_as(x)
    return index - index.where(begins, 0).cummax(1).values, begins.cumsum(1, dtype=torch.int32) - 1


class DocumentLoader(TrainLoader):
    """The windows of a TrainLoader, in its order, with documents kept apart."""

    def __init__(self, tokens: np.ndarray, document_token: int, **options: int) -> None:
        super().__init__(tokens, **options)
        self._document_token = document_token

    def read(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        x, y = super().read(rows)
        return x, y, *document_inputs(x, self._document_token)


def piece_starts(tokens: np.ndarray, document_token: int, seq_len: int) -> np.ndarray:
    """Where each piece begins, and as the last number where the last one ends; (pieces + 1,) int64.

    A piece is a document, or of one longer than seq_len each seq_len tokens of it and what is left. Only tokens that
    have a next one to predict are in pieces. Takes 8 bytes for each piece, twice that while it works; about a second
    for 10^9 tokens.
    """
    last, begin, parts = len(tokens) - 1, 0, []
    for at in range(0, last, _BLOCK):
        stop = min(at + _BLOCK, last)
        found = np.flatnonzero(np.asarray(tokens[at:stop]) == document_token) + at
        edges = np.concatenate(([begin], found, [last] if stop == last else found[:0]))
        counts = -(-np.diff(edges) // seq_len)  # pieces of each document
        of_document = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        parts.append(np.repeat(edges[:-1], counts) + of_document * seq_len)
        begin = int(edges[-1])
    return np.concatenate([*parts, [last]], dtype=np.int64)


def pack(starts: Sequence[int], lengths: Sequence[int], seq_len: int) -> list[Row]:
    """Rows of pieces of at most seq_len tokens in all: each takes, again and again, the longest piece that fits."""
    pieces = sorted(zip(lengths, starts))
    lengths, starts = [n for n, _ in pieces], [start for _, start in pieces]
    rows = []
    while lengths:
        row, room = [], seq_len
        while at := bisect_right(lengths, room):
            row.append((starts.pop(at - 1), lengths.pop(at - 1)))
            room -= row[-1][1]
        rows.append(row)
    return rows


def read_pieces(tokens: np.ndarray, rows: Sequence[Row], seq_len: int) -> tuple[Tensor, ...]:
    """Inputs, targets, positions and segment_ids of packed rows, each (rows, seq_len).

    What a row leaves free has input 0 and target -100, and is a segment of its own.
    """
    shape = (len(rows), seq_len)
    x, y, positions = np.zeros(shape, np.int64), np.full(shape, IGNORE_INDEX, np.int64), np.zeros(shape, np.int64)
    segments = np.zeros(shape, np.int32)
    counting = np.arange(seq_len)
    for i, row in enumerate(rows):
        at = 0
        for n, (start, length) in enumerate(row):
            end = at + length
            x[i, at:end] = tokens[start : start + length]
            y[i, at:end] = tokens[start + 1 : start + length + 1]
            positions[i, at:end] = counting[:length]
            segments[i, at:end] = n
            at = end
        positions[i, at:] = counting[: seq_len - at]
        segments[i, at:] = len(row)
    return tuple(map(torch.from_numpy, (x, y, positions, segments)))


class BestFitLoader(Loader):
    """Rows packed so that few documents are cut (Ding et al. 2024, "Fewer truncations improve language modeling").

    A document longer than seq_len is cut into pieces of seq_len and what is left; any other is a piece, whole. An epoch
    has every piece once, in the order of a permutation that is computed and not stored; each POOL of them that follow
    each other are packed together, longest first (first-fit decreasing), and their rows shuffled. So every token that
    has a next one is an input once per epoch, and little of a row stays free.

    The state counts pools and rows: it is the same for any batch_size and world_size.
    """

    def __init__(self, tokens: np.ndarray, document_token: int, **options: int) -> None:
        super().__init__(**options)
        if len(tokens) < 2:
            raise UserError(f"{len(tokens)} training tokens are too few to predict any")
        self._tokens = plain(tokens)
        self._starts = piece_starts(self._tokens, document_token, self.seq_len)
        self._count = len(self._starts) - 1
        self._go_to(0, 0, 0)

    def take(self, n: int) -> list[Row]:
        """The next n rows of the stream."""
        rows: list[Row] = []
        while len(rows) < n:
            if self._row == len(self._packed):
                last = (self._pool + 1) * POOL >= self._count
                self._go_to(*((self._epoch + 1, 0) if last else (self._epoch, self._pool + 1)), 0)
            part = self._packed[self._row : self._row + n - len(rows)]
            self._row += len(part)
            rows += part
        return rows

    def read(self, rows: Sequence[Row]) -> tuple[Tensor, ...]:
        return read_pieces(self._tokens, rows, self.seq_len)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins: rows used of a pool of an epoch; and what the order depends on."""
        position = {"epoch": self._epoch, "pool": self._pool, "row": self._row}
        return {**position, "rollbacks": self.rollbacks, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_order(state, self._order())
        position = epoch, pool, row = [state.get(name, -1) for name in ("epoch", "pool", "row")]
        if min(position) < 0 or pool * POOL >= self._count or row > POOL:
            raise UserError(f"the checkpoint's data position is invalid: row {row} of pool {pool}, epoch {epoch}")
        self.rollbacks = state.get("rollbacks", 0)
        self._go_to(*position)

    def _order(self) -> dict[str, Any]:
        order = {"seed": self.seed, "seq_len": self.seq_len, "tokens": len(self._tokens)}
        return {**order, "packing": "best_fit"}

    def _go_to(self, epoch: int, pool: int, row: int) -> None:
        keys = order_keys(f"{self.seed}:{epoch}:{self.rollbacks}")[1:]
        indices = np.arange(pool * POOL, min((pool + 1) * POOL, self._count))
        pieces = permuted(indices, self._count, keys)
        starts = self._starts[pieces]
        packed = pack(starts.tolist(), (self._starts[pieces + 1] - starts).tolist(), self.seq_len)
        shuffled = permuted(np.arange(len(packed)), len(packed), keys + np.uint64(1 + pool))
        self._packed = [packed[i] for i in shuffled]
        # After a rollback the pool has other pieces, and may make fewer rows.
        self._epoch, self._pool, self._row = epoch, pool, min(row, len(packed))


def packed_validation(
    tokens: np.ndarray,
    packing: str,
    document_token: int | None,
    *,
    batch_size: int,
    seq_len: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, ...]]:
    """The validation pass under a packing: validation_batches' targets, each once, and its arguments.

    documents: its rows, with documents kept apart. best_fit: packed as for training, pools in the text's order.
    """
    options = {"batch_size": batch_size, "seq_len": seq_len, "rank": rank, "world_size": world_size}
    if packing != "best_fit":
        for x, y in validation_batches(tokens, max_tokens=max_tokens, **options):
            yield (x, y) if packing == "stream" else (x, y, *document_inputs(x, document_token))
        return
    tokens = plain(tokens)[: targets_in(tokens, max_tokens) + 1]
    starts = piece_starts(tokens, document_token, seq_len)
    lengths = np.diff(starts)
    rows = (
        row
        for at in range(0, len(lengths), POOL)
        for row in pack(starts[:-1][at : at + POOL].tolist(), lengths[at : at + POOL].tolist(), seq_len)
    )
    while together := list(islice(rows, world_size * batch_size)):
        # Each rank gets as many batches; where none of these rows is left, one row without targets.
        mine = together[rank * batch_size : (rank + 1) * batch_size]
        yield read_pieces(tokens, mine or [[]], seq_len)


def make_loader(tokens: np.ndarray, packing: str, document_token: int | None, **options: int) -> Loader:
    """The training rows of tokens (N,) under a packing. options: as Loader takes them."""
    if packing == "stream":
        return TrainLoader(tokens, **options)
    return {"documents": DocumentLoader, "best_fit": BestFitLoader}[packing](tokens, document_token, **options)


def check_packing(packing: str, document_token: int | None, documents: int) -> None:
    """UserError where documents are to be kept apart and there is nothing that tells them apart."""
    if packing == "stream" or (document_token is not None and documents > 1):
        return
    why = "the corpus is one document" if documents == 1 else "the tokenizer has no document token"
    raise UserError(f"packing {packing} keeps documents apart, but {why}: give several documents, or packing stream")
