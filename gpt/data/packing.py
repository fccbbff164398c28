"""Training rows that keep documents apart, and the validation pass under every packing.

A token attends only to its own document (`segment_ids`), and positions count from 0 at the start of each document, or
of the part that is in the row. The targets are those of the plain stream: a document's last token predicts the document
token that follows, by which the model learns where a text ends.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.data.loader import Loader, TrainLoader, order_keys, permuted, targets_in
from gpt.errors import UserError
from gpt.model.config import IGNORE_INDEX

Row = list[tuple[int, int]]  # start among the tokens, and length, of each piece

POOL = 4096  # pieces packed together
_BLOCK = 1 << 24  # tokens searched at once


def document_inputs(x: Tensor, document_token: int) -> tuple[Tensor, Tensor]:
    """Return positions (int64) and segment_ids (int32) of rows x (B, T), whose documents begin with document_token."""
    begins = x == document_token
    begins[:, 0] = True
    index = torch.arange(x.shape[1]).expand_as(x)
    return index - index.where(begins, 0).cummax(1).values, begins.cumsum(1, dtype=torch.int32) - 1


class DocumentLoader(TrainLoader):
    """A TrainLoader's windows, in its order, with documents kept apart."""

    def __init__(self, tokens: np.ndarray, document_token: int, **options: int) -> None:
        super().__init__(tokens, **options)
        self._document_token = document_token

    def read(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        x, y = super().read(rows)
        return x, y, *document_inputs(x, self._document_token)


def piece_starts(tokens: np.ndarray, document_token: int, seq_len: int) -> np.ndarray:
    """Return the start of each piece, and the end of the last one; (pieces + 1,) int64.

    A piece is a document; one longer than seq_len is cut into pieces of seq_len and a shorter last one. The last token
    has no target, so no piece holds it. Takes 8 bytes per piece, and twice that while working.
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
    """Pack pieces into rows of at most seq_len tokens: a row takes the longest piece that fits, until none does."""
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
    """Read the inputs, targets, positions and segment_ids of packed rows, each (rows, seq_len).

    The free end of a row has input 0 and target IGNORE_INDEX, and is a segment of its own.
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

    An epoch has every piece (see piece_starts) once, in random order by a permutation that is computed rather than
    stored. Each POOL of consecutive pieces is packed, longest first (first-fit decreasing), and its rows are shuffled.
    So every token that has a target is an input once per epoch, and little of a row is empty.
    """

    def __init__(self, tokens: np.ndarray, document_token: int, **options: int) -> None:
        super().__init__(**options)
        if len(tokens) < 2:
            raise UserError(f"{len(tokens)} training tokens are too few to predict any")
        self._tokens = tokens
        self._starts = piece_starts(self._tokens, document_token, self.seq_len)
        self._count = len(self._starts) - 1
        self._go_to(0, 0, 0)

    def take(self, n: int) -> list[Row]:
        """Return the next n rows of the stream."""
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
        """Return the position: rows used of a pool of an epoch; and what the order depends on."""
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
        return {"seed": self.seed, "seq_len": self.seq_len, "tokens": len(self._tokens), "packing": "best_fit"}

    def _go_to(self, epoch: int, pool: int, row: int) -> None:
        keys = order_keys(f"{self.seed}:{epoch}:{self.rollbacks}")[1:]
        indices = np.arange(pool * POOL, min((pool + 1) * POOL, self._count))
        pieces = permuted(indices, self._count, keys)
        starts = self._starts[pieces]
        packed = pack(starts.tolist(), (self._starts[pieces + 1] - starts).tolist(), self.seq_len)
        shuffled = permuted(np.arange(len(packed)), len(packed), keys + np.uint64(1 + pool))
        self._packed = [packed[i] for i in shuffled]
        # After a rollback the pool holds other pieces, and may fill fewer rows.
        self._epoch, self._pool, self._row = epoch, pool, min(row, len(packed))


def validation_batches(
    tokens: np.ndarray,
    packing: str = "stream",
    document_token: int | None = None,
    *,
    batch_size: int,
    seq_len: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batches of one pass over tokens (N,), in the text's order; each has the tensors of Loader.next_batch.

    Each token but the first is a target exactly once, or the first max_tokens of them. stream: rows (seq_len,) of
    consecutive tokens. documents: the same rows, with documents kept apart. best_fit: rows packed as for training. The
    last batch may have fewer rows. Each rank gets every world_size-th batch; all get the same number of batches.
    """
    targets = targets_in(tokens, max_tokens)
    rows: Iterator[Row] = ([(at, min(seq_len, targets - at))] for at in range(0, targets, seq_len))
    if packing == "best_fit":
        starts = piece_starts(tokens[: targets + 1], document_token, seq_len)
        lengths = np.diff(starts)
        rows = (
            row
            for at in range(0, len(lengths), POOL)
            for row in pack(starts[:-1][at : at + POOL].tolist(), lengths[at : at + POOL].tolist(), seq_len)
        )
    while together := list(islice(rows, world_size * batch_size)):
        mine = together[rank * batch_size : (rank + 1) * batch_size]
        x, y, *apart = read_pieces(tokens, mine or [[]], seq_len)  # without rows of its own, one without targets
        if packing == "documents":
            apart = document_inputs(x, document_token)
        yield (x, y) if packing == "stream" else (x, y, *apart)


def make_loader(tokens: np.ndarray, packing: str, document_token: int | None, **options: int) -> Loader:
    """Make the loader of tokens (N,) under a packing. options: those of Loader."""
    if packing == "stream":
        return TrainLoader(tokens, **options)
    return {"documents": DocumentLoader, "best_fit": BestFitLoader}[packing](tokens, document_token, **options)


def check_packing(packing: str, document_token: int | None, documents: int) -> None:
    """Raise UserError if a packing keeps documents apart that cannot be told apart."""
    if packing == "stream" or (document_token is not None and documents > 1):
        return
    why = "the corpus is one document" if documents == 1 else "the tokenizer has no document token"
    raise UserError(f"packing {packing} keeps documents apart, but {why}: give several documents, or packing stream")
