"""A model that extends rows of tokens, with a cache of their keys and values.

A step runs the model's own modules (GPT.run) on new tokens, with linear layers prepared for few rows and with attention
to the cache.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.inference.attend import (
    FEW,
    CachedRows,
    KernelAttention,
    NoAttention,
    TorchAttention,
    check_masks,
    decode_impl,
    group_blocks,
)
from gpt.inference.kv_cache import CHUNK, CachedRow, KVCache
from gpt.inference.linear import PlainLinear, prepare_linear
from gpt.inference.prepare import lengthen_tables, prepared
from gpt.inference.quantize import Int8Linear
from gpt.inference.step_graph import StepGraphs, can_record
from gpt.model import GPT

TILES = (8, 4, 2)  # rows computed together when batch-invariant: the first size that gives all rows equal bits


def _plainly(method: Callable) -> Callable:
    """Run a method without gradients and autocast: the decoder's weights have their dtype already."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with torch.inference_mode():
            if not torch.is_autocast_enabled(self.device.type):
                return method(self, *args, **kwargs)
            with torch.autocast(self.device.type, enabled=False):
                return method(self, *args, **kwargs)

    return wrapped


class Snapshot(NamedTuple):
    """A copy of a Decoder's row: its number of tokens, and its part of each cache."""

    length: int
    cached: list[CachedRow]


