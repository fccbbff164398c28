"""Keys and values of a decoder's rows."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt.model import ModelConfig

CHUNK = 256  # most tokens of a row that go through the model at once: it bounds the memory of a long prompt
SLACK = 64  # tokens that a row with a window can always be cut back by
ALIGNED = 16  # a row's size is a multiple of this many tokens, so that every row starts at a multiple of 64 bytes


class CachedRow(NamedTuple):
    """A copy of one row: tokens start to length, (layers, 2, H_kv, length - start, D)."""

    start: int
    kv: Tensor


class KVCache:
    """Keys and values of all blocks with the same mask and slopes.

    kv (layers, B, 2, H_kv, size, D) holds tokens starts[row] to the row's length. Under a sliding window it is shorter
    than the text may grow, and drops the oldest tokens.
    """

    def __init__(self, config: ModelConfig, window: int | None, layers: int, rows: int, limit: int, **kind: Any):
        """limit: the most tokens of a row. kind: the tensor's dtype and device."""
        self.window, self.starts = window, [0] * rows
        # With room for two windows, tokens move at most once in `window` steps.
        size = min(limit, 2 * window + CHUNK + SLACK if window else limit)
        self.size = -(-size // ALIGNED) * ALIGNED
        # Zeros, not empty: masked values still meet a weight of 0, and 0 * NaN is NaN.
        shape = (layers, rows, 2, config.kv_heads, self.size, config.head_width)
        self.kv = torch.zeros(shape, **kind)

    def rows(self, rows: range) -> Tensor:
        """These rows' keys and values (layers, R, 2, H_kv, size, D), sharing memory."""
        return self.kv.narrow(1, rows.start, len(rows))

    def check_holds(self, row: int, length: int) -> None:
        """Raise ValueError unless a row can be cut to `length` tokens."""
        start = self.starts[row]
        if length and start and length - start < self.window - 1:
            raise ValueError(f"row {row} cannot go back to {length} tokens: its window has moved past them")

    def truncate(self, row: int, length: int, old: int) -> None:
        """Cut a row of `old` tokens to `length` tokens."""
        start = self.starts[row]
        self.kv[:, row, :, :, max(0, length - start) : old - start] = 0
        if length == 0:
            self.starts[row] = 0

    def copy(self, row: int, length: int) -> CachedRow:
        """Copy a row of `length` tokens."""
        return CachedRow(self.starts[row], self.kv[:, row, :, :, : length - self.starts[row]].clone())

    def restore(self, row: int, copied: CachedRow, old: int) -> None:
        """Replace a row of `old` tokens with a copied one."""
        used, before = copied.kv.shape[3], old - self.starts[row]
        self.kv[:, row, :, :, :used] = copied.kv
        self.kv[:, row, :, :, used : max(used, before)] = 0
        self.starts[row] = copied.start

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.kv, self.starts = self.kv[:, rows], [self.starts[row] for row in rows]

    def make_room(self, row: int, length: int, T: int) -> None:
        """Move the tokens still in a row's window to the front if T more do not fit behind its `length` tokens."""
        start = self.starts[row]
        if length + T - start > self.size:
            kept = self.window - 1 + SLACK
            moved = self.kv[:, row, :, :, length - start - kept : length - start].clone()
            self.kv[:, row, :, :, :kept] = moved
            self.kv[:, row, :, :, kept : length - start] = 0
            self.starts[row] = length - kept
