"""Turns tokens into training batches: windows in a seeded order that resumes exactly.

gpt.data.packing has the loaders that keep documents apart and the validation pass, gpt.data.mixture the loader of
several corpora.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError

DOCUMENT_INPUTS = ("positions", "segment_ids")  # GPT.loss's names for what packed batches have besides x and y
_ROUNDS = 6
_AHEAD = 4096  # window starts computed at once


class Loader(ABC):
    """An endless stream of rows, dealt out to ranks. A subclass decides what a row is.

    A step takes the next world_size * batch_size rows, and each rank reads batch_size of them: together the ranks read
    what one process with the whole batch would. batch_size may change between batches. rollbacks: how often the run
    went back to skip data; the order depends on it.
    """

    def __init__(self, *, batch_size: int, seq_len: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below world_size {world_size}")
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.rank, self.world_size, self.rollbacks = rank, world_size, 0

    def next_batch(self) -> tuple[Tensor, ...]:
        """Return inputs and targets, each (batch_size, seq_len) int64: a target is the next token, or IGNORE_INDEX.

        Loaders that keep documents apart add positions (int64) and segment_ids (int32) of the same shape.
        """
        rows = self.take(self.world_size * self.batch_size)
        return self.read(rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size])

    @abstractmethod
    def take(self, n: int) -> Sequence:
        """Advance the stream by its next n rows, n > 0, and return them."""

    @abstractmethod
    def read(self, rows: Sequence) -> tuple[Tensor, ...]:
        """Read the batch of rows that take returned."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch, over all ranks, and what the order depends on."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. batch_size and world_size may have changed. Raises UserError."""

    def check_order(self, state: dict[str, Any], order: dict[str, Any]) -> None:
        """Raise UserError unless the state was saved with this order."""
        for name, value in {"packing": None, **order}.items():
            if state.get(name) != value:
                raise UserError(
                    f"the checkpoint's data order has {name} {state.get(name)}, this run has {value}: resume with the "
                    "same text, tokenizer, seed, seq_len and packing"
                )


def order_keys(name: str) -> np.ndarray:
    """Hash a name to (1 + _ROUNDS,) uint64: a number, and keys for permuted."""
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(8 + 8 * _ROUNDS), "<u8")


class TrainLoader(Loader):
    """Endless training batches from tokens (N,).

    Each epoch cuts the tokens into windows of seq_len + 1, from a random phase below seq_len. Neighbours share one
    token, so that each token is a target at most once; fewer than 2 seq_len tokens at the two ends fill no window. The
    windows come in random order, by a Feistel permutation that is computed rather than stored. Phase and order depend
    on (seed, epoch) alone, the order on `rollbacks` too.

    Epochs follow each other as one stream of windows. options: those of Loader.
    """

    def __init__(self, tokens: np.ndarray, **options: int) -> None:
        super().__init__(**options)
        width = self.seq_len + 1
        if len(tokens) < width:
            raise UserError(f"{len(tokens)} training tokens fill no window: seq_len {self.seq_len} needs {width}")
        self._tokens = tokens
        self._go_to(0, 0)

    def read(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        windows = np.stack([self._tokens[start : start + self.seq_len + 1] for start in rows])
        windows = torch.from_numpy(windows.astype(np.int64))  # (B, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def state_dict(self) -> dict[str, int]:
        """Return the position: windows of the epoch used, over all ranks; and what the order depends on."""
        return {"epoch": self._epoch, "index": self._index, "rollbacks": self.rollbacks, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_order(state, self._order())
        self.rollbacks = state.get("rollbacks", 0)
        self._go_to(state.get("epoch", -1), state.get("index", -1))

    def _order(self) -> dict[str, int]:
        return {"seed": self.seed, "seq_len": self.seq_len, "tokens": len(self._tokens)}

    def _go_to(self, epoch: int, index: int) -> None:
        words = order_keys(f"{self.seed}:{epoch}")
        starts = len(self._tokens) - self.seq_len  # points where a window can start
        phase = int(words[0]) % min(self.seq_len, starts)
        count = (starts - 1 - phase) // self.seq_len + 1
        if not 0 <= index <= count or epoch < 0:
            raise UserError(f"the checkpoint's data position is invalid: window {index} of {count}, epoch {epoch}")
        if self.rollbacks:
            words = order_keys(f"{self.seed}:{epoch}:{self.rollbacks}")
        self._phase, self._count, self._keys = phase, count, words[1:]
        self._epoch, self._index = epoch, index
        self._ahead, self._ahead_from = np.empty(0, np.int64), index

    def take(self, n: int) -> np.ndarray:
        """Return the starts (n,) int64 of the next n windows of the stream."""
        parts = []
        while n:
            if self._index == self._count:
                self._go_to(self._epoch + 1, 0)
            at = self._index - self._ahead_from
            if at == len(self._ahead):
                stop = min(self._index + _AHEAD, self._count)
                order = permuted(np.arange(self._index, stop), self._count, self._keys)
                self._ahead, self._ahead_from, at = self._phase + order * self.seq_len, self._index, 0
            part = self._ahead[at : at + n]
            self._index += len(part)
            n -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Batches:
    """A Loader's batches on a device, and the data position of training, whatever has been read ahead.

    For a GPU, a thread reads one batch ahead into pinned memory, so that the copy overlaps the computation. For a CPU,
    a batch is read on demand.
    """

    def __init__(self, loader: Loader, device: torch.device, *, ahead: bool | None = None):
        self._loader, self._device = loader, device
        self._pinned = device.type == "cuda"
        self._state = loader.state_dict()
        self._thread = ThreadPoolExecutor(1, "batches") if (self._pinned if ahead is None else ahead) else None
        self._next: Future | None = None

    def next_batch(self) -> tuple[Tensor, ...]:
        """Return the loader's next batch, on the device, without waiting for the copy."""
        if self._thread is None:
            batch, self._state = self._read()
        else:
            batch, self._state = self._read() if self._next is None else self._next.result()
            self._next = self._thread.submit(self._read)
        return tuple(part.to(self._device, non_blocking=True) for part in batch)

    def _read(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        batch = self._loader.next_batch()
        return tuple(part.pin_memory() if self._pinned else part for part in batch), self._loader.state_dict()

    def go_to(self, state: dict[str, Any], rows: int | None = None) -> None:
        """Continue from a saved position, with `rows` rows per batch."""
        if self._next is not None:
            self._next.exception()  # its result and any error are unwanted
            self._next = None
        self._loader.batch_size = rows or self._loader.batch_size
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's state before the batch that next_batch will return."""
        return self._state

    def close(self) -> None:
        """End the thread and drop what it has read ahead."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


def permuted(indices: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Apply a keyed permutation of range(count) to indices (n,). Returns int64. keys: (rounds,) uint64.

    A Feistel network on the smallest domain of 2^(2k) >= count values; values outside the range are mapped again until
    they are inside (Black and Rogaway 2002).
    """
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    values = indices.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def target_bytes(tokens: np.ndarray, tokenizer: Tokenizer, max_tokens: int | None = None) -> int:
    """Count the UTF-8 bytes of validation_batches' targets.

    Bits per byte = loss in nats, summed over the targets / (ln 2 * target_bytes).
    """
    stop = 1 + targets_in(tokens, max_tokens)
    parts = (tokens[start : min(start + (1 << 20), stop)] for start in range(1, stop, 1 << 20))
    return sum(int(tokenizer.token_bytes[np.asarray(ids)].sum()) for ids in parts)


def targets_in(tokens: np.ndarray, max_tokens: int | None) -> int:
    """Count the targets of a validation pass: each token but the first, max_tokens at most. UserError if none."""
    if len(tokens) < 2:
        raise UserError(f"the validation part has {len(tokens)} tokens, too few to predict any: give more text")
    return min(len(tokens) - 1, max_tokens or len(tokens))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Hash each uint64 (MurmurHash3's finaliser)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