class Decoder:
    """B independent rows of up to `capacity` tokens each, and no more than the model's context.

    lengths: how many tokens each row has. Token i of a row is at position i. Logits are float32. The decoder takes
    weights (on a CPU mostly copied, in a faster layout) and masks when it is created, and does not see later changes of
    the model. Dropout is never applied.

    dtype: of matrices and cache; by default autocast's if it is on, else the model's. The residual stream and the norms
    keep the model's own dtype, as under autocast.
    quantize: "int8" for 8-bit weights (gpt/inference/quantize.py); the default dtype is then bfloat16.
    batch_invariant: a row's logits have the same bits whatever the other rows are, if the calls on that row are equal:
    rows go through the matrices in tiles of one size, and through attention one by one.
    cuda_graphs: on a GPU, record a step of few tokens as a CUDA graph the third time it has the same shape, then replay
    it; never when batch-invariant.
    overrun: how many tokens a row may be fed past capacity and context, along with rows that have room. Their logits
    are meaningless, and the row must be truncated before it is used again.

    For a block whose mask is a sliding window the cache holds about 2 * window + 320 tokens of a row, however long it
    grows; under any other mask it holds the whole row. Raises ValueError if a row would pass the capacity or the
    context, and UserError for masks that check_masks refuses.
    """

    def __init__(
        self,
        model: GPT,
        rows: int,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        batch_invariant: bool = False,
        cuda_graphs: bool = True,
        overrun: int = 0,
    ):
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize must be int8 or None, not {quantize!r}")
        config, self.device = model.config, model.embed.weight.device
        if dtype is None and torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        dtype = dtype or (torch.bfloat16 if quantize else model.embed.weight.dtype)
        self.config, self.dtype, self.capacity = config, dtype, capacity
        self.limit = min(capacity, config.seq_len) + overrun
        check_masks(model, min(capacity, config.seq_len))
        self._lengths = [0] * rows
        self._batch_invariant = batch_invariant
        records = cuda_graphs and can_record(self.device) and not batch_invariant
        self._graphs = StepGraphs(self._run) if records else None
        self._prepare(model, TILES[0] if batch_invariant else rows, quantize)
        self._tile = next((n for n in TILES if self._same_in_every_place(n)), 1) if batch_invariant else 0

    @_plainly
    def _prepare(self, model: GPT, rows: int, quantize: str | None) -> None:
        def linear(layer: nn.Linear) -> PlainLinear:
            return Int8Linear(layer, self.dtype) if quantize else prepare_linear(layer, self.dtype, rows)

        self._model = prepared(model, linear, self.dtype)
        for layer, block in enumerate(self._model.blocks):
            block.attn.attend = functools.partial(self._attend, layer)
        lengthen_tables(self._model, self.limit, self.dtype)
        self._visibilities, of_block = group_blocks(model)
        shared = {"rows": len(self._lengths), "limit": self.limit, "dtype": self.dtype, "device": self.device}
        windows = [visibility.window for visibility in self._visibilities]
        self._caches = [KVCache(self.config, each, of_block.count(n), **shared) for n, each in enumerate(windows)]
        self._of_block = [(n, of_block[:layer].count(n)) for layer, n in enumerate(of_block)]  # see CachedRows

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, segment_ids: None) -> Tensor:
        """Attend to the cache: the twin's blocks call this instead of their own attention."""
        return self._attention.attend(layer, q, k, v)

    @property
    def lengths(self) -> list[int]:
        return list(self._lengths)

    @_plainly
    def prefill(self, row: int, tokens: Sequence[int]) -> Tensor:
        """Append one token or more to a row; returns logits (V,) after the last."""
        new = torch.tensor([list(tokens)], dtype=torch.int64, device=self.device)
        if new.shape[1] == 0:
            raise ValueError("prefill needs one token or more")
        for chunk in new.split(CHUNK, dim=1):
            hidden = self._hidden(chunk, self._next(range(row, row + 1), chunk.shape[1]))
        return self._read(hidden[-1:])[0]

    @_plainly
    def step(self, tokens: Tensor) -> Tensor:
        """Append T tokens to each row, (B, T) int64; returns logits (B, T, V) after each."""
        B, T = tokens.shape
        if B != len(self._lengths):
            raise ValueError(f"step needs tokens for {len(self._lengths)} rows, not {B}")
        if T > CHUNK:
            return torch.cat([self.step(chunk) for chunk in tokens.split(CHUNK, dim=1)], dim=1)
        if self._graphs is not None and T <= FEW:
            return self._graphs.step(tokens, self._advance(range(B), T))
        if not self._batch_invariant:
            return self._logits(tokens, range(B), B)
        # T > 1 tokens of one row already make T matrix rows, so the tile is 1.
        tile = self._tile if T == 1 else 1
        return torch.cat(
            [self._logits(tokens[i : i + tile], range(i, min(i + tile, B)), tile) for i in range(0, B, tile)]
        )

    def _logits(self, tokens: Tensor, rows: range, tile: int) -> Tensor:
        """Compute logits of these rows' tokens (R, T), padded to `tile` rows."""
        R, T = tokens.shape
        hidden = self._hidden(F.pad(tokens, (0, 0, 0, tile - R)) if R < tile else tokens, self._next(rows, T, tile - R))
        return self._read(hidden).view(tile, T, -1)[:R]

    def _run(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Compute logits (B, T, V) of all rows' tokens; all numbers that change from step to step are in tensors."""
        attention = KernelAttention(self._rows(range(len(tokens))), counts, tokens.shape[1], decode_impl(self.device))
        return self._read(self._hidden(tokens, attention)).view(*tokens.shape, -1)

    def _next(self, rows: range, T: int, padding: int = 0) -> TorchAttention | KernelAttention:
        """Make room for these rows' next T tokens, and prepare their attention."""
        counts, impl = self._advance(rows, T), decode_impl(self.device)
        if T <= FEW and impl is not None:
            counts = torch.tensor([each + [0] * padding for each in counts], device=self.device)
            return KernelAttention(self._rows(rows), counts, T, impl, padding)
        return TorchAttention(self._rows(rows), counts[0], counts[1:], T, padding, one_by_one=self._batch_invariant)

    def _rows(self, rows: range) -> CachedRows:
        return CachedRows([cache.rows(rows) for cache in self._caches], self._visibilities, self._of_block)

    def _advance(self, rows: range, T: int) -> list[list[int]]:
        """Make room for T more tokens of these rows; returns how many each had, and how many each cache held.

        Raises ValueError if they do not fit.
        """
        lengths = self._lengths[rows.start : rows.stop]
        for row, length in zip(rows, lengths):
            if length + T > self.limit:
                raise ValueError(
                    f"{length + T} tokens are more than row {row} can hold: the capacity is {self.capacity}, "
                    f"the model's context {self.config.seq_len}"
                )
            for cache in self._caches:
                cache.make_room(row, length, T)
        self._lengths[rows.start : rows.stop] = [n + T for n in lengths]
        starts = (cache.starts[rows.start : rows.stop] for cache in self._caches)
        return [lengths, *([n - start for n, start in zip(lengths, each)] for each in starts)]

    def _read(self, hidden: Tensor) -> Tensor:
        """Apply the head: logits (M, V), float32, of hidden (M, C)."""
        return self._model.read(hidden).float()

    @_plainly
    def truncate(self, row: int, length: int) -> None:
        """Cut a row to `length` tokens. Raises ValueError if its window has moved past them: see SLACK."""
        old = self._lengths[row]
        if not 0 <= length <= old:
            raise ValueError(f"row {row} has {old} tokens, so it cannot be cut to {length}")
        for cache in self._caches:
            cache.check_holds(row, length)
        for cache in self._caches:
            cache.truncate(row, length, old)
        self._lengths[row] = length

    @_plainly
    def snapshot(self, row: int) -> Snapshot:
        """Copy a row."""
        length = self._lengths[row]
        return Snapshot(length, [cache.copy(row, length) for cache in self._caches])

    @_plainly
    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Replace a row with a copy of one of this decoder's rows."""
        for cache, cached in zip(self._caches, snapshot.cached, strict=True):
            cache.restore(row, cached, self._lengths[row])
        self._lengths[row] = snapshot.length

    @_plainly
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and number them from 0 in this order."""
        rows = list(rows)
        for cache in self._caches:
            cache.keep(rows)
        self._lengths = [self._lengths[row] for row in rows]
        if self._graphs is not None:
            self._graphs.clear()  # they hold the old caches' addresses

    def _hidden(self, tokens: Tensor, attention: TorchAttention | KernelAttention | NoAttention) -> Tensor:
        """Compute the head's input (R * T, C) for tokens (R, T)."""
        self._attention = attention
        return self._model.run(tokens.flatten(), attention.positions)

    @_plainly
    def _same_in_every_place(self, tile: int) -> bool:
        """Whether equal rows get equal bits wherever they are in a tile."""
        hidden = self._hidden(torch.zeros(tile, 1, dtype=torch.int64, device=self.device), NoAttention())
        logits = self._read(hidden)
        return bool((logits == logits[:1]).all() and (hidden == hidden[:1]).all())
