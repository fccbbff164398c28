"""What a Decoder's rows hold while they grow: keys and values."""

from typing import NamedTuple

import torch
from torch import Tensor

from gpt.model import ModelConfig

CHUNK = 256  # tokens of a row that go through the model at once: it bounds the memory of a long prompt
SLACK = 64  # tokens that a row with a window can be taken back by, at least
ALIGNED = 16  # a row's cache is this many tokens or a multiple, so that every row starts at a multiple of 64 bytes


class HeldRow(NamedTuple):
    """What a Store held of one row: tokens start to length, (layers, 2, H_kv, length - start, D)."""

    start: int
    cache: Tensor


class Store:
    """Keys and values of all blocks that see the same.

    cache (layers, B, 2, H_kv, size, D); of a row it holds tokens start to length. Where there is a window it is shorter
    than the text may be, and slides.
    """

    def __init__(
        self,
        config: ModelConfig,
        window: int | None,
        layers: int,
        rows: int,
        limit: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.window, self.starts = window, [0] * rows
        # A window's buffer slides once in `window` tokens or more, so that sliding costs little for each.
        size = min(limit, 2 * window + CHUNK + SLACK if window else limit)
        self.size = -(-size // ALIGNED) * ALIGNED
        # Zeros and not empty: what is masked still meets a weight of 0, and 0 * NaN is NaN.
        shape = (layers, rows, 2, config.kv_heads, self.size, config.head_width)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)

    def rows(self, rows: range) -> Tensor:
        """The cache of these rows (layers, R, 2, H_kv, size, D), sharing its memory."""
        return self.cache[:, rows.start : rows.stop]

    def check_reaches(self, row: int, length: int) -> None:
        """ValueError unless a row can be cut to so many tokens."""
        start = self.starts[row]
        if length and start and length - start < self.window - 1:
            raise ValueError(f"row {row} cannot go back to {length} tokens: its window has moved past them")

    def truncate(self, row: int, length: int, old: int) -> None:
        """Forget a row's tokens from `length` on, of `old`."""
        start = self.starts[row]
        self.cache[:, row, :, :, max(0, length - start) : old - start] = 0
        if length == 0:
            self.starts[row] = 0

    def copy(self, row: int, length: int) -> HeldRow:
        """What a row of `length` tokens holds."""
        return HeldRow(self.starts[row], self.cache[:, row, :, :, : length - self.starts[row]].clone())

    def restore(self, row: int, held: HeldRow, old: int) -> None:
        """Make a row, of `old` tokens so far, hold what was held."""
        used, before = held.cache.shape[3], old - self.starts[row]
        self.cache[:, row, :, :, :used] = held.cache
        self.cache[:, row, :, :, used : max(used, before)] = 0
        self.starts[row] = held.start

    def keep(self, rows: list[int]) -> None:
        """Leave out all rows but these."""
        self.cache, self.starts = self.cache[:, rows], [self.starts[row] for row in rows]

    def make_room(self, row: int, length: int, T: int) -> None:
        """Where T tokens more do not fit into a window's buffer, move what is still in sight to its front."""
        start = self.starts[row]
        if length + T - start > self.size:
            kept = self.window - 1 + SLACK
            moved = self.cache[:, row, :, :, length - start - kept : length - start].clone()
            self.cache[:, row, :, :, :kept] = moved
            self.cache[:, row, :, :, kept : length - start] = 0
            self.starts[row] = length - kept
